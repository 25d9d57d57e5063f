//! Vital Product Data: a guest reads what the host's kernel reads for it, and writes none.

use nix::errno::Errno;

use crate::frontend::{Frontend, write_op};
use crate::world::{WEB, World, bdf};

/// A function with VPD of six bytes, whose own registers hold something else.
const HOST: &str = r#"
drivers: [pciback, pci-stub]
models:
  card:
    size: 256
    reset-methods: [flr]
    bars: {0: 1000}
    vpd: |
      00: 82 01 00 41 78 09
    config: |
      00: 86 80 d3 10 00 00 10 00 00 00 00 02 00 00 00 00
      30: 00 00 00 00 40 00 00 00 00 00 00 00 00 00 00 00
      40: 03 00 00 00 ee ee ee ee 00 00 00 00 00 00 00 00
functions:
  - {address: "00:02.0", model: card}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
"#;
const ADDRESS: u32 = 0x42;
const DATA: u32 = 0x44;
const FLAG: u32 = 0x8000;

fn attached(world: &World, policies: &[&str], check: impl FnOnce(&Frontend)) {
    let frontend = Frontend::load(world, WEB);
    let service = world.start_with(policies);
    service.hold(bdf("00:02.0")).unwrap();
    service.attach(WEB, bdf("00:02.0")).unwrap();
    check(&frontend);
    service.detach(WEB, bdf("00:02.0")).unwrap();
    world.assert_held(&service, bdf("00:02.0"), "detached");
}

fn write(frontend: &Frontend, offset: u32, size: u32, value: u32) {
    assert_eq!(frontend.ask(&write_op(0, offset, size, value)).0, 0, "{offset:#x}");
}

#[test]
fn a_guest_reads_what_the_kernel_reads_and_hardware_is_not_asked() {
    let world = World::of(HOST);
    attached(&world, &[], |frontend| {
        for (address, data) in [(0, 0x4100_0182), (4, 0x0978), (0x200, u32::MAX)] {
            write(frontend, ADDRESS, 2, address);
            assert_eq!(frontend.read(0, ADDRESS, 2), FLAG | address);
            assert_eq!(frontend.read(0, DATA, 4), data, "at {address:#x}");
        }
        assert_eq!(world.simulation.peek(bdf("00:02.0"), 0x40, 8), [3, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
    });
}

#[test]
fn a_guests_write_of_vpd_is_not_carried_out_and_not_reported_as_done() {
    let world = World::of(HOST);
    attached(&world, &[], |frontend| {
        write(frontend, DATA, 4, 0x1234_5678);
        write(frontend, ADDRESS, 2, FLAG | 4);
        assert_eq!(frontend.read(0, ADDRESS, 2), FLAG | 4, "the write is not reported as done");
        assert_eq!(world.simulation.peek(bdf("00:02.0"), 0x40, 8), [3, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
        write(frontend, ADDRESS, 2, 4);
        assert_eq!(frontend.read(0, DATA, 4), 0x0978);
    });
}

#[test]
fn vpd_that_the_kernel_cannot_read_is_not_reported_as_read_and_the_function_goes_on() {
    let world = World::of(HOST);
    attached(&world, &[], |frontend| {
        world.fail("vpd_read", Some(bdf("00:02.0")), Errno::ENODEV, 0);
        write(frontend, ADDRESS, 2, 0);
        assert_eq!(frontend.read(0, ADDRESS, 2), 0);
        write(frontend, ADDRESS, 2, 0);
        assert_eq!(frontend.read(0, ADDRESS, 2), FLAG, "the next read is answered");
    });
}

#[test]
fn vpd_that_a_policy_passes_is_read_and_written_in_hardware() {
    let world = World::of(HOST);
    attached(&world, &["match: {vendor: 8086}\ncapabilities: {vpd: pass}\n"], |frontend| {
        write(frontend, ADDRESS, 2, FLAG | 4);
        assert_eq!(world.simulation.peek(bdf("00:02.0"), 0x42, 2), [4, 0x80]);
        assert_eq!(frontend.read(0, DATA, 4), 0xeeee_eeee);
    });
}

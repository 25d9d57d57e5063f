//! HVM guests: what they reach, what happens when the service is killed, and that nothing remains.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::sim::{self, Delivery, Owner, SimHvmGuest, SimRequest};
use pciback::serve::hvm::wire::xen::{config, config_of, memory, port};
use pciback::serve::hvm::{ECAM_BASE, wire};
use pciback::{Devfn, DeviceNumber, DomId, FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Success};

use crate::crashes::{at_each_change, settled};
use crate::frontend::Frontend;
use crate::world::{LIMIT, Service, WEB, World, bdf, name, wait_until};

pub const WIN: DomId = DomId(7);
pub const SLOT: u8 = 0x1f;
pub const VENDOR: u16 = 0;
const CAPABILITIES_POINTER: u16 = 0x34;
/// A function with Enhanced Allocation at 0xe0, before its PCI Express capability at 0x80.
const WITH_ENHANCED_ALLOCATION: &str = r#"
drivers: [pci-stub]
models:
  allocated:
    reset-methods: [flr]
    bars: {0: 4000}
    config: |
      00: 86 80 10 00 00 00 10 00 02 02 08 01 00 00 00 00
      10: 04 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
      30: 00 00 00 00 e0 00 00 00 00 00 00 00 00 00 00 00
      80: 10 00 02 00 20 80 00 10 00 00 00 00 11 04 00 00
      90: 00 00 11 00 00 00 00 00 00 00 00 00 00 00 00 00
      e0: 14 80 00 00 00 00 00 00 00 00 00 00 00 00 00 00
functions:
  - {address: "02:00.0", model: allocated}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
"#;
const BAR0: u16 = 0x10;
pub const BAR3: u16 = 0x1c;
pub const MSIX_CONTROL: u16 = 0x72;
pub const DEVICE_CONTROL: u16 = 0xa8;
pub const TABLE: u64 = 0xf310_0000;

/// The guest's vCPU.
pub struct Guest(SimHvmGuest);

impl Guest {
    /// A paused guest.
    pub fn new(world: &World) -> Self {
        world.simulation.create_hvm(WIN, "win").unwrap();
        Self::of(world, WIN)
    }

    /// A guest that was made.
    pub fn of(world: &World, domain: DomId) -> Self {
        Self(world.simulation.hvm_guest(domain))
    }

    pub fn ask(&self, access: &wire::xen::Access) -> u64 {
        self.begin(access).answer(LIMIT).unwrap()
    }

    pub fn read(&self, slot: u8, offset: u16, size: u32) -> u64 {
        self.ask(&config(slot, offset, size, None))
    }

    pub fn write(&self, offset: u16, size: u32, value: u32) {
        self.ask(&config(SLOT, offset, size, Some(value)));
    }

    /// Sends a request, which is answered when the service runs.
    pub fn begin(&self, access: &wire::xen::Access) -> SimRequest {
        self.0.begin(access).unwrap_or_else(|| panic!("nobody takes {access:x?}"))
    }

    /// Whether a device answers for an address.
    pub fn is_taken(&self, address: u64) -> bool {
        self.0.begin(&memory(address, 4, None)).map(|request| request.answer(LIMIT).unwrap()).is_some()
    }

    /// Whether anybody but its device model answers at a device number.
    pub fn is_served(&self, slot: u8) -> bool {
        self.is_function_served(Devfn(slot << 3))
    }

    /// The same of one function.
    pub fn is_function_served(&self, function: Devfn) -> bool {
        let read = self.0.begin(&config_of(function, VENDOR, 4, None));
        read.map(|request| request.answer(LIMIT).unwrap()).is_some()
    }

    /// What was written to its memory.
    pub fn memory(&self, address: u64, bytes: u64) -> Vec<u8> {
        self.0.memory(address, bytes)
    }

    pub fn deliveries(&self) -> BTreeMap<u32, Delivery> {
        self.0.reached().messages
    }

    /// Interrupt lines with the device and the pin that they are delivered as.
    pub fn lines(&self) -> Vec<(u32, u8, u8)> {
        self.0.reached().lines.into_iter().map(|(line, slot, pin)| (line, slot.get(), pin)).collect()
    }

    pub fn frames(&self) -> Vec<u64> {
        self.0.reached().frames.into_keys().collect()
    }
}

/// The thread takes a new function in between two requests of the guest's, which otherwise is paused then.
pub fn served(guest: &Guest, slot: u8) {
    wait_until("the function is served", || guest.read(slot, VENDOR, 2) == 0x8086);
}

pub fn attach_at(service: &Service, address: Sbdf, slot: u8) -> Result<Success, Failure> {
    service.call(Request::PciAttach {
        domain: name(WIN),
        address,
        slot: DeviceNumber::new(slot),
        persist: false,
        managed: false,
        trust_former_owner: false,
        dry_run: false,
    })
}

pub fn attached() -> (World, Guest, Service) {
    let world = World::new();
    let guest = Guest::new(&world);
    let service = world.start();
    service.hold(bdf("01:10.0")).unwrap();
    service.attach(WIN, bdf("01:10.0")).unwrap();
    served(&guest, SLOT);
    (world, guest, service)
}

/// Nothing of a function is in the guest or granted to it.
pub fn assert_nothing_remains(world: &World, guest: &Guest, why: &str) {
    assert_eq!(guest.0.reached(), Default::default(), "{why}");
    assert!(world.simulation.grants(WIN).is_empty(), "{why}: {:?}", world.simulation.grants(WIN));
    assert_eq!(guest.0.servers(), 0, "{why}");
}

#[test]
fn all_functions_of_a_guest_that_ends_are_held_again() {
    let (world, _guest, service) = attached();
    let [first, second] = ["01:10.0", "01:10.2"].map(bdf);
    service.hold(second).unwrap();
    service.attach(WIN, second).unwrap();
    // Switching one off takes longer than the other.
    world.simulation.fail(sim::Failure {
        operation: "config_write".into(),
        address: Some(second),
        delay: Duration::from_millis(300),
        times: 1,
        ..sim::Failure::default()
    });
    world.simulation.destroy(WIN);
    for address in [first, second] {
        wait_until(&format!("{address} has been withdrawn"), || {
            matches!(service.state(address), FunctionState::Held | FunctionState::Quarantined)
        });
        world.assert_held(&service, address, "its guest has ended");
    }
}

#[test]
fn a_paused_guest_gets_a_function_that_answers_beside_its_device_models() {
    let (world, guest, service) = attached();
    assert_eq!(guest.read(SLOT, VENDOR, 4), 0x10ca_8086);
    assert!(guest.0.begin(&config(2, VENDOR, 4, None)).is_none(), "a device of QEMU's is taken over");
    // Any alignment; what lies behind port CFF is not config space.
    assert_eq!(guest.read(SLOT, VENDOR + 1, 2), 0xca80);
    assert_eq!(guest.read(SLOT, VENDOR + 2, 4), 0xffff_10ca);
    let window = ECAM_BASE + u64::from(SLOT) * 0x8000;
    assert_eq!(guest.ask(&memory(window, 8, None)) as u32, 0x10ca_8086);
    assert_eq!(guest.ask(&memory(window + 0x100, 4, None)), 0x1501_0001);
    assert_eq!(guest.ask(&memory(ECAM_BASE + 0x1000, 4, None)), 0xffff_ffff);
    let Ok(Success::Synced(sync)) = service.call(Request::Sync { dry_run: true }) else { panic!("no plan") };
    assert!(!sync.text.iter().any(|line| line.contains("01:10.0")), "{:?}", sync.text);
    let status = service.status();
    assert_eq!((status.guests[0].domain, status.guests[0].errors), (WIN, 0));
    service.detach(WIN, bdf("01:10.0")).unwrap();
    world.assert_held(&service, bdf("01:10.0"), "detached");
    assert_nothing_remains(&world, &guest, "detached");
}

#[test]
fn a_guest_that_places_bars_itself_does_not_find_the_hosts_addresses_in_enhanced_allocation() {
    let world = World::of(WITH_ENHANCED_ALLOCATION);
    let function = bdf("02:00.0");
    let pv = Frontend::load(&world, WEB);
    let guest = Guest::new(&world);
    let service = world.start();
    service.hold(function).unwrap();
    service.attach(WEB, function).unwrap();
    wait_until("the guest has it", || pv.is_connected());
    assert_eq!(pv.read(0, CAPABILITIES_POINTER.into(), 1), 0xe0);
    service.detach(WEB, function).unwrap();
    service.attach(WIN, function).unwrap();
    served(&guest, SLOT);
    assert_eq!(guest.read(SLOT, CAPABILITIES_POINTER, 1), 0x80);
}

#[test]
fn used_device_numbers_are_refused() {
    let (_world, guest, service) = attached();
    service.hold(bdf("01:10.2")).unwrap();
    for (slot, said) in [(1, "emulated"), (SLOT, "0000:01:10.0")] {
        let failure = attach_at(&service, bdf("01:10.2"), slot).unwrap_err();
        assert!(failure.code == ErrorCode::Refused && failure.message.contains(said), "{failure:?}");
    }
    attach_at(&service, bdf("01:10.2"), 9).unwrap();
    served(&guest, 9);
}

#[test]
fn bars_follow_the_guests_registers_and_the_msix_table_is_trapped() {
    let (world, guest, service) = attached();
    assert_eq!(guest.read(SLOT, BAR0, 4), 0xc, "an HVM guest's BARs begin without an address");
    assert_eq!(guest.frames(), [0u64; 0]);
    guest.write(BAR0, 4, 0xf300_0000);
    assert_eq!(guest.frames(), [0xf3000, 0xf3001, 0xf3002, 0xf3003]);
    guest.write(BAR0, 4, 0xffff_ffff);
    assert_eq!(guest.frames(), [0u64; 0], "a BAR that is sized is nowhere");
    assert_eq!(guest.read(SLOT, BAR0, 4), 0xffff_c00c);
    guest.write(BAR0, 4, 0xf400_0000);
    let host = world.host().function(bdf("01:10.0")).unwrap().resources[0].start / 4096;
    assert_eq!(guest.0.reached().frames[&0xf4001], host + 1);
    guest.write(BAR0, 4, 0);
    guest.write(BAR3, 4, TABLE as u32);
    let mapped = guest.frames();
    assert!(!mapped.contains(&(TABLE / 4096)) && !mapped.is_empty(), "{mapped:x?}");
    // Masked at first; a reserved bit stays 0.
    assert_eq!(guest.ask(&memory(TABLE + 0xc, 4, None)), 1);
    guest.ask(&memory(TABLE + 0xc, 4, Some(0xffff_fffe)));
    assert_eq!(guest.ask(&memory(TABLE + 0xc, 4, None)), 0);
    assert_eq!(guest.ask(&memory(TABLE + 1, 2, None)), 0xffff, "no access that the table takes");
    service.detach(WIN, bdf("01:10.0")).unwrap();
    assert_nothing_remains(&world, &guest, "detached with BARs placed");
}

/// Xen would crash the guest.
#[test]
fn a_bar_placed_over_another_one_waits_until_the_address_is_free() {
    let (world, guest, service) = attached();
    service.hold(bdf("01:10.2")).unwrap();
    attach_at(&service, bdf("01:10.2"), 9).unwrap();
    served(&guest, 9);
    let start = |index: usize| world.host().function(bdf("01:10.2")).unwrap().resources[index].start / 4096;
    let move_second = |to: u32| guest.ask(&config(9, BAR0, 4, Some(to)));
    guest.write(BAR0, 4, 0xf300_0000);
    move_second(0xf300_0000);
    let first = world.host().function(bdf("01:10.0")).unwrap().resources[0].start / 4096;
    assert_eq!((guest.0.reached().frames[&0xf3000], guest.frames().len()), (first, 4));
    guest.write(BAR0, 4, 0xf400_0000);
    assert_eq!((guest.0.reached().frames[&0xf3000], guest.frames().len()), (start(0), 8));
    assert_eq!(service.status().guests[0].errors, 0);
}

#[test]
fn a_failure_of_two_functions_counts_only_for_the_request_that_caused_it() {
    let (world, guest, service) = attached();
    service.hold(bdf("01:10.2")).unwrap();
    attach_at(&service, bdf("01:10.2"), 9).unwrap();
    served(&guest, 9);
    guest.write(BAR0, 4, 0xf300_0000);
    guest.ask(&config(9, BAR0, 4, Some(0xf300_0000)));
    // The first function leaves the place; then neither it nor the other one can be mapped.
    world.simulation.fail(sim::Failure {
        operation: "map_memory".into(),
        errno: Some(Errno::EIO),
        after: 1,
        times: 100,
        ..sim::Failure::default()
    });
    guest.write(BAR0, 4, 0xf400_0000);
    world.simulation.forget_failures();
    wait_until("the request counts as one that failed", || service.status().guests[0].errors > 0);
    // Each is counted before the next is answered.
    for _ in 0..3 {
        assert_eq!(guest.read(SLOT, VENDOR, 2), 0x8086);
    }
    assert_eq!(service.status().guests[0].errors, 1);
}

/// The guest sets up a vector.
pub fn set_up(guest: &Guest, entry: u64, vector: u64) {
    guest.ask(&memory(TABLE + 16 * entry, 8, Some(0xfee0_0000)));
    guest.ask(&memory(TABLE + 16 * entry + 8, 8, Some(vector)));
}

pub fn bound(guest: &Guest) -> Vec<(u32, u64)> {
    guest.0.reached().messages.values().map(|bound| (bound.message.data, bound.table)).collect()
}

#[test]
fn msix_is_bound_per_vector_and_ends_with_enable_reset_and_detach() {
    let (world, guest, service) = attached();
    guest.write(BAR3, 4, TABLE as u32);
    set_up(&guest, 0, 0x41);
    assert_eq!(bound(&guest), []);
    guest.write(MSIX_CONTROL, 2, 0x8000);
    assert_eq!(bound(&guest), [(0x41, TABLE)]);
    set_up(&guest, 2, 0x42);
    let mut found = bound(&guest);
    found.sort_unstable();
    assert_eq!(found, [(0x41, TABLE), (0x42, TABLE)]);
    assert_eq!(world.simulation.grants(WIN).vectors.len(), 2);
    // Xen looks for masks where the table is now.
    guest.write(BAR3, 4, 0xf320_0000);
    assert!(bound(&guest).iter().all(|(_, table)| *table == 0xf320_0000), "{:x?}", bound(&guest));
    guest.write(MSIX_CONTROL, 2, 0);
    assert_eq!((bound(&guest), world.simulation.grants(WIN).vectors.len()), (vec![], 0));
    guest.write(MSIX_CONTROL, 2, 0x8000);
    assert_eq!(bound(&guest).len(), 2, "unmasked vectors come back with Enable");
    guest.write(DEVICE_CONTROL, 2, 0x8000);
    wait_until("the reset ends", || guest.read(SLOT, VENDOR, 4) == 0x10ca_8086);
    assert_eq!(guest.0.reached(), Default::default(), "after a reset nothing is set up");
    guest.write(BAR3, 4, TABLE as u32);
    assert_eq!(guest.ask(&memory(TABLE + 0xc, 4, None)), 1, "masked again");
    guest.write(MSIX_CONTROL, 2, 0x8000);
    set_up(&guest, 1, 0x43);
    service.detach(WIN, bdf("01:10.0")).unwrap();
    world.assert_held(&service, bdf("01:10.0"), "detached");
    assert_nothing_remains(&world, &guest, "detached with vectors");
}

#[test]
fn a_request_that_waits_while_the_service_is_dead_is_answered_after_the_restart() {
    let (world, guest, service) = attached();
    guest.write(BAR0, 4, 0xf300_0000);
    service.kill();
    let waiting = guest.0.begin(&config(SLOT, VENDOR, 4, None)).unwrap();
    let service = world.start();
    assert_eq!(waiting.answer(LIMIT).unwrap(), 0x10ca_8086);
    assert_eq!((guest.0.servers(), guest.frames().len()), (1, 4));
    assert_eq!(guest.read(SLOT, BAR0, 4), 0xf300_000c);
    assert_eq!(service.problems(), [""; 0]);
    service.detach(WIN, bdf("01:10.0")).unwrap();
    assert_nothing_remains(&world, &guest, "detached by the next process");
}

#[test]
fn port_cf8_keeps_its_value_over_a_kill_and_port_cf9_restarts_the_guest() {
    let (world, guest, service) = attached();
    guest.ask(&port(0xcf8, 4, Some(0x8000_f8a8)));
    assert_eq!(guest.ask(&port(0xcf8, 4, None)), 0x8000_f8a8);
    assert_eq!(guest.ask(&port(0xcfa, 1, None)), 0xff, "part of the register");
    service.kill();
    let waiting = guest.0.begin(&port(0xcf8, 4, None)).unwrap();
    let service = world.start();
    assert_eq!(waiting.answer(LIMIT).unwrap(), 0x8000_f8a8);
    guest.ask(&port(0xcf9, 1, Some(2)));
    guest.ask(&port(0xcf9, 1, Some(6)));
    wait_until("it starts again", || guest.0.restarts() > 0);
    assert_eq!((guest.0.restarts(), guest.ask(&port(0xcf9, 1, None))), (1, 2));
    service.detach(WIN, bdf("01:10.0")).unwrap();
    assert!(guest.0.begin(&port(0xcf8, 4, None)).is_none(), "its device model has it again");
    assert_nothing_remains(&world, &guest, "detached");
    let notes = std::fs::read_dir(world.settings().run_directory.join("config-ports")).unwrap();
    assert_eq!(notes.count(), 0);
}

#[test]
fn a_pvh_guest_is_refused_for_having_no_bus() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/sim/two-guests.yaml"));
    let world = World::of(&text.unwrap().replace("name: web, type: pv,", "name: web, type: pvh,"));
    let service = world.start();
    service.hold(bdf("02:00.0")).unwrap();
    let failure = service.attach(WEB, bdf("02:00.0")).unwrap_err();
    assert!(failure.code == ErrorCode::Refused && failure.message.contains("no PCI bus"), "{failure:?}");
    assert_eq!(service.state(bdf("02:00.0")), FunctionState::Held);
}

#[test]
fn a_guest_with_shadow_page_tables_is_refused() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/sim/two-guests.yaml"));
    let shadow = "name: web, type: hvm, shadow-paging: true,";
    let world = World::of(&text.unwrap().replace("name: web, type: pv,", shadow));
    let service = world.start();
    service.hold(bdf("02:00.0")).unwrap();
    let failure = service.attach(WEB, bdf("02:00.0")).unwrap_err();
    let said = format!("{failure:?}");
    assert!(
        failure.code == ErrorCode::Refused && said.contains("shadow") && said.contains("hap=0"),
        "{said}"
    );
    assert_eq!(service.state(bdf("02:00.0")), FunctionState::Held);
}

#[test]
fn when_the_guest_ends_its_functions_are_held_again() {
    let (world, guest, service) = attached();
    guest.write(BAR0, 4, 0xf300_0000);
    world.simulation.destroy(WIN);
    wait_until("it is held", || service.state(bdf("01:10.0")) == FunctionState::Held);
    world.assert_held(&service, bdf("01:10.0"), "its guest has ended");
    assert_eq!(world.simulation.owner(bdf("01:10.0")), Some(Owner::Quarantine));
}

/// Killed at each change outside, an attach ends held or attached and served, and no server is left behind.
#[test]
fn an_attach_that_is_killed_anywhere_leaves_no_unknown_server() {
    at_each_change(5..100, |change, moment, why| {
        let world = World::new();
        let guest = Guest::new(&world);
        let service = world.start();
        service.hold(bdf("01:10.0")).unwrap();
        service.fuse.arm(change, moment);
        if service.attach(WIN, bdf("01:10.0")).is_ok() && !service.fuse.is_blown() {
            return false;
        }
        service.kill();
        let service = world.start();
        settled(&service, why);
        if service.state(bdf("01:10.0")) == FunctionState::Held {
            assert_nothing_remains(&world, &guest, why);
            service.attach(WIN, bdf("01:10.0")).unwrap();
        }
        served(&guest, SLOT);
        assert_eq!(guest.0.servers(), 1, "{why}");
        service.detach(WIN, bdf("01:10.0")).unwrap();
        assert_nothing_remains(&world, &guest, why);
        true
    });
}

//! What of the PCI Express capability's controls a guest's write changes in hardware (PCI Express 6.0, section 7.5.3).

use pciback::config::{Access, VirtualConfigSpace};

use crate::devices::{self, Device};
use crate::model::space;

/// Where [`devices::network_pf`] has the capability.
const BASE: usize = 0xa0;
const DEVICE_CONTROL: usize = BASE + 0x08;
const LINK_CONTROL: usize = BASE + 0x10;
const DEVICE_CONTROL_2: usize = BASE + 0x28;

fn write(device: &Device, space: &mut VirtualConfigSpace, at: usize, value: u32) {
    space.write(Access::new(at as u32, 2).unwrap(), value, &device.hardware).unwrap();
}

fn read(device: &Device, space: &VirtualConfigSpace, at: usize) -> u32 {
    space.read(Access::new(at as u32, 2).unwrap(), &device.hardware).unwrap()
}

fn hardware(device: &Device, at: usize) -> u16 {
    let bytes = device.hardware.bytes.borrow();
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[test]
fn a_read_request_size_between_the_payload_and_the_hosts_reaches_hardware_and_no_other_does() {
    // 512 bytes, with a payload of 256.
    let device = devices::network_pf();
    let mut space = space(&device.spec);
    for (wanted, expected) in [(1u32, 1), (0, 1), (3, 1), (5, 1), (2, 2)] {
        write(&device, &mut space, DEVICE_CONTROL, 0x0930 | wanted << 12);
        assert_eq!(hardware(&device, DEVICE_CONTROL) >> 12, expected, "{wanted}");
        assert_eq!(read(&device, &space, DEVICE_CONTROL) >> 12, wanted, "the guest's own view");
    }
}

#[test]
fn a_guest_switches_aspm_and_clkreq_off_and_not_on() {
    let mut device = devices::network_pf();
    // ASPM L0s and L1, common clock, clock power management.
    device.hardware.put16(LINK_CONTROL, 0x0143);
    let mut space = space(&device.spec);
    write(&device, &mut space, LINK_CONTROL, 0x0142);
    assert_eq!(hardware(&device, LINK_CONTROL), 0x0142, "L0s is off");
    write(&device, &mut space, LINK_CONTROL, 0x0040);
    assert_eq!(hardware(&device, LINK_CONTROL), 0x0040, "all are off");
    write(&device, &mut space, LINK_CONTROL, 0x0143);
    assert_eq!(hardware(&device, LINK_CONTROL), 0x0040, "and stay off");
}

#[test]
fn completion_timeout_and_id_based_ordering_reach_hardware_and_atomics_do_not() {
    let device = devices::network_pf();
    let mut space = space(&device.spec);
    // Timeout value 9 and disabled, IDO for requests and completions, AtomicOp Requester Enable.
    write(&device, &mut space, DEVICE_CONTROL_2, 0x0359);
    assert_eq!(hardware(&device, DEVICE_CONTROL_2) & 0x035f, 0x0319);
    assert_eq!(read(&device, &space, DEVICE_CONTROL_2) & 0x035f, 0x0319);
}

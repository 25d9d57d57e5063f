//! What is built in for known devices and capabilities: registers that reach the host's firmware, other functions or the link.

use pciback::config::{Filter, FunctionSpec, Policy};
use pciback::spec::{AnyId, CapabilityId, ExtendedCapabilityId};

use crate::devices;
use crate::rules::alone;

fn compile(spec: &FunctionSpec) -> Filter {
    Filter::compile(spec, &Policy::default()).unwrap()
}

/// A function without capabilities.
fn plain(vendor: u16, class: u32) -> FunctionSpec {
    let mut spec = devices::virtio().spec;
    spec.bytes[0x06] = 0;
    spec.bytes[0x40..].fill(0x5a);
    (spec.identity.vendor, spec.identity.class) = (vendor, class);
    spec
}

/// Dwords of the function from 0x40 on of which some bits do not pass.
fn kept_back(spec: &FunctionSpec) -> Vec<u16> {
    let filter = compile(spec);
    (0x40..0x100).step_by(4).filter(|offset| filter.bits(*offset).hw_write != u32::MAX).collect()
}

#[test]
fn registers_of_firmware_and_of_other_functions_are_not_the_guests() {
    for (vendor, class, expected) in [
        (0x8086, 0x03_0000, vec![0xe0, 0xe4, 0xe8, 0xfc]),
        (0x8086, 0x03_8000, vec![0xe0, 0xe4, 0xe8, 0xfc]),
        (0x10de, 0x03_0000, vec![]),
        (0x8086, 0x0c_0320, vec![0x6c]),
        (0x1033, 0x0c_0320, vec![]),
        (0x8086, 0x0c_0330, vec![0xd0, 0xd4, 0xd8, 0xdc]),
        (0x1912, 0x0c_0330, vec![]),
        (0x8086, 0x0c_0300, vec![0xc0]),
        (0x1106, 0x0c_0300, vec![0xc0]),
        (0x8086, 0x01_018f, vec![0x90, 0x94, 0x98, 0x9c]),
        (0x8086, 0x01_0400, vec![0x90, 0x94, 0x98, 0x9c]),
        (0x8086, 0x01_0601, vec![0x90, 0x94, 0x98, 0x9c]),
        (0x1b4b, 0x01_0601, vec![]),
    ] {
        assert_eq!(kept_back(&plain(vendor, class)), expected, "{vendor:04x}, class {class:06x}");
    }
}

#[test]
fn the_opregion_of_intel_graphics_has_no_address_for_a_guest() {
    let bits = compile(&plain(0x8086, 0x03_0000)).bits(0xfc);
    assert_eq!((bits.hw_read, bits.shadow_write, bits.fixed, bits.value), (0, 0, u32::MAX, 0));
}

#[test]
fn no_system_management_interrupt_of_an_ehci_controller_is_enabled_by_a_guest() {
    let bits = compile(&plain(0x8086, 0x0c_0320)).bits(0x6c);
    assert_eq!((bits.hw_write, bits.shadow_write, bits.hw_read), (0, 0xe03f, 0x003f_0000));
}

#[test]
fn what_a_capability_has_is_treated_by_the_capabilitys_rules() {
    let mut spec = devices::network_pf().spec;
    let before = compile(&spec);
    (spec.identity.vendor, spec.identity.class) = (0x8086, 0x0c_0330);
    let after = compile(&spec);
    // PCI Express at 0xa0 takes 0xa0 to 0xdc.
    for offset in (0xd0..0xdc).step_by(4) {
        assert_eq!(after.bits(offset), before.bits(offset), "{offset:#x}");
    }
}

#[test]
fn registers_of_cxl_are_read_only() {
    for (vendor, written) in [(0x1e98u32, 0), (0x8086, u32::MAX)] {
        let spec = alone(
            AnyId::Extended(ExtendedCapabilityId::DVSEC),
            1,
            &[(4, 0x0200_0000 | vendor), (8, 0xffff_0000)],
        );
        let bits = compile(&spec).bits(0x10c);
        assert_eq!((bits.hw_read, bits.hw_write), (u32::MAX, written), "{vendor:04x}");
    }
}

#[test]
fn the_first_version_of_an_integrated_endpoints_capability_buries_nothing() {
    // Version 1, Root Complex Integrated Endpoint; at once behind it, Power Management.
    let mut spec = alone(AnyId::Legacy(CapabilityId::PCI_EXPRESS), 0x0091, &[]);
    spec.bytes[0x41] = 0x4c;
    spec.bytes[0x4c..0x54].copy_from_slice(&[1, 0, 3, 0, 0, 0, 0, 0]);
    let filter = compile(&spec);
    let seen: Vec<_> = filter.capabilities().iter().map(|(found, seen)| (found.offset, *seen)).collect();
    assert_eq!(seen, [(0x40, true), (0x4c, true)]);
}

#[test]
fn d3hot_loses_nothing_whatever_hardware_would_do() {
    let spec = alone(AnyId::Legacy(CapabilityId::POWER_MANAGEMENT), 3, &[(4, 0)]);
    let bits = compile(&spec).bits(0x44);
    assert_eq!((bits.fixed & 8, bits.value & 8, bits.shadow_write & 8), (8, 8, 0));
}

#[test]
fn a_function_has_a_pin_only_where_its_guest_has_its_line() {
    let shown = |spec: &FunctionSpec| compile(spec).bits(0x3c).fixed & 0xff00 == 0;
    let with = |gsi| FunctionSpec { gsi, ..devices::virtio().spec };
    for (gsi, pin) in [(0, false), (1, true), (255, true), (256, false)] {
        assert_eq!(shown(&with(gsi)), pin, "{gsi}");
    }
    assert!(!shown(&FunctionSpec { gsi: 11, ..devices::network_vf().spec }));
}

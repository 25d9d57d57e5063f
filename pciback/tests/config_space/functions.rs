//! What a function is, read from hardware and host.

use pciback::Sbdf;
use pciback::config::{Bar, BarKind, ConfigError, FunctionKind, FunctionSpec};
use pciback::platform::{HostFunction, Resource};

use crate::devices::{self, Device};
use crate::hardware::Hardware;

fn host(device: &Device) -> HostFunction {
    let identity = device.spec.identity;
    HostFunction {
        address: device.spec.address,
        incarnation: 1,
        vendor: identity.vendor,
        device: identity.device,
        subsystem_vendor: identity.subsystem_vendor,
        subsystem: identity.subsystem,
        class: identity.class,
        revision: identity.revision,
        resources: device.spec.resources,
        driver: None,
        driver_override: None,
        irq: device.spec.gsi,
        physical_function: None,
        virtual_functions: Vec::new(),
        total_vfs: 0,
        num_vfs: 0,
        numa_node: None,
        reset_methods: Vec::new(),
        interfaces: Vec::new(),
    }
}

/// A VF whose host does not know its device id, and its PF.
fn family() -> ((HostFunction, Hardware), (HostFunction, Hardware)) {
    let (vf, pf) = (devices::network_vf(), devices::network_pf());
    let mut vf_host = host(&vf);
    (vf_host.vendor, vf_host.device) = (0xffff, 0xffff);
    vf_host.physical_function = Some(Sbdf::from_devfn(0, 1, 0));
    let mut pf_host = host(&pf);
    pf_host.address = Sbdf::from_devfn(0, 1, 0);
    pf_host.virtual_functions = vec![Sbdf::from_devfn(0, 1, 0x78), vf.spec.address];
    ((vf_host, vf.hardware), (pf_host, pf.hardware))
}

#[test]
fn a_physical_function_is_what_host_and_hardware_say() {
    let device = devices::virtio();
    let spec = FunctionSpec::read(&host(&device), None, &device.hardware, None).unwrap();
    assert_eq!(spec, device.spec);
}

#[test]
fn a_vf_has_its_identity_and_bar_types_from_the_pf() {
    let ((vf, vf_hw), (pf, mut pf_hw)) = family();
    pf_hw.put32(0x184, 0x0000_000c);
    pf_hw.put32(0x190, 0x0000_0004);
    let spec = FunctionSpec::read(&vf, Some(&pf), &vf_hw, Some(&pf_hw)).unwrap();
    assert_eq!((spec.identity.vendor, spec.identity.device), (0x8086, 0x10ca));
    assert!(matches!(spec.kind, FunctionKind::Virtual { index: 1, .. }));
    let bars = Bar::of(&spec);
    let kinds: Vec<_> = bars.iter().map(|bar| (bar.index, bar.kind, bar.prefetchable)).collect();
    assert_eq!(kinds, [(0, BarKind::Memory64, true), (3, BarKind::Memory64, false)]);
}

#[test]
fn a_vf_without_its_pf_or_sriov_capability_is_refused() {
    let ((vf, vf_hw), (pf, mut pf_hw)) = family();
    let read = |pf_hw: Option<&Hardware>| {
        let pf_hw = pf_hw.map(|hw| hw as &dyn pciback::config::ConfigSpace);
        FunctionSpec::read(&vf, Some(&pf), &vf_hw, pf_hw)
    };
    assert!(matches!(read(None), Err(ConfigError::NoPhysicalFunction { .. })));
    pf_hw.put32(0x160, 0);
    assert!(matches!(read(Some(&pf_hw)), Err(ConfigError::NoPhysicalFunction { .. })));
}

#[test]
fn a_function_that_does_not_answer_or_fails_is_refused() {
    let mut device = devices::virtio();
    device.hardware.put(0, &[0xff; 256]);
    let read = |device: &Device| FunctionSpec::read(&host(device), None, &device.hardware, None);
    assert!(matches!(read(&device), Err(ConfigError::NoAnswer { .. })));
    device.hardware.fails = true;
    assert!(matches!(read(&device), Err(ConfigError::Read { .. })));
}

#[test]
fn bars_follow_the_hosts_flags_where_registers_say_nothing() {
    let mut spec = devices::virtio().spec;
    spec.bytes[0x10..0x28].fill(0);
    spec.resources = Default::default();
    // An Enhanced Allocation range has no BAR; an odd size is rounded up; a 64-bit BAR cannot begin at the last register.
    spec.resources[0] = devices::resource(0x1000, 0x1000, Resource::MEMORY | 0x20);
    spec.resources[1] = devices::resource(0x10_0000, 0x1800, Resource::MEMORY | Resource::PREFETCH);
    spec.resources[2] = devices::resource(0x1_0000_0000, 1 << 40, devices::MEMORY_64);
    spec.resources[4] = devices::resource(0xe000, 8, Resource::IO);
    spec.resources[5] = devices::resource(0, u64::MAX, devices::MEMORY_64);
    let bars = Bar::of(&spec);
    let seen: Vec<_> = bars.iter().map(|bar| (bar.index, bar.kind, bar.address_mask())).collect();
    assert_eq!(
        seen,
        [
            (1, BarKind::Memory32, 0xffff_e000),
            (2, BarKind::Memory64, 0xffff_ff00_0000_0000),
            (4, BarKind::Io, 0xffff_fff8),
            (5, BarKind::Memory32, 0),
        ]
    );
}

//! Decisions about registers and radii, over composed config spaces.

use std::path::Path;

use super::radius::{Bridge, Group, Radius, Stance, stance};
use super::*;
use crate::Sbdf;
use crate::dump::parse;
use crate::host::{HostFunction, Resource};

fn dump(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/dumps/{name}.txt"));
    let text = std::fs::read_to_string(path).unwrap();
    parse(&text).unwrap()[0].bytes.clone()
}

fn names(settings: &[Setting]) -> Vec<&'static str> {
    settings.iter().map(|setting| setting.row.name).collect()
}

#[test]
fn a_root_port_gets_all_and_nothing_of_aer_where_the_platform_keeps_it() {
    let port = dump("qemu-pcie-root-port");
    assert_eq!(role(&port, false), Role::RootPort);
    let all: Vec<_> = ROWS.iter().map(|row| row.name).collect();
    assert_eq!(names(&settings(&port, Role::RootPort, true)), all);
    assert_eq!(names(&settings(&port, Role::RootPort, false)), ["Bridge Control", "Command"]);
}

#[test]
fn what_a_function_has_is_set_and_nothing_in_a_vf_or_in_silence() {
    let igb = dump("qemu-igb");
    let expected = [
        "Uncorrectable Error Severity",
        "Uncorrectable Error Mask",
        "Correctable Error Mask",
        "Device Control",
        "Command",
    ];
    assert_eq!(names(&settings(&igb, role(&igb, false), true)), expected);
    let vf = dump("qemu-igbvf");
    assert_eq!(names(&settings(&vf, role(&vf, true), true)), [""; 0]);
    let conventional = dump("qemu-e1000");
    assert_eq!(names(&settings(&conventional, role(&conventional, false), true)), ["Command"]);
    let downstream = dump("qemu-xio3130-downstream");
    assert_eq!(role(&downstream, false), Role::Port);
    assert!(!names(&settings(&downstream, Role::Port, true)).contains(&"Root Control"));
    for silent in [vec![0xff; 4096], vec![0xff; 64], Vec::new()] {
        assert_eq!(names(&settings(&silent, Role::Physical, true)), [""; 0]);
    }
}

/// Nothing but the decided bits changes, no status bit is among them, and a bit that a written 1 clears is written as 0.
#[test]
fn a_write_changes_the_decided_bits_only_and_clears_no_status() {
    for row in ROWS {
        let setting = Setting { row, access: Access::new(0x40, row.width.into()).unwrap() };
        assert_eq!(row.wanted & !row.mask, 0, "{}", row.name);
        assert_eq!(row.mask & row.write_zero, 0, "{}", row.name);
        for current in [0, u32::MAX, 0x5a5a_5a5a, 0xa5a5_a5a5, row.wanted] {
            match setting.merged(current, row.wanted) {
                None => assert_eq!(setting.unlike(current), 0, "{}", row.name),
                Some(written) => {
                    assert_eq!(setting.unlike(written), 0, "{}", row.name);
                    let changed = (written ^ current) & !row.mask;
                    assert_eq!(changed, current & row.write_zero, "{}", row.name);
                    assert_eq!(written & row.write_zero, 0, "{}", row.name);
                }
            }
        }
    }
    // Device Status, Status, Secondary Status and the status registers of AER are registers of their own.
    assert!(ROWS.iter().all(|row| !matches!(
        row.place,
        RegisterPlace::Aer(0x04 | 0x10 | 0x30) | RegisterPlace::Express(0x0a)
    )));
}

#[test]
fn what_a_guest_can_provoke_never_resets_the_link_and_damage_of_the_link_still_does() {
    let severity = ROWS.iter().find(|row| row.name == "Uncorrectable Error Severity").unwrap();
    for bit in [12, 14, 15, 16, 20, 21] {
        assert_ne!(severity.mask & 1 << bit, 0, "{bit}");
    }
    // Data Link Protocol, Surprise Down, Flow Control, Receiver Overflow, Malformed TLP, Internal: as they are.
    for bit in [4, 5, 13, 17, 18, 22] {
        assert_eq!(severity.mask & 1 << bit, 0, "{bit}");
    }
    assert_eq!(severity.wanted, 0);
}

fn function(address: &str, driver: Option<&str>) -> HostFunction {
    HostFunction {
        address: address.parse().unwrap(),
        incarnation: 1,
        vendor: 0x8086,
        device: 1,
        subsystem_vendor: 0,
        subsystem: 0,
        class: 0x02_0000,
        revision: 0,
        resources: Default::default(),
        driver: driver.map(str::to_owned),
        driver_override: None,
        irq: 0,
        physical_function: None,
        virtual_functions: Vec::new(),
        total_vfs: 0,
        num_vfs: 0,
        numa_node: None,
        reset_methods: Vec::new(),
        interfaces: Vec::new(),
    }
}

fn port(buses: std::ops::RangeInclusive<u8>) -> Bridge {
    let address = Sbdf::from_devfn(0, 0, *buses.start() << 3);
    Bridge { address, buses, isolates: Ok(()) }
}

fn addresses(sharers: &[radius::Sharer]) -> Vec<String> {
    sharers.iter().map(|sharer| sharer.address.to_string()).collect()
}

#[test]
fn who_shares_the_link_the_root_port_the_line_and_the_page_is_found() {
    let mut own = function("03:00.0", Some("pciback"));
    own.irq = 16;
    own.resources[0] = Resource { start: 0xfe00_0000, size: 0x100, flags: Resource::MEMORY };
    let mut same_page = function("09:00.0", Some("igb"));
    same_page.irq = 16;
    same_page.resources[2] = Resource { start: 0xfe00_0800, size: 0x100, flags: Resource::MEMORY };
    let mut next_page = function("0a:00.0", Some("igb"));
    next_page.resources[0] = Resource { start: 0xfe00_1000, size: 0x1000, flags: Resource::MEMORY };
    let others = [
        own.clone(),
        function("03:00.1", Some("pci-stub")),
        function("04:00.0", Some("igb")),
        same_page,
        next_page,
    ];
    let ports = [port(3..=3), port(2..=4)];
    let radius = Radius::of(&own, true, &ports, &others);
    assert_eq!(addresses(&radius.link), ["0000:03:00.1"]);
    assert_eq!(addresses(&radius.root_port), ["0000:04:00.0"]);
    assert_eq!(addresses(&radius.line), ["0000:09:00.0"]);
    assert_eq!(addresses(&radius.page), ["0000:09:00.0"]);
    assert_eq!(addresses(&radius.vetoes), ["0000:03:00.1"]);
    // A function that uses no line shares none.
    assert!(Radius::of(&own, false, &ports, &others).line.is_empty());
}

#[test]
fn bars_without_an_address_share_no_page() {
    let unplaced = Resource { start: 0, size: 0x100, flags: Resource::MEMORY | Resource::UNSET };
    let (mut own, mut other) = (function("03:00.0", None), function("09:00.0", None));
    (own.resources[0], other.resources[0]) = (unplaced, unplaced);
    assert!(Radius::of(&own, false, &[], &[other]).page.is_empty());
}

#[test]
fn iommu_groups_follow_from_the_port_nearest_to_the_root_that_does_not_isolate() {
    let own = function("03:00.0", None);
    let others = [function("03:00.1", None), function("04:00.0", None), function("09:00.0", None)];
    let mut ports = [port(3..=3), port(2..=4)];
    let group = |ports: &[Bridge]| {
        let radius = Radius::of(&own, false, ports, &others);
        (addresses(&radius.iommu_group), radius.iommu_group_because)
    };
    // Functions of one device are on their own behind the port.
    assert_eq!(group(&ports).0, ["0000:03:00.1"]);
    ports[1].isolates = Err("has no ACS");
    let (open, why) = group(&ports);
    assert_eq!(open, ["0000:03:00.1", "0000:04:00.0"]);
    assert!(why.contains("has no ACS"), "{why}");
    let mut vf = own.clone();
    vf.physical_function = "03:00.1".parse().ok();
    assert!(Radius::of(&vf, false, &ports[..1], &others).iommu_group.is_empty());
}

/// The radius's list has exactly the functions of the same [`Group`].
#[test]
fn functions_of_one_group_are_those_that_the_iommu_cannot_keep_apart() {
    let mut functions: Vec<HostFunction> =
        ["03:00.0", "03:00.1", "03:10.0", "03:10.1", "04:00.0"].map(|address| function(address, None)).into();
    for vf in &mut functions[2..4] {
        vf.physical_function = "03:00.0".parse().ok();
    }
    let ports_of = |function: &HostFunction, open: bool| {
        let mut ports = vec![port(function.address.bus()..=function.address.bus()), port(2..=4)];
        ports[1].isolates = if open { Err("has no ACS") } else { Ok(()) };
        ports
    };
    for open in [false, true] {
        for own in &functions {
            let ports = ports_of(own, open);
            let radius = Radius::of(own, false, &ports, &functions);
            let group = Group::of(own, &ports);
            let same = functions.iter().filter(|other| {
                other.address != own.address && Group::of(other, &ports_of(other, open)) == group
            });
            let same: Vec<String> = same.map(|other| other.address.to_string()).collect();
            assert_eq!(addresses(&radius.iommu_group), same, "{}, open: {open}", own.address);
        }
    }
}

#[test]
fn bridges_say_what_is_below_them_and_whether_they_isolate() {
    let mut bytes = dump("qemu-pcie-root-port");
    (bytes[0x19], bytes[0x1a]) = (2, 5);
    let address = Sbdf::from_devfn(0, 0, 8);
    let acs = CapabilityList::walk(&bytes).extended(ExtendedCapabilityId::ACS).map(|acs| acs.offset);
    let acs = usize::from(acs.unwrap());
    bytes[acs + 6] = 0;
    let bridge = Bridge::read(address, &bytes);
    assert_eq!(bridge.buses, 2..=5);
    assert!(bridge.covers("05:00.0".parse().unwrap()) && !bridge.covers("06:00.0".parse().unwrap()));
    assert!(bridge.isolates.is_err());
    bytes[acs + 6] = 0x1d;
    assert_eq!(Bridge::read(address, &bytes).isolates, Ok(()));
    assert!(Bridge::read(address, &dump("qemu-pci-bridge")).isolates.is_err());
}

#[test]
fn who_vetoes_recovery_is_known() {
    assert_eq!(stance(None), Stance::Vetoes);
    assert_eq!(stance(Some("pci-stub")), Stance::Vetoes);
    assert_eq!(stance(Some("pciback")), Stance::Recovers);
    assert_eq!(stance(Some("somebody")), Stance::Unknown);
}

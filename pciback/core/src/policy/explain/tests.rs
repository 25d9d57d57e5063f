use super::*;
use crate::dump;
use crate::policy::{Kind, PolicyFile, PolicySet, dumped_specs, obstacles};

/// A network controller with power management at 0x40 and an unknown capability at 0x50.
fn dumped() -> String {
    let mut bytes = [0u8; 256];
    bytes[..0x10].copy_from_slice(&[0x86, 0x80, 0xca, 0x10, 6, 4, 0x10, 0, 1, 0, 0, 2, 0x10, 0, 0, 0]);
    bytes[0x10..0x18].copy_from_slice(&[0x04, 0, 0, 0xfe, 0, 0, 0, 0]);
    bytes[0x34] = 0x40;
    bytes[0x40..0x48].copy_from_slice(&[0x01, 0x50, 0x03, 0, 0, 0, 0, 0]);
    bytes[0x50..0x54].copy_from_slice(&[0x77, 0, 0xab, 0xcd]);
    let function = dump::DumpedFunction {
        address: Sbdf::from_devfn(0, 1, 0),
        title: "Ethernet controller".into(),
        bytes: bytes.to_vec(),
        line: 1,
        regions: Vec::new(),
    };
    function.to_string()
}

fn explained(text: &str, kind: Option<Kind>, policy: &str) -> Explanation {
    let functions = dump::parse(text).unwrap();
    let specs = dumped_specs(&functions, kind);
    let set = PolicySet::new(vec![PolicyFile::parse("p.yaml", policy).unwrap()]);
    explain(&specs[0].spec, &set.all().policy, None)
}

fn register<'a>(explanation: &'a Explanation, name: &str) -> &'a RegisterLine {
    explanation.registers.iter().find(|register| register.name == name).unwrap()
}

#[test]
fn each_register_says_what_reads_and_writes_do_and_why() {
    let explanation = explained(&dumped(), None, "");
    assert_eq!(explanation.id, "8086:10ca");
    let command = register(&explanation, "Command");
    assert_eq!((command.offset, command.width), (4, 2));
    assert_eq!(command.read, "virtual+hardware+fixed");
    assert_eq!(command.write, "virtual+hardware+dropped");
    let serr = command.bits.iter().find(|bits| bits.mask == 0x100).unwrap();
    assert_eq!((serr.read.as_str(), serr.name.as_str()), ("virtual", "SERR# Enable"));
    assert!(serr.rule.contains("SERR is pinned"), "{}", serr.rule);
    assert!(serr.origin.contains("7.5.1"), "{}", serr.origin);
    let vendor = register(&explanation, "Vendor ID");
    assert_eq!((vendor.read.as_str(), vendor.write.as_str()), ("constant", "dropped"));
    let power = register(&explanation, "Power Management Control/Status");
    assert_eq!(power.capability, Some(0x40));
    assert!(explanation.not_assignable.is_none() && explanation.problems.is_empty());
}

#[test]
fn every_byte_is_in_exactly_one_register() {
    for text in [dumped(), dumped().replace("10: 04 00 00 fe", "10: 01 e0 00 00")] {
        let explanation = explained(&text, None, "");
        let mut next = 0;
        for register in &explanation.registers {
            assert_eq!(register.offset, next, "{register:?}");
            next = register.offset + register.width;
            if register.name != "unknown" {
                let all = register.bits.iter().fold(0u32, |all, bits| {
                    assert_eq!(all & bits.mask, 0, "{register:?}");
                    all | bits.mask
                });
                assert_eq!(all, u32::MAX >> (32 - 8 * register.width), "{register:?}");
            }
        }
        assert_eq!(next, 256);
    }
}

#[test]
fn a_policy_is_named_with_its_line_and_what_it_could_not_change() {
    let policy = "unknown: read-only\ncapabilities:\n  legacy-0x77: {action: hide, reason: a test}\nregisters:\n  - {at: 0x42, width: 2, action: pass}\n  - {at: 0x40, width: 2, action: pass}\n";
    let explanation = explained(&dumped(), None, policy);
    let capability = explanation.capabilities.iter().find(|capability| capability.id == 0x77).unwrap();
    assert!(!capability.visible);
    assert_eq!(capability.word, "legacy-0x77");
    let hidden = explanation.registers.iter().find(|register| register.offset == 0x50).unwrap();
    assert_eq!((hidden.read.as_str(), hidden.rule.as_str()), ("fixed", "a test"));
    assert_eq!(hidden.bits[0].origin, "p.yaml:3");
    let gap = explanation.registers.iter().find(|register| register.offset == 0x52).unwrap();
    assert_eq!(
        (gap.name.as_str(), gap.read.as_str(), gap.write.as_str()),
        ("unknown", "hardware", "dropped")
    );
    assert_eq!(explanation.refused.len(), 1, "{:?}", explanation.refused);
    assert!(explanation.refused[0].starts_with("p.yaml:6: the register at 0x40 is guarded"));
}

#[test]
fn a_dump_can_be_read_as_a_vfs_and_a_bridge_says_why_no_guest_gets_it() {
    let explanation = explained(&dumped(), Some(Kind::Virtual), "");
    assert!(explanation.is_virtual);
    let command = register(&explanation, "Command");
    let memory = command.bits.iter().find(|bits| bits.mask == 2).unwrap();
    assert_eq!((memory.read.as_str(), memory.value), ("fixed", Some(2)));
    let bridge = dumped().replace("01 00 00 02 10 00 00 00", "01 00 04 06 10 00 01 00");
    let explanation = explained(&bridge, None, "");
    assert!(explanation.not_assignable.unwrap().contains("bridges stay with the host"));
    assert_eq!(explanation.capabilities.len(), 2);
}

#[test]
fn a_vf_gets_its_identity_from_the_pf_of_the_same_dump() {
    let mut pf = dump::parse(&dumped()).unwrap().remove(0);
    pf.bytes.resize(4096, 0);
    pf.bytes[0x100..0x104].copy_from_slice(&[0x10, 0, 1, 0]);
    for (at, word) in [(0x108, 1u16), (0x110, 2), (0x114, 0x80), (0x116, 2), (0x11a, 0x10ca), (0x124, 4)] {
        pf.bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
    }
    let mut vf = pf.clone();
    vf.address = Sbdf::from_devfn(0, 1, 0x82);
    vf.bytes[..4].fill(0xff);
    vf.bytes[0x100..0x140].fill(0);
    let specs = dumped_specs(&[pf, vf], None);
    assert!(!specs[0].spec.is_virtual() && specs[1].spec.is_virtual());
    assert_eq!((specs[1].spec.identity.vendor, specs[1].spec.identity.device), (0x8086, 0x10ca));
    assert!(specs[1].spec.resources[0].exists());
}

#[test]
fn a_guest_writes_nothing_outside_the_capabilities_of_a_usb_controller_of_any_vendor() {
    for (interface, policy) in [
        ("20", include_str!("../../../../../configs/policies/ehci.yaml")),
        ("30", include_str!("../../../../../configs/policies/xhci.yaml")),
    ] {
        let usb = dumped()
            .replace("86 80 ca 10", "12 19 14 00")
            .replace("01 00 00 02 10 00 00 00", &format!("01 {interface} 03 0c 10 00 00 00"));
        let unknown = |policy: &str| -> Vec<String> {
            let explanation = explained(&usb, Some(Kind::Physical), policy);
            assert_eq!(explanation.id, "1912:0014");
            let lines = explanation.registers.iter().filter(|line| line.name == "unknown");
            lines.filter(|line| line.capability.is_none()).map(|line| line.write.clone()).collect()
        };
        assert!(unknown("").iter().any(|write| write == "hardware"), "nothing is shown without the policy");
        let written = unknown(policy);
        assert!(!written.is_empty() && written.iter().all(|write| write == "dropped"), "{written:?}");
    }
}

#[test]
fn a_host_bridge_goes_to_no_guest_although_its_header_is_an_ordinary_one() {
    let bridge = dumped().replace("01 00 00 02 10 00 00 00", "01 00 00 06 10 00 00 00");
    let explanation = explained(&bridge, None, "");
    assert!(explanation.not_assignable.unwrap().contains("bridges stay with the host"));
    assert!(explanation.registers.is_empty());
}

#[test]
fn the_size_of_a_bar_comes_from_the_dumps_text_or_is_named_as_unknown() {
    let specs = |text: &str| dumped_specs(&dump::parse(text).unwrap(), None).remove(0);
    let unknown = specs(&dumped());
    assert_eq!(unknown.spec.resources[0].size, 16);
    assert!(unknown.unknown[0].contains("size of BAR 0 is unknown"), "{:?}", unknown.unknown);
    let text = dumped().replacen('\n', "\n\tRegion 0: Memory at fe000000 (64-bit) [size=16K]\n", 1);
    let known = specs(&text);
    assert_eq!((known.spec.resources[0].size, known.unknown.len()), (16 << 10, 0));
}

#[test]
fn what_attach_would_refuse_is_named_as_an_obstacle() {
    let found_with = |policy: &str, text: &str, resets: Option<&[String]>| {
        let spec = dumped_specs(&dump::parse(text).unwrap(), None).remove(0).spec;
        let set = PolicySet::new(vec![PolicyFile::parse("p.yaml", policy).unwrap()]);
        obstacles(&spec, &set.all(), resets)
    };
    let found = |text: &str, resets: Option<&[String]>| found_with("", text, resets);
    // It can be reset by power management: No_Soft_Reset is clear.
    assert!(found(&dumped(), None).is_empty());
    let keeps_its_state = dumped().replace("40: 01 50 03 00 00", "40: 01 50 03 00 08");
    assert_ne!(keeps_its_state, dumped());
    assert!(found(&keeps_its_state, None)[0].contains("only a reset of its bus"));
    assert!(found(&keeps_its_state, Some(&["bus".to_owned()])).is_empty());
    for said in ["a policy says 'reset: {together: true}'", "'reset: {none: permit}'"] {
        assert!(found(&dumped(), Some(&[]))[0].contains(said));
    }
    assert!(found_with("reset: {together: true}\n", &dumped(), Some(&[])).is_empty());
    assert!(found_with("reset: {none: permit}\n", &dumped(), Some(&[])).is_empty());

    let mut pf = dump::parse(&dumped()).unwrap().remove(0);
    pf.bytes.resize(4096, 0);
    pf.bytes[0x100..0x104].copy_from_slice(&[0x10, 0, 1, 0]);
    pf.bytes[0x10e] = 8;
    let pf = pf.to_string();
    assert!(found(&pf, None)[0].contains("'permit: [physical-function]'"));
    assert!(found_with("permit: [physical-function]\n", &pf, None).is_empty());
}

#[test]
fn a_bar_of_unknown_size_is_as_large_as_its_msix_structures_need() {
    // Eight vectors: the table at 0x2000, the PBA at 0x3000.
    let text = dumped()
        .replace("50: 77 00 ab cd 00 00 00 00 00 00 00 00", "50: 11 00 07 00 00 20 00 00 00 30 00 00");
    let functions = dump::parse(&text).unwrap();
    let dumped = dumped_specs(&functions, None).remove(0);
    assert_eq!(dumped.spec.resources[0].size, 0x4000);
    assert!(dumped.unknown[0].contains("BAR 0 is unknown, 16384 bytes are shown"), "{:?}", dumped.unknown);
    let explanation = explain(&dumped.spec, &Policy::default(), None);
    assert_eq!(explanation.problems, [""; 0]);
    assert!(explanation.capabilities.iter().any(|capability| capability.id == 0x11 && capability.visible));
}

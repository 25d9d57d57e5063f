use super::*;
use crate::config::{AnyId, CapabilityAction, Identity, Initial, MailboxPeers, Origin, Place, VendorPart};
use crate::policy::{Subject, WithoutReset};
use crate::spec::{CapabilityId, ExtendedCapabilityId};

fn mistakes(text: &str) -> Vec<String> {
    let list = PolicyFile::parse("f.yaml", text).expect_err(text);
    list.iter().map(ToString::to_string).collect()
}

fn parsed(text: &str) -> PolicyFile {
    PolicyFile::parse("f.yaml", text).unwrap_or_else(|mistakes| panic!("{mistakes:#?}"))
}

const EXPRESS: Selector = Selector { id: AnyId::Legacy(CapabilityId::PCI_EXPRESS), part: None };

#[test]
fn every_key_says_what_it_should() {
    let file = parsed(
        "description: A test.
match:
  vendor: [8086, 0x10ec]
  device: 10ca
  class: 0200
  function: virtual
  address: 01:10.0
  domain: web
profile: strict
unknown: {action: pass, reason: we know it}
capabilities:
  vpd: hide
  doe: {action: show, reason: attestation}
  dvsec:1e98:0008: hide
  pci-express:
    registers:
      - {at: Device Control, mask: 0x7000, action: pass, reason: larger reads}
      - {at: 0x28, width: 2, action: virtual, value: 0x5, write-mask: 0xf}
registers:
  - {at: 0xe1-0xe6, action: read-only}
  - {at: 0xf0, width: 4, action: fixed, value: 0x12345678}
",
    );
    assert_eq!(file.matching.vendor, [0x8086, 0x10ec]);
    assert_eq!(file.matching.class[0], ClassPrefix { value: 0x0200, digits: 4 });
    assert_eq!(file.matching.function, Some(Kind::Virtual));
    assert_eq!(file.profile.as_ref().unwrap().0, Profile::Strict);
    let (treatment, rule) = file.unknown.as_ref().unwrap();
    assert_eq!((*treatment, rule.reason.as_ref()), (Treatment::Pass, "we know it"));
    let actions: Vec<_> = file.capabilities.iter().map(|entry| (entry.which, entry.action)).collect();
    let dvsec = Selector {
        id: AnyId::Extended(ExtendedCapabilityId::DVSEC),
        part: Some(VendorPart::Dvsec { vendor: 0x1e98, id: 8 }),
    };
    assert_eq!(
        actions,
        [
            (AnyId::Legacy(CapabilityId::VPD).into(), CapabilityAction::Hide),
            (AnyId::Extended(ExtendedCapabilityId::DOE).into(), CapabilityAction::Show),
            (dvsec, CapabilityAction::Hide),
        ]
    );
    assert_eq!(file.capabilities[1].rule.origin, Origin::Policy { file: "f.yaml".into(), line: 13 });
    let registers: Vec<_> =
        file.registers.iter().map(|entry| (entry.place, entry.width, entry.mask, entry.treatment)).collect();
    assert_eq!(
        registers,
        [
            (Place::In(EXPRESS, 8), 2, 0x7000, Treatment::Pass),
            (Place::In(EXPRESS, 0x28), 2, 0xf, Treatment::Virtual(Initial::Value(5))),
            (Place::In(EXPRESS, 0x28), 2, 0xfff0, Treatment::Fixed(5)),
            (Place::Absolute(0xe1), 1, u32::MAX, Treatment::ReadOnly),
            (Place::Absolute(0xe2), 2, u32::MAX, Treatment::ReadOnly),
            (Place::Absolute(0xe4), 2, u32::MAX, Treatment::ReadOnly),
            (Place::Absolute(0xe6), 1, u32::MAX, Treatment::ReadOnly),
            (Place::Absolute(0xf0), 4, u32::MAX, Treatment::Fixed(0x1234_5678)),
        ]
    );
    assert_eq!(file.registers[0].rule.reason, "larger reads");
}

#[test]
fn an_empty_file_says_nothing_of_every_function() {
    for text in ["", "# a comment\n", "{}\n"] {
        let file = parsed(text);
        assert_eq!((file.matching, file.profile, file.unknown), (Match::default(), None, None));
    }
}

#[test]
fn all_mistakes_are_reported_with_their_place_and_the_nearest_word() {
    let text = "profile: strickt\nmach: {vendor: 8086}\ncapabilities:\n  vdp: hide\n  vpd: hid\nregisters:\n  - {at: 0xe0, widht: 4, action: pass}\n";
    assert_eq!(
        mistakes(text),
        [
            "f.yaml:1:10: 'strickt' is not a valid profile; did you mean 'strict'?",
            "f.yaml:2:1: 'mach' is not a valid key of a policy; did you mean 'match'?",
            "f.yaml:4:3: 'vdp' is not a valid capability; did you mean 'vpd'?",
            "f.yaml:5:8: 'hid' is not a valid action for a capability; did you mean 'hide'?",
            "f.yaml:7:5: a register given by its offset needs a 'width' of 1, 2 or 4",
            "f.yaml:7:16: 'widht' is not a valid key of a register; did you mean 'width'?",
        ]
    );
}

#[test]
fn each_mistake_has_its_own_words() {
    for (text, message) in [
        ("- a\n", "1:1: a policy is a mapping, not a list"),
        (
            "match: {vendor: 80866}\n",
            "1:17: '80866' is not a valid vendor id: one to four hexadecimal digits are expected, as in 8086",
        ),
        ("match: {vendor: []}\n", "1:17: an empty list: no function has any vendor id"),
        (
            "match: {class: 020}\n",
            "1:16: '020' is not a valid class: 2, 4 or 6 hexadecimal digits are expected, as in 0200",
        ),
        (
            "match: {address: 1:2}\n",
            "1:18: '1:2' is not a valid address: [SSSS:]BB:DD.F is expected, as in 0000:01:10.0",
        ),
        ("profile:\n", "1:8: profile is a word, not nothing"),
        (
            "capabilities: {msi-x: hide, legacy-0x11: show}\n",
            "1:29: 'legacy-0x11' is the same capability as 'msi-x' above",
        ),
        (
            "capabilities: {msi-x: pass}\n",
            "1:23: msi-x is guarded: xpci itself carries out what it controls; it can only be hidden",
        ),
        (
            "capabilities:\n  msi:\n    registers: [{at: 2, width: 2, action: pass}]\n",
            "3:16: the registers of msi are guarded: xpci itself carries out what they control",
        ),
        (
            "registers: [{at: 0x10, width: 4, action: pass}]\n",
            "1:18: the header is guarded: the guest sees virtual BARs and a filtered Command, whatever a policy says",
        ),
        (
            "registers: [{at: 0x1000, width: 4, action: pass}]\n",
            "1:18: '0x1000' is not a valid place: an offset from 0 to 0xfff or a range of two is expected",
        ),
        (
            "registers: [{at: 0xe8-0xe0, action: pass}]\n",
            "1:18: '0xe8-0xe0' is not a valid place: an offset from 0 to 0xfff or a range of two is expected",
        ),
        (
            "registers: [{at: 0xe1, width: 2, action: pass}]\n",
            "1:13: offset 0xe1 is not a multiple of the width, 2",
        ),
        (
            "registers: [{at: 0xe0, width: 3, action: pass}]\n",
            "1:31: '3' is not a valid width in bytes; it is one of 1, 2, 4",
        ),
        (
            "registers: [{at: 0xe0, width: 1, action: pass, mask: 0x100}]\n",
            "1:54: mask 0x100 has bits beyond the register's 1 bytes",
        ),
        (
            "registers: [{at: 0xe0, width: 1, action: pass, mask: 0}]\n",
            "1:54: the mask is 0: no bit is meant",
        ),
        (
            "registers: [{at: 0xe0, width: 1, action: pass, value: 1}]\n",
            "1:55: a value belongs to 'fixed' and 'virtual' only",
        ),
        (
            "registers: [{at: 0xe0, width: 1, action: hide, write-mask: 1}]\n",
            "1:60: a write-mask belongs to 'pass' and 'virtual' only",
        ),
        ("registers: [{at: 0xe0, width: 1, action: fixed}]\n", "1:13: 'fixed' needs a 'value'"),
        (
            "registers: [{at: 0xe0-0xe3, action: pass, mask: 1}]\n",
            "1:49: a range takes no width, mask, value or write-mask: its bytes are treated alike",
        ),
        ("registers: [{at: 0xe0, width: 1}]\n", "1:13: a register without 'action'"),
        ("registers: [{width: 1, action: pass}]\n", "1:13: a register without 'at'"),
        (
            "registers: [{at: 0xe0, width: 1, action: pass, mask: -1}]\n",
            "1:54: '-1' is not a valid mask: a number from 0 to 0xffffffff is expected",
        ),
        (
            "capabilities:\n  pci-express:\n    registers: [{at: Device Kontrol, action: pass}]\n",
            "3:22: 'Device Kontrol' is not a valid register of pci-express; did you mean 'Device Control'?",
        ),
    ] {
        assert_eq!(mistakes(text), [format!("f.yaml:{message}")], "{text}");
    }
}

#[test]
fn holding_at_once_says_for_which_functions_and_does_not_depend_on_a_guest() {
    assert_eq!(parsed("match: {vendor: 8086}\nhold: at-once\n").hold, Some(Holding::AtOnce));
    assert_eq!(parsed("hold: on-request\n").hold, Some(Holding::OnRequest));
    for (text, message) in [
        ("hold: at-once\n", "1:7: 'hold: at-once' needs a 'match' that says for which functions"),
        ("match: {}\nhold: at-once\n", "2:7: 'hold: at-once' needs a 'match' that says for which functions"),
        (
            "match: {vendor: 8086, domain: web}\nhold: at-once\n",
            "2:7: 'hold: at-once' cannot depend on 'domain': no guest has the function then",
        ),
        ("hold: always\n", "1:7: 'always' is not a valid time to hold; it is one of on-request, at-once"),
    ] {
        assert_eq!(mistakes(text), [format!("f.yaml:{message}")], "{text}");
    }
}

#[test]
fn resets_and_reserved_memory_are_read_and_mistyped_words_are_refused_with_the_nearest_one() {
    let file = parsed("reset: {methods: [flr, bus], together: true, none: permit}\nrdm-policy: strict\n");
    assert_eq!(file.reset.methods, Some(vec!["flr".to_owned(), "bus".to_owned()]));
    assert_eq!(file.reset.together, Some(true));
    assert_eq!((file.reset.none, file.rdm), (Some(WithoutReset::Permit), Some(RdmPolicy::Strict)));
    for (text, message) in [
        (
            "reset: {methods: [flr, buss]}\n",
            "1:24: 'buss' is not a valid method of reset; did you mean 'bus'?",
        ),
        ("reset: {method: bus}\n", "1:9: 'method' is not a valid key of 'reset'; did you mean 'methods'?"),
        ("reset: {together: yes}\n", "1:19: 'yes' is not a valid switch; it is one of true, false"),
        ("reset: {methods: []}\n", "1:18: an empty list: no method would be accepted"),
        (
            "reset: {none: allow}\n",
            "1:15: 'allow' is not a valid answer to 'without a reset?'; it is one of refuse, permit",
        ),
        ("rdm-policy: relax\n", "1:13: 'relax' is not a valid rdm-policy; did you mean 'relaxed'?"),
        (
            "match: {domain: web}\nreset: {none: permit}\n",
            "2:8: 'reset' cannot depend on 'domain': it is needed, too, when that guest has ended",
        ),
    ] {
        assert_eq!(mistakes(text), [format!("f.yaml:{message}")], "{text}");
    }
}

#[test]
fn the_shipped_files_are_good_and_say_what_they_are_for() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/policies");
    let mut families = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let (name, text) = (path.display().to_string(), std::fs::read_to_string(&path).unwrap());
        let file = PolicyFile::parse(&name, &text).unwrap_or_else(|mistakes| panic!("{mistakes:#?}"));
        assert!(file.description.is_some(), "{name}");
        assert_ne!(file.matching, Match::default(), "{name}");
        families += 1;
    }
    assert!(families >= 8, "{families}");
}

/// Device ids as drivers of Linux list them.
#[test]
fn each_shipped_file_is_for_all_devices_of_the_driver_that_it_names() {
    let ethernet = 0x02_0000;
    for (file, vendor, devices, class, kind) in [
        ("intel-82576-vf", 0x8086, &[0x10ca, 0x152d, 0x1520, 0x152f][..], ethernet, Kind::Virtual),
        (
            "intel-ixgbevf",
            0x8086,
            &[0x10ed, 0x152e, 0x1515, 0x1530, 0x1564, 0x1565, 0x15a8, 0x15a9, 0x15c5, 0x15b4, 0x57ad],
            ethernet,
            Kind::Virtual,
        ),
        ("intel-iavf", 0x8086, &[0x154c, 0x1571, 0x37cd, 0x1889], ethernet, Kind::Virtual),
        (
            "mellanox-mlx5-vf",
            0x15b3,
            &[0x1012, 0x1014, 0x1016, 0x1018, 0x101a, 0x101c, 0x101e, 0xa2d3],
            ethernet,
            Kind::Virtual,
        ),
        ("ehci", 0x8086, &[0x8c26], 0x0c_0320, Kind::Physical),
        ("xhci", 0x8086, &[0x8c31], 0x0c_0330, Kind::Physical),
        ("uhci", 0x8086, &[0x2934], 0x0c_0300, Kind::Physical),
    ] {
        let path = format!("{}/../../configs/policies/{file}.yaml", env!("CARGO_MANIFEST_DIR"));
        let policy = parsed(&std::fs::read_to_string(path).unwrap());
        for device in devices {
            let identity = Identity { vendor, device: *device, class, ..Identity::default() };
            let subject = Subject { address: Sbdf::from_devfn(0, 1, 0), identity, kind, domain: None };
            assert_eq!(policy.matching.mismatch(&subject), None, "{file}: {device:04x}");
        }
    }
}

#[test]
fn the_example_names_every_key_and_every_word() {
    let text = include_str!("../../../../../configs/policies/example.yaml");
    let schema = crate::policy::schema().to_string();
    let keys = rules::REGISTER_KEYS.iter().chain(KEYS).chain(MATCH_KEYS);
    for key in keys.chain(rules::CAPABILITY_KEYS).chain(reset::RESET_KEYS) {
        assert!(text.contains(&format!("{}:", key.word)), "{}", key.word);
        assert!(schema.contains(&format!("\"{}\"", key.word)), "{}", key.word);
    }
    for (word, _) in rules::WholeAction::WORDS {
        assert!(text.contains(word), "{word}");
    }
    for (word, _) in rules::RegisterAction::WORDS {
        assert!(text.contains(&format!("action: {word}")), "{word}");
    }
}

#[test]
fn a_rom_is_none_the_devices_or_a_file_by_its_absolute_path() {
    for (text, rom) in [
        ("rom: hide\n", RomSource::Hide),
        ("rom: device\n", RomSource::Device),
        ("rom: /usr/share/vgabios/card one.rom\n", RomSource::File("/usr/share/vgabios/card one.rom".into())),
    ] {
        assert_eq!(parsed(text).rom, Some(rom), "{text}");
    }
    let expected = "hide, device or the absolute path of a file is expected";
    for (text, message) in [
        ("rom: yes\n", format!("1:6: 'yes' is not a valid rom: {expected}")),
        ("rom: vbios.rom\n", format!("1:6: 'vbios.rom' is not a valid rom: {expected}")),
        ("rom: [device]\n", "1:6: rom is a word, not a list".to_owned()),
    ] {
        assert_eq!(mistakes(text), [format!("f.yaml:{message}")], "{text}");
    }
}

#[test]
fn a_mailbox_is_with_guests_dom0_both_or_nobody() {
    for (text, guest, dom0) in [
        ("mailbox: guest\n", true, false),
        ("mailbox: dom0\n", false, true),
        ("mailbox: [dom0, guest]\n", true, true),
        ("mailbox: off\n", false, false),
        ("match: {domain: web}\nmailbox: [guest]\n", true, false),
    ] {
        let peers = parsed(text).mailbox.map(|wish| wish.peers);
        assert_eq!(peers, Some(MailboxPeers { guest, dom0 }), "{text}");
    }
    for (text, message) in [
        ("mailbox: on\n", "1:10: 'on' is not a valid side of a mailbox; it is one of guest, dom0, off"),
        ("mailbox: [guest, off]\n", "1:18: 'off' is not a valid side of a mailbox; it is one of guest, dom0"),
        ("mailbox: {with: guest}\n", "1:10: side of a mailbox is a word, not a mapping"),
    ] {
        assert_eq!(mistakes(text), [format!("f.yaml:{message}")], "{text}");
    }
}

#[test]
fn vfs_by_guest_are_at_most_what_fits_on_a_bus() {
    for count in [1, 256] {
        let text = format!("virtual-functions: {{by-guest: {count}}}\n");
        assert_eq!(parsed(&text).virtual_functions.map(|by_guest| by_guest.count), Some(count));
    }
    for (text, message) in [
        (
            "virtual-functions: {by-guest: 257}\n",
            "1:31: '257' is not a valid by-guest: a number from 1 to 256 is expected",
        ),
        (
            "virtual-functions: {by-guest: 0}\n",
            "1:31: '0' is not a valid by-guest: a number from 1 to 256 is expected",
        ),
        (
            "virtual-functions: {by-guests: 2}\n",
            "1:21: 'by-guests' is not a valid key of 'virtual-functions'; did you mean 'by-guest'?",
        ),
        ("virtual-functions: 2\n", "1:20: 'virtual-functions' is a mapping, not a word"),
        (
            "match: {domain: nic}\nvirtual-functions: {by-guest: 2}\n",
            "2:20: 'virtual-functions' cannot depend on 'domain': the PF is bound to the driver that creates VFs before a guest has it",
        ),
    ] {
        assert_eq!(mistakes(text), [format!("f.yaml:{message}")], "{text}");
    }
}

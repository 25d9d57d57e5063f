//! What happens to a connected guest's config space when its policy changes, and which of its writes are counted.

use std::sync::Arc;

use pciback::config::{
    Access, AnyId, CapabilityAction, CapabilityOverride, Filter, FunctionImage, MaskedWrite, Origin, Place,
    Policy, RegisterOverride, Rule, Treatment, VirtualConfigSpace,
};
use pciback::platform::SharedMemory;
use pciback::spec::CapabilityId;

use crate::devices::{self, Device};
use crate::model::OWNER;

/// Device Control of the network PF, and an unknown byte.
const DEVICE_CONTROL: u16 = 0xa8;
const UNKNOWN: u16 = 0xe8;

fn rule() -> Rule {
    Rule { reason: "a test".into(), origin: Origin::Policy { file: "test.yaml".into(), line: 1 } }
}

fn treat(offset: u16, width: u8, mask: u32, treatment: Treatment) -> Policy {
    let registers =
        vec![RegisterOverride { place: Place::Absolute(offset), width, mask, treatment, rule: rule() }];
    Policy { registers, ..Policy::default() }
}

fn filter(device: &Device, policy: &Policy) -> Arc<Filter> {
    Arc::new(Filter::compile(&device.spec, policy).unwrap())
}

fn create(device: &Device, policy: &Policy) -> VirtualConfigSpace {
    let image = FunctionImage::new(SharedMemory::anonymous(FunctionImage::BYTES).unwrap(), OWNER);
    VirtualConfigSpace::create(&device.spec, filter(device, policy), image).unwrap()
}

fn word(offset: u16) -> Access {
    Access::new(u32::from(offset), 2).unwrap()
}

#[test]
fn what_becomes_virtual_begins_as_hardware_shows_it_now() {
    let mut device = devices::network_pf();
    let mut space = create(&device, &Policy::default());
    space.write(word(UNKNOWN), 0x1234, &device.hardware).unwrap();
    device.hardware.put(UNKNOWN.into(), &[0xcd, 0xab]);
    let own = treat(UNKNOWN, 2, 0xffff, Treatment::Virtual(pciback::config::Initial::Hardware));
    space.replace_filter(filter(&device, &own), &device.hardware).unwrap();
    assert_eq!(space.read(word(UNKNOWN), &device.hardware).unwrap(), 0xabcd);
    space.write(word(UNKNOWN), 0x5555, &device.hardware).unwrap();
    assert_eq!(device.hardware.bytes.borrow()[0xe8], 0xcd, "hardware no longer hears of it");
    space.reset();
    assert_eq!(space.read(word(UNKNOWN), &device.hardware).unwrap(), 0xabcd);
}

#[test]
fn what_becomes_hardwares_shows_hardware_and_never_replays_the_guest() {
    let device = devices::network_pf();
    let mut space = create(&device, &Policy::default());
    let before = device.hardware.bytes.borrow().clone();
    space.write(word(DEVICE_CONTROL), 0x7fef, &device.hardware).unwrap();
    let all = treat(DEVICE_CONTROL, 2, 0x7fff, Treatment::Pass);
    let written = device.hardware.bytes.borrow().clone();
    space.replace_filter(filter(&device, &all), &device.hardware).unwrap();
    assert_eq!(*device.hardware.bytes.borrow(), written, "the change itself writes nothing");
    let hardware = u32::from(written[0xa8]) | u32::from(written[0xa9]) << 8;
    assert_ne!(before[0xa8..0xaa], [0xef, 0x7f]);
    assert_eq!(space.read(word(DEVICE_CONTROL), &device.hardware).unwrap(), hardware & 0x7fff);
    // And back again: the guest's old value is gone, hardware's is taken over.
    space.replace_filter(filter(&device, &Policy::default()), &device.hardware).unwrap();
    assert_eq!(space.read(word(DEVICE_CONTROL), &device.hardware).unwrap(), hardware & 0x7fff);
}

#[test]
fn bars_command_and_msix_stay_as_the_guest_left_them() {
    let device = devices::network_pf();
    let mut space = create(&device, &Policy::default());
    space.write(Access::new(0x10, 4).unwrap(), u32::MAX, &device.hardware).unwrap();
    space.write(word(0x04), 0x0507, &device.hardware).unwrap();
    space.set_msix_enabled(true);
    let seen = |space: &VirtualConfigSpace| {
        [0x04, 0x10, 0x12, 0x72].map(|offset| space.read(word(offset), &device.hardware).unwrap())
    };
    let before = seen(&space);
    let strict = Policy { unknown: (Treatment::ReadOnly, rule()), ..Policy::default() };
    space.replace_filter(filter(&device, &strict), &device.hardware).unwrap();
    assert_eq!(seen(&space), before);
}

#[test]
fn hardware_that_fails_leaves_the_old_filter_in_force() {
    let mut device = devices::network_pf();
    let mut space = create(&device, &Policy::default());
    let old = space.filter().behaviour_hash();
    device.hardware.fails = true;
    let own = treat(UNKNOWN, 2, 0xffff, Treatment::Virtual(pciback::config::Initial::Hardware));
    assert!(space.replace_filter(filter(&device, &own), &device.hardware).is_err());
    assert_eq!(space.filter().behaviour_hash(), old);
    device.hardware.fails = false;
    let other = filter(&devices::disk(), &Policy::default());
    assert!(space.replace_filter(other, &device.hardware).is_err(), "a filter of another device");
    assert_eq!(space.filter().behaviour_hash(), old);
}

#[test]
fn a_restart_with_another_policy_takes_over_as_a_reload_does() {
    let mut device = devices::network_pf();
    let file = tempfile::tempfile().unwrap();
    file.set_len(FunctionImage::BYTES as u64).unwrap();
    let image = || FunctionImage::new(SharedMemory::map_file(&file, FunctionImage::BYTES).unwrap(), OWNER);
    VirtualConfigSpace::create(&device.spec, filter(&device, &Policy::default()), image()).unwrap();
    device.hardware.put(UNKNOWN.into(), &[0xcd, 0xab]);
    let own = treat(UNKNOWN, 2, 0xffff, Treatment::Virtual(pciback::config::Initial::Hardware));
    for written in [0xabcd, 0x5555] {
        // The first run seeds; a later one keeps what the guest wrote.
        let mut space =
            VirtualConfigSpace::resume(&device.spec, filter(&device, &own), image(), &device.hardware)
                .unwrap();
        assert_eq!(space.read(word(UNKNOWN), &device.hardware).unwrap(), written);
        space.write(word(UNKNOWN), 0x5555, &device.hardware).unwrap();
    }
}

#[test]
fn a_guest_goes_on_seeing_the_capabilities_that_it_has_seen() {
    let device = devices::network_pf();
    let space = create(&device, &Policy::default());
    let visible = space.image().visible_capabilities(device.spec.bytes.len());
    let listed = space.filter().capabilities().iter().filter(|(_, visible)| *visible);
    assert_eq!(visible, listed.map(|(capability, _)| capability.offset).collect::<Vec<_>>());
    let id = AnyId::Legacy(CapabilityId::POWER_MANAGEMENT);
    let sriov = AnyId::Extended(pciback::spec::ExtendedCapabilityId::SR_IOV);
    let policy = Policy {
        capabilities: vec![
            CapabilityOverride { which: id.into(), action: CapabilityAction::Hide, rule: rule() },
            CapabilityOverride { which: sriov.into(), action: CapabilityAction::Show, rule: rule() },
        ],
        ..Policy::default()
    };
    let filter = Filter::compile_keeping(&device.spec, &policy, Some(&visible)).unwrap();
    let now: Vec<u16> = filter
        .capabilities()
        .iter()
        .filter(|(_, seen)| *seen)
        .map(|(capability, _)| capability.offset)
        .collect();
    assert_eq!(now, visible);
    let deferred: Vec<_> = filter.deferred().iter().map(|waits| (waits.capability.id, waits.show)).collect();
    assert_eq!(deferred, [(id, false), (sriov, true)]);
}

#[test]
fn masked_writes_are_counted_by_dword_and_only_when_a_bit_is_lost() {
    let device = devices::network_pf();
    let mut space = create(&device, &Policy::default());
    let masked =
        |space: &VirtualConfigSpace| space.masked_writes().iter().copied().collect::<Vec<MaskedWrite>>();
    let same = space.read(word(DEVICE_CONTROL), &device.hardware).unwrap();
    space.write(word(DEVICE_CONTROL), same, &device.hardware).unwrap();
    space.write(word(UNKNOWN), 0x1234, &device.hardware).unwrap();
    assert_eq!(masked(&space), [], "what the guest reads already, and what passes, loses nothing");
    for _ in 0..2 {
        space.write(word(DEVICE_CONTROL), same ^ 0x2000, &device.hardware).unwrap();
        space.write(word(DEVICE_CONTROL), same, &device.hardware).unwrap();
    }
    let vendor = space.read(word(0), &device.hardware).unwrap();
    space.write(word(0), vendor ^ 0x00ff, &device.hardware).unwrap();
    let found = masked(&space);
    assert_eq!(found.len(), 1, "hardware would not let its ids be written either: {found:x?}");
    assert_eq!((found[0].dword, found[0].kept, found[0].dropped, found[0].writes), (0xa8, 0x2000, 0, 2));
    for value in 0..100_000u32 {
        let access = Access::new(value * 4 % 0x1000, 4).unwrap();
        space.write(access, !value & !0x8000, &device.hardware).unwrap();
    }
    assert!(masked(&space).len() <= 1024);
}

#[test]
fn a_reset_by_the_guest_never_passes_whatever_the_policy_says() {
    let device = devices::network_pf();
    let express = AnyId::Legacy(CapabilityId::PCI_EXPRESS);
    let action = CapabilityAction::Treat(Treatment::Pass);
    let whole = Policy {
        capabilities: vec![CapabilityOverride { which: express.into(), action, rule: rule() }],
        ..Policy::default()
    };
    for policy in [whole, treat(DEVICE_CONTROL, 2, 0xffff, Treatment::Pass)] {
        let mut space = create(&device, &policy);
        assert_eq!(space.filter().guarded(DEVICE_CONTROL) & 0xffff, 0x8000);
        let effect = space.write(word(DEVICE_CONTROL), 0x8000, &device.hardware).unwrap();
        assert_eq!(effect, Some(pciback::config::SideEffect::FunctionLevelReset));
        assert_eq!(device.hardware.bytes.borrow()[0xa9] & 0x80, 0);
        space.write(word(DEVICE_CONTROL), 0x7000, &device.hardware).unwrap();
        assert_eq!(device.hardware.bytes.borrow()[0xa9] & 0x70, 0x70, "the rest passes");
    }
}

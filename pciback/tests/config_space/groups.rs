//! Registers that repeat, bodies that are a vendor's, and what every capability has in common.

use std::sync::Arc;

use pciback::config::{
    Access, AnyId, CapabilityAction, CapabilityOverride, Filter, FunctionImage, FunctionSpec, Origin, Place,
    Policy, RegisterOverride, Rule, Treatment, VirtualConfigSpace,
};
use pciback::platform::SharedMemory;
use pciback::spec::{self, ExtendedCapabilityId};

use crate::devices;
use crate::hardware::Hardware;
use crate::model::OWNER;
use crate::rules::{alone, variants};

fn rule() -> Rule {
    Rule { reason: "a test".into(), origin: Origin::Policy { file: "test.yaml".into(), line: 1 } }
}

fn show(id: AnyId) -> Policy {
    let capabilities =
        vec![CapabilityOverride { which: id.into(), action: CapabilityAction::Show, rule: rule() }];
    Policy { capabilities, ..Policy::default() }
}

/// The offsets at which a filter has a register of this name.
fn places(filter: &Filter, name: &str) -> Vec<u16> {
    let named = filter.registers().iter().filter(|register| register.name == name);
    let mut offsets: Vec<_> = named.map(|register| register.offset).collect();
    offsets.dedup();
    offsets
}

#[test]
fn groups_that_follow_one_another_begin_where_the_last_one_ended() {
    let ide = AnyId::Extended(ExtendedCapabilityId::IDE);
    // Two link streams, then a selective stream with two address blocks and one with none.
    let function = alone(ide, 1, &[(4, 0x0001_2003), (0x1c, 2)]);
    let filter = Filter::compile(&function, &show(ide)).unwrap();
    assert_eq!(places(&filter, "Link IDE Stream Control"), [0x10c, 0x114]);
    assert_eq!(places(&filter, "Selective IDE Stream Capability"), [0x11c, 0x148]);
    assert_eq!(places(&filter, "IDE Address Association 1"), [0x130, 0x13c]);
}

#[test]
fn repeated_registers_end_with_their_capability() {
    let ide = AnyId::Extended(ExtendedCapabilityId::IDE);
    // It claims 256 selective streams, and a serial number stands behind the second.
    let mut function = alone(ide, 1, &[(0, 0x1301_0030), (4, 0x00ff_0002)]);
    function.bytes[0x130..0x134].copy_from_slice(&[3, 0, 1, 0]);
    let filter = Filter::compile(&function, &show(ide)).unwrap();
    assert_eq!(places(&filter, "Selective IDE Stream Capability"), [0x10c, 0x120]);
    assert_eq!(places(&filter, "Selective IDE Stream Status"), [0x114, 0x128]);
    for offset in [0x130, 0x134, 0x138] {
        let bits = filter.bits(offset);
        assert_eq!((bits.shadow_write, bits.hw_write), (0, 0), "{offset:#x}: the serial number is constant");
    }
}

#[test]
fn a_capability_that_says_it_has_no_bytes_keeps_its_header() {
    let id = AnyId::Extended(ExtendedCapabilityId::MMIO_REGISTER_BLOCK_LOCATOR);
    let function = alone(id, 1, &[(4, 0)]);
    let filter = Filter::compile(&function, &Policy::default()).unwrap();
    assert_eq!(filter.bits(0x100).fixed, u32::MAX, "the list is not hardware's");
}

#[test]
fn a_vendors_body_follows_the_policy_for_unknown_bytes_and_its_header_does_not() {
    let disk = devices::disk();
    for (treatment, passes) in [(Treatment::Pass, u32::MAX), (Treatment::ReadOnly, 0), (Treatment::ZERO, 0)] {
        let policy = Policy { unknown: (treatment, rule()), ..Policy::default() };
        let filter = Filter::compile(&disk.spec, &policy).unwrap();
        // VSEC at 0x120 and the vendor-specific capability at 0x60, whose length is the byte at 2.
        assert_eq!(filter.bits(0x128).hw_write, passes);
        assert_eq!(filter.bits(0x64).hw_write, passes);
        assert_eq!(filter.bits(0x124).hw_read, 0);
        assert_eq!(filter.bits(0x60).hw_write, passes & 0xff00_0000);
    }
}

/// A function whose events have all happened.
fn eventful(function: &mut FunctionSpec, filter: &Filter) -> Hardware {
    let mut hardware = Hardware::new(4096);
    for at in (0x40..4096).step_by(4) {
        let events = filter.bits(at as u16).zero_merge;
        hardware.cleared_by_one32(at, events);
        hardware.writable32(at, !events);
        for (byte, events) in function.bytes[at..at + 4].iter_mut().zip(events.to_le_bytes()) {
            *byte |= events;
        }
    }
    hardware.put(0, &function.bytes);
    hardware
}

/// Each capability, shown, with every second bit passed by a policy: what the guest writes as 0 stays.
#[test]
fn a_write_never_clears_an_event_that_the_guest_did_not_write() {
    for capability in spec::capabilities() {
        for (word, dwords) in variants(capability.id) {
            let mut function = alone(capability.id, *word, dwords);
            let mut policy = show(capability.id);
            let filter = Filter::compile(&function, &policy).unwrap();
            let hardware = eventful(&mut function, &filter);
            let begin = filter.capabilities()[0].0.offset;
            let range = begin..begin + 0x60;
            policy.registers = range
                .clone()
                .step_by(4)
                .map(|at| RegisterOverride {
                    place: Place::Absolute(at),
                    width: 4,
                    mask: 0x5555_5555,
                    treatment: Treatment::Pass,
                    rule: rule(),
                })
                .collect();
            let filter = Arc::new(Filter::compile(&function, &policy).unwrap());
            let image = FunctionImage::new(SharedMemory::anonymous(FunctionImage::BYTES).unwrap(), OWNER);
            let mut space = VirtualConfigSpace::create(&function, filter, image).unwrap();
            let events = |hardware: &Hardware| -> Vec<u8> {
                let bytes = hardware.bytes.borrow();
                bytes.iter().zip(&hardware.cleared_by_one).map(|(byte, events)| byte & events).collect()
            };
            let before = events(&hardware);
            for size in [1u16, 2, 4] {
                for at in range.clone().step_by(usize::from(size)) {
                    let access = Access::new(u32::from(at), u32::from(size)).unwrap();
                    space.write(access, 0, &hardware).unwrap();
                    assert_eq!(events(&hardware), before, "{}: {size} at {at:#x}", capability.id);
                }
            }
        }
    }
}

/// Tables, lengths that are only an upper bound, and what could not be verified.
#[test]
fn only_these_capabilities_have_bytes_that_no_register_describes() {
    use pciback::spec::CapabilityId as Legacy;
    let mut ids: Vec<AnyId> = Vec::new();
    for capability in spec::capabilities() {
        for (word, dwords) in variants(capability.id) {
            let function = alone(capability.id, *word, dwords);
            let filter = Filter::compile(&function, &show(capability.id)).unwrap();
            let further = filter.segments().iter().any(|segment| {
                let register = segment.register.map(|index| &filter.registers()[usize::from(index)]);
                register.is_some_and(|register| register.name == "further registers")
            });
            if further && ids.last() != Some(&capability.id) {
                ids.push(capability.id);
            }
        }
    }
    let legacy = [Legacy::ENHANCED_ALLOCATION, Legacy::HYPER_TRANSPORT].map(AnyId::Legacy);
    let extended = [
        ExtendedCapabilityId::DPC,
        ExtendedCapabilityId::POWER_BUDGETING,
        ExtendedCapabilityId::ACS,
        ExtendedCapabilityId::MR_IOV,
        ExtendedCapabilityId::SHADOW_FUNCTIONS,
        ExtendedCapabilityId::IDE,
        ExtendedCapabilityId::CONFIG_ACCESS_CORRELATION,
        ExtendedCapabilityId::VIRTUAL_CHANNEL,
        ExtendedCapabilityId::VIRTUAL_CHANNEL_MFVC,
        ExtendedCapabilityId::MFVC,
        ExtendedCapabilityId::PMUX,
        ExtendedCapabilityId::MPCIE,
        ExtendedCapabilityId::RCRB_HEADER,
    ]
    .map(AnyId::Extended);
    assert_eq!(ids, [&legacy[..], &extended[..]].concat());
}

//! What a guest wrote that did not reach hardware, and that the proposed addition lets exactly that through.

use std::sync::Arc;

use pciback::config::{Access, ConfigSpace, Filter, FunctionImage, Policy, VirtualConfigSpace};
use pciback::platform::SharedMemory;
use pciback::policy::{Learned, PolicyFile, PolicySet, Subject, learn};
use proptest::prelude::*;

use crate::devices::{self, Device};
use crate::model::OWNER;

fn space(device: &Device, policy: &Policy) -> VirtualConfigSpace {
    let filter = Arc::new(Filter::compile(&device.spec, policy).unwrap());
    let image = FunctionImage::new(SharedMemory::anonymous(FunctionImage::BYTES).unwrap(), OWNER);
    VirtualConfigSpace::create(&device.spec, filter, image).unwrap()
}

fn learned(device: &Device, space: &VirtualConfigSpace) -> Learned {
    learn(&device.spec, space.filter(), space.masked_writes().iter())
}

fn set(addition: &str) -> PolicySet {
    PolicySet::new(vec![
        PolicyFile::parse("learned.yaml", addition).unwrap_or_else(|mistakes| panic!("{mistakes:?}")),
    ])
}

#[test]
fn the_82576s_device_control_is_proposed_with_its_risk() {
    let device = devices::network_pf();
    let mut space = space(&device, &Policy::default());
    let access = Access::new(0xa8, 2).unwrap();
    let before = space.read(access, &device.hardware).unwrap();
    space.write(access, before ^ 0x2000, &device.hardware).unwrap();
    let learned = learned(&device, &space);
    let register = &learned.registers[0];
    assert_eq!(
        (register.name.as_str(), register.capability.as_deref()),
        ("Device Control", Some("pci-express"))
    );
    assert_eq!((register.kept, register.never, register.writes), (0x2000, 0, 1));
    let addition = learned.addition.unwrap();
    assert!(addition.contains("- {at: Device Control, mask: 0x2000, action: pass}"), "{addition}");
    assert!(addition.contains("# risk: read requests larger than the host allows starve"), "{addition}");
}

#[test]
fn guarded_registers_are_named_as_such_and_never_proposed() {
    let device = devices::network_pf();
    let mut space = space(&device, &Policy::default());
    space.write(Access::new(0x10, 4).unwrap(), u32::MAX, &device.hardware).unwrap();
    space.write(Access::new(0x04, 2).unwrap(), 0x0007, &device.hardware).unwrap();
    space.write(Access::new(0x72, 2).unwrap(), 0x8000, &device.hardware).unwrap();
    let learned = learned(&device, &space);
    let names: Vec<&str> = learned.registers.iter().map(|register| register.name.as_str()).collect();
    assert_eq!(names, ["Command", "Base Address Register", "Message Control"]);
    assert!(learned.registers.iter().all(|register| register.never == register.kept | register.dropped));
    assert_eq!(learned.addition, None);
}

proptest! {
    /// Under the policy with the addition, the same writes lose nothing but what never passes.
    #[test]
    fn the_addition_lets_through_what_was_lost_and_nothing_else(
        which in 0usize..devices::all().len(),
        strict in any::<bool>(),
        writes in prop::collection::vec((0u16..0x1000, 0usize..3, any::<u32>()), 1..60),
    ) {
        let device = devices::all().swap_remove(which);
        let base = if strict { "profile: strict\n" } else { "" };
        let base = set(base).all().policy;
        let mut first = space(&device, &base);
        let drive = |space: &mut VirtualConfigSpace, hardware: &dyn ConfigSpace| {
            for (offset, width, value) in &writes {
                let width = 1 << width;
                let access = Access::new(u32::from(offset / width * width), u32::from(width)).unwrap();
                // A reset would end what is compared.
                space.write(access, *value, hardware).unwrap();
            }
        };
        drive(&mut first, &device.hardware);
        let found = learned(&device, &first);
        let Some(addition) = &found.addition else { return Ok(()) };
        let set = set(addition);
        let merged = set.merge(&Subject::of(&device.spec, None));
        prop_assert_eq!(merged.applied.len(), 1);
        let mut policy = base.clone();
        policy.registers.extend(merged.policy.registers.clone());
        let again = devices::all().swap_remove(which);
        let mut second = space(&again, &policy);
        prop_assert!(second.filter().refused().is_empty(), "{:?}", second.filter().refused());
        drive(&mut second, &again.hardware);
        for register in learned(&again, &second).registers {
            let before = found.registers.iter().find(|known| known.offset == register.offset && known.width == register.width);
            let never = before.map_or(0, |known| known.never);
            let proposed = before.map_or(0, |known| (known.kept | known.dropped) & !never);
            prop_assert_eq!((register.kept | register.dropped) & proposed, 0, "{:x?}", register);
        }
    }
}

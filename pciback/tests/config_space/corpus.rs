//! The dumps of many devices: hidden capabilities are unlinked wherever they stand, shipped policies fit their devices, and
//! any dump can be explained.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pciback::config::{
    Access, AnyId, CapabilityAction, CapabilityOverride, ConfigSpace, Filter, FunctionImage, FunctionSpec,
    Origin, Policy, Rule, VirtualConfigSpace,
};
use pciback::dump;
use pciback::platform::SharedMemory;
use pciback::policy::{Kind, PolicyFile, PolicySet, Subject, dumped_specs, explain};

use crate::model::OWNER;

/// Bytes that stay as they are.
struct Still(Vec<u8>);

impl ConfigSpace for Still {
    fn size(&self) -> u16 {
        self.0.len() as u16
    }

    fn read(&self, access: Access) -> std::io::Result<u32> {
        let at = usize::from(access.offset());
        let bytes = &self.0[at..at + usize::from(access.width().bytes())];
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn write(&self, _: Access, _: u32) -> std::io::Result<()> {
        Ok(())
    }
}

fn files(directory: &str, extension: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let paths = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|it| it == extension)).collect();
    found.sort();
    found
}

fn dumps() -> Vec<(String, FunctionSpec)> {
    let of = |path: &PathBuf| {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let functions = dump::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
        dumped_specs(&functions, None)
            .into_iter()
            .map(move |dumped| (name.clone(), dumped.spec))
            .collect::<Vec<_>>()
    };
    files("tests/dumps", "txt").iter().flat_map(of).collect()
}

/// What a guest finds that follows the pointers with accesses of one width: offsets in both lists.
fn walk_by_hand(space: &VirtualConfigSpace, hw: &Still, width: u32) -> Vec<u32> {
    let register = |at: u32, length: u32| {
        let parts = (0..length.div_ceil(width)).map(|part| {
            let at = at / width * width + part * width;
            (at, space.read(Access::new(at, width).unwrap(), hw).unwrap())
        });
        let value = parts.fold(0u64, |value, (from, part)| {
            if from < at {
                value | u64::from(part) >> (8 * (at - from))
            } else {
                value | u64::from(part) << (8 * (from - at))
            }
        });
        (value & ((1 << (8 * length)) - 1)) as u32
    };
    let mut found = Vec::new();
    let mut at = if register(6, 2) & 0x10 != 0 { register(0x34, 1) } else { 0 };
    while at != 0 {
        assert!(at >= 0x40 && !found.contains(&at), "{at:#x} after {found:x?}");
        found.push(at);
        at = register(at + 1, 1);
    }
    let mut at = if hw.0.len() > 0x100 { 0x100 } else { 0 };
    while at != 0 {
        let header = register(at, 4);
        if header == u32::MAX {
            break;
        }
        assert!(at >= 0x100 && !found.contains(&at), "{at:#x} after {found:x?}");
        if header & 0xffff != 0 {
            found.push(at);
        }
        at = header >> 20;
    }
    found
}

#[test]
fn a_hidden_capability_is_unlinked_wherever_it_stands_and_at_every_width() {
    let rule = || Rule { reason: "a test".into(), origin: Origin::BuiltIn { section: "test" } };
    let mut walks = 0;
    for (name, spec) in dumps() {
        let Ok(plain) = Filter::compile(&spec, &Policy::default()) else { continue };
        let null = |id: AnyId| {
            matches!(id, AnyId::Legacy(id) if id.0 == 0) || matches!(id, AnyId::Extended(id) if id.0 == 0)
        };
        let ids: Vec<AnyId> = plain.capabilities().iter().map(|(capability, _)| capability.id).collect();
        if ids.iter().copied().any(null) {
            // Its header looks like the end of the list by hand.
            continue;
        }
        // The first and the last of each list, and one in between.
        let legacy = ids.iter().filter(|id| matches!(id, AnyId::Legacy(_))).count();
        let mut places = vec![0, legacy / 2, legacy.saturating_sub(1), legacy, ids.len().saturating_sub(1)];
        places.dedup();
        let chosen = places.into_iter().filter_map(|place| ids.get(place).copied());
        for hidden in chosen.map(Some).chain([None]) {
            let capabilities = hidden
                .map(|id| CapabilityOverride {
                    which: id.into(),
                    action: CapabilityAction::Hide,
                    rule: rule(),
                })
                .into_iter()
                .collect();
            let policy = Policy { capabilities, ..Policy::default() };
            let filter = Arc::new(Filter::compile(&spec, &policy).unwrap());
            let expected: Vec<u32> = filter
                .capabilities()
                .iter()
                .filter(|(_, visible)| *visible)
                .map(|(capability, _)| u32::from(capability.offset))
                .collect();
            let seen = |id: AnyId| {
                filter.capabilities().iter().any(|(capability, seen)| capability.id == id && *seen)
            };
            assert!(!hidden.is_some_and(seen), "{name}: {hidden:?}");
            let image = FunctionImage::new(SharedMemory::anonymous(FunctionImage::BYTES).unwrap(), OWNER);
            let space = VirtualConfigSpace::create(&spec, filter, image).unwrap();
            let hardware = Still(spec.bytes.clone());
            for width in [1, 2, 4] {
                assert_eq!(walk_by_hand(&space, &hardware, width), expected, "{name}: {hidden:?} by {width}");
                walks += 1;
            }
        }
    }
    assert!(walks > 1000, "{walks}");
}

#[test]
fn the_shipped_policies_fit_the_devices_that_they_match() {
    let policies = files("../configs/policies", "yaml");
    let parsed = policies.iter().map(|path| {
        let text = std::fs::read_to_string(path).unwrap();
        PolicyFile::parse(&path.file_name().unwrap().to_string_lossy(), &text).unwrap()
    });
    let set = PolicySet::new(parsed.collect());
    let mut matched: Vec<&str> = Vec::new();
    for (name, spec) in dumps().into_iter().filter(|(name, _)| name.starts_with("qemu-")) {
        let mut spec = spec;
        if name == "qemu-igbvf" {
            // Alone in its dump, a VF does not show its ids; the PF's file does.
            (spec.identity.vendor, spec.identity.device) = (0x8086, 0x10ca);
        }
        let merged = set.merge(&Subject::of(&spec, None));
        let explained = explain(&spec, &merged.policy, None);
        assert_eq!(explained.refused, [""; 0], "{name}");
        matched.extend(merged.applied.iter().map(|file| file.name.as_str()));
    }
    for expected in
        ["gpu.yaml", "intel-82576-vf.yaml", "nvme.yaml", "sata-ahci.yaml", "uhci.yaml", "virtio.yaml"]
    {
        assert!(matched.contains(&expected), "{expected} matches no dump: {matched:?}");
    }
}

#[test]
fn every_dump_can_be_explained_whatever_it_holds_and_each_byte_once() {
    for (name, spec) in dumps() {
        for kind in [None, Some(Kind::Virtual)] {
            let function = dump::DumpedFunction {
                address: spec.address,
                title: String::new(),
                bytes: spec.bytes.clone(),
                line: 1,
                regions: Vec::new(),
            };
            let spec = dumped_specs(&[function], kind).remove(0).spec;
            let explained = explain(&spec, &Policy::default(), None);
            if explained.not_assignable.is_some() {
                assert!(explained.registers.is_empty(), "{name}");
                continue;
            }
            let mut next = 0;
            for register in &explained.registers {
                assert_eq!(register.offset, next, "{name}: {register:?}");
                assert!(!register.read.is_empty() && !register.write.is_empty() && !register.rule.is_empty());
                next += register.width;
            }
            assert_eq!(usize::from(next), spec.bytes.len(), "{name}");
        }
    }
}

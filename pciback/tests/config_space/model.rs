//! Every access of a guest, at every offset and width, answers and does what the naive model says.

use std::collections::BTreeSet;
use std::sync::Arc;

use pciback::DomId;
use pciback::config::{
    Access, Filter, FunctionImage, FunctionSpec, GuestRom, ImageOwner, Policy, SideEffect, VirtualConfigSpace,
};
use pciback::platform::SharedMemory;
use proptest::prelude::*;

use crate::devices::{self, Device};

pub const OWNER: ImageOwner = ImageOwner { boot: 0x1234_5678_9abc_def0, domain: DomId(3) };

pub fn space(spec: &FunctionSpec) -> VirtualConfigSpace {
    space_under(spec, &Policy::default())
}

pub fn space_under(spec: &FunctionSpec, policy: &Policy) -> VirtualConfigSpace {
    let filter = Filter::compile(spec, policy).unwrap();
    let image = FunctionImage::new(SharedMemory::anonymous(FunctionImage::BYTES).unwrap(), OWNER);
    VirtualConfigSpace::create(spec, Arc::new(filter), image).unwrap()
}

/// One write and what it leaves, then reads of every width around it.
pub fn check(device: &mut Device, space: &mut VirtualConfigSpace, offset: u32, size: u32, value: u32) {
    let access = Access::new(offset, size).unwrap();
    let context = format!("{}: write {value:#x} of {size} at {offset:#x}", device.name);
    let resets = device.oracle.write(offset as usize, size as usize, value);
    let effect = space.write(access, value, &device.hardware).unwrap();
    assert_eq!(effect == Some(SideEffect::FunctionLevelReset), resets, "{context}: {effect:?}");
    let asked = match effect {
        Some(SideEffect::VpdRead { register, address }) => {
            // Any data will do, each address other ones.
            let data = 0x5a00_0000 | u32::from(address);
            space.show_vpd(register, data);
            device.oracle.vpd_read(data);
            Some(address)
        }
        _ => None,
    };
    assert_eq!(asked, device.oracle.vpd_asked, "{context}: {effect:?}");
    let seen = device.hardware.take_seen();
    assert!(seen.iter().filter(|seen| seen.write).count() <= 1, "{context}: {seen:?}");
    assert!(seen.iter().filter(|seen| !seen.write).count() <= 1, "{context}: {seen:?}");
    for seen in &seen {
        assert_eq!((seen.offset, seen.width), (access.offset(), access.width()), "{context}");
    }
    if device.oracle.bytes != *device.hardware.bytes.borrow() {
        let hardware = device.hardware.bytes.borrow();
        let at = device.oracle.bytes.iter().zip(hardware.iter()).position(|(a, b)| a != b).unwrap();
        panic!("{context}: hardware at {at:#x}: {:#x}, not {:#x}", hardware[at], device.oracle.bytes[at]);
    }
    for size in [1, 2, 4] {
        for offset in ((offset & !3)..(offset & !3) + 4).step_by(size) {
            check_read(device, space, offset, size as u32, &context);
        }
    }
}

fn check_read(device: &Device, space: &VirtualConfigSpace, offset: u32, size: u32, context: &str) {
    let access = Access::new(offset, size).unwrap();
    let read = space.read(access, &device.hardware).unwrap();
    let expected = device.oracle.read(offset as usize, size as usize);
    assert_eq!(read, expected, "{context}: read {size} at {offset:#x}: {read:#x}, not {expected:#x}");
    let seen = device.hardware.take_seen();
    assert!(seen.len() <= 1 && seen.iter().all(|seen| !seen.write), "{context}: {seen:?}");
    assert!(seen.iter().all(|seen| (seen.offset, seen.width) == (access.offset(), access.width())));
}

#[test]
fn every_register_reads_at_first_as_the_model_says() {
    for device in devices::all() {
        let space = space(&device.spec);
        for size in [1, 2, 4] {
            for offset in (0..0x1000).step_by(size as usize) {
                check_read(&device, &space, offset, size, &device.name);
            }
        }
    }
}

#[test]
fn every_offset_width_and_class_of_value_does_what_the_model_says() {
    for mut device in devices::all() {
        let mut space = space(&device.spec);
        for size in [1u32, 2, 4] {
            for offset in (0..0x1000).step_by(size as usize) {
                let now = device.oracle.read(offset as usize, size as usize);
                for value in [0, u32::MAX, 0x5555_5555, 0xaaaa_aaaa, 1, 0x8000_8080, now, !now] {
                    check(&mut device, &mut space, offset, size, value);
                }
                if offset < 0x200 {
                    for bit in 0..8 * size {
                        check(&mut device, &mut space, offset, size, 1 << bit);
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_sequence_of_accesses_does_what_the_model_says(
        which in 0usize..9,
        accesses in prop::collection::vec((0u32..0x400, 0u32..3, any::<u32>()), 1..200),
    ) {
        let mut device = devices::all().swap_remove(which);
        let mut space = space(&device.spec);
        for (place, width, value) in accesses {
            // Half of the accesses fall into the first 256 bytes.
            let place = if place < 0x200 { place & 0xff } else { place - 0x100 };
            let size = 1 << width;
            check(&mut device, &mut space, place & !(size - 1), size, value);
        }
    }

    #[test]
    fn config_space_of_noise_never_panics(
        bytes in prop::collection::vec(any::<u8>(), 0..1200),
        full in any::<bool>(),
        accesses in prop::collection::vec((0u32..0x1000, 0u32..3, any::<u32>()), 1..50),
    ) {
        let mut bytes = bytes;
        if full {
            bytes.resize(4096, 0x5a);
        }
        let mut hardware = crate::hardware::Hardware::new(4096);
        hardware.put(0, &bytes);
        let mut spec = devices::virtio().spec;
        if bytes.len() > 0x0e {
            bytes[0x0e] = 0;
            bytes[0x06] |= 0x10;
        }
        spec.bytes = bytes;
        if let Ok(filter) = Filter::compile(&spec, &Policy::default()) {
            let image = FunctionImage::new(SharedMemory::anonymous(FunctionImage::BYTES).unwrap(), OWNER);
            let mut space = VirtualConfigSpace::create(&spec, Arc::new(filter), image).unwrap();
            for (place, width, value) in accesses {
                let access = Access::new(place & !((1 << width) - 1), 1 << width).unwrap();
                space.write(access, value, &hardware).unwrap();
                space.read(access, &hardware).unwrap();
            }
        }
    }
}

#[test]
fn a_copy_of_a_rom_sizes_by_its_own_length_and_touches_no_hardware() {
    for (bytes, mask) in [(2048, 0xffff_f800), (0x1_0000, 0xffff_0000), (16 << 20, 0xff00_0000u32)] {
        let mut device = devices::virtio_with_rom();
        device.spec.rom = Some(GuestRom::Copy(bytes));
        let mut space = space(&device.spec);
        let at = |width| Access::new(0x30, width).unwrap();
        for (written, read) in [
            (u32::MAX, mask | 1),
            (0xffff_f800, mask),
            (0xffff_fffe, mask),
            (0xf300_0001, 0xf300_0001),
            (0, 0),
        ] {
            space.write(at(4), written, &device.hardware).unwrap();
            assert_eq!(space.read(at(4), &device.hardware).unwrap(), read, "{bytes:#x}: {written:#x}");
        }
        space.write(at(1), 1, &device.hardware).unwrap();
        space.unplace();
        assert_eq!(space.read(at(4), &device.hardware).unwrap(), 1, "{bytes:#x}");
        space.reset();
        assert_eq!(space.read(at(4), &device.hardware).unwrap(), 0, "{bytes:#x}");
        assert_eq!(device.hardware.take_seen(), []);
    }
}

#[test]
fn the_hosts_rom_is_sized_and_enabled_in_place_whatever_address_the_guest_writes() {
    let device = devices::virtio_with_the_hosts_rom();
    let mut space = space(&device.spec);
    let rom = Access::new(0x30, 4).unwrap();
    let hardware = || u32::from_le_bytes(device.hardware.bytes.borrow()[0x30..0x34].try_into().unwrap());
    assert_eq!(space.read(rom, &device.hardware).unwrap(), 0xfeb8_0000);
    for (written, read, reached) in [
        (0xffff_f800, 0xffff_f000, 0xfeb8_0000u32),
        (u32::MAX, 0xffff_f001, 0xfeb8_0001),
        (0xf300_0001, 0xf300_0001, 0xfeb8_0001),
        (0xfeb8_0000, 0xfeb8_0000, 0xfeb8_0000),
    ] {
        space.write(rom, written, &device.hardware).unwrap();
        assert_eq!(space.read(rom, &device.hardware).unwrap(), read, "{written:#x}");
        assert_eq!(hardware(), reached, "{written:#x}");
    }
}

#[test]
fn functions_that_differ_in_their_rom_alone_share_no_filter() {
    let with = |rom| FunctionSpec { rom, ..devices::network_pf().spec };
    let hosts = devices::network_pf().spec.resources[6].size as u32;
    let copies = [hosts, 2 * hosts].map(GuestRom::Copy);
    let roms = [None, Some(GuestRom::OfHost), Some(copies[0]), Some(copies[1])];
    let inputs: BTreeSet<Vec<u8>> = roms.iter().map(|rom| Filter::inputs(&with(*rom))).collect();
    assert_eq!(inputs.len(), roms.len());
}

#[test]
fn bars_size_in_any_order_and_at_any_width() {
    let device = devices::disk();
    let mut space = space(&device.spec);
    let put = |space: &mut VirtualConfigSpace, offset, size, value| {
        space.write(Access::new(offset, size).unwrap(), value, &device.hardware).unwrap();
    };
    let get = |space: &VirtualConfigSpace, offset| {
        space.read(Access::new(offset, 4).unwrap(), &device.hardware).unwrap()
    };
    for bytes in
        [[0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17], [0x17, 0x13, 0x10, 0x14, 0x16, 0x12, 0x15, 0x11]]
    {
        for offset in bytes {
            put(&mut space, offset, 1, 0xff);
        }
        // 8 GiB: all of the lower register, the lowest bit of the upper.
        assert_eq!((get(&space, 0x10), get(&space, 0x14)), (0x0000_000c, 0xffff_fffe));
        put(&mut space, 0x14, 2, 0x0038);
        put(&mut space, 0x16, 2, 0);
        put(&mut space, 0x10, 4, 0);
        assert_eq!((get(&space, 0x10), get(&space, 0x14)), (0x0000_000c, 0x0000_0038));
    }
    assert_eq!(device.hardware.take_seen(), []);
}

#[test]
fn an_access_that_hardware_fails_is_an_error_and_changes_nothing() {
    let mut device = devices::network_pf();
    let mut space = space(&device.spec);
    device.hardware.fails = true;
    let command = Access::new(4, 2).unwrap();
    assert!(space.write(command, 0x0407, &device.hardware).is_err());
    assert!(space.read(command, &device.hardware).is_err());
    device.hardware.fails = false;
    assert_eq!(space.read(command, &device.hardware).unwrap() & 0x0400, 0);
}

#[test]
fn a_function_that_is_being_reset_reads_all_ones_and_is_left_alone() {
    let device = devices::network_pf();
    let mut space = space(&device.spec);
    space.image_mut().set_resetting(true);
    let access = Access::new(4, 2).unwrap();
    assert_eq!(space.read(access, &device.hardware).unwrap(), 0xffff);
    assert_eq!(space.write(access, 7, &device.hardware).unwrap(), None);
    assert_eq!(device.hardware.take_seen(), []);
}

#[test]
fn a_reset_brings_back_what_the_guest_found_at_first() {
    let device = devices::network_pf();
    let mut space = space(&device.spec);
    for offset in [0x10, 0x30, 0x3c, 0x44, 0x50, 0x54, 0x70, 0xa8, 0x108] {
        space.write(Access::new(offset, 4).unwrap(), !0x8000, &device.hardware).unwrap();
    }
    space.set_msix_enabled(true);
    space.reset();
    let fresh = devices::network_pf();
    for offset in [0x10, 0x30, 0x3c, 0x44, 0x50, 0x54, 0x70, 0x108] {
        let access = Access::new(offset, 4).unwrap();
        let expected = fresh.oracle.read(offset as usize, 4);
        assert_eq!(space.read(access, &device.hardware).unwrap(), expected, "{offset:#x}");
    }
}

const UNCORRECTABLE_STATUS: usize = 0x104;
const UNSUPPORTED_REQUEST: u32 = 1 << 20;

#[test]
fn an_error_that_the_guest_clears_is_gone_for_the_guest_and_stays_in_hardware() {
    let device = devices::network_pf();
    let mut space = space(&device.spec);
    let before = device.hardware.bytes.borrow().clone();
    let access = Access::new(UNCORRECTABLE_STATUS as u32, 4).unwrap();
    space.write(access, UNSUPPORTED_REQUEST, &device.hardware).unwrap();
    assert_eq!(space.read(access, &device.hardware).unwrap(), 0x0000_4020);
    // Device Status and Status, with all that is writable beside them.
    for (offset, left) in [(0xaa, 0x0000), (0x06, 0x0010)] {
        space.write(Access::new(offset, 2).unwrap(), 0xffff, &device.hardware).unwrap();
        let read = space.read(Access::new(offset, 2).unwrap(), &device.hardware).unwrap();
        assert_eq!(read & !0x0039, left & !0x0039, "{offset:#x}: {read:#x}");
    }
    assert_eq!(*device.hardware.bytes.borrow(), before);
}

#[test]
fn an_error_that_comes_after_the_host_has_cleared_hardware_shows_again() {
    let device = devices::network_pf();
    let access = Access::new(UNCORRECTABLE_STATUS as u32, 4).unwrap();
    let set = |value: u32| {
        device.hardware.bytes.borrow_mut()[UNCORRECTABLE_STATUS..UNCORRECTABLE_STATUS + 4]
            .copy_from_slice(&value.to_le_bytes());
    };
    // The guest looks in between; or the host says that it has cleared them.
    let looks: fn(&mut VirtualConfigSpace, &Device, Access) = |space, device, access| {
        assert_eq!(space.read(access, &device.hardware).unwrap(), 0);
    };
    let hears: fn(&mut VirtualConfigSpace, &Device, Access) = |space, _, _| space.events_cleared();
    for between in [looks, hears] {
        let mut space = space(&device.spec);
        set(UNSUPPORTED_REQUEST);
        space.write(access, u32::MAX, &device.hardware).unwrap();
        assert_eq!(space.read(access, &device.hardware).unwrap(), 0, "the guest has cleared it");
        set(0);
        between(&mut space, &device, access);
        set(UNSUPPORTED_REQUEST);
        assert_eq!(space.read(access, &device.hardware).unwrap(), UNSUPPORTED_REQUEST);
    }
}

#[test]
fn a_guest_cannot_clear_errors_before_they_happen() {
    let device = devices::network_pf();
    let mut space = space(&device.spec);
    let access = Access::new(UNCORRECTABLE_STATUS as u32, 4).unwrap();
    space.write(access, u32::MAX, &device.hardware).unwrap();
    device.hardware.bytes.borrow_mut()[UNCORRECTABLE_STATUS + 1] |= 0x80;
    assert_eq!(space.read(access, &device.hardware).unwrap(), 0x8000);
}

#[test]
fn what_protocol_requests_enable_reads_as_enabled() {
    let device = devices::network_pf();
    let mut space = space(&device.spec);
    let read = |space: &VirtualConfigSpace, offset| {
        space.read(Access::new(offset, 2).unwrap(), &device.hardware).unwrap()
    };
    space.set_msi_enabled(true);
    space.set_msix_enabled(true);
    assert_eq!((read(&space, 0x52), read(&space, 0x72)), (0x0181, 0x8009));
    space.set_msi_enabled(false);
    space.set_msix_enabled(false);
    assert_eq!((read(&space, 0x52), read(&space, 0x72)), (0x0180, 0x0009));
    let (msi, msix) = (space.msi().unwrap(), space.msix().unwrap());
    assert_eq!((msi.offset, msi.address_64, msi.maskable, msi.vectors), (0x50, true, true, 1));
    assert_eq!((msix.offset, msix.table_size, msix.table_bar, msix.table_offset), (0x70, 10, 3, 0));
    assert_eq!((msix.pba_bar, msix.pba_offset), (3, 0x2000));
}

#[test]
fn writes_tell_the_server_what_they_ask_for() {
    let device = devices::network_pf();
    let mut space = space(&device.spec);
    let mut write = |offset, size, value| {
        space.write(Access::new(offset, size).unwrap(), value, &device.hardware).unwrap()
    };
    assert_eq!(write(4, 2, 0x0144), None, "nothing changes");
    assert_eq!(write(4, 2, 0x0542), Some(SideEffect::Command { changed: 0x0406, value: 0x0542 }));
    assert_eq!(write(4, 1, 0x46), Some(SideEffect::Command { changed: 4, value: 0x46 }));
    assert_eq!(write(5, 1, 0x01), Some(SideEffect::Command { changed: 0x0400, value: 0x0100 }));
    assert_eq!(write(0x44, 1, 3), Some(SideEffect::PowerState { state: 3 }));
    assert_eq!(write(0x44, 2, 3), None);
    assert_eq!(write(0x52, 2, 1), Some(SideEffect::MsiControl { value: 0x0181 }));
    assert_eq!(write(0x70, 4, 0xc000_0000), Some(SideEffect::MsixControl { value: 0xc009 }));
    assert_eq!(write(0xa9, 1, 0x80), Some(SideEffect::FunctionLevelReset));
}

#[test]
fn a_write_that_is_the_guests_alone_is_one_access() {
    let device = devices::virtio();
    let mut space = space(&device.spec);
    space.write(Access::new(0x48, 4).unwrap(), 1, &device.hardware).unwrap();
    assert_eq!(device.hardware.take_seen().len(), 1);
    // A write that would clear no event and store nothing is none.
    space.write(Access::new(0x06, 2).unwrap(), 0, &device.hardware).unwrap();
    assert_eq!(device.hardware.take_seen(), []);
}

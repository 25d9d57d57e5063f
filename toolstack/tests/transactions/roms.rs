//! Expansion ROMs: an HVM guest reads a copy of the device's, or a file, where a policy says so. Those of PV guests are in `pv_roms`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use pciback::Sbdf;
use pciback::serve::hvm::wire::xen::{Items, memory, read_items};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Success};

use crate::frontend::{Frontend, read_op};
use crate::hvm::{DEVICE_CONTROL, Guest, SLOT, VENDOR, WIN, attach_at};
use crate::world::{Service, WEB, World, bdf, dry_run, wait_until, warnings};

/// A card with a ROM of 32 KiB and FLR, and one without a ROM.
const HOST: &str = r#"
drivers: [pciback, pci-stub]
models:
  card:
    reset-methods: [flr]
    bars: {0: 4000, 6: 8000}
    config: |
      00: 86 80 10 00 00 00 10 00 02 00 00 03 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 00 00 00
      40: 00 00 00 00 ee ee ee ee 00 00 00 00 00 00 00 00
      a0: 10 00 02 00 20 80 00 10 00 00 00 00 11 04 00 00
      b0: 00 00 11 00 00 00 00 00 00 00 00 00 00 00 00 00
  bare:
    reset-methods: [flr]
    bars: {0: 4000}
    config: |
      00: 86 80 11 00 00 00 10 00 02 00 00 03 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 00 00 00
      a0: 10 00 02 00 20 80 00 10 00 00 00 00 11 04 00 00
      b0: 00 00 11 00 00 00 00 00 00 00 00 00 00 00 00 00
functions:
  - {address: "02:00.0", model: card}
  - {address: "03:00.0", model: bare}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
"#;
const FROM_DEVICE: &str = "match: {class: '03'}\nrom: device\n";
const COMMAND: u16 = 4;
const ROM: u16 = 0x30;
/// A register outside of capabilities.
const UNKNOWN: u16 = 0x44;
const PLACE: u64 = 0xf300_0000;

fn card() -> Sbdf {
    bdf("02:00.0")
}

fn bare() -> Sbdf {
    bdf("03:00.0")
}

/// A ROM with one image that has nearly so many bytes: the device has more than the image.
fn rom(bytes: usize) -> Vec<u8> {
    let mut rom: Vec<u8> = (0..bytes).map(|at| (at * 7) as u8).collect();
    rom[..2].copy_from_slice(&[0x55, 0xaa]);
    rom[0x18..0x1a].copy_from_slice(&[0x40, 0]);
    rom[0x40..0x48].copy_from_slice(b"PCIR\x86\x80\x10\x00");
    rom[0x50..0x52].copy_from_slice(&((bytes / 512) as u16).to_le_bytes());
    rom[0x55] = 0x80;
    rom
}

fn world_with_guest() -> (World, Guest) {
    let world = World::of(HOST);
    world.simulation.set_rom(card(), rom(20 << 10));
    let guest = Guest::new(&world);
    (world, guest)
}

fn attached(policy: &str) -> (World, Guest, Service) {
    let (world, guest) = world_with_guest();
    let service = world.start_with(&[policy]);
    service.hold(card()).unwrap();
    attach_at(&service, card(), SLOT).unwrap();
    wait_until("the function is served", || guest.read(SLOT, VENDOR, 2) == 0x8086);
    (world, guest, service)
}

/// The guest's firmware places the ROM, its driver enables it.
fn enable(guest: &Guest) {
    guest.write(ROM, 4, PLACE as u32 | 1);
    guest.write(COMMAND, 2, 2);
}

fn assert_answers(guest: &Guest, contents: &[u8]) {
    for at in [0, 0x42, contents.len() / 2 + 1, contents.len() - 4] {
        let expected = u32::from_le_bytes(contents[at..at + 4].try_into().unwrap());
        assert_eq!(guest.ask(&memory(PLACE + at as u64, 4, None)), u64::from(expected), "at {at:#x}");
    }
}

fn copy_of(world: &World, address: Sbdf) -> PathBuf {
    world.settings().run_directory.join("images").join(format!("{address}.rom"))
}

#[test]
fn a_guest_finds_the_devices_rom_as_a_bar_that_it_sizes_places_and_enables() {
    let (world, guest, service) = attached(FROM_DEVICE);
    assert_eq!(guest.read(SLOT, ROM, 4), 0);
    guest.write(COMMAND, 2, 2);
    guest.write(ROM, 4, 0xffff_ffff);
    assert_eq!(guest.read(SLOT, ROM, 4), 0xffff_8001, "20 KiB need 32");
    guest.write(ROM, 4, 0xffff_f800);
    assert_eq!(guest.read(SLOT, ROM, 4), 0xffff_8000);
    guest.write(ROM, 4, PLACE as u32);
    assert!(!guest.is_taken(PLACE), "it is not enabled");
    guest.write(ROM, 1, 1);
    assert_answers(&guest, &rom(20 << 10));
    assert_eq!(guest.ask(&memory(PLACE + (20 << 10), 8, None)), u64::MAX, "behind the contents");

    guest.ask(&memory(PLACE, 4, Some(0)));
    assert_answers(&guest, &rom(20 << 10));
    assert_eq!(world.simulation.peek(card(), ROM, 4)[0] & 1, 0, "hardware's stays off");

    guest.write(ROM, 4, PLACE as u32 + 0x10_0001);
    assert!(!guest.is_taken(PLACE) && guest.is_taken(PLACE + 0x10_0000), "moved");
    guest.write(COMMAND, 2, 0);
    assert!(!guest.is_taken(PLACE + 0x10_0000), "memory space is off");
    guest.write(COMMAND, 2, 2);
    assert!(guest.is_taken(PLACE + 0x10_0000));
    service.detach(WIN, card()).unwrap();
    assert!(!guest.is_taken(PLACE + 0x10_0000) && !copy_of(&world, card()).exists(), "detached");
}

/// Firmware and drivers copy ROMs by `rep movs`, which Xen sends as one request.
#[test]
fn a_string_instruction_copies_the_rom_into_the_guests_memory() {
    let (_world, guest, _service) = attached(FROM_DEVICE);
    enable(&guest);
    let contents = rom(20 << 10);
    for (from, size, count) in [(0, 4, 1024), (0x1003, 1, 4096), (0x2000, 8, 1)] {
        let items = Items { memory: 0x9_0ffe, count, down: false };
        guest.ask(&read_items(PLACE + from, size, items));
        let end = from as usize + (size * count) as usize;
        assert!(guest.memory(0x9_0ffe, (size * count).into()) == contents[from as usize..end], "{from:#x}");
    }
    let items = Items { memory: 0xa_0ffc, count: 1024, down: true };
    guest.ask(&read_items(PLACE + 0xffc, 4, items));
    assert!(guest.memory(0xa_0000, 4096) == contents[..4096], "from high addresses to low ones");
}

#[test]
fn the_copy_is_used_after_a_restart_even_if_its_source_changed() {
    let (world, guest, service) = attached(FROM_DEVICE);
    enable(&guest);
    world.simulation.set_rom(card(), Vec::new());
    service.kill();
    let service = world.start_with(&["match: {class: '03'}\nrom: hide\n"]);
    assert_answers(&guest, &rom(20 << 10));
    assert!(service.problems().is_empty(), "{:?}", service.problems());
    service.detach(WIN, card()).unwrap();
    assert!(!copy_of(&world, card()).exists());
    attach_at(&service, card(), SLOT).unwrap();
    wait_until("the function is served", || guest.read(SLOT, VENDOR, 2) == 0x8086);
    guest.write(ROM, 4, 0xffff_ffff);
    assert_eq!(guest.read(SLOT, ROM, 4), 0, "the next attachment follows the policy of its time");
}

#[test]
fn new_policies_change_registers_of_a_function_in_use_and_not_its_rom() {
    let (_world, guest, service) = attached("match: {class: '03'}\nrom: device\nprofile: hidden\n");
    enable(&guest);
    assert_eq!(guest.read(SLOT, UNKNOWN, 4), 0);
    // There are no files.
    service.call(Request::PolicyReload).unwrap();
    wait_until("the built-in rules are in force", || guest.read(SLOT, UNKNOWN, 4) == 0xeeee_eeee);
    assert_eq!(guest.read(SLOT, ROM, 4), PLACE | 1);
    assert_answers(&guest, &rom(20 << 10));
}

#[test]
fn a_function_level_reset_takes_the_rom_away_until_the_guest_places_it_again() {
    let (_world, guest, _service) = attached(FROM_DEVICE);
    enable(&guest);
    guest.write(DEVICE_CONTROL, 2, 1 << 15);
    wait_until("the reset has ended", || guest.read(SLOT, VENDOR, 2) == 0x8086);
    assert_eq!(guest.read(SLOT, ROM, 4), 0);
    assert!(!guest.is_taken(PLACE));
    enable(&guest);
    assert_answers(&guest, &rom(20 << 10));
}

type Damage = fn(&Path);

#[test]
fn a_copy_that_is_lost_or_damaged_is_reported_and_reads_all_ones() {
    let damages: [(&str, Damage); 3] = [
        ("lost", |copy| fs::remove_file(copy).unwrap()),
        ("cut short", |copy| fs::write(copy, &rom(20 << 10)[..512]).unwrap()),
        ("changed", |copy| fs::write(copy, vec![0; 32 << 10]).unwrap()),
    ];
    for (what, damage) in damages {
        let (world, guest, service) = attached(FROM_DEVICE);
        enable(&guest);
        service.kill();
        damage(&copy_of(&world, card()));
        let service = world.start_with(&[FROM_DEVICE]);
        assert_eq!(guest.ask(&memory(PLACE, 4, None)), u64::from(u32::MAX), "{what}");
        assert_eq!(guest.read(SLOT, ROM, 4), PLACE | 1, "{what}");
        let problems = service.problems().join("\n");
        assert!(problems.contains("expansion ROM") && problems.contains("02:00.0.rom"), "{what}: {problems}");
        service.detach(WIN, card()).unwrap();
        world.assert_held(&service, card(), what);
    }
}

fn from_file(world: &World, path: &Path) -> (Service, Result<Success, Failure>) {
    let service = world.start_with(&[&format!("match: {{class: '03'}}\nrom: {}\n", path.display())]);
    service.hold(bare()).unwrap();
    let answer = attach_at(&service, bare(), SLOT);
    (service, answer)
}

#[test]
fn a_file_is_given_to_a_function_that_has_no_rom_of_its_own() {
    let (world, guest) = world_with_guest();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("card.rom");
    fs::write(&path, rom(1024)).unwrap();
    let (_service, answer) = from_file(&world, &path);
    answer.unwrap();
    wait_until("the function is served", || guest.read(SLOT, VENDOR, 2) == 0x8086);
    guest.write(ROM, 4, 0xffff_ffff);
    assert_eq!(guest.read(SLOT, ROM, 4), 0xffff_f801, "2 KiB are the least");
    enable(&guest);
    assert_answers(&guest, &rom(1024));
}

#[test]
fn an_invalid_or_writable_rom_file_is_refused_and_the_function_stays_held() {
    let make = |change: &dyn Fn(&Path)| {
        let (world, _guest) = world_with_guest();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("card.rom");
        change(&path);
        let (service, answer) = from_file(&world, &path);
        let failure = answer.unwrap_err();
        assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
        world.assert_held(&service, bare(), "refused");
        assert!(!copy_of(&world, bare()).exists());
        let file = path.display().to_string();
        assert!(failure.message.contains(&file) && failure.hint.is_some(), "{failure}");
        failure.message
    };
    let written = |bytes: &[u8]| make(&|path| fs::write(path, bytes).unwrap());
    for (message, expected) in [
        (make(&|_| {}), "No such file"),
        (make(&|path| fs::create_dir(path).unwrap()), "no regular file"),
        (
            make(&|path| {
                fs::write(path, rom(1024)).unwrap();
                fs::set_permissions(path, fs::Permissions::from_mode(0o664)).unwrap();
            }),
            "others may write to it (mode 664)",
        ),
        (written(b""), "it has 0x0 bytes"),
        (written(b"NVGI"), "it has 0x4 bytes"),
        (written(&[0xff; 1024]), "ff ff instead of 55 aa"),
        (written(&rom(4096)[..2048]), "ends at 0x1000, and only 0x800 bytes are there"),
        (written(&[rom(4096), vec![0; 16 << 20]].concat()), "more than 0x1000000 bytes"),
    ] {
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn a_dry_run_and_show_name_a_file_that_is_no_rom() {
    let (world, _guest) = world_with_guest();
    let service = world.start_with(&["match: {class: '03'}\nrom: /nowhere/card.rom\n"]);
    service.hold(bare()).unwrap();
    let refused = dry_run(&service, WIN, bare()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Refused);
    assert!(refused.message.contains("/nowhere/card.rom: No such file"), "{refused}");
    let Ok(Success::Shown(shown)) = service.call(Request::Show { address: bare() }) else { panic!() };
    assert!(
        shown.obstacles.iter().any(|obstacle| obstacle.message.contains("/nowhere/card.rom")),
        "{shown:?}"
    );
    dry_run(&service, WEB, bare()).unwrap();
}

#[test]
fn a_device_whose_rom_cannot_be_read_is_refused_with_what_to_do_instead() {
    for (function, contents, expected) in [
        (bare(), None, "it has none"),
        (card(), Some(Vec::new()), "the kernel cannot read it"),
        (card(), Some(vec![0xff; 4096]), "ff ff instead of 55 aa"),
    ] {
        let (world, _guest) = world_with_guest();
        if let Some(contents) = contents {
            world.simulation.set_rom(function, contents);
        }
        let service = world.start_with(&[FROM_DEVICE]);
        service.hold(function).unwrap();
        let failure = attach_at(&service, function, SLOT).unwrap_err();
        assert!(failure.code == ErrorCode::Refused && failure.message.contains(expected), "{failure}");
        let asked = "give 0000:0X:00.0 with an expansion ROM to 'win' (domain 7), as 'rom: device' of more.yaml says: the ROM of 0000:0X:00.0: ";
        let asked = asked.replace('X', &function.bus().to_string());
        assert!(failure.message.starts_with(&asked), "{failure}");
        assert!(failure.hint.unwrap().contains("'rom: FILE'"));
        world.assert_held(&service, function, expected);
    }
}

#[test]
fn a_pv_guest_gets_no_file_and_attach_warns() {
    let (world, _guest) = world_with_guest();
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_with(&["match: {class: '03'}\nrom: /nowhere/card.rom\n"]);
    service.hold(card()).unwrap();
    let said = warnings(service.attach(WEB, card()));
    assert!(said.contains("'rom: /nowhere/card.rom'") && said.contains("PV guest"), "{said}");
    assert_eq!(frontend.ask(&read_op(0, ROM.into(), 4)).1, 0);
}

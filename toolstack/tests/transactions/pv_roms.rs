//! Expansion ROMs of PV guests: where a policy says so, a guest maps the device's own and switches its decoder.

use std::collections::BTreeSet;

use pciback::platform::Resource;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Success};

use crate::frontend::{Frontend, write_op};
use crate::world::{DB, Service, WEB, World, bdf, dry_run, wait_until, warnings};

/// Cards with FLR: one with a ROM of 32 KiB; one without; one whose ROM has no place; one whose ROM's decoder cannot be switched off; and
/// one with a ROM in the page of another function's BAR.
const HOST: &str = r#"
drivers: [pciback, pci-stub]
models:
  card:
    reset-methods: [flr]
    bars: {0: 4000, 6: 8000}
    config: &config |
      00: 86 80 10 00 00 00 10 00 02 00 00 03 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 00 00 00
      a0: 10 00 02 00 20 80 00 10 00 00 00 00 11 04 00 00
      b0: 00 00 11 00 00 00 00 00 00 00 00 00 00 00 00 00
  bare: {reset-methods: [flr], bars: {0: 4000}, config: *config}
  stuck: {reset-methods: [flr], bars: {0: 4000, 6: 8000}, config: *config, writable: {30: ffff8000}}
  small: {reset-methods: [flr], bars: {0: 4000, 6: 800}, config: *config}
  tiny: {reset-methods: [flr], bars: {0: 100}, config: *config}
functions:
  - {address: "00:01.0", model: root-port, buses: [2, 2]}
  - {address: "00:02.0", model: root-port, buses: [3, 3]}
  - {address: "00:03.0", model: root-port, buses: [4, 4]}
  - {address: "00:04.0", model: root-port, buses: [5, 5]}
  - {address: "00:05.0", model: root-port, buses: [6, 6]}
  - {address: "00:06.0", model: root-port, buses: [7, 7]}
  - {address: "02:00.0", model: card, bars: {6: f0000000}}
  - {address: "03:00.0", model: bare}
  - {address: "04:00.0", model: card, bars: {6: "0"}}
  - {address: "05:00.0", model: stuck}
  - {address: "06:00.0", model: small, bars: {6: f0100000}}
  - {address: "07:00.0", model: tiny, bars: {0: f0100800}}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
  - {id: 2, name: db, type: pv, passthrough: true}
"#;
const FROM_DEVICE: &str = "match: {class: '03'}\nrom: device\n";
const COMMAND: u16 = 4;
const MEMORY: u8 = 1 << 1;
const ROM: u32 = 0x30;
const PLACE: u32 = 0xf000_0000;
const FRAMES: std::ops::Range<u64> = 0xf_0000..0xf_0008;
const DEVICE_CONTROL: u32 = 0xa8;
const FLR: u32 = 1 << 15;

fn card() -> Sbdf {
    bdf("02:00.0")
}

fn attached(policy: &str) -> (World, Frontend, Service) {
    let world = World::of(HOST);
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_with(&[policy]);
    service.hold(card()).unwrap();
    service.attach(WEB, card()).unwrap();
    (world, frontend, service)
}

fn write(frontend: &Frontend, offset: u32, size: u32, value: u32) {
    assert_eq!(frontend.ask(&write_op(0, offset, size, value)).0, 0);
}

/// What hardware's register holds.
fn register(world: &World, address: Sbdf) -> u32 {
    u32::from_le_bytes(world.simulation.peek(address, ROM as u16, 4).try_into().unwrap())
}

fn frames_of(world: &World, domain: DomId) -> BTreeSet<u64> {
    let ranges = world.simulation.grants(domain).frames;
    ranges.into_iter().flat_map(|(first, end)| first..end).filter(|frame| FRAMES.contains(frame)).collect()
}

#[test]
fn a_pv_guest_may_map_the_devices_rom_and_enables_it_in_hardware() {
    let world = World::of(HOST);
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_with(&[FROM_DEVICE]);
    service.hold(card()).unwrap();
    let said = warnings(service.attach(WEB, card()));
    assert!(said.contains("one address decoder for its ROM and its BARs"), "{said}");
    assert_eq!(frames_of(&world, WEB), FRAMES.collect());
    assert_eq!((frontend.read(0, ROM, 4), register(&world, card())), (PLACE, PLACE));

    write(&frontend, ROM, 4, 0xffff_f800);
    assert_eq!((frontend.read(0, ROM, 4), register(&world, card())), (0xffff_8000, PLACE), "it is sized");
    write(&frontend, ROM, 4, 0xe000_0001);
    assert_eq!((frontend.read(0, ROM, 4), register(&world, card())), (0xe000_0001, PLACE | 1), "not moved");
    assert_eq!(world.simulation.peek(card(), COMMAND, 1)[0] & MEMORY, MEMORY, "memory is decoded");
    write(&frontend, ROM, 1, 0);
    assert_eq!(register(&world, card()), PLACE);
}

#[test]
fn the_next_owner_finds_the_decoder_off_and_gets_none_that_no_policy_gives() {
    let (world, frontend, service) = attached("match: {class: '03', domain: web}\nrom: device\n");
    write(&frontend, ROM, 4, PLACE | 1);
    service.detach(WEB, card()).unwrap();
    world.assert_held(&service, card(), "detached");
    assert_eq!(register(&world, card()) & 1, 0, "off");
    let next = Frontend::load(&world, DB);
    service.attach(DB, card()).unwrap();
    assert!(frames_of(&world, DB).is_empty());
    write(&next, ROM, 4, PLACE | 1);
    assert_eq!((next.read(0, ROM, 4), register(&world, card()) & 1), (0, 0));
}

#[test]
fn a_decoder_that_firmware_left_on_is_off_while_a_guest_has_the_function_and_on_again_for_dom0() {
    for policy in [FROM_DEVICE, "match: {class: '03'}\nrom: hide\n"] {
        let world = World::of(HOST);
        let _frontend = Frontend::load(&world, WEB);
        world.simulation.poke(card(), ROM as u16, &(PLACE | 1).to_le_bytes());
        let service = world.start_with(&[policy]);
        service.hold(card()).unwrap();
        service.attach(WEB, card()).unwrap();
        assert_eq!(register(&world, card()), PLACE, "{policy}");
        service.detach(WEB, card()).unwrap();
        world.simulation.destroy(WEB);
        service.release(card()).unwrap();
        assert_eq!(register(&world, card()), PLACE | 1, "{policy}");
    }
}

#[test]
fn an_address_that_firmware_did_not_write_is_in_hardware_when_the_guest_enables_the_rom() {
    let world = World::of(HOST);
    let frontend = Frontend::load(&world, WEB);
    world.simulation.poke(card(), ROM as u16, &[0; 4]);
    let service = world.start_with(&[FROM_DEVICE]);
    service.hold(card()).unwrap();
    service.attach(WEB, card()).unwrap();
    write(&frontend, ROM, 1, 1);
    assert_eq!(register(&world, card()), PLACE | 1);
    // As after a reset of the device by its own registers.
    world.simulation.poke(card(), ROM as u16, &[0; 4]);
    write(&frontend, ROM, 4, PLACE | 1);
    assert_eq!(register(&world, card()), PLACE | 1);
}

#[test]
fn a_function_level_reset_switches_the_decoder_off() {
    let (world, frontend, _service) = attached(FROM_DEVICE);
    write(&frontend, ROM, 4, PLACE | 1);
    write(&frontend, DEVICE_CONTROL, 2, FLR);
    wait_until("the reset has ended", || frontend.read(0, 0, 2) == 0x8086);
    assert_eq!((frontend.read(0, ROM, 4), register(&world, card())), (PLACE, PLACE));
    write(&frontend, ROM, 4, PLACE | 1);
    assert_eq!(register(&world, card()), PLACE | 1);
}

#[test]
fn a_killed_service_leaves_the_guest_its_rom_and_the_next_one_takes_it_back() {
    let (world, frontend, service) = attached(FROM_DEVICE);
    write(&frontend, ROM, 4, PLACE | 1);
    service.kill();
    let service = world.start_with(&["match: {class: '03'}\nrom: hide\n"]);
    assert_eq!((frontend.read(0, ROM, 4), register(&world, card())), (PLACE | 1, PLACE | 1));
    assert!(service.problems().is_empty(), "{:?}", service.problems());
    service.detach(WEB, card()).unwrap();
    world.assert_held(&service, card(), "detached");
    assert_eq!(register(&world, card()) & 1, 0);
}

#[test]
fn a_decoder_that_stays_on_when_the_guest_loses_the_function_quarantines_it() {
    let stuck = bdf("05:00.0");
    let world = World::of(HOST);
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start_with(&[FROM_DEVICE]);
    service.hold(stuck).unwrap();
    service.attach(WEB, stuck).unwrap();
    let place = register(&world, stuck);
    world.simulation.poke(stuck, ROM as u16, &(place | 1).to_le_bytes());
    let failure = service.detach(WEB, stuck).unwrap_err();
    assert!(failure.message.contains("Expansion ROM Enable"), "{failure}");
    assert_eq!(service.state(stuck), FunctionState::Quarantined);
}

#[test]
fn a_guest_that_may_have_the_rom_mapped_keeps_the_function_from_the_next_owner() {
    let world = World::of(HOST);
    let frontend = Frontend::load(&world, WEB);
    let policy = "match: {class: '03'}\nrom: device\nreuse: after-shutdown\n";
    let service = world.start_with(&[policy]);
    service.hold(card()).unwrap();
    service.attach(WEB, card()).unwrap();
    service.detach(WEB, card()).unwrap();
    drop(frontend);
    service.release(card()).unwrap_err();
    // Linux has moved the BAR since, and not the ROM.
    service.stop();
    world.simulation.unplug(card());
    let moved = "{address: \"02:00.0\", model: card, bars: {0: e8000000, 6: f0000000}}";
    world.simulation.plug(moved).unwrap();
    let service = world.start_with(&[policy]);
    service.hold(card()).unwrap();
    let failure = service.attach(DB, card()).unwrap_err();
    assert_eq!((failure.code, failure.domain), (ErrorCode::Refused, Some(WEB)), "{failure}");
    world.simulation.destroy(WEB);
    service.attach(DB, card()).unwrap();
}

fn refused(service: &Service, world: &World, function: Sbdf, expected: &str) -> Failure {
    service.hold(function).unwrap();
    let tried = dry_run(service, WEB, function).unwrap_err();
    assert!(tried.message.contains(expected), "{tried}");
    let failure = service.attach(WEB, function).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
    assert!(failure.message.contains(expected) && failure.hint.is_some(), "{failure}");
    world.assert_held(service, function, expected);
    failure
}

#[test]
fn a_rom_that_no_guest_can_map_is_refused_with_the_reason() {
    for (function, flags, expected) in [
        ("03:00.0", 0, "it has none"),
        ("04:00.0", 0, "the kernel found no address for it"),
        ("02:00.0", Resource::ROM_SHADOW, "a copy that firmware has left in memory"),
        ("02:00.0", Resource::ENHANCED_ALLOCATION, "Enhanced Allocation"),
    ] {
        let world = World::of(HOST);
        let service = world.start_with(&[FROM_DEVICE]);
        world.simulation.mark_rom(bdf(function), flags);
        let failure = refused(&service, &world, bdf(function), expected);
        assert!(failure.message.contains("as 'rom: device' of more.yaml says"), "{failure}");
    }
}

#[test]
fn a_rom_in_pages_of_ram_of_a_driver_or_of_another_owner_is_refused() {
    for (line, expected) in [
        ("f0007000-f0007fff : System RAM", "there is System RAM"),
        ("f0000000-f0000fff : efifb", "there is efifb"),
    ] {
        let world = World::of(&format!("memory: \"{line}\"\n{HOST}"));
        let service = world.start_with(&[FROM_DEVICE]);
        refused(&service, &world, card(), expected);
    }
    let world = World::of(HOST);
    let service = world.start_with(&["match: {address: '06:00.0'}\nrom: device\n"]);
    refused(&service, &world, bdf("06:00.0"), "07:00.0 (dom0's, without a driver)");
    // With the other function held no owner is hit, and it does not go to another one while the guest has the page.
    service.hold(bdf("07:00.0")).unwrap();
    service.attach(WEB, bdf("06:00.0")).unwrap();
    let failure = service.attach(DB, bdf("07:00.0")).unwrap_err();
    assert!(failure.message.contains("a page of memory with"), "{failure}");
    let failure = service.release(bdf("07:00.0")).unwrap_err();
    assert!(failure.message.contains("06:00.0 ('web', domain 1)"), "{failure}");
}

#[test]
fn show_has_the_place_of_the_rom() {
    let world = World::of(HOST);
    let service = world.start();
    let Ok(Success::Shown(shown)) = service.call(Request::Show { address: card() }) else { panic!() };
    assert_eq!(shown.bars.last().unwrap(), "expansion ROM at 0xf0000000, 0x8000 bytes");
}

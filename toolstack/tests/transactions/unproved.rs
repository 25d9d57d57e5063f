//! A guest cannot reach a function that it lost; that no thread serves the function is no proof of that.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::errno::Errno;
use pciback::FunctionState;
use pciback::platform::sim::{self, Owner};
use pciback::serve::hvm::wire::xen::config;
use toolstack::outcome::ErrorCode;

use crate::frontend::{Frontend, msix_op, read_op, write_op};
use crate::world::{DB, Service, WEB, World, attachment, bdf, wait_until};

const COMMAND: u32 = 4;
const STATUS: u32 = 6;
/// Message Control of the PF's MSI-X, its high byte with MSI-X Enable.
const MSIX_CONTROL: u16 = 0x73;
/// The word of an image with its version, in bytes from its beginning.
const IMAGE_VERSION: u64 = 4;

/// What becomes of the image of a function while no service runs.
type Damage = fn(&World);

fn image(world: &World) -> std::path::PathBuf {
    world.settings().run_directory.join("images").join("0000:01:00.0")
}

fn of_another_version(world: &World) {
    let file = fs::OpenOptions::new().write(true).open(image(world)).unwrap();
    file.write_all_at(&99u32.to_le_bytes(), IMAGE_VERSION).unwrap();
}

fn damaged(world: &World) {
    let length = fs::metadata(image(world)).unwrap().len() as usize;
    fs::write(image(world), vec![0xa5; length]).unwrap();
}

fn missing(world: &World) {
    fs::remove_file(image(world)).unwrap();
}

/// A PF at work for a PV guest, and a service that has stopped.
fn at_work(world: &World) -> Frontend {
    let address = bdf("01:00.0");
    let frontend = Frontend::load(world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(WEB, address).unwrap();
    assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
    frontend.ask(&write_op(0, COMMAND, 2, 0x0006));
    service.stop();
    frontend
}

fn assert_off(world: &World, why: &str) {
    let address = bdf("01:00.0");
    assert_eq!(world.simulation.peek(address, 4, 1)[0] & 1 << 2, 0, "{why}: bus mastering is on");
    assert_eq!(world.simulation.peek(address, MSIX_CONTROL, 1)[0] & 0x80, 0, "{why}: MSI-X is on");
}

/// Nobody gets it while its guest is there, whatever is tried; when the guest has ended it is anybody's.
fn assert_unavailable_before_the_guest_ends(world: &World, service: &Service, why: &str) {
    let address = bdf("01:00.0");
    assert_eq!(service.state(address), FunctionState::Quarantined, "{why}");
    assert_off(world, why);
    let grants = world.simulation.grants(WEB);
    assert!(grants.frames.is_empty() && grants.ports.is_empty(), "{why}: {grants:?}");
    assert_eq!(world.simulation.owner(address), Some(Owner::Quarantine), "{why}");
    assert_eq!(service.attach(DB, address).unwrap_err().code, ErrorCode::Refused, "{why}");
    assert!(service.clear(address).is_err(), "{why}: it was cleared while its guest may reach it");
    assert_eq!(service.state(address), FunctionState::Quarantined, "{why}");
    world.simulation.destroy(WEB);
    wait_until("its guest has ended", || service.clear(address).is_ok());
    world.assert_held(service, address, why);
    service.attach(DB, address).unwrap();
}

#[test]
fn a_function_with_an_unreadable_image_is_not_attached_before_its_guest_has_ended() {
    let damages: [(&str, Damage); 3] =
        [("of another version", of_another_version), ("damaged", damaged), ("missing", missing)];
    for (why, damage) in damages {
        let world = World::without_vfs();
        let _frontend = at_work(&world);
        damage(&world);
        let service = world.start();
        let failure = service.detach(WEB, bdf("01:00.0")).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Quarantined, "{why}: {failure}");
        assert_unavailable_before_the_guest_ends(&world, &service, why);
    }
}

#[test]
fn a_guest_whose_thread_hangs_when_its_ring_is_given_up_loses_its_functions() {
    let (world, address) = (World::without_vfs(), bdf("01:00.0"));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(WEB, address).unwrap();
    assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
    frontend.ask(&write_op(0, COMMAND, 2, 0x0006));
    world.simulation.fail(sim::Failure {
        operation: "config_read".into(),
        address: Some(address),
        delay: Duration::from_secs(4),
        times: 1,
        ..sim::Failure::default()
    });
    frontend.put(&read_op(0, STATUS, 2));
    wait_until("its thread hangs", || world.simulation.pending_failures() == 0);
    frontend.unload();
    service.wait_for_state(address, FunctionState::Quarantined);
    assert_off(&world, "quarantined");
}

#[test]
fn the_function_stays_unavailable_across_restarts_of_the_service() {
    let world = World::without_vfs();
    let _frontend = at_work(&world);
    damaged(&world);
    let service = world.start();
    service.detach(WEB, bdf("01:00.0")).unwrap_err();
    service.stop();
    assert_unavailable_before_the_guest_ends(&world, &world.start(), "in the next run of the service");
}

#[test]
fn a_function_that_was_silent_when_the_service_started_is_switched_off_when_it_answers() {
    let world = World::without_vfs();
    let _frontend = at_work(&world);
    world.simulation.silence(bdf("01:00.0"), true);
    let service = world.start();
    world.simulation.silence(bdf("01:00.0"), false);
    service.detach(WEB, bdf("01:00.0")).unwrap();
    world.assert_held(&service, bdf("01:00.0"), "it answers again");
    assert!(world.simulation.grants(WEB).vectors.is_empty(), "its vectors are the guest's still");
}

#[test]
fn a_function_that_stays_silent_is_quarantined_until_it_answers() {
    let world = World::without_vfs();
    let _frontend = at_work(&world);
    world.simulation.silence(bdf("01:00.0"), true);
    let service = world.start();
    assert_eq!(service.detach(WEB, bdf("01:00.0")).unwrap_err().code, ErrorCode::Quarantined);
    assert!(service.clear(bdf("01:00.0")).is_err());
    world.simulation.silence(bdf("01:00.0"), false);
    service.clear(bdf("01:00.0")).unwrap();
    world.assert_held(&service, bdf("01:00.0"), "it answers again");
    assert!(world.simulation.grants(WEB).vectors.is_empty(), "its vectors are the guest's still");
}

#[test]
fn a_function_whose_guest_could_not_be_taken_over_is_switched_off_by_its_image() {
    let world = World::without_vfs();
    let _frontend = at_work(&world);
    world.fail("watch", None, Errno::ENOSPC, 0);
    let service = world.start();
    world.simulation.forget_failures();
    service.detach(WEB, bdf("01:00.0")).unwrap();
    world.assert_held(&service, bdf("01:00.0"), "nobody served it");
}

#[test]
fn a_function_that_an_hvm_guest_has_mapped_goes_to_no_other_guest() {
    const WIN: pciback::DomId = pciback::DomId(7);
    let world = World::without_vfs();
    world.simulation.create_hvm(WIN, "win").unwrap();
    let guest = world.simulation.hvm_guest(WIN);
    let service = world.start();
    service.hold(bdf("01:00.0")).unwrap();
    service.attach(WIN, bdf("01:00.0")).unwrap();
    let ask = |offset, value| {
        let request = guest.begin(&config(0x1f, offset, 4, value)).unwrap();
        request.answer(crate::world::LIMIT).unwrap()
    };
    wait_until("the function is served", || ask(0, None) as u16 == 0x8086);
    ask(0x10, Some(0xf300_0000));
    ask(4, Some(6));
    assert!(!guest.reached().frames.is_empty());
    service.stop();
    let image = world.settings().run_directory.join("images").join("0000:01:00.0");
    let bytes = fs::read(&image).unwrap();
    fs::write(&image, vec![0xa5; bytes.len()]).unwrap();
    let service = world.start();
    assert_eq!(service.detach(WIN, bdf("01:00.0")).unwrap_err().code, ErrorCode::Quarantined);
    assert!(!guest.reached().frames.is_empty(), "it is unknown where they are");
    assert_eq!(service.call(attachment(DB, bdf("01:00.0"))).unwrap_err().code, ErrorCode::Refused);
    // An image that can be read again shows where they are.
    fs::write(&image, bytes).unwrap();
    service.clear(bdf("01:00.0")).unwrap();
    world.assert_held(&service, bdf("01:00.0"), "by its image");
    assert_eq!(guest.reached(), Default::default());
}

//! Files that a crash, a disk or another version has left so that they cannot be used, and those of the version before.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use pciback::platform::sim::Owner;
use pciback::{FunctionState, Sbdf};
use toolstack::engine::Containment;
use toolstack::outcome::ErrorCode;
use toolstack::protocol::Success;
use toolstack::transaction::Step;

use crate::frontend::{Frontend, msix_op, write_op};
use crate::world::{DB, Service, WEB, World, attachment, bdf, wait_until};

const COMMAND: u32 = 4;

fn attached(world: &World) -> (Frontend, Service) {
    let frontend = Frontend::load(world, WEB);
    let service = world.start();
    service.hold(bdf("01:00.0")).unwrap();
    service.persist(WEB, bdf("01:00.0")).unwrap();
    assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
    frontend.ask(&write_op(0, COMMAND, 2, 0x0006));
    (frontend, service)
}

fn journal(world: &World) -> PathBuf {
    world.settings().state_directory.join("0000:01:00.0.json")
}

#[test]
fn a_function_whose_journal_record_cannot_be_used_is_quarantined() {
    let address = bdf("01:00.0");
    for (why, damage) in [
        ("cut", (|text: String| text[..text.len() / 2].to_owned()) as fn(String) -> String),
        ("of a later version", |text| text.replace("\"version\": 1", "\"version\": 9")),
        ("with what this version does not know", |text| text.replacen('{', "{\"later\": 1,", 1)),
        ("garbage", |text| text.chars().map(|_| '\u{1}').collect()),
    ] {
        let world = World::without_vfs();
        let (_frontend, service) = attached(&world);
        service.kill();
        let text = damage(fs::read_to_string(journal(&world)).unwrap());
        fs::write(journal(&world), &text).unwrap();
        let service = world.start();
        service.wait_for_state(address, FunctionState::Quarantined);
        wait_until("it is switched off", || world.simulation.peek(address, 4, 1)[0] & 1 << 2 == 0);
        assert_eq!(fs::read_to_string(journal(&world).with_extension("unusable")).unwrap(), text, "{why}");
        let problems = service.problems();
        assert!(problems.iter().any(|problem| problem.contains("cannot be used")), "{why}: {problems:?}");
        assert_eq!(service.attach(DB, address).unwrap_err().code, ErrorCode::Refused, "{why}");
        assert!(service.clear(address).is_err(), "{why}: it is the guest's still");
        service.stop();
        let service = world.start();
        assert_eq!(service.state(address), FunctionState::Quarantined, "{why}, after a restart");
        world.simulation.destroy(WEB);
        service.clear(address).unwrap();
        assert_eq!(service.state(address), FunctionState::Held, "{why}");
    }
}

#[test]
fn a_function_with_an_unusable_reservation_is_not_attached() {
    let world = World::without_vfs();
    let (_frontend, service) = attached(&world);
    service.stop();
    world.simulation.destroy(WEB);
    let path = world.settings().state_directory.join("persistent/0000:01:00.0.json");
    fs::write(&path, "{").unwrap();
    let service = world.start();
    service.wait_for_state(bdf("01:00.0"), FunctionState::Held);
    let failure = service.attach(DB, bdf("01:00.0")).unwrap_err();
    assert!(failure.code == ErrorCode::Refused && failure.message.contains("0000:01:00.0.json"), "{failure}");
    fs::remove_file(path).unwrap();
    service.attach(DB, bdf("01:00.0")).unwrap();
}

/// The files of version 0.1 about a PF that a guest has persistently, with three vectors.
fn written_by_0_1() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transactions/written-by-0.1")
}

/// The files about the function, in the fixture and where the service has them.
fn files(world: &World) -> Vec<(PathBuf, PathBuf)> {
    let settings = world.settings();
    let state = |name: &str| (written_by_0_1().join(name), settings.state_directory.join(name));
    let mut files = vec![
        state("0000:01:00.0.json"),
        state("persistent/0000:01:00.0.json"),
        state("path/0000:00:01.0.json"),
        state("path/0000:01:00.0.json"),
    ];
    files.push((written_by_0_1().join("image"), settings.run_directory.join("images/0000:01:00.0")));
    files
}

#[test]
fn files_of_version_0_1_are_read() {
    let world = World::without_vfs();
    let (frontend, service) = attached(&world);
    let vectors = world.simulation.grants(WEB).vectors;
    service.kill();
    for (fixture, path) in files(&world) {
        fs::write(&path, fs::read(&fixture).unwrap()).unwrap();
    }
    let service = world.start();
    assert_eq!(service.problems(), [""; 0]);
    assert_eq!(service.state(bdf("01:00.0")), FunctionState::Attached);
    assert_eq!(frontend.read(0, 0, 2), 0x8086);
    assert_eq!(world.simulation.grants(WEB).vectors, vectors);
    service.detach(WEB, bdf("01:00.0")).unwrap();
    world.assert_held(&service, bdf("01:00.0"), "detached");
    assert_eq!(world.simulation.owner(bdf("01:00.0")), Some(Owner::Quarantine));
}

/// No record of this function can be written any more, as on a full disk.
fn refuse_writes(world: &World, address: Sbdf) {
    let next = world.settings().state_directory.join(format!("{address}.new"));
    let _ = fs::remove_file(&next);
    fs::create_dir(next).unwrap();
}

fn allow_writes(world: &World, address: Sbdf) {
    fs::remove_dir(world.settings().state_directory.join(format!("{address}.new"))).unwrap();
}

#[test]
fn an_attachment_that_cannot_be_noted_as_done_is_none() {
    let (first, address) = (bdf("02:00.0"), bdf("01:00.0"));
    let world = World::without_vfs();
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_impatient();
    service.hold(first).unwrap();
    service.attach(WEB, first).unwrap();
    service.hold(address).unwrap();
    // The last step waits for the guest.
    frontend.freeze();
    let operator = service.operator();
    let attaching = thread::spawn(move || operator.call(attachment(WEB, address)));
    wait_until("the function is served", || {
        let progress = world.record(address).and_then(|record| record.transaction);
        progress.is_some_and(|progress| progress.step == Step::Serve)
    });
    refuse_writes(&world, address);
    let failure = attaching.join().unwrap().unwrap_err();
    assert_eq!(failure.code, ErrorCode::Quarantined, "{failure}");
    assert_eq!(service.state(address), FunctionState::Quarantined);
    assert_eq!(world.simulation.owner(address), Some(Owner::Quarantine));
    world.assert_nothing_granted_but_nodes(address);
    allow_writes(&world, address);
    service.clear(address).unwrap();
    assert_eq!(service.state(address), FunctionState::Held);
}

#[test]
fn a_quarantine_whose_end_cannot_be_noted_has_not_ended() {
    let address = bdf("01:00.0");
    let world = World::without_vfs();
    let service = world.start();
    service.hold(address).unwrap();
    service.contain(address, Containment::Quarantine);
    service.wait_for_state(address, FunctionState::Quarantined);
    refuse_writes(&world, address);
    let failure = service.clear(address).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Quarantined, "{failure}");
    assert_eq!(service.state(address), FunctionState::Quarantined);
    assert_eq!(service.attach(WEB, address).unwrap_err().code, ErrorCode::Refused);
    allow_writes(&world, address);
    service.clear(address).unwrap();
    world.assert_held(&service, address, "cleared");
}

#[test]
fn what_a_guest_gives_back_of_a_quarantined_function_is_not_called_assignable() {
    let address = bdf("01:00.0");
    let world = World::without_vfs();
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(WEB, address).unwrap();
    world.fail("deassign", None, Errno::EIO, 0);
    service.detach(WEB, address).unwrap_err();
    assert_eq!(service.state(address), FunctionState::Quarantined);
    let Ok(Success::Changed { message, .. }) = service.detach(WEB, address) else { panic!("not detached") };
    assert_eq!(message, format!("{address} is detached from 'web' (domain {WEB}); it is quarantined"));
    assert_eq!(service.state(address), FunctionState::Quarantined);
}

#[test]
fn what_cannot_be_noted_before_it_is_begun_changes_nothing() {
    let address = bdf("01:00.0");
    let world = World::without_vfs();
    let service = world.start();
    refuse_writes(&world, address);
    let failure = service.hold(address).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Failed, "{failure}");
    world.assert_host(&service, address, Some("igb"), "not held");
    allow_writes(&world, address);
    service.hold(address).unwrap();
    refuse_writes(&world, address);
    let failure = service.attach(WEB, address).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Failed, "{failure}");
    world.assert_held(&service, address, "not attached");
    allow_writes(&world, address);
    service.attach(WEB, address).unwrap();
}

//! The registers on the path of an assigned function: set while one is assigned, whatever the guest writes, and put back.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::sim::{self, Owner};
use pciback::{FunctionState, Sbdf};
use toolstack::journal::{Journal, Progress};
use toolstack::protocol::Success;
use toolstack::transaction::{Kind, Step};

use crate::crashes::{killed_anywhere, settled};
use crate::frontend::{Frontend, write_op};
use crate::world::{DB, Service, WEB, World, bdf, wait_until};

const ROOT_PORT: &str = "00:01.0";
const PF: &str = "01:00.0";
/// Registers of the root port: Command, Bridge Control, Device Control, Root Control, and in AER Uncorrectable Error Mask and Severity,
/// Correctable Error Mask, Root Error Command.
const OF_PORT: [(u16, u16); 8] =
    [(0x04, 2), (0x3e, 2), (0x5c, 2), (0x70, 2), (0x108, 4), (0x10c, 4), (0x114, 4), (0x12c, 4)];
/// Of the PF: Command, Device Control, the same of AER.
const OF_PF: [(u16, u16); 5] = [(0x04, 2), (0xa8, 2), (0x108, 4), (0x10c, 4), (0x114, 4)];
const PROVOKABLE: u32 = 0x8fb1_d000;

fn register(world: &World, address: &str, (offset, width): (u16, u16)) -> u32 {
    let bytes = world.simulation.peek(bdf(address), offset, width);
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// All registers that may be set, bus mastering and decoding left out.
fn registers(world: &World) -> BTreeMap<(&'static str, u16), u32> {
    let of_port = OF_PORT.iter().map(|place| (ROOT_PORT, *place));
    let all = of_port.chain(OF_PF.iter().map(|place| (PF, *place)));
    let value = |address, place: (u16, u16)| match place.0 {
        0x04 => register(world, address, place) & 0x0140,
        _ => register(world, address, place),
    };
    all.map(|(address, place)| ((address, place.0), value(address, place))).collect()
}

/// A host whose firmware had its own ideas.
fn world() -> World {
    let world = World::new();
    for (address, offset, bytes) in [
        (ROOT_PORT, 0x70, &[0x07, 0][..]),
        (ROOT_PORT, 0x10c, &[0x30, 0x60, 0x57, 0]),
        (PF, 0x10c, &[0x30, 0x70, 0x5f, 0]),
        (PF, 0x108, &[0, 0, 0x10, 0]),
        // A status bit is set: it must not be cleared.
        (ROOT_PORT, 0x104, &[0, 0, 0x10, 0]),
        (PF, 0xaa, &[0x0f, 0]),
    ] {
        world.simulation.poke(bdf(address), offset, bytes);
    }
    world
}

fn assert_set(world: &World, why: &str) {
    let now = registers(world);
    let of = |address, offset| now[&(address, offset)];
    for address in [ROOT_PORT, PF] {
        assert_eq!(of(address, 0x04) & 0x100, 0x100, "{why}: SERR of {address}");
        assert_eq!(of(address, 0x108) & PROVOKABLE, 0, "{why}: the mask of {address}");
        assert_eq!(of(address, 0x10c) & PROVOKABLE, 0, "{why}: the severity of {address}");
        assert_ne!(of(address, 0x10c) & 0x30, 0, "{why}: errors of the link stay fatal at {address}");
        assert_eq!(of(address, 0x114) & 0x2000, 0, "{why}: advisory errors of {address}");
    }
    assert_eq!((of(ROOT_PORT, 0x5c) & 0xf, of(PF, 0xa8) & 0xf), (0xf, 0xf), "{why}: reporting");
    assert_eq!(of(ROOT_PORT, 0x3e) & 2, 2, "{why}: forwarding");
    assert_eq!(of(ROOT_PORT, 0x70) & 7, 0, "{why}: system errors");
    assert_eq!(of(ROOT_PORT, 0x12c) & 7, 7, "{why}: the root port's interrupt");
}

fn assert_status_kept(world: &World, why: &str) {
    assert_eq!(register(world, ROOT_PORT, (0x104, 4)), 0x0010_0000, "{why}: Uncorrectable Error Status");
    assert_eq!(register(world, PF, (0xaa, 2)) & 0xf, 0xf, "{why}: Device Status");
}

fn hold_two(service: &Service) -> [Sbdf; 2] {
    let vfs = [bdf("01:10.0"), bdf("01:10.2")];
    vfs.iter().for_each(|vf| drop(service.hold(*vf).unwrap()));
    vfs
}

#[test]
fn the_path_is_set_for_the_first_function_and_restored_after_the_last_across_restarts() {
    let world = world();
    let before = registers(&world);
    let _guests = [WEB, DB].map(|domain| Frontend::load(&world, domain));
    let service = world.start();
    let vfs = hold_two(&service);
    assert_eq!(registers(&world), before, "holding sets nothing");
    service.attach(WEB, vfs[0]).unwrap();
    assert_set(&world, "the first VF");
    service.kill();
    let service = world.start();
    service.attach(DB, vfs[1]).unwrap();
    assert_set(&world, "the second VF, after a restart");
    service.detach(WEB, vfs[0]).unwrap();
    assert_set(&world, "the other guest still has one");
    service.stop();
    let service = world.start();
    service.detach(DB, vfs[1]).unwrap();
    assert_eq!(registers(&world), before, "the last one left");
    assert_status_kept(&world, "all the way");
}

/// Looks at the path while `work` resets a function, which takes a while.
fn during_the_reset(world: &World, address: Sbdf, work: impl FnOnce() + Send, look: impl FnOnce()) {
    world.simulation.fail(sim::Failure {
        operation: "reset".to_owned(),
        address: Some(address),
        delay: Duration::from_millis(500),
        times: 1,
        ..sim::Failure::default()
    });
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        wait_until("it is being reset", || world.simulation.pending_failures() == 0);
        look();
        assert!(!worker.is_finished(), "the reset ended before the path was looked at");
    });
}

#[test]
fn the_path_is_set_before_the_first_reset_and_until_after_the_last() {
    let world = world();
    let before = registers(&world);
    let _guest = Frontend::load(&world, WEB);
    let service = world.start();
    let [vf, _] = hold_two(&service);
    let attach = || drop(service.attach(WEB, vf).unwrap());
    during_the_reset(&world, vf, attach, || assert_set(&world, "the first reset"));
    let detach = || drop(service.detach(WEB, vf).unwrap());
    during_the_reset(&world, vf, detach, || assert_set(&world, "the last reset"));
    assert_eq!(registers(&world), before, "detached");
}

#[test]
fn an_unfinished_attachment_of_an_older_version_is_undone() {
    for undoing in [false, true] {
        let world = world();
        let before = registers(&world);
        let _guest = Frontend::load(&world, WEB);
        let service = world.start();
        let [vf, _] = hold_two(&service);
        service.attach(WEB, vf).unwrap();
        service.kill();
        let mut record = world.record(vf).unwrap();
        record.state = FunctionState::Attaching;
        record.transaction = Some(Progress { kind: Kind::Attach, step: Step::ContainErrors, undoing });
        record.grants.clear();
        Journal::open(&world.settings().state_directory).unwrap().write(&record).unwrap();
        let service = world.start();
        service.wait_for_state(vf, FunctionState::Held);
        assert_eq!(world.simulation.owner(vf), Some(Owner::Quarantine), "undoing: {undoing}");
        assert!(!world.simulation.msix_prepared(vf), "undoing: {undoing}");
        assert_eq!(registers(&world), before, "undoing: {undoing}");
    }
}

#[test]
fn a_guests_writes_to_error_reporting_do_not_reach_hardware() {
    let world = World::without_vfs();
    let frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(bdf(PF)).unwrap();
    service.attach(WEB, bdf(PF)).unwrap();
    let set = registers(&world);
    assert_set(&world, "attached");
    // Command with everything but SERR and decoding off, Device Control, mask, severity, correctable mask.
    for (offset, size, value) in
        [(0x04, 2, 0x0006), (0xa8, 2, 0), (0x108, 4, !0), (0x10c, 4, !0), (0x114, 4, !0)]
    {
        frontend.ask(&write_op(0, offset, size, value));
    }
    assert_eq!(registers(&world), set, "the guest's writes are its own");
    service.detach(WEB, bdf(PF)).unwrap();
}

#[test]
fn aer_registers_under_firmware_control_are_not_changed_with_a_warning() {
    let world = world();
    world.simulation.withhold_aer(true);
    let before = registers(&world);
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start();
    let [vf, _] = hold_two(&service);
    let Ok(Success::Changed { warnings, .. }) = service.attach(WEB, vf) else { panic!("attach") };
    assert!(
        warnings
            .iter()
            .any(|warning| warning.contains("does not grant Linux control of AER at 0000:00:01.0")),
        "{warnings:?}"
    );
    let problems = service.problems();
    assert!(
        problems
            .iter()
            .any(|problem| problem.contains("does not grant Linux control of AER at 0000:00:01.0")),
        "{problems:?}"
    );
    let changed: Vec<_> =
        registers(&world).into_iter().filter(|(place, value)| before[place] != *value).collect();
    assert_eq!(
        changed,
        [((ROOT_PORT, 0x04), 0x100), ((ROOT_PORT, 0x3e), 0x2), ((PF, 0x04), 0x100)],
        "SERR alone"
    );
    service.detach(WEB, vf).unwrap();
    assert_eq!(registers(&world), before);
}

#[test]
fn a_path_that_cannot_be_set_fails_the_attach_and_one_that_cannot_be_restored_quarantines() {
    for operation in ["config", "config_read", "config_write"] {
        for member in [ROOT_PORT, PF] {
            for after in 0..6 {
                let why = format!("{operation} of {member} failed after {after} calls");
                let world = world();
                let before = registers(&world);
                let _frontend = Frontend::load(&world, WEB);
                let service = world.start();
                let [vf, _] = hold_two(&service);
                world.fail(operation, Some(bdf(member)), Errno::EIO, after);
                if service.attach(WEB, vf).is_err() {
                    assert_eq!(registers(&world), before, "{why}: undone");
                    service.attach(WEB, vf).unwrap();
                }
                assert_set(&world, &why);
                world.simulation.forget_failures();
                world.fail(operation, Some(bdf(member)), Errno::EIO, after);
                if service.detach(WEB, vf).is_err() {
                    assert!(world.record(vf).unwrap().quarantine.is_some(), "{why}");
                    service.clear(vf).unwrap();
                }
                assert_eq!(registers(&world), before, "{why}: put back in the end");
            }
        }
    }
}

#[test]
fn a_service_killed_anywhere_keeps_the_earlier_values() {
    let vf = bdf("01:10.0");
    let vfs = |world: &World| {
        world.host().set_vf_autoprobe(bdf(PF), false).unwrap();
        world.host().set_num_vfs(bdf(PF), 1, crate::world::LIMIT).unwrap();
    };
    let untouched = registers(&World::without_vfs());
    let check = |world: &World, service: &Service, _: &Frontend, why: &str| {
        settled(service, why);
        // A detach that was refused because there is nothing to detach is as good.
        let _ = service.detach(WEB, vf);
        assert_eq!(registers(world), untouched, "{why}");
        service.attach(WEB, vf).unwrap();
        assert_ne!(registers(world), untouched, "{why}");
        service.detach(WEB, vf).unwrap();
        assert_eq!(registers(world), untouched, "{why}");
    };
    let hold = |world: &World, service: &Service| {
        vfs(world);
        service.hold(vf).unwrap();
    };
    let attach = |world: &World, service: &Service| {
        hold(world, service);
        service.attach(WEB, vf).unwrap();
    };
    killed_anywhere(hold, |service| service.attach(WEB, vf).is_ok(), check);
    killed_anywhere(attach, |service| service.detach(WEB, vf).is_ok(), check);
}

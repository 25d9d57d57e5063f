//! The power of the host fails: the next boot has what commands have promised, and trips over nothing that was being written.

mod disk;
mod trace;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use pciback::{FunctionState, Sbdf};
use toolstack::engine::Containment;
use toolstack::protocol::{Request, Scope};

use crate::world::{WEB, World, bdf, wait_until};
use disk::{Change, Disk, Left};

/// Where the recorded process keeps its records.
const DIRECTORY: &str = "XPCI_POWER_DIRECTORY";
/// Its test, which does nothing without that.
const RECORDED: &str = "power::commands_that_promise_something";

fn wished() -> Sbdf {
    bdf("02:00.0")
}

fn persistent() -> Sbdf {
    bdf("01:00.0")
}

fn distrusted() -> Sbdf {
    bdf("03:00.0")
}

/// What a host has to remember after so many commands.
struct Promised {
    held: bool,
    persistent: bool,
    quarantined: bool,
}

impl Promised {
    fn after(commands: usize) -> Self {
        Self {
            held: (1..7).contains(&commands),
            persistent: (2..6).contains(&commands),
            quarantined: (3..4).contains(&commands),
        }
    }
}

/// Runs in a process of its own, which strace records.
#[test]
fn commands_that_promise_something() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let mut answered = File::create(Path::new(&directory).join("answered")).unwrap();
    let mut answered = || answered.write_all(b".").unwrap();
    let world = World::in_directory(Path::new(&directory), "a boot");
    let service = world.start();
    for address in [persistent(), wished()] {
        let (force, persist, managed, dry_run) = (false, true, false, false);
        service.call(Request::PciAssignableAdd { address, force, persist, managed, dry_run }).unwrap();
    }
    answered();
    service.persist(WEB, persistent()).unwrap();
    answered();
    service.hold(distrusted()).unwrap();
    service.attach(WEB, distrusted()).unwrap();
    service.contain(distrusted(), Containment::Quarantine);
    service.wait_for_state(distrusted(), FunctionState::Quarantined);
    answered();
    service.clear(distrusted()).unwrap();
    answered();
    service.release(distrusted()).unwrap();
    answered();
    service.detach_only(WEB, persistent(), Scope::All).unwrap();
    answered();
    service.release(wished()).unwrap();
    answered();
    service.stop();
}

/// The changes that strace has seen.
fn recorded(directory: &Path) -> Vec<Change> {
    let record = directory.join("record");
    let status = Command::new("strace")
        .args(["-f", "-y", "-xx", "-s", "1000000", "-e", &format!("trace={}", trace::CALLS), "-o"])
        .arg(&record)
        .arg(std::env::current_exe().unwrap())
        .args([RECORDED, "--exact"])
        .env(DIRECTORY, directory)
        .output()
        .unwrap();
    assert!(status.status.success(), "{status:?}");
    let places = [directory.join("state"), directory.join("answered")];
    trace::changes(&fs::read_to_string(record).unwrap(), &places.each_ref().map(PathBuf::as_path))
}

#[test]
fn after_a_power_failure_at_any_write_what_was_promised_holds_and_nothing_is_damaged() {
    let directory = tempfile::tempdir().unwrap();
    let changes = recorded(directory.path());
    let root = directory.path().join("state");
    let (mut disk, mut commands, mut seen) = (Disk::new(&root), 0, BTreeSet::new());
    for (index, change) in changes.iter().enumerate() {
        match change {
            Change::Written { path, .. } if path.ends_with("answered") => commands += 1,
            Change::Opened { path, .. } if path.ends_with("answered") => continue,
            Change::MadeDirectory { path } if *path == root => continue,
            change => disk.apply(change),
        }
        for left in [Left::Everything, Left::Metadata, Left::Nothing] {
            let files = disk.after_power_failure(left);
            if seen.insert((commands, format!("{files:?}"))) {
                let next = tempfile::tempdir().unwrap();
                disk::write(&files, &next.path().join("state"));
                holds(
                    next.path(),
                    commands,
                    &format!("{left:?} of change {index}, {change:?}, after {commands} answers"),
                );
            }
        }
    }
    assert_eq!(commands, 7, "{changes:?}");
}

/// The next boot finds what was promised, or what the command under way would have promised.
fn holds(directory: &Path, commands: usize, why: &str) {
    let world = World::in_directory(directory, "the next boot");
    let service = world.start();
    let (before, after) = (Promised::after(commands), Promised::after(commands + 1));
    let is_as = |what: &str, found: bool, before: bool, after: bool| {
        assert!(found == before || found == after, "{why}: {what}: {found}");
    };
    if before.held && after.held {
        wait_until(&format!("{why}: it is held"), || service.state(wished()) == FunctionState::Held);
    } else if !before.held && !after.held {
        assert_eq!(service.view(wished()).map(|view| view.state), None, "{why}");
    }
    let is_persistent = service.view(persistent()).is_some_and(|view| view.persistent.is_some());
    is_as("persistent", is_persistent, before.persistent, after.persistent);
    let is_quarantined = service.state(distrusted()) == FunctionState::Quarantined;
    is_as("quarantined", is_quarantined, before.quarantined, after.quarantined);
    wait_until(&format!("{why}: nothing is wrong, {:?}", service.problems()), || {
        service.problems().iter().all(|problem| problem.contains("the test distrusts it"))
    });
}

//! Guests that move from one simulated host to another, or within one: by the real `xpci`, on both ends, with an xl that does to the simulated
//! hosts what the real one does. The guest runs in one place at most, whatever fails and whoever is killed.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use pciback::platform::{StoreOps, VfSettings};
use pciback::{DeviceNumber, DomId, FunctionState, Sbdf, Uuid};
use tempfile::TempDir;
use toolstack::protocol::{Request, Success};

use crate::frontend::Frontend;
use crate::world::{Service, WEB, World, bdf, name, wait_until};

/// The domain that the guest is where it comes.
const AGAIN: DomId = DomId(11);

/// An xl that asks the test what comes of each of its calls, and carries a guest's memory as the real one does.
const XL: &str = r#"#!/bin/sh
ask() {
    mkfifo "$XL/$$" || exit 9
    echo "$SIDE $$ $PPID $*" > "$XL/calls"
    read -r status < "$XL/$$"
    rm "$XL/$$"
    [ "$status" = 0 ] || exit "$status"
}
case "$1" in
save) ask begin "$3"; seq 300000 > "$4" || exit 7; ask saved "$3" ;;
restore) ask restore; seq 300000 > "$XL/$$.whole"; cmp -s "$XL/$$.whole" "$3" || exit 8; ask restored ;;
*) ask "$@" ;;
esac
"#;

fn uuid() -> Uuid {
    "00000000-0000-0000-0000-000000000001".parse().unwrap()
}

fn vfs() -> [Sbdf; 2] {
    [bdf("01:10.0"), bdf("01:10.2")]
}

/// A host of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Here,
    There,
}
use Side::{Here, There};

/// A call of xl on one of the hosts.
struct Call<'a> {
    side: Side,
    /// The `xpci` that makes it.
    caller: Pid,
    words: Vec<&'a str>,
}

impl Call<'_> {
    fn is(&self, side: Side, word: &str) -> bool {
        self.side == side && self.words[0] == word
    }
}

/// Two hosts, or one that is both, with a guest that is to move.
struct Move {
    here: World,
    /// `None`: it moves within the host.
    there: Option<World>,
    services: Mutex<[Option<Service>; 2]>,
    /// What the guest's kernel is, as either domain.
    frontends: Mutex<Vec<Frontend>>,
    /// Each `xpci` that has run xl.
    callers: Mutex<BTreeSet<i32>>,
    /// Each call of xl, with the host.
    calls: Mutex<Vec<String>>,
    directory: TempDir,
    /// What becomes of the words of the other end, as a part of a pipeline.
    words: &'static str,
}

impl Move {
    /// The guest has a VF persistently as device 9, and another one as device 3.
    fn between(here: World, there: Option<World>) -> Self {
        let service = here.start();
        let frontend = Frontend::load(&here, WEB);
        for (vf, slot) in vfs().into_iter().zip([9, 3]) {
            service.hold(vf).unwrap();
            attach_at(&service, vf, slot);
        }
        service.persist(WEB, vfs()[0]).unwrap();
        let other = there.as_ref().map(|there| {
            there.simulation.destroy(WEB);
            there.start()
        });
        let directory = tempfile::tempdir().unwrap();
        install(directory.path());
        Self {
            here,
            there,
            services: Mutex::new([Some(service), other]),
            frontends: Mutex::new(vec![frontend]),
            callers: Mutex::default(),
            calls: Mutex::default(),
            directory,
            words: "",
        }
    }

    fn between_hosts() -> Self {
        Self::between(World::new(), Some(World::new()))
    }

    fn world(&self, side: Side) -> &World {
        match (side, &self.there) {
            (There, Some(there)) => there,
            _ => &self.here,
        }
    }

    fn with_service<T>(&self, side: Side, with: impl FnOnce(&mut Option<Service>) -> T) -> T {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        let place = if side == There && self.there.is_some() { 1 } else { 0 };
        with(&mut services[place])
    }

    fn problems(&self, side: Side) -> Vec<String> {
        self.with_service(side, |service| service.as_ref().unwrap().problems())
    }

    fn state(&self, side: Side, address: Sbdf) -> FunctionState {
        self.with_service(side, |service| service.as_ref().unwrap().state(address))
    }

    fn socket(&self, side: Side) -> PathBuf {
        self.world(side).settings().socket()
    }

    /// Where copies of the guest run.
    fn runs(&self) -> Vec<Side> {
        let runs = |side, domain| self.world(side).simulation.is_paused(domain) == Some(false);
        [(Here, WEB), (There, AGAIN)]
            .into_iter()
            .filter(|(side, domain)| runs(*side, *domain))
            .map(|(side, _)| side)
            .collect()
    }

    fn xpci(&self) -> Command {
        let xpci = env!("CARGO_BIN_EXE_xpci");
        let mut command = Command::new(xpci);
        let path = format!("{}:{}", self.directory.path().display(), std::env::var("PATH").unwrap());
        let words = self.words;
        let receive = format!(
            "SIDE=there exec {xpci} --socket {} migrate-receive{words}",
            self.socket(There).display()
        );
        command.env("PATH", path).env("XL", self.directory.path()).env("SIDE", "here").stdin(Stdio::null());
        command.arg("--socket").arg(self.socket(Here)).args(["migrate", "-s", "", "web", &receive]);
        command
    }

    /// Runs `xpci migrate` until everything that it started has ended. `xl` says how each call of xl ends, before that has an effect, and
    /// may do more.
    fn migrate(&self, xl: impl Fn(&Call<'_>) -> u8 + Sync) -> Output {
        self.migrate_and(xl, |_| {})
    }

    fn migrate_and(&self, xl: impl Fn(&Call<'_>) -> u8 + Sync, after: impl Fn(&Call<'_>) + Sync) -> Output {
        let calls = self.directory.path().join("calls");
        // Open for writing, too: it does not end with the last call.
        let pipe = OpenOptions::new().read(true).write(true).open(&calls).unwrap();
        let mut lines = BufReader::new(pipe.try_clone().unwrap()).lines();
        let (xl, after) = (&xl, &after);
        thread::scope(|scope| {
            let answering = scope.spawn(move || {
                let mut wrong = None;
                while let Some(line) = lines.next().map(Result::unwrap).filter(|line| line != "end") {
                    // An xl without an answer would wait for ever.
                    let status = catch_unwind(AssertUnwindSafe(|| self.answer(&line, xl, after)));
                    let reply = line.split(' ').nth(1).unwrap();
                    let mut reply =
                        OpenOptions::new().write(true).open(self.directory.path().join(reply)).unwrap();
                    writeln!(reply, "{}", status.as_ref().unwrap_or(&9)).unwrap();
                    wrong = status.err().or(wrong);
                }
                if let Some(wrong) = wrong {
                    resume_unwind(wrong);
                }
            });
            let output = self.xpci().output();
            writeln!(&pipe, "end").unwrap();
            answering.join().unwrap();
            // The other end has closed its output a moment before it ends; what adopts it may not notice that.
            for caller in self.callers.lock().unwrap().iter() {
                wait_until("the other end has ended", || has_ended(*caller));
            }
            output.unwrap()
        })
    }

    /// The status with which a call of xl ends.
    fn answer(&self, line: &str, xl: &impl Fn(&Call<'_>) -> u8, after: &impl Fn(&Call<'_>)) -> u8 {
        let words: Vec<&str> = line.split(' ').collect();
        let side = if words[0] == "here" { Here } else { There };
        let call =
            Call { side, caller: Pid::from_raw(words[2].parse().unwrap()), words: words[3..].to_vec() };
        self.callers.lock().unwrap().insert(call.caller.as_raw());
        self.calls.lock().unwrap().push(format!("{} {}", words[0], call.words.join(" ")));
        let status = xl(&call);
        if status == 0 {
            self.carry_out(&call);
        }
        assert!(self.runs().len() <= 1, "it runs on both hosts after '{line}'");
        after(&call);
        status
    }

    /// What the real xl does with the hosts.
    fn carry_out(&self, call: &Call<'_>) {
        let simulation = &self.world(call.side).simulation;
        let domain = call.words.get(1).and_then(|word| word.parse().ok()).map(DomId);
        match call.words[0] {
            "saved" => simulation.platform("xl").unwrap().hypervisor.pause(domain.unwrap()).unwrap(),
            "restored" => {
                simulation.create_guest(AGAIN, "web", "pv", uuid()).unwrap();
                simulation.platform("xl").unwrap().hypervisor.pause(AGAIN).unwrap();
                let frontend = Frontend::load(self.world(There), AGAIN);
                self.frontends.lock().unwrap().push(frontend);
            }
            "rename" => {
                let path = format!("/local/domain/{}/name", call.words[1]);
                simulation.store(DomId::DOM0).unwrap().write(&path, call.words[2].as_bytes()).unwrap();
            }
            "unpause" => simulation.unpause(domain.unwrap()).unwrap(),
            // By name where the number is unknown.
            "destroy" => simulation.destroy(domain.unwrap_or(AGAIN)),
            _ => {}
        }
    }

    /// The guest runs on as if nothing had happened, and the other host has nothing of it.
    fn assert_stays(&self, why: &str) {
        assert_eq!(self.runs(), [Here], "{why}");
        assert_eq!(self.world(There).simulation.is_paused(AGAIN), None, "{why}: a copy is left");
        let places = self.with_service(Here, |service| {
            vfs().map(|vf| {
                let view = service.as_ref().unwrap().view(vf).unwrap();
                (view.state, view.domain, view.guest_address, view.persistent.is_some())
            })
        });
        let place = |slot: u32, persistent| {
            (FunctionState::Attached, Some(WEB), Some(Sbdf::from_devfn(0, 0, (slot << 3) as u8)), persistent)
        };
        assert_eq!(places, [place(9, true), place(3, false)], "{why}");
        let path = format!("/local/domain/{WEB}/name");
        let called = self.here.simulation.store(DomId::DOM0).unwrap().read(&path).unwrap();
        assert_eq!(called.as_deref(), Some(&b"web"[..]), "{why}");
        if self.there.is_some() {
            let left = vfs().map(|vf| self.state(There, vf));
            assert_eq!(left, [FunctionState::Host; 2], "{why}: reserved still");
        }
        for side in [Here, There] {
            assert_eq!(self.problems(side), [""; 0], "{why}");
        }
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

fn attach_at(service: &Service, address: Sbdf, slot: u8) {
    let attach = Request::PciAttach {
        domain: name(WEB),
        address,
        slot: DeviceNumber::new(slot),
        persist: false,
        managed: false,
        trust_former_owner: true,
        dry_run: false,
    };
    service.call(attach).unwrap();
}

/// Puts xl into a directory. A process of its own writes it: one that another test starts at that moment would inherit an open file of ours,
/// and the kernel refuses to start a program that is open for writing.
fn install(directory: &Path) {
    mkfifo(&directory.join("calls"), Mode::S_IRWXU).unwrap();
    fs::write(directory.join("script"), XL).unwrap();
    let installed = Command::new("install")
        .args(["-m", "755"])
        .arg(directory.join("script"))
        .arg(directory.join("xl"))
        .status()
        .unwrap();
    assert!(installed.success());
}

fn has_ended(process: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"));
    stat.is_err() || stat.is_ok_and(|stat| stat.contains(") Z "))
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_moved_guest_runs_on_the_other_host_with_functions_equal_to_its_own() {
    let guest = Move::between_hosts();
    let mac = "52:54:00:aa:bb:07".parse().unwrap();
    let settings = VfSettings { mac: Some(mac), ..VfSettings::default() };
    guest.with_service(Here, |service| {
        let set = Request::VfSet { address: vfs()[1], settings, persist: false };
        service.as_ref().unwrap().call(set).unwrap();
    });
    let output = guest.migrate(|_| 0);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("web runs on "), "{}", said(&output));
    assert_eq!(guest.runs(), [There]);
    assert_eq!(guest.here.simulation.is_paused(WEB), None);
    let calls = guest.calls();
    let order = [
        "here begin 1",
        "there restore",
        "here saved 1",
        "there restored",
        "here destroy 1",
        "there unpause 11",
    ];
    let found: Vec<&str> = calls.iter().map(String::as_str).filter(|call| order.contains(call)).collect();
    assert_eq!(found.len(), order.len(), "{calls:?}");
    assert_eq!(found[4..], order[4..], "it ends here before it runs there");
    guest.with_service(There, |service| {
        let service = service.as_ref().unwrap();
        let seen = vfs().map(|vf| {
            let view = service.view(vf).unwrap();
            (view.domain, view.guest_address.unwrap().devfn().device().get(), view.persistent.is_some())
        });
        assert_eq!(seen, [(Some(AGAIN), 9, true), (Some(AGAIN), 3, false)]);
    });
    assert_eq!(guest.world(There).simulation.vf_network(vfs()[1]).unwrap().mac, Some(mac));
    let listed = guest.with_service(Here, |service| {
        service.as_ref().unwrap().call(Request::PciListPersistent { guest: None }).unwrap()
    });
    assert!(matches!(&listed, Success::Functions { functions } if functions.is_empty()), "{listed:?}");
    for side in [Here, There] {
        assert_eq!(guest.problems(side), [""; 0]);
    }
}

#[test]
fn a_guest_moves_within_one_host_to_other_functions() {
    let world = World::without_vfs();
    world.host().set_vf_autoprobe(bdf("01:00.0"), false).unwrap();
    world.host().set_num_vfs(bdf("01:00.0"), 4, crate::world::LIMIT).unwrap();
    let guest = Move::between(world, None);
    let output = guest.migrate(|_| 0);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(guest.runs(), [There]);
    for (vf, slot, is_persistent) in [("01:10.4", 9, true), ("01:10.6", 3, false)] {
        let view = guest.with_service(Here, |service| service.as_ref().unwrap().view(bdf(vf)).unwrap());
        let found =
            (view.domain, view.guest_address.unwrap().devfn().device().get(), view.persistent.is_some());
        assert_eq!(found, (Some(AGAIN), slot, is_persistent), "{vf}");
    }
    for vf in vfs() {
        guest.with_service(Here, |service| service.as_ref().unwrap().wait_for_state(vf, FunctionState::Held));
        let view = guest.with_service(Here, |service| service.as_ref().unwrap().view(vf).unwrap());
        assert!(view.persistent.is_none(), "{vf} is reserved for a guest that has another one");
    }
    assert_eq!(guest.problems(Here), [""; 0]);
}

#[test]
fn a_host_without_equal_functions_refuses_the_guest_before_that_notices() {
    let guest = Move::between(World::new(), Some(World::without_vfs()));
    let output = guest.migrate(|_| 0);
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(said(&output).contains("this host has none of its kind that is free"), "{}", said(&output));
    assert!(guest.calls().is_empty(), "{:?}", guest.calls());
    guest.assert_stays("it was refused");
}

#[test]
fn a_guest_whose_move_fails_anywhere_before_the_hand_over_runs_on_with_its_functions() {
    for (side, word) in
        [(Here, "begin"), (Here, "rename"), (There, "restore"), (Here, "saved"), (There, "restored")]
    {
        let guest = Move::between_hosts();
        // The first call only: what undoes a rename is one, too.
        let left = Mutex::new(1);
        let output = guest.migrate(|call| {
            let mut left = left.lock().unwrap();
            let fails = call.is(side, word) && *left > 0;
            *left -= i32::from(fails);
            u8::from(fails)
        });
        assert_eq!(output.status.code(), Some(1), "{word}: {}", said(&output));
        let text = "the guest runs on here and has its functions again";
        assert!(said(&output).contains(text), "{word}: {}", said(&output));
        guest.assert_stays(word);
    }
}

#[test]
fn a_guest_that_cannot_have_its_functions_there_runs_on_here() {
    let guest = Move::between_hosts();
    let output = guest.migrate(|call| {
        if call.is(There, "restored") {
            guest.world(There).fail("assign", Some(vfs()[1]), Errno::EIO, 0);
        }
        0
    });
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(guest.calls().contains(&"there destroy 11".to_owned()), "{:?}", guest.calls());
    guest.assert_stays("there is no function for it");
}

#[test]
fn a_guest_stays_if_the_other_host_cannot_say_that_it_is_ready() {
    let guest = Move { words: " | head -n 1", ..Move::between_hosts() };
    let output = guest.migrate(|_| 0);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(guest.calls().contains(&"there destroy 11".to_owned()), "{:?}", guest.calls());
    guest.assert_stays("it does not hear of the other host");
}

#[test]
fn a_guest_stays_if_it_cannot_be_noted_that_it_is_handed_over() {
    let guest = Move::between_hosts();
    let notes = guest.here.settings().state_directory.join("leaving");
    let output = guest.migrate(|call| {
        if call.is(There, "restored") {
            fs::remove_dir_all(&notes).unwrap();
        }
        if call.is(Here, "unpause") {
            fs::create_dir(&notes).unwrap();
        }
        0
    });
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    guest.assert_stays("it was not noted");
}

#[test]
fn the_network_settings_of_a_vf_that_was_held_for_the_guest_in_vain_are_as_before() {
    let guest = Move::between_hosts();
    guest.with_service(There, |service| {
        for vf in vfs() {
            service.as_ref().unwrap().hold(vf).unwrap();
        }
    });
    let settings = VfSettings { mac: Some("52:54:00:aa:bb:07".parse().unwrap()), ..VfSettings::default() };
    guest.with_service(Here, |service| {
        let set = Request::VfSet { address: vfs()[1], settings, persist: false };
        service.as_ref().unwrap().call(set).unwrap();
    });
    let before = guest.world(There).simulation.vf_network(vfs()[1]);
    let output = guest.migrate(|call| u8::from(call.is(Here, "begin")));
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert_eq!(guest.world(There).simulation.vf_network(vfs()[1]), before);
    assert_eq!(vfs().map(|vf| guest.state(There, vf)), [FunctionState::Held; 2]);
}

#[test]
fn a_guest_is_moved_by_one_command_at_a_time() {
    let guest = Move::between_hosts();
    let second = Mutex::new(None);
    let output = guest.migrate(|call| {
        if call.is(Here, "begin") {
            *second.lock().unwrap() = Some(guest.xpci().output().unwrap());
        }
        0
    });
    assert!(output.status.success(), "{}", said(&output));
    let second = second.into_inner().unwrap().unwrap();
    assert_eq!(second.status.code(), Some(5), "{}", said(&second));
    assert!(said(&second).contains("is being moved already"), "{}", said(&second));
}

#[test]
fn a_connection_that_is_lost_after_the_hand_over_leaves_the_guest_paused_with_what_to_do() {
    let guest = Move::between_hosts();
    let output = guest.migrate(|call| {
        if call.is(Here, "destroy") {
            kill(call.caller, Signal::SIGKILL).unwrap();
        }
        0
    });
    assert!(said(&output).contains("'xl unpause 11' lets it run here"), "{}", said(&output));
    assert_eq!((guest.runs(), guest.world(There).simulation.is_paused(AGAIN)), (vec![], Some(true)));
    let here = guest.problems(Here).join("; ");
    assert!(here.contains("was handed over to ") && here.contains("' ends this message"), "{here}");
    let there = guest.problems(There).join("; ");
    assert!(there.contains("says that it was handed over, 'xl unpause web' lets it run here"), "{there}");
    guest.world(There).simulation.unpause(AGAIN).unwrap();
    assert_eq!(guest.problems(There), [""; 0]);
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The `xpci` that runs xl.
    Command,
    /// The service of its host.
    Service,
}

/// Does what the status of both hosts says.
fn make_good(guest: &Move, why: &str) {
    let (here, there) = (guest.problems(Here).join("; "), guest.problems(There).join("; "));
    let (at_home, away) = (&guest.here.simulation, &guest.world(There).simulation);
    let copy = away.is_paused(AGAIN);
    if here.contains("was handed over") {
        if here.contains("must not run here: 'xl destroy ") {
            at_home.destroy(WEB);
        }
        if copy == Some(true) {
            assert!(there.contains("'xl unpause web'"), "{why}: {there}");
            away.unpause(AGAIN).unwrap();
        }
        return;
    }
    if copy == Some(true) {
        assert!(there.contains("otherwise 'xl destroy web'"), "{why}: {there}");
        away.destroy(AGAIN);
    }
    if at_home.is_paused(WEB) == Some(true) {
        assert!(here.contains("'xl unpause web"), "{why}: {here}");
        at_home.unpause(WEB).unwrap();
    }
    for (vf, slot) in vfs().into_iter().zip([9, 3]).filter(|_| copy != Some(false)) {
        if guest.state(Here, vf) == FunctionState::Held {
            assert!(here.contains(&format!("{vf}@{slot:x}' gives it back")), "{why}: {here}");
            guest.with_service(Here, |service| attach_at(service.as_ref().unwrap(), vf, slot));
        }
    }
}

#[test]
fn a_guest_runs_in_one_place_whoever_is_killed_at_any_call_of_xl() {
    let calls = [
        (Here, "begin"),
        (Here, "rename"),
        (There, "restore"),
        (Here, "saved"),
        (There, "restored"),
        (Here, "destroy"),
        (There, "unpause"),
    ];
    for (side, word) in calls {
        for victim in [Victim::Command, Victim::Service] {
            for is_after in [false, true] {
                let why = format!("{victim:?} killed at '{word}' {side:?}, after: {is_after}");
                let guest = Move::between_hosts();
                let is_killed = Mutex::new(false);
                let at = |call: &Call<'_>, now: bool| {
                    let mut is_killed = is_killed.lock().unwrap();
                    if now && call.is(side, word) && !*is_killed {
                        *is_killed = true;
                        match victim {
                            Victim::Command => kill(call.caller, Signal::SIGKILL).unwrap(),
                            Victim::Service => {
                                let service = guest.with_service(side, Option::take).unwrap();
                                service.kill();
                            }
                        }
                    }
                };
                guest.migrate_and(
                    |call| {
                        at(call, !is_after);
                        0
                    },
                    |call| at(call, is_after),
                );
                for side in [Here, There] {
                    guest.with_service(side, |service| {
                        if let Some(service) = service.take() {
                            service.stop();
                        }
                        *service = Some(guest.world(side).start());
                    });
                }
                assert!(*is_killed.lock().unwrap(), "{why}: it was not");
                make_good(&guest, &why);
                assert_eq!(guest.runs().len(), 1, "{why}: {:?}", guest.calls());
                if guest.runs() == [Here] {
                    let states = vfs().map(|vf| guest.state(Here, vf));
                    assert_eq!(states, [FunctionState::Attached; 2], "{why}");
                }
                wait_until(&format!("{why}: nothing is left to do"), || {
                    let left = guest.problems(Here);
                    left.iter().all(|problem| problem.contains("' ends this message"))
                });
            }
        }
    }
}

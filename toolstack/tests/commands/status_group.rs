//! What members of the status group can ask for, at a socket of their own.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Output;

use nix::unistd::{Gid, Group, getegid, geteuid};
use serde_json::{Value, json};

use crate::daemon::{Daemon, LIMIT, install_program, program};
use crate::transcript::host;

/// A user and a group without rights, where tests run as root: Debian's `nobody` and `daemon`.
const MEMBER: u32 = 65534;
const MEMBERS: u32 = 1;

fn members() -> Group {
    let id = if geteuid().is_root() { Gid::from_raw(MEMBERS) } else { getegid() };
    Group::from_gid(id).unwrap().unwrap()
}

/// A service with a status group, in a run directory that only its owner may enter, as systemd makes it.
fn start(settings: &str) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o711)).unwrap();
    let run = directory.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::set_permissions(&run, Permissions::from_mode(0o700)).unwrap();
    Daemon::start_with(directory, &host(), settings)
}

fn with_group() -> Daemon {
    start(&format!("status-group: {}\n", members().name))
}

fn socket(daemon: &Daemon) -> PathBuf {
    daemon.directory.path().join("run/status")
}

/// `xpci` as a user runs it who has the group, or not, and no other rights.
fn xpci_as(group: Gid, daemon: &Daemon, arguments: &[&str]) -> Output {
    // Where the tests are built, that user may not go.
    let copy = daemon.directory.path().join("xpci");
    if !copy.exists() {
        install_program(env!("CARGO_BIN_EXE_xpci").as_ref(), &copy);
    }
    let mut command = program(copy.to_str().unwrap());
    command.arg("--socket").arg(daemon.socket()).args(arguments);
    if geteuid().is_root() {
        command.uid(MEMBER).gid(group.as_raw());
    } else {
        // The tests' own user is the service's: a mode keeps it from the control socket.
        fs::set_permissions(daemon.socket(), Permissions::from_mode(0o000)).unwrap();
    }
    command.output().unwrap()
}

fn error_of(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What the socket for the group answers to a request.
fn ask(stream: &mut UnixStream, request: &Value) -> Value {
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    answer(stream)
}

fn answer(stream: &UnixStream) -> Value {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn members_of_the_status_group_see_the_status_without_root() {
    let daemon = with_group();
    for arguments in [&["status"][..], &["list"], &["pci-assignable-list"], &["events"], &["metrics"]] {
        let output = xpci_as(members().gid, &daemon, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", error_of(&output));
        let as_root = daemon.xpci(arguments);
        assert_eq!(
            output.stdout.is_empty(),
            as_root.stdout.is_empty(),
            "{arguments:?}: {}",
            error_of(&output)
        );
    }
}

#[test]
fn members_of_the_status_group_cannot_change_anything() {
    let daemon = with_group();
    let output = xpci_as(members().gid, &daemon, &["pci-assignable-add", "01:00.0"]);
    let said = error_of(&output);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("only root may use pci-assignable-add") && said.contains("sudo"), "{said}");
    let mut stream = UnixStream::connect(socket(&daemon)).unwrap();
    for (command, arguments) in [
        ("pci-assignable-add", json!({"address": "0000:01:00.0", "dry-run": true})),
        ("pci-attach", json!({"domain": "web", "address": "0000:01:00.0"})),
        ("vf-create", json!({"address": "0000:01:00.0", "count": 1})),
        ("sync", json!({})),
        ("quarantine-clear", json!({"address": "0000:01:00.0"})),
    ] {
        let request = json!({"version": 1, "id": 3, "command": command, "arguments": arguments});
        let answer = ask(&mut stream, &request);
        assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(3), &json!("refused")), "{answer}");
    }
    // The connection stays open.
    let status = ask(&mut stream, &json!({"version": 1, "id": 4, "command": "status"}));
    assert_eq!(status["ok"], true, "{status}");
}

#[test]
fn users_outside_the_status_group_cannot_connect() {
    if !geteuid().is_root() {
        // Only root can run a program as another user.
        return;
    }
    let daemon = with_group();
    let output = xpci_as(Gid::from_raw(MEMBER), &daemon, &["status"]);
    let said = error_of(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("only root may use it") && said.contains("status-group"), "{said}");
}

#[test]
fn the_status_group_can_reach_its_own_socket_only() {
    let daemon = with_group();
    let of = |path: PathBuf| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.mode() & 0o777, Gid::from_raw(metadata.gid()) == members().gid)
    };
    assert_eq!(of(socket(&daemon)), (0o660, true));
    assert_eq!(of(daemon.directory.path().join("run")), (0o710, true));
    assert_eq!(of(daemon.socket()).0, 0o600);
}

#[test]
fn without_a_status_group_there_is_no_socket_for_one() {
    let daemon = with_group();
    fs::write(daemon.directory.path().join("settings.yaml"), "").unwrap();
    let daemon = daemon.start_again();
    assert!(!socket(&daemon).exists());
    assert!(daemon.socket().exists());
}

#[test]
fn a_status_group_that_does_not_exist_is_a_problem_in_the_status() {
    let daemon = start("status-group: no-such-group\n");
    let status = String::from_utf8(daemon.xpci(&["status"]).stdout).unwrap();
    assert!(status.contains("there is no group 'no-such-group'"), "{status}");
    assert!(!socket(&daemon).exists());
}

#[test]
fn clients_of_the_status_group_are_limited_without_affecting_root() {
    let daemon = with_group();
    let status = json!({"version": 1, "id": 1, "command": "status"});
    let clients: Vec<UnixStream> = (0..64)
        .map(|_| {
            let mut client = UnixStream::connect(socket(&daemon)).unwrap();
            assert_eq!(ask(&mut client, &status)["ok"], true);
            client
        })
        .collect();
    // One more is refused before it asks.
    let one_more = UnixStream::connect(socket(&daemon)).unwrap();
    assert_eq!(answer(&one_more)["error"]["code"], "refused");
    assert!(daemon.xpci(&["status"]).status.success());
    drop(clients);
}

//! How the service starts, stops and starts again.

use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::Signal;

use crate::daemon::{Daemon, program, service};
use crate::transcript::host;

#[test]
fn a_second_service_in_the_same_run_directory_refuses_to_start() {
    let daemon = Daemon::start(&host());
    let output = service(daemon.directory.path()).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("another xpcid seems to run") && log.contains("run/lock"), "{log}");
    assert!(daemon.xpci(&["status"]).status.success(), "the first one has to go on");
}

#[test]
fn a_termination_signal_stops_it_cleanly_and_its_socket_answers_no_more() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = Daemon::start(&host());
        daemon.signal(signal);
        let (status, log) = daemon.wait();
        assert!(status.success(), "{signal}: {status}\n{}", log.join("\n"));
        assert!(log.iter().any(|line| line.contains("stopping")), "{}", log.join("\n"));
        assert_eq!(daemon.xpci(&["status"]).status.code(), Some(3), "{signal}");
    }
}

#[test]
fn only_its_owner_reaches_the_socket() {
    let daemon = Daemon::start(&host());
    let mode = std::fs::metadata(daemon.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_service_that_was_killed_starts_again_over_its_socket_and_its_lock() {
    let daemon = Daemon::start(&host());
    daemon.signal(Signal::SIGKILL);
    let daemon = daemon.start_again();
    assert!(daemon.xpci(&["status"]).status.success());
}

#[test]
fn a_description_or_settings_that_cannot_be_used_are_named_with_the_place() {
    for (file, text, named) in [
        ("host.yaml", "xen: \"4.17\"\ndrivers: 7\n", "host.yaml"),
        ("host.yaml", "", "host.yaml"),
        ("settings.yaml", "holder: vfio\n", "vfio"),
        ("settings.yaml", "guest-limit-seconds: 0\n", "guest-limit-seconds"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("host.yaml"), host()).unwrap();
        std::fs::write(directory.path().join("settings.yaml"), "").unwrap();
        std::fs::write(directory.path().join(file), text).unwrap();
        let output = service(directory.path()).output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}: {log}");
        assert!(log.contains(named), "{text}: {log}");
    }
}

#[test]
fn on_a_machine_without_xen_it_says_so_and_its_help_works() {
    let help = program(env!("CARGO_BIN_EXE_xpcid")).arg("--help").output().unwrap();
    assert!(help.status.success() && help.stderr.is_empty(), "{help:?}");
    let wrong = program(env!("CARGO_BIN_EXE_xpcid")).args(["--platform", "kvm"]).output().unwrap();
    let said = String::from_utf8(wrong.stderr).unwrap();
    assert_eq!(wrong.status.code(), Some(2), "{said}");
    assert!(said.contains("must be 'xen' or 'sim:FILE'"), "{said}");
}

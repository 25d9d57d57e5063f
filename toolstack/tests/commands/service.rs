//! How the service starts, stops and starts again.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};

use nix::sys::signal::Signal;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::daemon::{Daemon, LIMIT, describe, install_program, install_script, program, service};
use crate::transcript::host;

#[test]
fn a_second_service_in_the_same_run_directory_refuses_to_start() {
    let daemon = Daemon::start(&host());
    let output = service(daemon.directory.path()).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("another xpcid has it") && log.contains("run/lock"), "{log}");
    assert!(daemon.xpci(&["status"]).status.success(), "the first one has to go on");
}

#[test]
fn a_service_with_another_run_directory_refuses_to_write_the_same_records() {
    let daemon = Daemon::start(&host());
    let run = daemon.directory.path().join("run");
    let other = daemon.directory.path().join("other").into_os_string();
    let first = service(daemon.directory.path());
    let arguments = first.get_args().map(|argument| if argument == run { &other } else { argument });
    let output = program(env!("CARGO_BIN_EXE_xpcid")).args(arguments).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("another xpcid has it") && log.contains("/state:"), "{log}");
    assert!(daemon.xpci(&["status"]).status.success(), "the first one has to go on");
}

#[test]
fn sigterm_stops_the_service_and_closes_its_socket() {
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
fn only_its_owner_can_connect_to_the_socket() {
    let daemon = Daemon::start(&host());
    let mode = std::fs::metadata(daemon.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// A service that is started with these limits of a shell's.
fn limited(limits: &str) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    describe(directory.path(), &host(), "");
    Daemon::run_until_ready(directory, |directory| {
        let xpcid = service(directory);
        let mut limited = program("sh");
        let script = format!("{limits}; exec \"$0\" \"$@\"");
        limited.args(["-c", script.as_str()]).arg(xpcid.get_program()).args(xpcid.get_args());
        limited
    })
}

#[test]
fn the_limit_of_open_files_is_raised_to_the_hard_limit() {
    let daemon = limited("ulimit -Sn 64; ulimit -Hn 777");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.id())).unwrap();
    let files: Vec<&str> = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .map(|line| line.split_whitespace().collect())
        .unwrap();
    assert_eq!(files[3..5], ["777", "777"], "{limits}");
    let status = String::from_utf8(daemon.xpci(&["status"]).stdout).unwrap();
    assert!(!status.contains("LimitNOFILE"), "{status}");
}

#[test]
fn a_limit_of_open_files_that_is_too_low_for_the_host_is_a_problem_in_the_status() {
    let daemon = limited("ulimit -n 200");
    let status = String::from_utf8(daemon.xpci(&["status"]).stdout).unwrap();
    assert!(status.contains("xpcid can open 200 files") && status.contains("LimitNOFILE"), "{status}");
}

#[test]
fn a_service_without_free_descriptors_answers_later_and_warns_once() {
    let mut daemon = limited("ulimit -n 48");
    let clients: Vec<UnixStream> = (0..60).map(|_| UnixStream::connect(daemon.socket()).unwrap()).collect();
    daemon.wait_for_log("accept control connections");
    drop(clients);
    assert!(daemon.xpci(&["status"]).status.success());
    daemon.signal(Signal::SIGTERM);
    let (_, log) = daemon.wait();
    assert!(!log.iter().any(|line| line.contains("accept control connections")), "{}", log.join("\n"));
}

#[test]
fn a_service_that_was_killed_starts_again_over_its_socket_and_its_lock() {
    let daemon = Daemon::start(&host());
    daemon.signal(Signal::SIGKILL);
    let daemon = daemon.start_again();
    assert!(daemon.xpci(&["status"]).status.success());
}

#[test]
fn a_service_that_cannot_copy_its_policies_serves_and_says_so_until_it_can() {
    let directory = tempfile::tempdir().unwrap();
    describe(directory.path(), &host(), "");
    // Where the copy is written first.
    let next = directory.path().join("state/policies-in-force.new");
    std::fs::create_dir_all(&next).unwrap();
    let daemon = Daemon::run_until_ready(directory, service);
    let status = || String::from_utf8(daemon.xpci(&["status"]).stdout).unwrap();
    assert!(status().contains("keep a copy of the policies in "), "{}", status());
    std::fs::remove_dir(next).unwrap();
    assert!(daemon.xpci(&["policy", "reload"]).status.success());
    assert!(!status().contains("keep a copy"), "{}", status());
}

#[test]
fn mistakes_in_a_simulation_or_in_settings_are_reported_with_their_position() {
    for (file, text, named) in [
        ("host.yaml", "xen: \"4.17\"\ndrivers: 7\n", "host.yaml"),
        ("host.yaml", "", "host.yaml"),
        ("settings.yaml", "holder: vfio\n", "vfio"),
        ("settings.yaml", "guest-limit-seconds: 0\n", "guest-limit-seconds is 0"),
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
fn without_xen_the_service_fails_with_a_message_and_help_works() {
    let help = program(env!("CARGO_BIN_EXE_xpcid")).arg("--help").output().unwrap();
    assert!(help.status.success() && help.stderr.is_empty(), "{help:?}");
    let wrong = program(env!("CARGO_BIN_EXE_xpcid")).args(["--platform", "kvm"]).output().unwrap();
    let said = String::from_utf8(wrong.stderr).unwrap();
    assert_eq!(wrong.status.code(), Some(2), "{said}");
    assert!(said.contains("must be 'xen' or 'sim:FILE'"), "{said}");
}

/// A service as systemd starts it, and its notifications to systemd.
fn under_systemd(watchdog: &str) -> (Daemon, UnixDatagram) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("host.yaml"), host()).unwrap();
    std::fs::write(directory.path().join("settings.yaml"), "").unwrap();
    let socket = directory.path().join("notify");
    let systemd = UnixDatagram::bind(&socket).unwrap();
    systemd.set_read_timeout(Some(LIMIT)).unwrap();
    let mut program = service(directory.path());
    program.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", watchdog);
    (Daemon::run(directory, program), systemd)
}

/// Waits for a notification from the service to systemd.
fn wait_for(systemd: &UnixDatagram, wanted: &str) {
    let mut bytes = [0; 1024];
    loop {
        let length = systemd.recv(&mut bytes).unwrap_or_else(|error| panic!("no {wanted}: {error}"));
        if String::from_utf8_lossy(&bytes[..length]).lines().any(|line| line == wanted) {
            return;
        }
    }
}

#[test]
fn systemd_is_notified_when_the_socket_answers() {
    let (daemon, systemd) = under_systemd("0");
    wait_for(&systemd, "READY=1");
    assert!(daemon.xpci(&["status"]).status.success());
    daemon.signal(Signal::SIGTERM);
    wait_for(&systemd, "STOPPING=1");
}

#[test]
fn the_watchdog_is_notified_while_the_engine_is_idle() {
    let (_daemon, systemd) = under_systemd("200000");
    (0..3).for_each(|_| wait_for(&systemd, "WATCHDOG=1"));
}

#[test]
fn sighup_reloads_the_policies() {
    let daemon = Daemon::start(&host());
    let policies = daemon.directory.path().join("policies");
    std::fs::create_dir_all(&policies).unwrap();
    std::fs::write(policies.join("new.yaml"), "profile: strict\n").unwrap();
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_log("the policies were read again");
    let shown = daemon.xpci(&["policy", "show", "--for", "02:00.0"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("new.yaml"), "{shown:?}");
    // A mistake is logged and reported until it is corrected, and changes nothing.
    std::fs::write(policies.join("new.yaml"), "profil: strict\n").unwrap();
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_log("SIGHUP: the policies are not reloaded");
    let status = daemon.xpci(&["status", "--check"]);
    assert_eq!(status.status.code(), Some(1));
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(text.contains("the earlier policies stay in force") && text.contains("'profil'"), "{text}");
    std::fs::write(policies.join("new.yaml"), "profile: strict\n").unwrap();
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_log("the policies were read again");
    assert!(daemon.xpci(&["status", "--check"]).status.success());
}

/// The values of a key of the unit that is shipped.
fn unit(key: &str) -> Vec<String> {
    let text = include_str!("../../../configs/systemd/xpcid.service");
    let lines = text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    lines.flat_map(|values| values.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect()
}

#[test]
fn the_unit_starts_after_xen_and_before_guests_on_each_distribution() {
    let (after, before) = (unit("After"), unit("Before"));
    for wanted in ["xen.service", "xenstored.service", "proc-xen.mount"] {
        assert!(after.iter().any(|unit| unit == wanted), "After={wanted}: {after:?}");
    }
    for wanted in ["xendomains.service", "libvirtd.service", "virtxend.service"] {
        assert!(before.iter().any(|unit| unit == wanted), "Before={wanted}: {before:?}");
    }
    // A condition that is false for a moment during boot would skip the service for that boot.
    let conditions: Vec<String> =
        ["ConditionPathExists", "ConditionPathIsMountPoint"].iter().flat_map(|key| unit(key)).collect();
    assert!(conditions.iter().all(|path| path.starts_with("/sys/hypervisor/")), "{conditions:?}");
}

#[test]
fn the_unit_is_restarted_without_a_limit() {
    assert_eq!(unit("StartLimitIntervalSec"), ["0"]);
    assert_eq!(unit("Restart"), ["always"]);
    assert_eq!(unit("Type"), ["notify"]);
}

#[test]
fn settings_with_a_mistake_do_not_stop_a_service_that_has_run_before() {
    let daemon = Daemon::start(&host());
    std::fs::write(daemon.directory.path().join("settings.yaml"), "guest-limit-seconds: 1\nholdr: auto\n")
        .unwrap();
    let daemon = daemon.start_again();
    let status = daemon.xpci(&["status"]);
    let shown = String::from_utf8_lossy(&status.stdout);
    assert!(status.status.success(), "{shown}");
    assert!(
        shown.contains("settings.yaml:2:1: 'holdr' is not a valid setting; did you mean 'holder'?"),
        "{shown}"
    );
}

#[test]
fn settings_and_policies_are_checked_without_starting_anything() {
    let directory = tempfile::tempdir().unwrap();
    let settings = directory.path().join("settings.yaml");
    let check = |text: &str| {
        std::fs::write(&settings, text).unwrap();
        let output = service(directory.path()).arg("--check").output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, said, _) = check("guest-limit-seconds: 5\n");
    assert_eq!((code, said.as_str()), (Some(0), "no mistake in 1 settings file and 0 policy files\n"));
    let (code, _, said) = check("guest-limit-second: 5\n");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains(
            "settings.yaml:1:1: 'guest-limit-second' is not a valid setting; did you mean 'guest-limit-seconds'?"
        ),
        "{said}"
    );
    let (code, _, said) = check("policy-directories: [/nonexistent]\n");
    assert_eq!(code, Some(0), "{said}");
    std::fs::create_dir(directory.path().join("policies")).unwrap();
    std::fs::write(directory.path().join("policies/bad.yaml"), "profil: strict\n").unwrap();
    let (code, _, said) = check("");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("bad.yaml:1:1: 'profil' is not a valid key of a policy; did you mean 'profile'?"),
        "{said}"
    );
    assert!(!directory.path().join("run").exists() && !directory.path().join("state").exists());
}

#[test]
fn the_journal_gets_one_line_per_record_with_priority_and_without_time() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("host.yaml"), host()).unwrap();
    std::fs::write(directory.path().join("settings.yaml"), "holdr: 1\n").unwrap();
    let output = service(directory.path()).env("JOURNAL_STREAM", "8:1").output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    let path = directory.path().join("settings.yaml");
    let wanted = format!(
        "<3>{}:1:1: 'holdr' is not a valid setting; did you mean 'holder'?; correct the settings ('xpcid --check'), then start xpcid again\n",
        path.display()
    );
    assert_eq!(log, wanted);
}

#[test]
fn a_refused_request_is_not_logged_as_an_error() {
    let mut daemon = Daemon::start(&host());
    let refused = daemon.xpci(&["pci-attach", "closed", "02:00.0"]);
    assert_eq!(refused.status.code(), Some(5));
    daemon.xpci(&["pci-assignable-add", "02:00.0"]);
    let refused = daemon.xpci(&["pci-attach", "closed", "02:00.0"]);
    assert_eq!(refused.status.code(), Some(5), "{refused:?}");
    daemon.signal(Signal::SIGTERM);
    let (_, log) = daemon.wait();
    assert!(log.iter().any(|line| line.contains("passthrough")), "{}", log.join("\n"));
    assert!(log.iter().all(|line| !line.contains("ERROR")), "{}", log.join("\n"));
}

/// A service that was started from a file of its own, and that file.
fn installed() -> (Daemon, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    describe(directory.path(), &host(), "");
    let file = directory.path().join("xpcid");
    let daemon = Daemon::run_until_ready(directory, |directory| {
        let xpcid = service(directory);
        install_program(xpcid.get_program().as_ref(), &file);
        let mut copy = program(file.to_str().unwrap());
        copy.args(xpcid.get_args());
        copy
    });
    (daemon, file)
}

/// The process behind a service's socket.
fn server(daemon: &Daemon) -> i32 {
    let stream = UnixStream::connect(daemon.socket()).unwrap();
    getsockopt(&stream, PeerCredentials).unwrap().pid()
}

#[test]
fn the_installed_program_takes_over_from_the_running_one() {
    let (mut daemon, file) = installed();
    // What was installed meanwhile says that it is another.
    let real = file.with_extension("real");
    install_program(&file, &real);
    install_script(&format!("#!/bin/sh\necho the newer one >&2\nexec {} \"$@\"\n", real.display()), &file);
    let old = server(&daemon);
    let output = daemon.xpci(&["daemon-reexec"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    daemon.wait_for_log("the newer one");
    daemon.wait_for_log("ready on");
    assert!(daemon.wait_for_end().success());
    let new = server(&daemon);
    assert_ne!(old, new);
    assert!(daemon.xpci(&["status"]).status.success());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(new), Signal::SIGTERM).unwrap();
    daemon.wait();
}

#[test]
fn a_program_that_cannot_start_leaves_the_running_one_in_place() {
    let (daemon, file) = installed();
    let running = server(&daemon);
    for (script, said) in [("#!/bin/sh\nexit 1\n", "ended"), ("", "start")] {
        install_script(script, &file);
        let output = daemon.xpci(&["daemon-reexec"]);
        let said_it = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said_it}");
        assert!(said_it.contains(said) && said_it.contains("the running process continues"), "{said_it}");
    }
    assert_eq!(server(&daemon), running);
    assert!(daemon.xpci(&["status"]).status.success());
}

#[test]
fn a_simulated_host_outlives_the_service() {
    let mut daemon = Daemon::start(&host());
    for command in ["vf create 01:00.0 2", "pci-assignable-add 01:10.0", "pci-attach web 01:10.0"] {
        let output = daemon.xpci(&command.split(' ').collect::<Vec<_>>());
        assert!(output.status.success(), "{command}: {output:?}");
    }
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    let daemon = daemon.start_again();
    let shown = |arguments: &[&str]| String::from_utf8(daemon.xpci(arguments).stdout).unwrap();
    let status = shown(&["status", "--check"]);
    assert!(status.contains("attached  web") && !status.contains("problem"), "{status}");
    assert_eq!(shown(&["vf", "list", "01:00.0"]).lines().count(), 3, "a head and two VFs");
    let detached = shown(&["pci-detach", "web", "01:10.0"]);
    assert!(detached.contains("is detached from 'web' (domain 1) and assignable again"), "{detached}");
}

#[test]
fn another_description_is_another_simulated_host() {
    let mut daemon = Daemon::start(&host());
    assert!(daemon.xpci(&["vf", "create", "01:00.0", "2"]).status.success());
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    let file = daemon.directory.path().join("host.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("# changed\n{text}")).unwrap();
    let daemon = daemon.start_again();
    let listed = daemon.xpci(&["vf", "list", "01:00.0"]);
    assert_eq!(String::from_utf8(listed.stdout).unwrap(), "", "no VF is enabled");
}

#[test]
fn a_simulated_host_does_not_run_on_the_records_of_the_real_one() {
    let directory = tempfile::tempdir().unwrap();
    describe(directory.path(), &host(), "");
    let file = directory.path().join("host.yaml");
    let run = directory.path().join("run");
    let mut command = program(env!("CARGO_BIN_EXE_xpcid"));
    command.arg("--platform").arg(format!("sim:{}", file.display())).arg("--run-directory").arg(run);
    let output = command.output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("a simulated host needs --state-directory"), "{log}");
}

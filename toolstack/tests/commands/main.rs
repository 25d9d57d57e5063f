//! The two binaries as people and tools meet them, on a simulated host: what they print, where, and how they exit.
//!
//! Most tests are transcripts, files beside this one: `$` is a command, what follows is what it printed (`!`: on standard
//! error), `[n]` its exit status unless 0; `< NAME` and the `|` lines after it make a file in DIR. `XPCI_BLESS=1 cargo test -p toolstack
//! --test commands` rewrites them; read the difference before committing it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that fails says so by panicking")]

mod daemon;
mod fleet;
mod service;
mod socket;
mod status_group;
mod transcript;
mod wire;
mod xl_config;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;

use daemon::Daemon;
use nix::sys::signal::Signal;
use transcript::{host, play, play_alone, play_on};

#[test]
fn a_vf_goes_from_its_pf_to_a_guest_and_back() {
    play("life-of-a-vf", host());
}

#[test]
fn the_hosts_functions_are_listed_with_names_and_owners() {
    play("list", host());
}

#[test]
fn columns_are_omitted_on_a_narrow_terminal() {
    let daemon = Daemon::start(&host());
    for (columns, gone) in [(200, 0), (100, 2), (72, 5)] {
        let mut list = daemon::program(env!("CARGO_BIN_EXE_xpci"));
        list.arg("--socket").arg(daemon.socket()).arg("list").env("COLUMNS", columns.to_string());
        let text = String::from_utf8(list.output().unwrap().stdout).unwrap();
        let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= columns, "{columns}:\n{text}");
        let titles = text.lines().next().unwrap().split("  ").filter(|title| !title.trim().is_empty());
        assert_eq!(10 - titles.count(), gone, "{columns}:\n{text}");
        assert_eq!(text.lines().count(), 6, "one line a function:\n{text}");
    }
}

#[test]
fn all_obstacles_are_named_at_once_and_a_dry_run_changes_nothing() {
    let virtio = "{address: 02:00.0, model: virtio-net, irq: 11, interfaces: [eth1]}";
    let used = virtio.replace("eth1]", "eth1], uses: [{interface: {name: eth1, up: true, master: br0}}]");
    play("obstacles", host().replace(virtio, &used));
}

#[test]
fn a_correct_dom0_passes_every_check_and_exits_with_0() {
    play("doctor", host());
}

#[test]
fn faults_of_dom0_are_reported_with_corrections_and_exit_with_1() {
    let texts = "
machine:
  /usr/lib/udev/rules.d/90-xpci.rules: null
  xl info: \"virt_caps : pv hvm\\nxen_commandline : iommu=off\\n\"
  xl dmesg: null
";
    play("doctor-ill", host().replace("pciback, pci-stub", "pci-stub") + texts);
}

#[test]
fn without_the_service_doctor_runs_the_other_checks() {
    let directory = tempfile::tempdir().unwrap();
    let output = daemon::xpci(&directory.path().join("control"), &["doctor"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("FAULT        service: cannot connect to xpcid at"), "{text}");
    assert!(text.contains(" kernel: ") && text.contains(" xl-functions: without xpcid"), "{text}");
}

#[test]
fn dom0_exchanges_messages_with_the_guest_of_a_vf_where_a_policy_says_so() {
    play("mailbox", host());
}

#[test]
fn a_persistent_function_is_reserved_until_a_command_ends_that() {
    play("persistent", host());
}

#[test]
fn functions_are_named_by_vf_index_interface_name_and_pool() {
    let settings = "names:
  uplink: {address: '01:00.0'}
  web-vf: {address: '01:00.0', vf: 0}
  virtio: {path: pci-0000:02:00.0}
  nic: {serial: 52-54-00-ff-ff-12-34-56, function: 0}
  twins: {serial: 52-54-00-ff-ff-12-34-56}
  slot: {path: 0000:00:03.0/00.1}
  absent: {serial: 00-00-00-00-00-00-00-01}
";
    let daemon = Daemon::start_with(tempfile::tempdir().unwrap(), &host_with_card(4), settings);
    play_on("names", &daemon);
}

/// The host with a card of two functions that have a serial number, on a bus of this number.
fn host_with_card(bus: u8) -> String {
    let port = "  - {address: 00:03.0, model: root-port, buses: [BUS, BUS]}";
    let card = "  - {address: 0BUS:00.0, model: card}\n  - {address: 0BUS:00.1, model: card}";
    let functions = format!("{port}\n{card}\n").replace("BUS", &bus.to_string());
    let model = "models:
  card:
    reset-methods: [flr]
    bars: {0: 4000}
    config: |
      00: 86 80 d3 10 00 00 10 00 00 00 00 02 00 00 80 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 01 00 00
      a0: 10 00 02 00 00 00 00 10 00 00 00 00 11 04 00 00
      100: 03 00 01 00 56 34 12 ff ff 00 54 52 00 00 00 00
";
    let host = host().replace("\n# A model of your own", &format!("{functions}\n# A model of your own"));
    host.replace("models: {}\n", model)
}

#[test]
fn a_name_by_serial_number_or_path_follows_a_device_whose_bus_number_changes() {
    let settings = "names:
  nic: {serial: 52-54-00-ff-ff-12-34-56, function: 1}
  slot: {path: /sys/devices/pci0000:00/0000:00:03.0/0000:04:00.1}
";
    for (bus, address) in [(4, "0000:04:00.1"), (6, "0000:06:00.1")] {
        let daemon = Daemon::start_with(tempfile::tempdir().unwrap(), &host_with_card(bus), settings);
        for name in ["nic", "slot"] {
            let shown = daemon.xpci(&["--json", "show", name]);
            let answer: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
            assert_eq!(answer["result"]["address"], address, "{name}: {answer}");
            assert_eq!(answer["result"]["path"], "0000:00:03.0/00.1", "{name}: {answer}");
        }
    }
}

/// A service after a reboot of the host: only what is wanted persistently is left.
fn rebooted(before: &Daemon, host: &str) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let wanted = |daemon: &std::path::Path| daemon.join("state/wanted");
    std::fs::create_dir(directory.path().join("state")).unwrap();
    std::fs::copy(wanted(before.directory.path()), wanted(directory.path())).unwrap();
    Daemon::start_in(directory, host)
}

#[test]
fn persistent_holds_and_settings_survive_a_reboot_until_the_release() {
    let daemon = Daemon::start(&host());
    play_on("wanted", &daemon);
    let after = rebooted(&daemon, &host());
    after.wait_for_log("0000:02:00.0: held at once");
    // The VFs are there when they are enabled again.
    assert!(after.xpci(&["vf", "create", "01:00.0", "2"]).status.success());
    after.wait_for_log("0000:01:10.0: held at once");
    play_on("wanted-again", &after);
    let wanted = std::fs::read_to_string(after.directory.path().join("state/wanted")).unwrap();
    assert!(wanted.contains("\"wishes\": []"), "all was given back: {wanted}");
}

#[test]
fn a_function_that_is_held_persistently_is_held_at_the_address_that_it_has_later() {
    let daemon = Daemon::start(&host_with_card(4));
    assert!(daemon.xpci(&["pci-assignable-add", "--persist", "04:00.1"]).status.success());
    let moved = host_with_card(6)
        .replace("  - {address: 02:00.0", "  - {address: 04:00.1, model: nvme}\n  - {address: 02:00.0");
    let after = rebooted(&daemon, &moved);
    after.wait_for_log("0000:06:00.1: held at once");
    let held = after.xpci(&["pci-assignable-list"]);
    assert_eq!(String::from_utf8(held.stdout).unwrap(), "0000:06:00.1\n", "not what is at its address now");
}

#[test]
fn functions_in_the_settings_are_attached_when_guest_and_function_exist() {
    let settings = "guests:
  web: [02:00.0@5, eth0:1]
  db: [any:eth0]
  00000000-0000-0000-0000-0000000000aa: [03:00.0]
";
    let daemon = Daemon::start_with(tempfile::tempdir().unwrap(), &host(), settings);
    daemon.wait_for_log("eth0:1 is missing in domain 1, to which the settings assign it");
    assert_eq!(daemon.xpci(&["status", "--check"]).status.code(), Some(1));
    assert!(daemon.xpci(&["vf", "create", "eth0", "2"]).status.success());
    for (function, address, domain) in
        [("02:00.0", "0000:02:00.0", 1), ("eth0:1", "0000:01:10.2", 1), ("eth0:0", "0000:01:10.0", 2)]
    {
        assert!(daemon.xpci(&["pci-assignable-add", function]).status.success(), "{function}");
        daemon.wait_for_log(&format!("{address}: attached again, to domain {domain}"));
    }
    play_on("guests", &daemon);
}

#[test]
fn an_hvm_guest_that_was_created_paused_gets_a_function_before_it_runs() {
    let paused = "name: desktop, type: hvm, paused: true,";
    let daemon = Daemon::start(&host().replace("name: desktop, type: hvm,", paused));
    assert!(daemon.xpci(&["pci-assignable-add", "02:00.0"]).status.success());
    let attached = daemon.xpci(&["pci-attach", "desktop", "02:00.0"]);
    let text = String::from_utf8(attached.stdout).unwrap();
    assert!(attached.status.success() && text.contains("is attached to"), "{text} {:?}", attached.stderr);
}

#[test]
fn a_repeated_command_succeeds() {
    play("already", host());
}

#[test]
fn json_prints_one_envelope_for_each_answer() {
    play("json", host());
}

#[test]
fn an_answer_that_cannot_be_written_exits_with_1() {
    let daemon = Daemon::start(&host());
    for arguments in [&["status"][..], &["--json", "list"]] {
        let mut command = daemon::program(env!("CARGO_BIN_EXE_xpci"));
        command.arg("--socket").arg(daemon.socket()).args(arguments);
        command.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains("print the answer: No space left on device"), "{arguments:?}: {text}");
    }
}

#[test]
fn events_of_vfs_and_policies_are_followed_across_a_restart_of_the_service() {
    let daemon = Daemon::start(&host());
    let mut command = daemon::program(env!("CARGO_BIN_EXE_xpci"));
    command.arg("--socket").arg(daemon.socket()).args(["events", "--follow"]);
    let mut follower = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (sender, lines) = mpsc::channel();
    let output = BufReader::new(follower.stdout.take().unwrap());
    thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let wait_for = |wanted: &str| {
        let mut seen = Vec::new();
        while !seen.last().is_some_and(|line: &String| line.contains(wanted)) {
            let line = lines.recv_timeout(daemon::LIMIT);
            seen.push(line.unwrap_or_else(|error| panic!("wait for '{wanted}': {error}, after {seen:?}")));
        }
    };
    let vf = |daemon: &Daemon, count: &str| {
        let done =
            ["vf create 01:00.0", "pci-assignable-add 01:10.0", "pci-attach web 01:10.0"].map(|command| {
                let command = command.replace("01:00.0", &format!("01:00.0 {count}"));
                daemon.xpci(&command.split(' ').collect::<Vec<_>>()).status.success()
            });
        assert_eq!(done, [true; 3]);
    };
    vf(&daemon, "2");
    wait_for("0000:01:00.0: 2 VFs are enabled");
    wait_for("0000:01:10.0 ('web', domain 1): attaching -> attached");
    let policies = daemon.directory.path().join("policies");
    std::fs::create_dir_all(&policies).unwrap();
    std::fs::write(
        policies.join("more.yaml"),
        "registers: [{at: 0xc0, width: 4, action: fixed, value: 0x12345678, reason: a mark}]\n",
    )
    .unwrap();
    let reloaded = daemon.xpci(&["policy", "reload"]);
    assert!(reloaded.status.success(), "{reloaded:?}");
    wait_for("0000:01:10.0 ('web', domain 1): the policies were reloaded");
    let mut daemon = daemon.start_again();
    assert!(daemon.xpci(&["vf", "set-count", "03:00.0", "3"]).status.success());
    wait_for("0000:03:00.0: 3 VFs are enabled");
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    let daemon = daemon.start_again();
    assert!(daemon.xpci(&["vf", "set-count", "03:00.0", "2"]).status.success());
    wait_for("0000:03:00.0: 2 VFs are enabled");
    follower.kill().unwrap();
    follower.wait().unwrap();
}

#[test]
fn a_command_is_about_all_functions_of_a_device() {
    play("device", host());
}

#[test]
fn metrics_have_functions_guests_and_problems() {
    play("metrics", host());
}

#[test]
fn metrics_of_a_service_that_does_not_run_exit_with_3() {
    play_alone("metrics-unreachable");
}

#[test]
fn a_missing_function_or_guest_exits_with_4() {
    play("not-found", host());
}

#[test]
fn a_request_that_does_not_fit_the_state_exits_with_5_and_changes_nothing() {
    play("refused", host());
}

#[test]
fn a_failure_that_is_undone_exits_with_1_and_can_be_tried_again() {
    let failures = r#"
  - {operation: assign, address: "02:00.0", errno: EIO, after: 1, times: 1}
  - {operation: set_num_vfs, address: "03:00.0", errno: ENOSPC, times: 1}
  - {operation: probe, address: "03:00.0", errno: EIO, times: 1}"#;
    play("failed", host().replace("failures: []", &format!("failures:{failures}")));
}

#[test]
fn a_reset_that_fails_at_detach_quarantines_with_6_until_it_is_cleared() {
    let failures = r#"
  - {operation: reset, address: "01:10.0", errno: ETIMEDOUT, after: 1, times: 2}"#;
    play("quarantined", host().replace("failures: []", &format!("failures:{failures}")));
}

#[test]
fn paths_and_blast_radii_are_shown_and_attach_warns_of_them() {
    play("paths", host());
}

#[test]
fn network_settings_are_set_kept_for_guests_and_restored() {
    play("vf-network", host());
}

#[test]
fn network_settings_that_fail_are_undone_and_fail_the_attachment() {
    // In the order of calls: the second of a set, the first of an attach, the first on the way back to dom0.
    let failures = r#"
  - {operation: set_vf_setting, address: "01:10.0", errno: EIO, after: 1, times: 1}
  - {operation: set_vf_setting, address: "01:10.0", errno: EIO, after: 3, times: 1}
  - {operation: set_vf_setting, address: "01:10.0", errno: EIO, after: 2, times: 1}"#;
    play("vf-network-fails", host().replace("failures: []", &format!("failures:{failures}")));
}

#[test]
fn settings_and_commands_set_the_number_of_vfs() {
    let directory = tempfile::tempdir().unwrap();
    let settings = "function-limit: 11\nvirtual-functions:\n  - {pf: '01:00.0', count: 3}\n  - {id: 'dead:beef', count: 1}\n";
    let daemon = Daemon::start_with(directory, &host(), settings);
    daemon.wait_for_log("has 3 VFs");
    play_on("vf-count", &daemon);
}

#[test]
fn pfs_and_untrusted_vfs_need_a_permission() {
    play("permit", host());
}

#[test]
fn functions_in_use_are_refused_and_vfs_of_a_pf_without_a_driver_need_an_option() {
    let virtio = "{address: 02:00.0, model: virtio-net, irq: 11, interfaces: [eth1]}";
    let used = virtio.replace("eth1]", "eth1], uses: [{interface: {name: eth1, up: true, master: br0}}]");
    // A PF whose driver is not loaded.
    let host = host().replace(virtio, &used).replace("drivers: [igb, ", "drivers: [");
    play("holding", host);
}

#[test]
fn policies_are_shown_explained_reloaded_and_learned_from() {
    play("policy", host());
}

#[test]
fn policies_show_the_rom_and_attach_warns_of_a_guest_that_gets_none() {
    play("roms", host());
}

#[test]
fn policy_files_and_dumps_are_checked_and_explained_without_a_service() {
    play_alone("policy-alone");
}

#[test]
fn wrong_usage_exits_with_2_without_a_request() {
    play_alone("usage");
}

#[test]
fn help_and_version_need_no_service_and_everything_else_exits_with_3() {
    play_alone("unreachable");
}

#[test]
fn a_journal_file_that_cannot_be_used_is_a_problem_in_status() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    std::fs::create_dir(&state).unwrap();
    std::fs::write(state.join("0000:01:10.0.json"), "{\"version\": 1, \"boo").unwrap();
    let daemon = Daemon::start_in(directory, &host());
    play_on("corrupt-journal", &daemon);
    std::fs::remove_file(daemon.directory.path().join("state/0000:01:10.0.json")).unwrap();
    let checked = daemon.xpci(&["status", "--check"]);
    assert!(checked.status.success(), "without the file there is no problem: {checked:?}");
}

/// An `xl` that notes what it is asked for, and fails where the test says so.
fn with_xl(daemon: &Daemon, script: &str, arguments: &[&str]) -> std::process::Output {
    let programs = daemon.directory.path().join("bin");
    std::fs::create_dir_all(&programs).unwrap();
    let xl = programs.join("xl");
    let log = daemon.directory.path().join("xl.log");
    daemon::install_script(&format!("#!/bin/sh\necho \"$@\" >> {}\n{script}\n", log.display()), &xl);
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let mut command = daemon::program(env!("CARGO_BIN_EXE_xpci"));
    command.env("PATH", path).arg("--socket").arg(daemon.socket()).args(arguments).output().unwrap()
}

/// A service whose guest "web" has a VF as device 3, and the paths of a checkpoint and of what belongs to it.
fn guest_with_a_vf() -> (Daemon, String, std::path::PathBuf) {
    let daemon = Daemon::start(&host());
    for command in [
        &["vf", "create", "01:00.0", "2"][..],
        &["pci-assignable-add", "01:10.0"],
        &["pci-attach", "web", "01:10.0@3"],
    ] {
        assert!(daemon.xpci(command).status.success(), "{command:?}");
    }
    let file = daemon.directory.path().join("web.save");
    let beside = daemon.directory.path().join("web.save.xpci");
    (daemon, file.to_str().unwrap().to_owned(), beside)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_guest_that_xl_cannot_save_gets_its_functions_back() {
    let (daemon, file, beside) = guest_with_a_vf();
    let output = with_xl(&daemon, "exit 3", &["save", "web", &file]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("failed (exit status: 3)") && said.contains("has its functions again"), "{said}");
    assert!(!beside.exists(), "what belongs to no checkpoint is left");
    let status = text(&daemon.xpci(&["status", "--check"]).stdout);
    assert!(status.contains("attached  web    0000:00:03.0"), "{status}");
    let log = std::fs::read_to_string(daemon.directory.path().join("xl.log")).unwrap();
    assert_eq!(log, format!("save 1 {file}\n"));
}

#[test]
fn a_checkpoint_that_cannot_be_written_is_refused_before_the_guest_loses_anything() {
    let (daemon, _, _) = guest_with_a_vf();
    let output = with_xl(&daemon, "exit 0", &["save", "web", "/nowhere/web.save"]);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(!daemon.directory.path().join("xl.log").exists(), "xl was run");
}

#[test]
fn a_saved_guest_that_keeps_running_gets_its_functions_back() {
    let (daemon, file, beside) = guest_with_a_vf();
    let output = with_xl(&daemon, &format!("touch {file}"), &["save", "-c", "web", &file]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(beside.exists() && std::path::Path::new(&file).exists());
    let status = daemon.xpci(&["status", "--check"]);
    assert!(status.status.success(), "{}", text(&status.stdout));
    assert!(text(&status.stdout).contains("attached  web    0000:00:03.0"), "{}", text(&status.stdout));
}

#[test]
fn a_refused_restore_is_explained_and_xl_is_not_run() {
    let (daemon, file, beside) = guest_with_a_vf();
    let restore = || with_xl(&daemon, "exit 0", &["restore", &file]);
    let missing = restore();
    assert_eq!(missing.status.code(), Some(4), "{}", text(&missing.stderr));
    assert!(text(&missing.stderr).contains("without functions"), "{}", text(&missing.stderr));
    // The simulated domain stays, as if the guest had been started again meanwhile.
    assert!(with_xl(&daemon, "exit 0", &["save", "web", &file]).status.success());
    let runs = restore();
    assert_eq!(runs.status.code(), Some(5), "{}", text(&runs.stderr));
    assert!(text(&runs.stderr).contains("runs, as 'web' (domain 1)"), "{}", text(&runs.stderr));
    let status = text(&daemon.xpci(&["status"]).stdout);
    assert!(status.contains("'xpci pci-attach web 0000:01:10.0@3' gives it back"), "{status}");
    std::fs::write(&beside, "{\"version\": 1}").unwrap();
    assert!(text(&restore().stderr).contains("web.save.xpci cannot be used"));
    let log = std::fs::read_to_string(daemon.directory.path().join("xl.log")).unwrap();
    assert_eq!(log, format!("save 1 {file}\n"), "xl was run for a guest that is not restored");
}

//! The playbook of docs/fleet.md, carried out by Ansible on a simulated host.

use std::fs;
use std::path::Path;

use crate::daemon::{Daemon, install_script, program};
use crate::transcript::host;

/// The text of the playbook.
fn playbook() -> String {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/fleet.md")).unwrap();
    text.split("```yaml").nth(1).unwrap().split("```").next().unwrap().to_owned()
}

/// Carries out the playbook; returns how many tasks ended as `changed`.
fn carry_out(daemon: &Daemon, options: &[&str]) -> u32 {
    let directory = daemon.directory.path();
    let mut ansible = program("ansible-playbook");
    ansible
        .args(["-i", "dom0,", "-c", "local", "-e", "ansible_python_interpreter=/usr/bin/python3"])
        .args(options)
        .arg(directory.join("playbook.yaml"))
        .env("PATH", format!("{}:{}", directory.display(), std::env::var("PATH").unwrap()))
        .env("HOME", directory)
        .env("LC_ALL", "C.UTF-8")
        .env("ANSIBLE_NOCOLOR", "1");
    let output = ansible
        .output()
        .expect("ansible-playbook is not there; 'make deps' installs Debian's package ansible-core");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let count = said.rsplit("changed=").next().and_then(|rest| rest.split_whitespace().next());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no count of changes in:\n{said}"))
}

/// Puts an `xpci` for this service where Ansible finds it, and the playbook beside it.
fn prepare(directory: &Path, socket: &Path) {
    fs::write(directory.join("playbook.yaml"), playbook()).unwrap();
    let script =
        format!("#!/bin/sh\nexec {} --socket {} \"$@\"\n", env!("CARGO_BIN_EXE_xpci"), socket.display());
    install_script(&script, &directory.join("xpci"));
}

#[test]
fn the_playbook_changes_a_host_once() {
    let daemon = Daemon::start(&host());
    prepare(daemon.directory.path(), &daemon.socket());
    assert_eq!(carry_out(&daemon, &[]), 3);
    let persistent = daemon.xpci(&["pci-list", "--persistent"]);
    let persistent = String::from_utf8(persistent.stdout).unwrap();
    assert!(persistent.contains("00000000-0000-0000-0000-0000000000aa"), "{persistent}");
    assert_eq!(carry_out(&daemon, &[]), 0, "the second time");
}

#[test]
fn check_mode_changes_nothing() {
    let daemon = Daemon::start(&host());
    prepare(daemon.directory.path(), &daemon.socket());
    // A VF has to be there for its dry run.
    assert!(daemon.xpci(&["vf", "create", "01:00.0", "2"]).status.success());
    let before = daemon.xpci(&["--json", "status"]).stdout;
    assert_eq!(carry_out(&daemon, &["--check"]), 0);
    assert_eq!(daemon.xpci(&["--json", "status"]).stdout, before);
}

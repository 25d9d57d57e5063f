//! `make install` and `make uninstall` as an administrator or a packager meets them.

#![expect(clippy::unwrap_used, reason = "a test that fails says so by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a target of the workspace's Makefile, with the programs that this test was built with.
fn make(target: &str, destination: &Path, prefix: &str) -> Output {
    let binaries = Path::new(env!("CARGO_BIN_EXE_xpcid")).parent().unwrap();
    let mut make = Command::new("make");
    make.args(["--silent", "-C", concat!(env!("CARGO_MANIFEST_DIR"), "/.."), target])
        .arg(format!("BINARIES={}", binaries.display()))
        .arg(format!("DESTDIR={}", destination.display()))
        .arg(format!("PREFIX={prefix}"));
    // This test may itself be run by make.
    for name in ["MAKEFLAGS", "MAKELEVEL", "MFLAGS"] {
        make.env_remove(name);
    }
    let output = make.output().unwrap();
    assert!(output.status.success(), "make {target}: {output:?}");
    output
}

#[test]
fn the_unit_and_the_settings_name_what_is_installed_below_the_prefix() {
    let root = tempfile::tempdir().unwrap();
    make("install", root.path(), "/usr/local");
    let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
    let unit = read("usr/local/lib/systemd/system/xpcid.service");
    assert!(unit.contains("ExecStart=/usr/local/sbin/xpcid\n"), "{unit}");
    assert!(root.path().join("usr/local/sbin/xpcid").exists());
    let settings = read("etc/xpci/xpcid.yaml");
    assert!(settings.contains("[/usr/local/share/xpci/policies, /etc/xpci/policies]"), "{settings}");
    assert!(root.path().join("usr/local/share/xpci/policies/nvme.yaml").exists());
}

#[test]
fn settings_that_are_there_are_neither_overwritten_nor_removed() {
    let root = tempfile::tempdir().unwrap();
    let settings = root.path().join("etc/xpci/xpcid.yaml");
    fs::create_dir_all(settings.parent().unwrap()).unwrap();
    fs::write(&settings, "holder: pci-stub\n").unwrap();
    make("install", root.path(), "/usr");
    make("uninstall", root.path(), "/usr");
    assert_eq!(fs::read_to_string(&settings).unwrap(), "holder: pci-stub\n");
}

#[test]
fn uninstall_removes_every_file_outside_etc() {
    let root = tempfile::tempdir().unwrap();
    make("install", root.path(), "/usr");
    make("uninstall", root.path(), "/usr");
    let found = Command::new("find").arg(root.path().join("usr")).args(["-type", "f"]).output().unwrap();
    assert_eq!(String::from_utf8(found.stdout).unwrap(), "");
}

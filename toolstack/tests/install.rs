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

#[path = "../build/commit.rs"]
mod commit;

fn git(folder: &Path, arguments: &[&str]) {
    let mut git = Command::new("git");
    git.arg("-C")
        .arg(folder)
        .args(["-c", "user.name=test", "-c", "user.email=test@localhost"])
        .args(arguments);
    let output = git.output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {output:?}");
}

#[test]
fn manual_pages_describe_both_programs_and_each_command() {
    let root = tempfile::tempdir().unwrap();
    make("install", root.path(), "/usr");
    let page = |path: &str| {
        let text = fs::read_to_string(root.path().join("usr/share/man").join(path)).unwrap();
        // Hyphens are escaped in roff.
        text.replace('\\', "")
    };
    assert!(page("man1/xpci.1").contains("pci-attach"));
    assert!(page("man1/xpci-pci-attach.1").contains("--trust-former-owner"));
    assert!(page("man1/xpci-vf-create.1").contains("--unmanaged"));
    assert!(page("man8/xpcid.8").contains(".TH xpcid 8") && page("man8/xpcid.8").contains("--platform"));
}

#[test]
fn the_shells_complete_commands_and_options() {
    let root = tempfile::tempdir().unwrap();
    make("install", root.path(), "/usr");
    let share = root.path().join("usr/share");
    let file = share.join("bash-completion/completions/xpci");
    let script = format!(
        ". '{}'; COMP_WORDS=(xpci pci-at); COMP_CWORD=1; _xpci xpci pci-at xpci; echo \"${{COMPREPLY[@]}}\"",
        file.display()
    );
    let output = Command::new("bash").args(["--norc", "-c", &script]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "pci-attach", "{output:?}");
    let zsh = fs::read_to_string(share.join("zsh/site-functions/_xpci")).unwrap();
    assert!(zsh.starts_with("#compdef xpci") && zsh.contains("pci-assignable-add"));
    let fish = fs::read_to_string(share.join("fish/vendor_completions.d/xpci.fish")).unwrap();
    assert!(fish.contains("complete -c xpci") && fish.contains("quarantine"));
}

#[test]
fn a_release_from_a_checkout_names_its_commit_and_other_sources_have_none() {
    let root = tempfile::tempdir().unwrap();
    let sources = root.path().join("sources");
    fs::create_dir(&sources).unwrap();
    assert!(commit::commit(&sources).is_none(), "no checkout");
    git(&sources, &["init", "-q"]);
    assert!(commit::commit(&sources).is_none(), "no commit yet");
    git(&sources, &["commit", "-q", "--allow-empty", "-m", "first"]);
    let first = commit::commit(&sources).unwrap();
    assert!(
        first.hash.len() >= 12 && first.hash.bytes().all(|digit| digit.is_ascii_hexdigit()),
        "{}",
        first.hash
    );
    let before = fs::read(&first.changes).unwrap();
    git(&sources, &["commit", "-q", "--allow-empty", "-m", "second"]);
    assert_ne!(commit::commit(&sources).unwrap().hash, first.hash);
    assert_ne!(fs::read(&first.changes).unwrap(), before, "what the build script watches did not change");
    // Sources that were unpacked inside of a checkout are not that checkout's.
    let unpacked = sources.join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    assert!(commit::commit(&unpacked).is_none());
}

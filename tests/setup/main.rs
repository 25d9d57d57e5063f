//! What set-up decides, from recorded answers of QEMU and apt; and that it leaves the machine alone otherwise.
//!
//! `host.sh` itself runs. Programs that it asks are `fake.sh` under their names; dpkg, which compares versions, is the real one.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

const FAKED: [&str; 7] =
    ["apt-cache", "apt-config", "apt-get", "dpkg-query", "id", "qemu-system-x86_64", "sudo"];

/// A machine on which set-up runs.
struct Machine {
    folder: TempDir,
}

/// What a run of set-up came to.
struct Run {
    succeeded: bool,
    /// What it wrote, on both streams.
    text: String,
    /// The calls of the programs, one a line.
    calls: Vec<String>,
}

impl Machine {
    /// With root's rights, all packages for building, no QEMU, and a release whose own sources have this recorded candidate.
    fn with_release(release: &str) -> Result<Self> {
        let machine = Self { folder: tempfile::tempdir()? };
        let (program, programs) = (source("fake.sh"), machine.path("bin"));
        fs::create_dir(&programs)?;
        for name in FAKED {
            symlink(&program, programs.join(name))?;
        }
        machine.write("os-release", &format!("VERSION_CODENAME={release}\n"))?;
        machine.write("uid", "0\n")?;
        machine.write("missing", "")?;
        machine.record("policy", &format!("policy-{release}.txt"))?;
        machine.record("targets", &format!("targets-{release}.txt"))?;
        machine.record("plan-normal", "plan-10.0.txt")?;
        machine.record("qemu-normal", "qemu-10.0.txt")?;
        machine.record("plan-backports", "plan-10.0.txt")?;
        machine.record("qemu-backports", "qemu-10.0.txt")?;
        Ok(machine)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.path(name), text).with_context(|| format!("writing {name}"))
    }

    /// Has an answer be a recorded one.
    fn record(&self, name: &str, recorded: &str) -> Result<()> {
        let from = source("recorded").join(recorded);
        fs::copy(&from, self.path(name)).map(drop).with_context(|| format!("copying {}", from.display()))
    }

    fn set_up(&self) -> Result<Run> {
        self.write("calls", "")?;
        let output = Command::new("sh")
            .arg(source("host.sh"))
            .env("PATH", format!("{}:/usr/bin:/bin", self.path("bin").display()))
            .env("FAKE", self.folder.path())
            .env("XPCI_OS_RELEASE", self.path("os-release"))
            .output()
            .context("running host.sh")?;
        Ok(Run {
            succeeded: output.status.success(),
            text: String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
            calls: fs::read_to_string(self.path("calls"))?.lines().map(str::to_owned).collect(),
        })
    }
}

impl Run {
    /// The calls of apt.
    fn apt(&self) -> impl Iterator<Item = &str> {
        self.calls.iter().map(String::as_str).filter(|call| call.starts_with("apt-"))
    }

    /// The calls of apt that install something.
    fn installed(&self) -> Vec<&str> {
        self.apt().filter(|call| call.contains(" install ") && !call.contains("--simulate")).collect()
    }
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("setup").join(name)
}

#[test]
fn where_all_is_there_apt_is_not_called() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.record("qemu", "qemu-10.0.txt")?;
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    assert_eq!(run.text, "");
    assert_eq!(run.apt().count(), 0, "{:?}", run.calls);
    Ok(())
}

#[test]
fn a_second_run_does_nothing() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    assert!(machine.set_up()?.succeeded);
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    assert_eq!(run.apt().count(), 0, "{:?}", run.calls);
    Ok(())
}

#[test]
fn qemu_7_2_lacks_igb_though_it_exits_with_0() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.record("qemu", "qemu-7.2.txt")?;
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    assert!(run.text.contains("taking QEMU from bookworm-backports"), "{}", run.text);
    let installed = run.installed();
    assert_eq!(installed.len(), 1, "{installed:?}");
    assert!(installed[0].ends_with("-t bookworm-backports qemu-system-x86"), "{installed:?}");
    Ok(())
}

#[test]
fn a_newer_qemu_utils_stays_because_7_2_is_not_tried() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.record("plan-normal", "plan-7.2-removes.txt")?;
    machine.record("qemu-normal", "qemu-7.2.txt")?;
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    let tried: Vec<&str> = run.apt().filter(|call| call.contains("install")).collect();
    assert!(tried.iter().all(|call| call.contains("-t bookworm-backports")), "{tried:?}");
    Ok(())
}

#[test]
fn debian_13_has_igb_in_its_own_sources() -> Result<()> {
    let machine = Machine::with_release("trixie")?;
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    assert!(run.apt().all(|call| !call.contains("backports")), "{:?}", run.calls);
    assert_eq!(run.installed().len(), 1, "{:?}", run.calls);
    Ok(())
}

#[test]
fn backports_are_taken_where_the_releases_own_version_would_remove_something() -> Result<()> {
    let machine = Machine::with_release("trixie")?;
    machine.record("plan-normal", "plan-7.2-removes.txt")?;
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    let installed = run.installed();
    assert!(installed[0].ends_with("-t trixie-backports qemu-system-x86"), "{installed:?}");
    Ok(())
}

#[test]
fn nothing_is_installed_where_apt_would_remove_a_package() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.write("missing", "gcc\n")?;
    machine.record("plan-backports", "plan-7.2-removes.txt")?;
    let run = machine.set_up()?;
    assert!(!run.succeeded);
    assert!(run.text.contains("it would remove qemu-utils"), "{}", run.text);
    assert_eq!(run.installed(), [""; 0]);
    Ok(())
}

#[test]
fn nothing_is_installed_where_apt_would_downgrade_a_package() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    let plan = fs::read_to_string(source("recorded/plan-7.2-downgrades.txt"))?;
    let plan: Vec<&str> = plan.lines().filter(|line| !line.starts_with("Remv")).collect();
    machine.write("plan-backports", &plan.join("\n"))?;
    let run = machine.set_up()?;
    assert!(!run.succeeded);
    let expected =
        "it would downgrade qemu-system-data from 1:10.0.2+ds-2+deb13u1~bpo12+1 to 1:7.2+dfsg-7+deb12u18\n";
    assert!(run.text.contains(expected), "{}", run.text);
    assert_eq!(run.installed(), [""; 0]);
    Ok(())
}

#[test]
fn the_backports_are_those_of_the_mirror_that_apt_uses() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    let script = format!(
        ". '{}'; backports_line bookworm < '{}'",
        source("apt.sh").display(),
        machine.path("targets").display()
    );
    let output = Command::new("sh").args(["-c", &script]).output()?;
    let line = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(line.ends_with(" http://mirror.example/debian/ bookworm-backports main\n"), "{line}");
    Ok(())
}

#[test]
fn a_source_of_backports_that_apt_has_is_not_added_again() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    let targets = fs::read_to_string(machine.path("targets"))?;
    let own = "bookworm-backports|Debian Backports|main|http://mirror.example/debian/\n";
    machine.write("targets", &(targets + own))?;
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    assert!(run.apt().all(|call| !call.contains("Dir::Etc::SourceList=")), "{:?}", run.calls);
    assert!(run.installed()[0].ends_with("-t bookworm-backports qemu-system-x86"), "{:?}", run.calls);
    Ok(())
}

#[test]
fn without_a_mirror_of_the_release_nothing_is_installed() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.write("targets", "nodistro|Somebody|main|http://mirror.example/other/\n")?;
    let run = machine.set_up()?;
    assert!(!run.succeeded);
    assert!(run.text.contains("apt has no source of Debian's bookworm"), "{}", run.text);
    assert_eq!(run.installed(), [""; 0]);
    Ok(())
}

#[test]
fn apt_reads_and_writes_lists_of_set_ups_own_which_are_gone_afterwards() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.write("missing", "gcc\n")?;
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    let mut folders = Vec::new();
    for call in run.apt().filter(|call| !call.starts_with("apt-config")) {
        let lists = call.split_whitespace().find_map(|word| word.strip_prefix("Dir::State::Lists="));
        folders.push(lists.with_context(|| format!("the host's own lists in {call}"))?);
    }
    assert!(!folders.is_empty());
    assert!(folders.iter().all(|folder| !Path::new(folder).exists()), "{folders:?}");
    Ok(())
}

#[test]
fn a_user_with_sudo_installs_with_it_and_is_not_asked() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.write("uid", "1000\n")?;
    machine.write("sudo", "")?;
    let run = machine.set_up()?;
    assert!(run.succeeded, "{}", run.text);
    let by_sudo: Vec<&String> = run.calls.iter().filter(|call| call.starts_with("sudo ")).collect();
    assert!(by_sudo.iter().all(|call| call.starts_with("sudo -n ")), "{by_sudo:?}");
    assert!(
        by_sudo.iter().any(|call| call.ends_with("-t bookworm-backports qemu-system-x86")),
        "{by_sudo:?}"
    );
    Ok(())
}

#[test]
fn a_user_without_rights_reads_what_is_missing_and_what_to_do() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.write("uid", "1000\n")?;
    machine.write("missing", "gcc\nmake\n")?;
    let run = machine.set_up()?;
    assert!(!run.succeeded);
    let expected = "not installed: gcc make qemu-system-x86 (with the device igb); run this as root, or as a user whose sudo asks \
                    for no password";
    assert!(run.text.contains(expected), "{}", run.text);
    assert_eq!(run.apt().count(), 0, "{:?}", run.calls);
    Ok(())
}

#[test]
fn a_qemu_without_igb_after_all_is_an_error() -> Result<()> {
    let machine = Machine::with_release("bookworm")?;
    machine.record("qemu-backports", "qemu-7.2.txt")?;
    let run = machine.set_up()?;
    assert!(!run.succeeded);
    assert!(run.text.contains("has no device igb, which QEMU has since 8.0"), "{}", run.text);
    Ok(())
}

//! A private apt: own sources, lists and state under the cache, nothing of the host's is changed.
//!
//! The mirror is the one that the host's apt already uses; its proxy and authentication settings apply. apt itself
//! verifies signatures and checksums.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// One package at one version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its exact version.
    pub version: String,
}

/// An apt root of our own.
#[derive(Debug)]
pub struct Apt {
    root: PathBuf,
}

const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

impl Apt {
    /// Prepares the root for one suite and fetches its package lists. One root per suite: apt then resolves
    /// dependencies within that suite, without pinning.
    pub fn open(root: &Path, suite: &str) -> Result<Self> {
        Self::open_with(root.join(suite), suite, &source(suite)?)
    }

    /// The same with the suite's sources, which most have no use for, in a root of its own.
    pub fn open_sources(root: &Path, suite: &str) -> Result<Self> {
        let binaries = source(suite)?;
        let both = format!("{binaries}\n{}", binaries.replacen("deb ", "deb-src ", 1));
        Self::open_with(root.join(format!("{suite}-sources")), suite, &both)
    }

    fn open_with(root: PathBuf, suite: &str, sources: &str) -> Result<Self> {
        for folder in ["etc", "state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::write(root.join("state/status"), "")?;
        fs::write(root.join("etc/sources.list"), format!("{sources}\n"))?;
        let apt = Self { root };
        apt.run(&["update", "-q", "--error-on=any"])
            .with_context(|| format!("fetching the package lists of {suite}"))?;
        Ok(apt)
    }

    /// What installing these packages on an empty machine would install.
    pub fn resolve(&self, names: &[&str]) -> Result<Vec<Package>> {
        let mut arguments = vec!["-s", "-q", "--no-install-recommends", "install"];
        arguments.extend(names);
        let plan = self.run(&arguments).context("resolving packages")?;
        let packages: Vec<Package> = plan.lines().filter_map(parse_inst).collect();
        ensure!(!packages.is_empty(), "apt resolved {names:?} to nothing:\n{plan}");
        Ok(packages)
    }

    /// Downloads these packages into `folder` (apt checks their checksums).
    pub fn download(&self, packages: &[Package], folder: &Path) -> Result<()> {
        let wanted: Vec<String> = packages.iter().map(|p| format!("{}={}", p.name, p.version)).collect();
        let mut arguments = vec!["download", "-q"];
        arguments.extend(wanted.iter().map(String::as_str));
        let mut command = self.command(&arguments);
        command.current_dir(folder);
        run(command).context("downloading packages").map(drop)
    }

    /// Downloads the newest source package of this name into `folder` (apt checks its checksums).
    pub fn download_source(&self, name: &str, folder: &Path) -> Result<()> {
        let mut command = self.command(&["source", "-q", "--download-only", name]);
        command.current_dir(folder);
        run(command).with_context(|| format!("downloading the sources of {name}")).map(drop)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let root = self.root.display();
        let mut command = Command::new("apt-get");
        for option in [
            format!("Dir::Etc::SourceList={root}/etc/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Dir::Etc::Preferences=/dev/null".to_owned(),
            "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
            format!("Dir::State={root}/state"),
            format!("Dir::State::status={root}/state/status"),
            format!("Dir::Cache={root}/cache"),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures::=amd64".to_owned(),
            "Acquire::Languages=none".to_owned(),
            // The cache is in a home folder that apt's own unprivileged user may not enter.
            "APT::Sandbox::User=".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command.args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        run(self.command(arguments))
    }
}

fn run(mut command: Command) -> Result<String> {
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).output().context("starting apt")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("apt-get failed ({}):\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(text)
}

/// `Inst bash (5.2.15-2 Debian:12/oldstable [amd64])`
fn parse_inst(line: &str) -> Option<Package> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
    let name = name.split_whitespace().next()?;
    Some(Package { name: name.to_owned(), version: rest.split_whitespace().next()?.to_owned() })
}

/// The line of a sources.list for a suite, on the mirror that the host's apt uses.
pub fn source(suite: &str) -> Result<String> {
    let keyring = KEYRINGS.into_iter().find(|k| Path::new(k).exists());
    let signed = keyring.map(|k| format!("signed-by={k}")).unwrap_or_default();
    Ok(format!("deb [arch=amd64 {signed}] {} {suite} main", mirror()?))
}

/// How the host's apt reaches that mirror, for another apt: proxies, time limits, checks of dates.
pub fn network_settings() -> Result<String> {
    const NAMES: [&str; 4] = ["Acquire::http", "Acquire::https", "Acquire::Check", "Acquire::Retries"];
    let mut command = Command::new("apt-config");
    command.arg("dump");
    let all = run(command).context("asking apt for its settings")?;
    let lines = all.lines().filter(|line| NAMES.iter().any(|name| line.starts_with(name)));
    Ok(lines.map(|line| format!("{line}\n")).collect())
}

/// The archive that the host's apt uses for Debian's `main`, without naming any host in our files.
fn mirror() -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]);
    let targets = run(command).context("asking apt for its mirrors")?;
    let release = host_release()?;
    targets
        .lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            let (uri, suite, component) = (words.next()?, words.next()?, words.next()?);
            let base = matches!(suite, "stable" | "oldstable" | "testing") || suite == release;
            (base && component == "main").then(|| uri.to_owned())
        })
        .with_context(|| {
            format!("apt knows no Debian mirror for {release}; run `apt-get update`. It said:\n{targets}")
        })
}

/// Code name of the host's Debian release.
pub fn host_release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let name = text.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME="));
    Ok(name
        .context("/etc/os-release names no release: the lab needs a Debian host")?
        .trim_matches('"')
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apts_plan_is_understood() {
        let line = "Inst libc6 (2.41-12+deb13u4 Debian:13.7/stable [amd64]) []";
        assert_eq!(
            parse_inst(line),
            Some(Package { name: "libc6".into(), version: "2.41-12+deb13u4".into() })
        );
        assert_eq!(parse_inst("Conf libc6 (2.41)"), None);
    }
}

//! `lab shell [4.17|4.20|debian] [FILE=PATH]...` boots the lab for a person; `lab fetch` only fills the cache; `lab qemu` builds
//! the QEMU with corrections and says where it is.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use xpci_tests::{GuestConfig, Lab, Process, XenVersion, debian, host, image, patched};

/// Where the service is in dom0.
const SERVICE: &str = "/usr/sbin/xpcid";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("shell") => shell(&arguments[1..]),
        Some("fetch") => XenVersion::ALL.into_iter().try_for_each(|version| {
            let images = image::images(version)?;
            if version == XenVersion::of_the_host()? {
                debian::root(&images.trees)?;
            }
            println!("lab: Xen {} is ready", version.name());
            Ok(())
        }),
        Some("qemu") => {
            println!("{}", patched::qemu()?.display());
            Ok(())
        }
        _ => bail!("usage: lab shell [4.17|4.20|debian] [FILE=PATH]... | lab fetch | lab qemu"),
    }
}

fn shell(arguments: &[String]) -> Result<()> {
    let mut builder = Lab::builder().name("shell").time_limit(Duration::from_secs(24 * 3600));
    let (mut has_service, mut has_systemd) = (false, false);
    for argument in arguments {
        builder = match argument.split_once('=') {
            Some((from, to)) => {
                has_service |= to == SERVICE;
                builder.install(from, to)
            }
            None if argument == "debian" => {
                has_systemd = true;
                builder.xen(XenVersion::of_the_host()?).debian()
            }
            None => builder.xen(XenVersion::parse(argument)?),
        };
    }
    println!("lab: booting; this takes about half a minute");
    let lab = builder.boot()?;
    lab.push(GuestConfig::pv("pv1").text().as_bytes(), "/guest/pv1.cfg")?;
    // Where there is no systemd that would do it. It ends with the lab.
    let _service = match has_service && !has_systemd {
        true => {
            lab.dom0("modprobe nvme").ok()?;
            let service = host::prepare(&lab)?;
            println!("lab: xpcid runs; its log is xpcid.log in the folder above");
            Some(service)
        }
        false => None,
    };
    println!(
        "lab: this is dom0. `xl create -c /guest/pv1.cfg` starts a guest; `exit` or Ctrl-D ends the lab."
    );
    let (rows, columns) = terminal_size().unwrap_or((24, 80));
    let bash = lab.shell(rows, columns)?;
    let mode = RawMode::enter()?;
    let write = bash.writer();
    thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = io::stdin().read(&mut buffer) {
            if write(&buffer[..n]).is_err() {
                return;
            }
        }
    });
    let shown = show(&bash);
    drop(mode);
    println!("\nlab: ended");
    shown
}

fn show(bash: &Process) -> Result<()> {
    let mut out = io::stdout();
    while let Some(bytes) = bash.next_output() {
        out.write_all(&bytes)?;
        out.flush()?;
    }
    Ok(())
}

/// stty knows the size without unsafe code.
fn terminal_size() -> Option<(u16, u16)> {
    let output =
        std::process::Command::new("stty").arg("size").stdin(std::process::Stdio::inherit()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (rows, columns) = text.trim().split_once(' ')?;
    Some((rows.parse().ok()?, columns.parse().ok()?))
}

/// The person's terminal passes every key on, until dropped. Without a terminal nothing changes.
struct RawMode(Option<Termios>);

impl RawMode {
    fn enter() -> Result<Self> {
        let Ok(before) = tcgetattr(io::stdin().as_fd()) else { return Ok(Self(None)) };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &raw).context("changing the terminal's mode")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // The person would notice.
            _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, before);
        }
    }
}

//! The host that the service runs on: a real one, for which it may have to wait, or a simulated one.

use std::fs;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Context;
use log::warn;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use pciback::platform::sim::{Keeper, Simulation};
use pciback::platform::{Cause, Platform, PlatformError, sim, xen};
use toolstack::cli::Choice;
use toolstack::descriptors;
use toolstack::protocol::Cause as ProblemCause;
use toolstack::settings::Settings;
use toolstack::supervisor;

use super::configuration::Problems;

/// The first and the longest pause before the service checks again for a host that is still booting.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Opens the host when it has booted. `None`: the service is to stop.
pub fn open_host(
    choice: &Choice,
    stop: &SignalFd,
    problems: &mut Problems,
) -> anyhow::Result<Option<(Platform, Option<Simulation>)>> {
    let limit = descriptors::raise_limit().context("cannot raise the limit of open files")?;
    let Some((platform, simulation)) = open_when_booted(choice, stop)? else { return Ok(None) };
    let shortage = descriptors::shortage(limit, platform.host.functions()?.len());
    problems.extend(shortage.map(|text| (ProblemCause::Service, text)));
    Ok(Some((platform, simulation)))
}

/// Opens the host, and waits for what dom0 starts at the same time as this service: /proc/xen, the devices in /dev/xen, xenstored.
/// `None`: the service is to stop.
fn open_when_booted(
    choice: &Choice,
    stop: &SignalFd,
) -> anyhow::Result<Option<(Platform, Option<Simulation>)>> {
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match open(choice) {
            Ok(opened) => return Ok(Some(opened)),
            Err(error) => error,
        };
        let awaited = error.downcast_ref::<PlatformError>();
        if !awaited.is_some_and(|error| matches!(error.cause, Cause::NotYet(_))) {
            return Err(error);
        }
        warn!("{error}; trying again in {pause:?}");
        supervisor::waiting(&error.to_string());
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, limit) {
            Ok(0) | Err(Errno::EINTR) => pause = (pause * 2).min(LONGEST_PAUSE),
            Ok(_) => return Ok(None),
            Err(errno) => return Err(errno).context("cannot wait for the Xen host"),
        }
    }
}

/// Opens the host; the simulation, where it is one.
fn open(choice: &Choice) -> anyhow::Result<(Platform, Option<Simulation>)> {
    Ok(match choice {
        Choice::Xen => (xen::open()?, None),
        Choice::Simulation(file) => {
            let (platform, simulation) = sim::open(file)?;
            (platform, Some(simulation))
        }
    })
}

/// Keeps a simulated host over restarts of the service.
pub fn keep(simulation: &Simulation, settings: &Settings) -> anyhow::Result<Keeper> {
    let file = settings.state_directory.join("simulated-host");
    fs::create_dir_all(&settings.state_directory)
        .and_then(|()| simulation.keep_in(&file, &boot_id()))
        .with_context(|| format!("cannot keep the simulated host in {}", file.display()))
}

pub fn boot_id() -> String {
    match fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(id) => id.trim().to_owned(),
        Err(error) => {
            warn!(
                "cannot read the boot id: {error}; the journal's records of guests are assumed to be of this boot"
            );
            "unknown".to_owned()
        }
    }
}

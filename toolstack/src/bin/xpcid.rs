//! The service: owns the functions that guests have, and serves them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, bail};
use clap::Parser;
use log::{error, warn};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pciback::platform::{Platform, linux, sim, xen};
use pciback::policy::PolicySet;
use std::os::fd::AsFd;
use toolstack::control;
use toolstack::engine::Engine;
use toolstack::journal::Journal;
use toolstack::policies;
use toolstack::settings::Settings;

/// Serves PCI functions to Xen guests.
#[derive(Debug, Parser)]
#[command(name = "xpcid", version, max_term_width = 110)]
struct Arguments {
    /// The host to work on: 'xen' (this dom0), or 'sim:FILE', a simulated one described by a YAML file.
    #[arg(long, default_value = "xen")]
    platform: Choice,
    /// The settings; without this, /etc/xpci/xpcid.yaml where it is there.
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Instead of the settings' run-directory.
    #[arg(long, value_name = "DIRECTORY")]
    run_directory: Option<PathBuf>,
    /// Instead of the settings' state-directory.
    #[arg(long, value_name = "DIRECTORY")]
    state_directory: Option<PathBuf>,
    /// Instead of the settings' policy-directories; may be given several times.
    #[arg(long = "policies", value_name = "DIRECTORY")]
    policy_directories: Vec<PathBuf>,
}

/// Which host to work on.
#[derive(Debug, Clone)]
enum Choice {
    Xen,
    Simulation(PathBuf),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "xen" => Ok(Self::Xen),
            Some(("sim", file)) if !file.is_empty() => Ok(Self::Simulation(file.into())),
            _ => Err("must be 'xen' or 'sim:FILE'".to_owned()),
        }
    }
}

fn main() -> ExitCode {
    // Writes to sysfs that may block for a minute happen in children of ours, started with this word.
    if let Some(code) = linux::blocking::run_if_child() {
        return code;
    }
    let arguments = Arguments::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_target(false)
        .format_timestamp_millis()
        .init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{failure:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    // Before any thread starts: each inherits the mask, so that these signals only ever come out of the descriptor.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().context("block signals")?;
    let stop = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("receive signals")?;

    let mut settings = Settings::load(arguments.settings.as_deref())?;
    settings.run_directory = arguments.run_directory.unwrap_or(settings.run_directory);
    settings.state_directory = arguments.state_directory.unwrap_or(settings.state_directory);
    if !arguments.policy_directories.is_empty() {
        settings.policy_directories = arguments.policy_directories;
    }

    let images = settings.run_directory.join("images");
    fs::create_dir_all(&images).with_context(|| format!("create {}", images.display()))?;
    let _lock = lock(&settings.run_directory)?;
    let platform = open(&arguments.platform)?;
    let journal = Journal::open(&settings.state_directory)?;
    let socket = settings.socket();
    let (policies, problem) = read_policies(&settings)?;
    let mut engine = Engine::new(platform, settings, policies, journal, boot_id())?;
    if let Some(problem) = problem {
        engine.note_problem(problem);
    }
    // Guests may have waited for an answer since the last life of the service ended: they come first.
    engine.recover()?;
    control::listen(&socket, engine.inbox()).with_context(|| format!("listen at {}", socket.display()))?;
    engine.run(stop.as_fd())?;
    Ok(())
}

/// The policies to begin with. Files with mistakes do not stop the guests that an earlier life left: they are served on under what
/// was in force, and the second value says so.
fn read_policies(settings: &Settings) -> anyhow::Result<(PolicySet, Option<String>)> {
    match policies::load(&settings.policy_directories) {
        Ok((sources, set)) => {
            let kept = policies::keep_copy(&settings.state_directory, &sources);
            kept.with_context(|| {
                format!("keep a copy of the policies in {}", settings.state_directory.display())
            })?;
            Ok((set, None))
        }
        Err(problem) => {
            let Some(set) = policies::read_copy(&settings.state_directory) else {
                bail!(
                    "{problem}\nmend the files ('xpci policy check') or remove them, then start xpcid again"
                );
            };
            let text = format!("the policy files cannot be used, those last in force stay so: {problem}");
            error!("{text}");
            Ok((set, Some(text)))
        }
    }
}

/// Makes sure that nobody else serves the same guests.
fn lock(directory: &Path) -> anyhow::Result<Flock<File>> {
    let path = directory.join("lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, errno)) => bail!("lock {}: {errno}; another xpcid seems to run", path.display()),
    }
}

fn open(choice: &Choice) -> anyhow::Result<Platform> {
    Ok(match choice {
        Choice::Xen => xen::open()?,
        Choice::Simulation(file) => sim::open(file)?,
    })
}

fn boot_id() -> String {
    match fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(id) => id.trim().to_owned(),
        Err(error) => {
            warn!("read the boot id: {error}; what the journal says of guests is taken for this boot's");
            "unknown".to_owned()
        }
    }
}

//! The service: manages the functions of guests, and serves them.

mod configuration;
mod host;
mod locks;

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use log::{Level, error, info, warn};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pciback::platform::linux;
use toolstack::cli::{Choice, ServiceArguments};
use toolstack::client;
use toolstack::control;
use toolstack::engine::{Ending, Engine, ReadySuccessor};
use toolstack::guest_names::GuestNames;
use toolstack::journal::Journal;
use toolstack::protocol::{Cause as ProblemCause, Request, Success};
use toolstack::settings::Settings;
use toolstack::successor::{Predecessor, Program};
use toolstack::supervisor;

use configuration::{
    Problems, check, copies_of_settings, keep_policies, keep_settings, missing_directories, settings_with,
    usable_policies,
};
use host::{boot_id, keep, open_host};
use locks::Locks;

/// The limit for a client to read the last answer of a process that another one replaces.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    // Writes to sysfs that may block for a minute run in child processes, which are started with a special argument.
    if let Some(code) = linux::blocking::run_if_child() {
        return code;
    }
    let arguments = ServiceArguments::parse();
    log_to(std::env::var_os("JOURNAL_STREAM").is_some());
    match if arguments.check { check(&arguments) } else { run(arguments) } {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{}", explained(&failure));
            ExitCode::FAILURE
        }
    }
}

/// A failure with its causes; some failures have the text of their cause already.
fn explained(failure: &anyhow::Error) -> String {
    failure.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        text if text.ends_with(&cause) => text.to_owned(),
        text => format!("{text}: {cause}"),
    })
}

/// Sets up the log on standard error. The journal adds times itself, and takes priorities as prefixes (sd-daemon(3)).
fn log_to(journal: bool) {
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    if journal {
        log.format(|line, record| {
            let priority = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                Level::Info => 6,
                Level::Debug | Level::Trace => 7,
            };
            // A record must be one line, so that the journal does not split it.
            writeln!(line, "<{priority}>{}", record.args().to_string().replace('\n', "; "))
        });
    } else {
        log.format_target(false).format_timestamp_millis();
    }
    log.init();
}

fn run(arguments: ServiceArguments) -> anyhow::Result<()> {
    let program = Program::of_this_process().context("cannot find the file of this program")?;
    // Before any thread starts: threads inherit the mask, so that these signals are only delivered through the descriptors.
    let stop = descriptor_of(&[Signal::SIGTERM, Signal::SIGINT])?;
    let hangup = descriptor_of(&[Signal::SIGHUP])?;
    let mut problems = Problems::new();
    let (settings, sources) = settings_with(&arguments, &mut problems)?;
    prepare_directories(&arguments.platform, &settings)?;
    // A successor takes the locks later, when its predecessor has released them.
    let own_locks = if arguments.successor { None } else { Some(Locks::take(&settings)?) };
    let Some((platform, simulation)) = open_host(&arguments.platform, &stop, &mut problems)? else {
        return Ok(());
    };
    let (policies, found) = usable_policies(&settings, &mut problems)?;
    let locks = match own_locks {
        Some(locks) => Some(locks),
        None => take_over(&settings, &stop)?,
    };
    let Some(locks) = locks else { return Ok(()) };
    let keeper = simulation.map(|simulation| keep(&simulation, &settings)).transpose()?;
    let journal = Journal::open(&settings.state_directory)?;
    if let Some(sources) = sources {
        keep_settings(&copies_of_settings(&arguments), &sources, &mut problems);
    }
    if let Some(found) = found {
        keep_policies(&settings.state_directory, &found, &mut problems);
    }
    let (sockets, names) = (Sockets::of(&settings), GuestNames::new(&platform.store));
    let mut engine = Engine::new(platform, settings, policies, journal, boot_id())?;
    engine.set_program(program);
    for (cause, problem) in problems {
        engine.note_problem(cause, problem);
    }
    // First of all, because guests may have waited for an answer since the last run of the service ended.
    engine.recover()?;
    sockets.listen(&mut engine, names)?;
    reload_at(hangup, sockets.control)?;
    if let Ending::Replaced(ready_successor) = engine.run(stop.as_fd())? {
        drop(keeper);
        hand_over(ready_successor, locks)?;
    }
    Ok(())
}

/// Blocks signals, and has them delivered through a descriptor.
fn descriptor_of(signals: &[Signal]) -> anyhow::Result<SignalFd> {
    let named = || signals.iter().map(|signal| signal.as_str()).collect::<Vec<_>>().join(" and ");
    let set = SigSet::from_iter(signals.iter().copied());
    set.thread_block().with_context(|| format!("cannot block {}", named()))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).with_context(|| format!("cannot receive {}", named()))
}

/// Creates the directories that the service needs.
fn prepare_directories(platform: &Choice, settings: &Settings) -> anyhow::Result<()> {
    for directory in missing_directories(settings) {
        warn!("the policy directory {} does not exist", directory.display());
    }
    if let Choice::Simulation(_) = platform {
        refuse_real_directories(settings)?;
    }
    let images = settings.run_directory.join("images");
    fs::create_dir_all(&images).with_context(|| format!("cannot create {}", images.display()))
}

/// Refuses to run a simulated host on the records of the real one.
fn refuse_real_directories(settings: &Settings) -> anyhow::Result<()> {
    let real = Settings::default();
    let shared = [
        ("--run-directory", settings.run_directory == real.run_directory),
        ("--state-directory", settings.state_directory == real.state_directory),
    ];
    match shared.iter().find(|(_, shared)| *shared) {
        Some((option, _)) => {
            bail!("a simulated host needs {option} DIRECTORY, because the default one is the real host's")
        }
        None => Ok(()),
    }
}

/// The sockets on which the service listens.
struct Sockets {
    control: PathBuf,
    status: PathBuf,
    /// The group whose members may ask for the status.
    group: Option<String>,
}

impl Sockets {
    fn of(settings: &Settings) -> Self {
        let (control, status) = (settings.socket(), settings.status_socket());
        Self { control, status, group: settings.status_group.clone() }
    }

    fn listen(&self, engine: &mut Engine, names: GuestNames) -> anyhow::Result<()> {
        let Self { control, status, group } = self;
        control::listen(control, engine.inbox(), names.clone())
            .with_context(|| format!("cannot listen at {}", control.display()))?;
        if let Err(error) = control::listen_for_group(status, group.as_deref(), engine.inbox(), names) {
            let text = format!(
                "status-group: cannot listen at {} for group '{}': {error}; only root is served",
                status.display(),
                group.as_deref().unwrap_or_default()
            );
            engine.note_problem(ProblemCause::Settings, text);
        }
        Ok(())
    }
}

/// Reloads the policies at each SIGHUP, as `xpci policy reload` does.
fn reload_at(hangup: SignalFd, socket: PathBuf) -> anyhow::Result<()> {
    let task = move || {
        while let Ok(Some(_)) = hangup.read_signal() {
            // Through the service's own socket, so that it is an ordinary request.
            let answer = client::call(&socket, Request::PolicyReload, &mut |_| ());
            match answer.map(|envelope| envelope.error) {
                Ok(None) => info!("SIGHUP: the policies were read again"),
                Ok(Some(failure)) | Err(failure) => {
                    error!("SIGHUP: the policies are not reloaded: {failure}")
                }
            }
        }
    };
    thread::Builder::new().name("reload".into()).spawn(task).context("cannot start a thread")?;
    Ok(())
}

/// Waits until the predecessor gives way, and takes the locks. `None`: the service is to stop.
fn take_over(settings: &Settings, stop: &SignalFd) -> anyhow::Result<Option<Locks>> {
    let predecessor = Predecessor::at_standard_input().context("cannot use standard input")?;
    info!("ready to take over");
    let go_ahead =
        predecessor.wait_for_go_ahead(stop.as_fd()).context("cannot take over from the running xpcid")?;
    if go_ahead { Locks::take(settings).map(Some) } else { Ok(None) }
}

/// Hands over to another process; this one ends.
fn hand_over(ready_successor: ReadySuccessor, locks: Locks) -> anyhow::Result<()> {
    let ReadySuccessor { successor, reply } = ready_successor;
    let process = successor.id();
    // Before anything else, because systemd accepts this only from the process that it knows.
    supervisor::replaced_by(process);
    drop(locks);
    successor.take_over().with_context(|| format!("cannot give way to process {process}"))?;
    let message = format!("process {process} has taken over");
    reply.done_before_the_end(
        Ok(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() }),
        ANSWER_LIMIT,
    );
    Ok(())
}

//! The service: manages the functions of guests, and serves them.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use log::{Level, error, info, warn};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pciback::platform::sim::{Keeper, Simulation};
use pciback::platform::{Cause, Platform, PlatformError, linux, sim, xen};
use pciback::policy::PolicySet;
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;
use toolstack::cli::{Choice, ServiceArguments};
use toolstack::client;
use toolstack::control;
use toolstack::descriptors;
use toolstack::engine::{Ending, Engine, ReadySuccessor};
use toolstack::guest_names::GuestNames;
use toolstack::journal::Journal;
use toolstack::policies;
use toolstack::protocol::{Cause as ProblemCause, Request, Success};
use toolstack::settings::{self, Settings};
use toolstack::successor::{Predecessor, Program};
use toolstack::supervisor;

/// Names and texts of files.
type Sources = Vec<(String, String)>;
/// What is found before the engine runs, for `xpci status`.
type Problems = Vec<(ProblemCause, String)>;

/// The first and the longest pause before the service checks again for a host that is still booting.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
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

/// The settings in force, with what the command line changes, and the texts of their files.
fn settings_with(
    arguments: &ServiceArguments,
    problems: &mut Problems,
) -> anyhow::Result<(Settings, Option<Sources>)> {
    let copies = copies_of_settings(arguments);
    let (mut settings, sources, problem) = read_settings(arguments.settings.as_deref(), &copies)?;
    problems.extend(problem.map(|text| (ProblemCause::Settings, text)));
    settings.run_directory = arguments.run_directory.clone().unwrap_or(settings.run_directory);
    settings.state_directory = arguments.state_directory.clone().unwrap_or(settings.state_directory);
    if !arguments.policy_directories.is_empty() {
        settings.policy_directories.clone_from(&arguments.policy_directories);
    }
    Ok((settings, sources))
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

/// Opens the host when it has booted. `None`: the service is to stop.
fn open_host(
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

/// Where copies of the settings are kept, whatever the settings say.
fn copies_of_settings(arguments: &ServiceArguments) -> PathBuf {
    arguments.state_directory.clone().unwrap_or_else(|| Settings::default().state_directory)
}

/// Keeps a copy of the settings, for a start with mistakes in them. Like that of the policies, a failure is not fatal, for example on a full
/// disk, because guests wait for the service.
fn keep_settings(directory: &Path, sources: &[(String, String)], problems: &mut Problems) {
    let kept = fs::create_dir_all(directory).and_then(|()| settings::keep_copy(directory, sources));
    if let Err(error) = kept {
        let text = format!("cannot keep a copy of the settings in {}: {error}", directory.display());
        problems.push((ProblemCause::StateFiles, text));
    }
}

fn keep_policies(directory: &Path, sources: &[policies::Source], problems: &mut Problems) {
    if let Err(error) = policies::keep_copy(directory, sources) {
        let text = format!("cannot keep a copy of the policies in {}: {error}", directory.display());
        problems.push((ProblemCause::Policies, text));
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

/// Keeps a simulated host over restarts of the service.
fn keep(simulation: &Simulation, settings: &Settings) -> anyhow::Result<Keeper> {
    let file = settings.state_directory.join("simulated-host");
    fs::create_dir_all(&settings.state_directory)
        .and_then(|()| simulation.keep_in(&file, &boot_id()))
        .with_context(|| format!("cannot keep the simulated host in {}", file.display()))
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

/// Reads the settings: with their files and an error message. Mistakes in the files must not stop the guests of an earlier process: the
/// copy of the settings in force is used then, and not overwritten.
fn read_settings(
    path: Option<&Path>,
    copies: &Path,
) -> anyhow::Result<(Settings, Option<Sources>, Option<String>)> {
    match settings::load(path) {
        Ok(loaded) => Ok((loaded.settings, Some(loaded.sources), None)),
        Err(problem) => {
            let Some(settings) = settings::read_copy(copies) else {
                bail!("{problem}\ncorrect the settings ('xpcid --check'), then start xpcid again");
            };
            let text =
                format!("the settings cannot be used, those that were last in force are kept: {problem}");
            Ok((settings, None, Some(text)))
        }
    }
}

/// Policy directories that do not exist, except the default ones.
fn missing_directories(settings: &Settings) -> impl Iterator<Item = &PathBuf> {
    let usual = Settings::default().policy_directories;
    settings.policy_directories.iter().filter(move |path| !path.is_dir() && !usual.contains(path))
}

/// Checks settings and policies.
fn check(arguments: &ServiceArguments) -> anyhow::Result<()> {
    let settings::Loaded { mut settings, sources } = settings::load(arguments.settings.as_deref())?;
    if !arguments.policy_directories.is_empty() {
        settings.policy_directories.clone_from(&arguments.policy_directories);
    }
    for directory in missing_directories(&settings) {
        warn!("the policy directory {} does not exist", directory.display());
    }
    let (policies, _) = policies::load(&settings.policy_directories)?;
    let files =
        |count: usize, kind: &str| format!("{count} {kind} file{}", if count == 1 { "" } else { "s" });
    println!("no mistake in {} and {}", files(sources.len(), "settings"), files(policies.len(), "policy"));
    Ok(())
}

/// Reads the policies, with their files. Mistakes in the files must not stop the guests of an earlier process: the copy of the policies in
/// force is used then, and not overwritten.
fn usable_policies(
    settings: &Settings,
    problems: &mut Problems,
) -> anyhow::Result<(PolicySet, Option<Vec<policies::Source>>)> {
    match policies::load(&settings.policy_directories) {
        Ok((sources, set)) => Ok((set, Some(sources))),
        Err(problem) => {
            let Some(set) = policies::read_copy(&settings.state_directory) else {
                bail!(
                    "{problem}\ncorrect the files ('xpci policy check') or remove them, then start xpcid again"
                );
            };
            let text =
                format!("the policy files cannot be used, those that were last in force are kept: {problem}");
            problems.push((ProblemCause::Policies, text));
            Ok((set, None))
        }
    }
}

/// Makes sure that no other process serves the same guests or writes the same records, which need not be in the same place: either
/// directory may be another one.
struct Locks {
    _run: Flock<File>,
    _state: Flock<File>,
}

impl Locks {
    fn take(settings: &Settings) -> anyhow::Result<Self> {
        let (run, state) = (settings.run_directory.join("lock"), &settings.state_directory);
        let file = File::create(&run).with_context(|| format!("cannot create {}", run.display()))?;
        let run_lock = lock(file, &run)?;
        fs::create_dir_all(state).with_context(|| format!("cannot create {}", state.display()))?;
        // The directory itself: a full disk may have no room for one more file.
        let directory = File::open(state).with_context(|| format!("cannot open {}", state.display()))?;
        Ok(Self { _run: run_lock, _state: lock(directory, state)? })
    }
}

fn lock(file: File, path: &Path) -> anyhow::Result<Flock<File>> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => bail!(
            "cannot lock {}: another xpcid has it; stop that one, or give this one a --run-directory and a --state-directory of its own",
            path.display()
        ),
        Err((_, errno)) => bail!("cannot lock {}: {errno}", path.display()),
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

fn boot_id() -> String {
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

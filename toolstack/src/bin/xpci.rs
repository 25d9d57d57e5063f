//! The command `xpci`: sends requests to xpcid and shows the answers.

use std::ffi::OsStr;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::Parser;
use serde::Serialize;
use toolstack::cli::{Cli, Look, Step, bulleted, gather, nothing_listed, printable, render, typed, usage};
use toolstack::client;
use toolstack::doctor;
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Answers, Envelope, EventView, Request, Success};
use toolstack::target::Target;

/// The number of simultaneous requests of a command. Taking a function from a driver mostly waits for its reset, 100 ms.
const PARALLEL_REQUESTS: usize = 8;
/// The interval of attempts to connect again.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);
/// The interval of requests for new messages.
const RECEIVE_INTERVAL: Duration = Duration::from_millis(200);
/// Whether a part of the answer could not be printed.
static OUTPUT_LOST: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let words: Vec<String> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() && json_wanted() => {
            show_json(&Envelope::done(1, &typed(&words), Err(usage(&error))));
            return ExitCode::from(ErrorCode::Usage.exit_code());
        }
        Err(error) => error.exit(),
    };
    let show_progress = !cli.json && std::io::stderr().is_terminal();
    let (look, checked) = (cli.command.look(), cli.command.is_check());
    for note in cli.command.notes() {
        say(&mut std::io::stderr(), &format!("xpci: {note}\n"));
    }
    if let Err(failure) = cli.command.block_interrupts() {
        report(&failure);
        return ExitCode::from(failure.code.exit_code());
    }
    let (mut code, mut shown) = (0, Vec::new());
    let all = match cli.command.steps(&mut |request| asked(&cli.socket, request)) {
        Ok(all) => all,
        Err(failure) => {
            let code = ExitCode::from(failure.code.exit_code());
            match cli.json {
                true => show_json(&Envelope::done(1, &typed(&words), Err(failure))),
                false => report(&failure),
            }
            return code;
        }
    };
    let together = cli.json && all.len() > 1;
    let mut steps = all.into_iter().peekable();
    while steps.peek().is_some() {
        let batch: Vec<Step> = steps.by_ref().take(PARALLEL_REQUESTS).collect();
        for envelope in answers(batch, &cli.socket, show_progress, cli.json) {
            code = code.max(exit_code(&envelope, checked));
            if !cli.json {
                show(envelope, look);
                continue;
            }
            let envelope = Envelope { command: typed(&words), ..envelope };
            match together {
                true => shown.push(envelope),
                false => show_json(&envelope),
            }
        }
    }
    if together {
        show_json(&Answers::of(shown));
    }
    if code == 0 && OUTPUT_LOST.load(Ordering::Relaxed) {
        code = ErrorCode::Failed.exit_code();
    }
    ExitCode::from(code)
}

/// Whether an invalid command line asks for JSON.
fn json_wanted() -> bool {
    std::env::args_os()
        .skip(1)
        .take_while(|word| word != OsStr::new("--"))
        .any(|word| word == OsStr::new("--json"))
}

/// Sends a request that the command itself needs, and returns the answer.
fn asked(socket: &Path, request: Request<Target>) -> Result<Success, Failure> {
    let envelope = client::call(socket, request, &mut |_| {})?;
    let nothing = || Failure::new(ErrorCode::Failed, "xpcid gave no answer");
    envelope.result.ok_or_else(|| envelope.error.unwrap_or_else(nothing))
}

/// Carries out steps at the same time, and returns the answers in the order of the steps.
fn answers(steps: Vec<Step>, socket: &Path, show_progress: bool, json: bool) -> Vec<Envelope> {
    let answer = |step| match step {
        Step::Ask(request) => ask(socket, request, show_progress, json),
        Step::Moving(moving) => {
            let mut progress = |text: &str| {
                if show_progress {
                    say(&mut std::io::stderr(), &format!("{text} ...\n"));
                }
            };
            Envelope::done(1, moving.name(), moving.run(socket, &mut progress))
        }
        Step::FollowMessages(request) => {
            let name = request.name();
            Envelope::done(1, name, Err(follow_messages(socket, &request, json)))
        }
        Step::Metrics(file) => Envelope::done(1, "metrics", gather(socket, file.as_deref())),
        Step::Local(local) => Envelope::done(1, local.name(), local.run()),
    };
    let stopped = |_| Failure::new(ErrorCode::Failed, "the request was abandoned");
    thread::scope(|scope| {
        let threads: Vec<_> = steps.into_iter().map(|step| scope.spawn(move || answer(step))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| Envelope::done(1, "", Err(stopped(panic)))))
            .collect()
    })
}

/// Follows events until interrupted, also across restarts of the service.
fn follow_events(socket: &Path, request: &Request<Target>, json: bool) -> Failure {
    let mut last: Option<EventView> = None;
    let mut connection = client::connect(socket);
    loop {
        let stream = match connection {
            Ok(stream) => stream,
            Err(failure) => return failure,
        };
        // After a reconnection, the service sends its last events again.
        let mut show_event = |envelope: &Envelope| {
            let Some(event) = &envelope.event else { return };
            if last.as_ref().is_some_and(|last| event.at < last.at || event == last) {
                return;
            }
            match json {
                true => show_json(envelope),
                false => say(&mut std::io::stdout(), &format!("{event}\n")),
            }
            last = Some(event.clone());
        };
        let ended = || Failure::new(ErrorCode::Failed, "the events ended");
        let followed = client::follow_on(stream, socket, request.clone(), &mut show_event);
        // A service that is stopped in order says so; one that is killed does not.
        let failure =
            followed.map_or_else(|failure| failure, |envelope| envelope.error.unwrap_or_else(ended));
        if failure.code != ErrorCode::Unreachable {
            return failure;
        }
        say(&mut std::io::stderr(), &format!("xpci: {}; waiting for xpcid\n", failure.message));
        connection = std::iter::repeat_with(|| {
            thread::sleep(RECONNECT_INTERVAL);
            client::connect(socket)
        })
        .find(Result::is_ok)
        .unwrap_or(Err(failure));
    }
}

/// Receives messages until interrupted, also across restarts of the service.
fn follow_messages(socket: &Path, request: &Request<Target>, json: bool) -> Failure {
    let mut has_answered = false;
    loop {
        let envelope = client::call(socket, request.clone(), &mut |_| {});
        let envelope = envelope.unwrap_or_else(|failure| Envelope::done(1, request.name(), Err(failure)));
        match (&envelope.result, envelope.error) {
            (Some(Success::Messages { messages }), None) => {
                has_answered = true;
                if !messages.is_empty() && json {
                    show_json(&Envelope { error: None, ..envelope });
                } else {
                    messages.iter().for_each(|message| say(&mut std::io::stdout(), &format!("{message}\n")));
                }
                thread::sleep(RECEIVE_INTERVAL);
            }
            (_, Some(failure)) if has_answered && failure.code == ErrorCode::Unreachable => {
                say(&mut std::io::stderr(), &format!("xpci: {}; waiting for xpcid\n", failure.message));
                thread::sleep(RECONNECT_INTERVAL);
            }
            (_, Some(failure)) => return failure,
            _ => return Failure::new(ErrorCode::Failed, "xpcid gave no answer"),
        }
    }
}

fn ask(socket: &Path, request: Request<Target>, show_progress: bool, json: bool) -> Envelope {
    if let Request::Events { follow: true } = request {
        return Envelope::done(1, request.name(), Err(follow_events(socket, &request, json)));
    }
    let (name, is_doctor) = (request.name(), request == Request::Doctor);
    let mut progress = |text: &str| {
        if show_progress {
            say(&mut std::io::stderr(), &format!("{text} ...\n"));
        }
    };
    match client::call(socket, request, &mut progress) {
        Ok(envelope) => envelope,
        // Without the service, the checks that need none are made here.
        Err(failure) if is_doctor && failure.code == ErrorCode::Unreachable => {
            Envelope::done(1, name, Ok(Success::Checkup { findings: doctor::examine_alone(&failure) }))
        }
        Err(failure) => Envelope::done(1, name, Err(failure)),
    }
}

/// The exit code; `checked`: problems in the answer count as a failure of the command.
fn exit_code(envelope: &Envelope, checked: bool) -> u8 {
    match (&envelope.result, &envelope.error) {
        (_, Some(failure)) => failure.code.exit_code(),
        (Some(success), None) if checked && success.has_problems() => ErrorCode::Failed.exit_code(),
        (Some(success), None) => success.exit_code(),
        (None, None) => 0,
    }
}

fn show(envelope: Envelope, look: Look) {
    match (envelope.result, envelope.error) {
        (_, Some(failure)) => report(&failure),
        (Some(success), None) => {
            let text = render(&success, look);
            say(&mut std::io::stdout(), &text);
            if let Some(note) = nothing_listed(&envelope.command).filter(|_| text.is_empty()) {
                say(&mut std::io::stderr(), &format!("xpci: {note}\n"));
            }
        }
        (None, None) => {}
    }
}

fn show_json(answer: &impl Serialize) {
    let text = serde_json::to_string(answer).unwrap_or_default();
    print(&mut std::io::stdout(), &format!("{text}\n"));
}

fn report(failure: &Failure) {
    let colon = if failure.obstacles.is_empty() { "" } else { ":" };
    let mut text = format!("xpci: {}{colon}\n{}", failure.message, bulleted(&failure.obstacles, "      "));
    if let Some(hint) = &failure.hint {
        text.push_str(&format!("      {hint}\n"));
    }
    say(&mut std::io::stderr(), &text);
}

/// Prints a text for people: names of guests may have control characters.
fn say(to: &mut dyn Write, text: &str) {
    print(to, &printable(text, "\n"));
}

/// Prints text. A reader that has closed the pipe, such as `head`, is no error; another failed write, for example to a full disk, is one.
fn print(to: &mut dyn Write, text: &str) {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            // If standard error fails as well, the exit status still shows it.
            let _ = writeln!(std::io::stderr(), "xpci: cannot print the answer: {error}");
            OUTPUT_LOST.store(true, Ordering::Relaxed);
        }
        _ => {}
    }
}

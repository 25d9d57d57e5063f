//! The command that people use: sends requests to xpcid and shows the answers.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread;

use clap::Parser;
use toolstack::cli::{Cli, Look, Step, bulleted, render};
use toolstack::client;
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Envelope, Request};

/// How many of a command's requests are made at the same time. Taking a function from a driver mostly waits for its reset, 100 ms.
const AT_ONCE: usize = 8;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let show_progress = !cli.json && std::io::stderr().is_terminal();
    let look = cli.command.look();
    let mut code = 0;
    let mut steps = cli.command.steps().into_iter().peekable();
    while steps.peek().is_some() {
        let batch: Vec<Step> = steps.by_ref().take(AT_ONCE).collect();
        for envelope in answers(batch, &cli.socket, show_progress, cli.json) {
            if let Err(failure) = show(envelope, cli.json, look) {
                code = code.max(failure.code.exit_code());
                if !cli.json {
                    report(&failure);
                }
            }
        }
    }
    ExitCode::from(code)
}

/// The answers to some steps, made at the same time, in the order of the steps.
fn answers(steps: Vec<Step>, socket: &Path, show_progress: bool, json: bool) -> Vec<Envelope> {
    let answer = |step| match step {
        Step::Ask(request) => ask(socket, request, show_progress, json),
        Step::Local(local) => Envelope::done(1, local.name(), local.run()),
    };
    let stopped = |_| Failure::new(ErrorCode::Failed, "the request was given up");
    thread::scope(|scope| {
        let threads: Vec<_> = steps.into_iter().map(|step| scope.spawn(move || answer(step))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| Envelope::done(1, "", Err(stopped(panic)))))
            .collect()
    })
}

fn ask(socket: &Path, request: Request, show_progress: bool, json: bool) -> Envelope {
    let name = request.name();
    let mut heard = |envelope: &Envelope| match (&envelope.progress, &envelope.event) {
        (Some(text), _) if show_progress => say(&mut std::io::stderr(), &format!("{text} ...\n")),
        (_, Some(_)) if json => show_json(envelope),
        (_, Some(event)) => say(&mut std::io::stdout(), &format!("{event}\n")),
        _ => {}
    };
    client::follow(socket, request, &mut heard)
        .unwrap_or_else(|failure| Envelope::done(1, name, Err(failure)))
}

fn show(envelope: Envelope, json: bool, look: Look) -> Result<(), Failure> {
    if json {
        show_json(&envelope);
    }
    match (envelope.result, envelope.error) {
        (_, Some(failure)) => Err(failure),
        (Some(success), None) => {
            if !json {
                say(&mut std::io::stdout(), &render(&success, look));
            }
            Ok(())
        }
        (None, None) => Ok(()),
    }
}

fn show_json(envelope: &Envelope) {
    let text = serde_json::to_string(envelope).unwrap_or_default();
    say(&mut std::io::stdout(), &format!("{text}\n"));
}

fn report(failure: &Failure) {
    let colon = if failure.obstacles.is_empty() { "" } else { ":" };
    say(&mut std::io::stderr(), &format!("xpci: {}{colon}\n", failure.message));
    say(&mut std::io::stderr(), &bulleted(&failure.obstacles, "      "));
    if let Some(hint) = &failure.hint {
        say(&mut std::io::stderr(), &format!("      {hint}\n"));
    }
}

/// Prints; a reader that went away, as `head` does, is no error.
fn say(to: &mut dyn Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

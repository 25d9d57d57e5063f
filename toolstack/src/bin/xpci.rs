//! The command that people use: sends requests to xpcid and shows the answers.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use toolstack::cli::{Cli, Step, render};
use toolstack::client;
use toolstack::outcome::Failure;
use toolstack::protocol::{Envelope, Request};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let show_progress = !cli.json && std::io::stderr().is_terminal();
    let mut code = 0;
    for step in cli.command.steps() {
        let envelope = match step {
            Step::Ask(request) => ask(&cli.socket, request, show_progress, cli.json),
            Step::Local(local) => Envelope::done(1, local.name(), local.run()),
        };
        match show(envelope, cli.json) {
            Ok(()) => {}
            Err(failure) => {
                code = code.max(failure.code.exit_code());
                if !cli.json {
                    report(&failure);
                }
            }
        }
    }
    ExitCode::from(code)
}

fn ask(socket: &std::path::Path, request: Request, show_progress: bool, json: bool) -> Envelope {
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

fn show(envelope: Envelope, json: bool) -> Result<(), Failure> {
    if json {
        show_json(&envelope);
    }
    match (envelope.result, envelope.error) {
        (_, Some(failure)) => Err(failure),
        (Some(success), None) => {
            if !json {
                say(&mut std::io::stdout(), &render(&success));
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
    say(&mut std::io::stderr(), &format!("xpci: {}\n", failure.message));
    if let Some(hint) = &failure.hint {
        say(&mut std::io::stderr(), &format!("      {hint}\n"));
    }
}

/// Prints; a reader that went away, as `head` does, is no error.
fn say(to: &mut dyn Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

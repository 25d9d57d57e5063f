//! Transcripts of `xpci`: commands with all that they printed.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::daemon::{Daemon, xpci};
use crate::wire::{Wire, schema};

/// The host of most tests.
pub fn host() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sim/two-guests.yaml");
    fs::read_to_string(path).unwrap()
}

/// Plays a transcript on a service of its own.
pub fn play(name: &str, host: String) {
    play_on(name, &Daemon::start(&host));
}

/// Plays a transcript on this service.
pub fn play_on(name: &str, daemon: &Daemon) {
    let wire = Wire::to(&daemon.socket(), daemon.directory.path().join("wire"));
    compare(name, daemon.directory.path(), &wire.socket);
    wire.assert_good();
}

/// Plays a transcript where no service runs.
pub fn play_alone(name: &str) {
    let directory = tempfile::tempdir().unwrap();
    compare(name, directory.path(), &directory.path().join("control"));
}

fn compare(name: &str, directory: &Path, socket: &Path) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/commands/{name}.transcript"));
    let expected = fs::read_to_string(&path).unwrap();
    let mut found = String::new();
    let mut file = (PathBuf::new(), String::new());
    for line in expected.lines() {
        if let Some(name) = line.strip_prefix("< ") {
            file = (directory.join(name), String::new());
            let _ = writeln!(found, "{line}");
            fs::create_dir_all(file.0.parent().unwrap()).unwrap();
            fs::write(&file.0, "").unwrap();
        } else if let Some(content) = line.strip_prefix('|') {
            let _ = writeln!(found, "{line}");
            let _ = writeln!(file.1, "{}", content.strip_prefix(' ').unwrap_or(content));
            fs::write(&file.0, &file.1).unwrap();
        } else if let Some(command) = line.strip_prefix("$ xpci") {
            let _ = writeln!(found, "{line}");
            let printed = run(socket, &command.replace("DIR", &directory.display().to_string()));
            found += &without_times(&printed.replace(&directory.display().to_string(), "DIR"));
        } else if line.is_empty() || line.starts_with('#') && !is_of_metrics(line) {
            let _ = writeln!(found, "{line}");
        }
    }
    if std::env::var_os("XPCI_BLESS").is_some() {
        fs::write(&path, found).unwrap();
    } else {
        assert!(found == expected, "{name}: expected\n{expected}\nbut it was\n{found}");
    }
}

/// Whether a line that looks like a comment is output: Prometheus' format describes each metric so.
fn is_of_metrics(line: &str) -> bool {
    ["# HELP ", "# TYPE "].iter().any(|begin| line.starts_with(begin))
}

/// The text with `TIME` for each moment, `2026-11-21T10:43:47.123Z`.
fn without_times(text: &str) -> String {
    const FORM: &[u8] = b"dddd-dd-ddTdd:dd:dd.dddZ";
    let is_moment = |bytes: &[u8]| {
        bytes.len() == FORM.len()
            && bytes.iter().zip(FORM).all(|(byte, form)| match form {
                b'd' => byte.is_ascii_digit(),
                sign => byte == sign,
            })
    };
    let (mut shown, mut rest) = (String::new(), text);
    while let Some(next) = rest.chars().next() {
        let moment = rest.as_bytes().get(..FORM.len()).is_some_and(is_moment);
        shown.push_str(if moment { "TIME" } else { &rest[..next.len_utf8()] });
        rest = &rest[if moment { FORM.len() } else { next.len_utf8() }..];
    }
    shown
}

/// What '--json' printed is one answer, or an event a line.
fn assert_answers(command: &str, printed: &[u8]) {
    let schema = schema("answer");
    for line in std::str::from_utf8(printed).unwrap().lines() {
        let answer: Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{command}: {error}: {line}"));
        assert_eq!(schema.mistakes(&answer), [""; 0], "{command}: {line}");
    }
}

fn run(socket: &Path, command: &str) -> String {
    // The repository's own files, dumps and policies among them.
    let command = command.replace("REPO", concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let arguments: Vec<&str> = command.split_whitespace().collect();
    let output = xpci(socket, &arguments);
    if arguments.contains(&"--json") && !arguments.contains(&"--help") {
        assert_answers(&command, &output.stdout);
    }
    let mut text = String::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        // An empty line ends nothing: it is shown so that it differs from the transcript's own.
        let _ = writeln!(text, "{}", if line.trim().is_empty() { "." } else { line.trim_end() });
    }
    for line in String::from_utf8(output.stderr).unwrap().lines() {
        let _ = writeln!(text, "{}", format!("! {line}").trim_end());
    }
    match output.status.code() {
        Some(0) => {}
        Some(code) => drop(writeln!(text, "[{code}]")),
        None => drop(writeln!(text, "{}", output.status)),
    }
    text
}

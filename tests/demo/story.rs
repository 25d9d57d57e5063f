//! How a story is told: chapters with their times, commands as they are typed, and what they print.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::Result;
use xpci_tests::host::SOON;
use xpci_tests::{Guest, Lab};

/// Prints one line of the story.
pub fn say(text: &str) {
    // The reader may have exited.
    let _ = writeln!(io::stdout(), "{text}");
}

pub fn chapter(begun: Instant, title: &str) {
    say(&format!("\n[{:>3} s] {title}", begun.elapsed().as_secs()));
}

/// Runs a command in dom0, shows it and what it prints.
pub fn show(lab: &Lab, command: &str) -> Result<String> {
    say(&format!("    dom0# {command}"));
    shown(lab.dom0(command).limit(SOON).ok()?)
}

/// The same inside a guest.
pub fn show_in(guest: &Guest<'_>, command: &str) -> Result<String> {
    say(&format!("    {}# {command}", guest.name()));
    shown(guest.run(command).limit(SOON).ok()?)
}

fn shown(output: String) -> Result<String> {
    for line in output.lines() {
        say(&format!("      {line}"));
    }
    Ok(output)
}

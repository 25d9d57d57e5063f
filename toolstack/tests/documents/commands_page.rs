//! `docs/commands.md`, generated from the command lines of both programs. `XPCI_BLESS=1 cargo test` writes it anew.

use std::fmt::Write;

use clap::builder::StyledStr;
use clap::{Arg, Command, CommandFactory};
use toolstack::cli::{Cli, ServiceArguments};
use xpci_test_support::reviewed;

const INTRODUCTION: &str = "# Commands

To look up a command, its options, an exit code or the JSON output. This page is generated from the help texts of `xpci` and `xpcid`: each
`--help` prints its part, and `man xpci-pci-attach` and the like have the same.

Tasks step by step are on other pages: [functions.md](functions.md), [vfs.md](vfs.md), [policies.md](policies.md),
[errors.md](errors.md), [hvm.md](hvm.md), [fleet.md](fleet.md).
";

/// The width of the lines of the documents.
const WIDTH: usize = 150;

/// A paragraph in lines of the documents' width.
fn wrapped(paragraph: &str) -> String {
    let (mut text, mut width) = (String::new(), 0);
    for word in paragraph.split_whitespace() {
        if width > 0 && width + 1 + word.len() > WIDTH {
            text.push('\n');
            width = 0;
        } else if width > 0 {
            text.push(' ');
            width += 1;
        }
        text.push_str(word);
        width += word.len();
    }
    text
}

/// A text of the help: paragraphs, and lines that begin with two spaces as they are.
fn paragraphs(text: &str) -> String {
    let shown = text.split("\n\n").map(|paragraph| {
        if paragraph.starts_with("  ") { format!("```text\n{paragraph}\n```") } else { wrapped(paragraph) }
    });
    shown.map(|paragraph| format!("\n{paragraph}\n")).collect()
}

/// The longer of two texts, with the full stop that clap takes from short ones.
fn longer(short: Option<&StyledStr>, long: Option<&StyledStr>) -> String {
    let text = long.or(short).map(ToString::to_string).unwrap_or_default();
    if text.is_empty() || text.ends_with('.') { text } else { format!("{text}.") }
}

/// How an argument is written.
fn written(argument: &Arg) -> String {
    let value = argument.get_value_names().map(|names| names.join(" ")).unwrap_or_default();
    let flags = [
        argument.get_short().map(|short| format!("-{short}")),
        argument.get_long().map(|long| format!("--{long}")),
    ];
    let flags = flags.into_iter().flatten().collect::<Vec<_>>().join(", ");
    match (flags.is_empty(), argument.get_action().takes_values()) {
        (true, _) => value,
        (false, true) => format!("{flags} {value}"),
        (false, false) => flags,
    }
}

/// The table of a command's arguments, without those that every command has.
fn arguments(command: &Command, inherited: &[&str]) -> String {
    let mut text = String::new();
    for argument in command.get_arguments() {
        let name = argument.get_id().as_str();
        if argument.is_hide_set() || ["help", "version"].contains(&name) || inherited.contains(&name) {
            continue;
        }
        if text.is_empty() {
            text.push_str("\n| argument | meaning |\n| --- | --- |\n");
        }
        let mut meaning = longer(argument.get_help(), argument.get_long_help());
        let values = argument.get_possible_values();
        if argument.get_action().takes_values() && !values.is_empty() {
            let words: Vec<_> = values.iter().map(|value| value.get_name()).collect();
            write!(meaning, " One of: {}.", words.join(", ")).unwrap();
        }
        if let Some(variable) = argument.get_env() {
            write!(meaning, " Also by the variable {}.", variable.to_string_lossy()).unwrap();
        }
        if argument.get_action().takes_values() && !argument.get_default_values().is_empty() {
            let values: Vec<_> =
                argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
            write!(meaning, " Default: {}.", values.join(", ")).unwrap();
        }
        let cells = [format!("`{}`", written(argument)), meaning.replace('\n', " ")];
        writeln!(text, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | ")).unwrap();
    }
    text
}

/// A command and those below it, with the words that lead to it.
fn page(command: &mut Command, before: &str, inherited: &[&str]) -> String {
    let name = if before.is_empty() {
        command.get_name().to_owned()
    } else {
        format!("{before} {}", command.get_name())
    };
    let mut text = String::new();
    if !command.has_subcommands() || before.is_empty() {
        let level = if before.is_empty() { "##" } else { "###" };
        write!(text, "\n{level} {name}\n").unwrap();
        text.push_str(&paragraphs(&longer(command.get_about(), command.get_long_about())));
        let usage = command.render_usage().to_string();
        let usage = usage.strip_prefix("Usage: ").unwrap_or(&usage);
        let usage: Vec<&str> = usage.lines().map(str::trim).collect();
        write!(text, "\n```text\n{}\n```\n", usage.join("\n")).unwrap();
        text.push_str(&arguments(command, inherited));
        if let Some(more) = command.get_after_long_help().or_else(|| command.get_after_help()) {
            text.push_str(&paragraphs(&more.to_string()));
        }
    }
    for below in command.get_subcommands_mut().filter(|below| !below.is_hide_set()) {
        if below.get_name() != "help" {
            text.push_str(&page(below, &name, &["json", "socket"]));
        }
    }
    text
}

fn document() -> String {
    let mut text = INTRODUCTION.to_owned();
    for mut program in [Cli::command(), ServiceArguments::command()] {
        program.build();
        text.push_str(&page(&mut program, "", &[]));
    }
    text
}

#[test]
fn the_page_of_commands_matches_the_help_texts() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/commands.md");
    reviewed::assert_is(path, &document()).unwrap();
}

//! Text output of answers.

use std::fmt::Write;

use super::{explained, list, network, paths, xl_config};
use crate::outcome::Obstacle;
use crate::protocol::{Finding, FunctionView, StatusView, Success, Verdict, VfView};

/// The format of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Look {
    /// The width of the terminal; `None`: the output is no terminal, and lines may have any length.
    pub width: Option<usize>,
    /// Whether functions are shown as a tree.
    pub tree: bool,
    /// Whether only the addresses of functions are shown, one per line, as with xl.
    pub addresses_only: bool,
}

/// The answer as text; empty if there is nothing to show.
pub fn render(success: &Success, look: Look) -> String {
    match success {
        Success::Listed { functions } if look.tree => list::tree(functions, look.width),
        Success::Listed { functions } => list::columns(functions, look.width),
        Success::Checkup { findings } => checkup(findings),
        Success::Shown(view) => list::shown(view),
        Success::Functions { functions } if look.addresses_only => {
            functions.iter().fold(String::new(), |text, function| format!("{text}{}\n", function.address))
        }
        Success::Changed { message, warnings, .. } => warnings
            .iter()
            .fold(format!("{message}\n"), |text, warning| format!("{text}warning: {warning}\n")),
        Success::Already { message } | Success::Possible { message } => format!("{message}\n"),
        Success::Functions { functions } => functions_table(functions),
        Success::Vfs { vfs } => vfs_table(vfs),
        Success::Synced(view) if view.plan.is_empty() => format!("{}\n", view.text.join("\n")),
        Success::Synced(view) => {
            let head = if view.dry_run { "what would be done:" } else { "done:" };
            format!("{head}\n{}\n", view.text.join("\n"))
        }
        Success::AerStatus(view) => paths::aer_status(view),
        Success::BlastRadius(radius) => paths::blast_radius(radius),
        Success::VfNetwork(view) => network::vf_network(view),
        Success::VfNetworks { physical_function, sriov, vfs } => {
            network::vf_networks(*physical_function, sriov.as_ref(), vfs)
        }
        Success::Policy(view) => explained::policy(view),
        Success::Explained { devices, damage } => explained::explanations(devices, damage),
        Success::Learned { functions } => explained::learned(functions),
        Success::Reloaded { files, functions } => explained::reloaded(*files, functions),
        Success::XlConfig(view) => xl_config::text(view),
        Success::Checked { files } => explained::checked(files),
        Success::Metrics { text } => text.clone(),
        Success::Schema { schema } => format!("{schema:#}\n"),
        Success::Events { events } if events.is_empty() => "no events are recorded\n".to_owned(),
        Success::Events { events } => {
            events.iter().fold(String::new(), |text, event| format!("{text}{event}\n"))
        }
        Success::Messages { messages } => {
            messages.iter().fold(String::new(), |text, message| format!("{text}{message}\n"))
        }
        // Intermediate answers of 'save' and 'restore', which report their results themselves.
        Success::Saved { .. } | Success::Reserved { .. } | Success::Restored { .. } => String::new(),
        Success::Status(status) => status_text(status),
    }
}

/// What to say, on standard error, of a command whose list is empty.
pub fn nothing_listed(command: &str) -> Option<&'static str> {
    Some(match command {
        "list" => "the host has no such function",
        "pci-assignable-list" => {
            "no function is assignable; 'xpci pci-assignable-add BDF' makes one assignable"
        }
        "pci-list" => "the guest has no functions of xpci",
        "pci-list-persistent" => "no function is persistent",
        "mailbox-receive" => "there are no messages",
        "vf-list" => "there are no VFs; 'xpci vf create PF COUNT' enables some",
        _ => return None,
    })
}

/// Other columns are omitted until at least this many characters of the last column fit.
const LEAST_LAST_COLUMN: usize = 24;

/// A table with columns as wide as their widest cell, two spaces apart.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let row = |cells: &Vec<String>| cells.iter().map(|cell| printable(cell, "")).collect();
    let rows: &[Vec<String>] = &rows.iter().map(row).collect::<Vec<_>>();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(|column| width_of(rows, column)).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

/// A text with control characters and characters that change the direction of writing as escapes, except those in `kept`: names of guests
/// may have any.
pub fn printable(text: &str, kept: &str) -> String {
    let is_hidden = |letter: char| {
        letter.is_control() || matches!(letter, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut printable = String::with_capacity(text.len());
    for letter in text.chars() {
        match is_hidden(letter) && !kept.contains(letter) {
            true => printable.extend(letter.escape_default()),
            false => printable.push(letter),
        }
    }
    printable
}

fn width_of(rows: &[Vec<String>], column: usize) -> usize {
    let cells = rows.iter().filter_map(|row| row.get(column));
    cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
}

/// A table within the width of a terminal: columns in `expendable` are omitted in that order, then the last column is cut.
pub(super) fn table_within(mut rows: Vec<Vec<String>>, width: Option<usize>, expendable: &[&str]) -> String {
    let Some(width) = width else { return table(&rows) };
    let needed = |rows: &[Vec<String>]| {
        let columns = rows.first().map_or(0, Vec::len);
        (0..columns).map(|column| width_of(rows, column) + 2).sum::<usize>().saturating_sub(2)
    };
    let last = rows.first().map_or(0, |titles| titles.len().saturating_sub(1));
    let least = |rows: &[Vec<String>]| {
        needed(rows) - width_of(rows, rows[0].len() - 1).saturating_sub(LEAST_LAST_COLUMN)
    };
    if last == 0 {
        return table(&rows);
    }
    for title in expendable {
        if least(&rows) <= width {
            break;
        }
        if let Some(column) = rows[0].iter().position(|known| known == title) {
            rows.iter_mut().for_each(|row| drop(row.remove(column)));
        }
    }
    table(&rows).lines().fold(String::new(), |text, line| format!("{text}{}\n", list::cut(line, Some(width))))
}

/// The findings of the checks, each with its correction.
fn checkup(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let _ = writeln!(text, "{:<12} {}: {}", finding.verdict, finding.check, finding.found);
        if let Some(mend) = &finding.mend {
            let _ = writeln!(text, "{:<12} {mend}", "");
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let several = |count: usize, word| format!("{count} {word}{}", if count == 1 { "" } else { "s" });
    let _ = writeln!(
        text,
        "\n{} good, {}, {}, {} not checked",
        count(Verdict::Good),
        several(count(Verdict::Warning), "warning"),
        several(count(Verdict::Fault), "fault"),
        count(Verdict::NotChecked)
    );
    text
}

/// A list of obstacles, each with its hint.
pub fn bulleted(obstacles: &[Obstacle], indent: &str) -> String {
    let mut text = String::new();
    for obstacle in obstacles {
        let _ = writeln!(text, "{indent}- {}", obstacle.message);
        if let Some(hint) = &obstacle.hint {
            let _ = writeln!(text, "{indent}  {hint}");
        }
    }
    text
}

pub(super) fn head(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub(super) fn dash<T: ToString>(value: Option<&T>) -> String {
    value.map_or_else(|| "-".to_owned(), T::to_string)
}

fn function_row(function: &FunctionView) -> Vec<String> {
    let seen_as = function.guest_address.map(|address| address.to_string());
    vec![
        function.address.to_string(),
        function.id.clone(),
        function.state.to_string(),
        guest(function),
        dash(seen_as.as_ref()),
        dash(function.driver.as_ref()),
        note(function),
    ]
}

/// The guest's name, or its number where it has none.
fn guest(function: &FunctionView) -> String {
    let number = || dash(function.domain.as_ref());
    function.domain_name.clone().unwrap_or_else(number)
}

fn note(function: &FunctionView) -> String {
    let persistent = function.persistent.as_ref().map(|persistent| {
        let guest = persistent.name.clone().unwrap_or_else(|| persistent.guest.to_string());
        match persistent.saved {
            true => format!("reserved for {guest}, which was saved with it"),
            false => format!("persistent for {guest}"),
        }
    });
    function
        .note
        .iter()
        .cloned()
        .chain(persistent)
        .reduce(|note, more| format!("{note}; {more}"))
        .unwrap_or_default()
}

const FUNCTION_HEAD: [&str; 7] = ["FUNCTION", "ID", "STATE", "GUEST", "SEEN AS", "DRIVER", "NOTE"];

fn functions_table(functions: &[FunctionView]) -> String {
    if functions.is_empty() {
        return String::new();
    }
    let rows: Vec<_> =
        std::iter::once(head(&FUNCTION_HEAD)).chain(functions.iter().map(function_row)).collect();
    table(&rows)
}

fn vfs_table(vfs: &[VfView]) -> String {
    if vfs.is_empty() {
        return String::new();
    }
    let names = [&["PF", "VF"][..], &FUNCTION_HEAD].concat();
    let row = |vf: &VfView| {
        let pf = dash(vf.function.physical_function.as_ref());
        let mut function = vf.function.clone();
        let untrusted = vf.untrusted.as_ref().map(|why| format!("untrusted: of a PF {why}"));
        function.note =
            function.note.into_iter().chain(untrusted).reduce(|note, more| format!("{note}; {more}"));
        [vec![pf, vf.index.to_string()], function_row(&function)].concat()
    };
    let rows: Vec<_> = std::iter::once(head(&names)).chain(vfs.iter().map(row)).collect();
    table(&rows)
}

fn status_text(status: &StatusView) -> String {
    let mut text = format!("xpcid {} on {}\n", status.service, status.platform);
    if status.functions.is_empty() {
        text.push_str("\nIt manages no functions; 'xpci pci-assignable-add BDF' holds one.\n");
    } else {
        text = format!("{text}\n{}", functions_table(&status.functions));
    }
    if !status.guests.is_empty() {
        let row = |guest: &crate::protocol::GuestView| {
            let (name, frontend) = (dash(guest.name.as_ref()), guest.frontend.clone());
            vec![
                guest.domain.to_string(),
                name,
                frontend,
                guest.requests.to_string(),
                guest.errors.to_string(),
            ]
        };
        let names = head(&["DOMAIN", "NAME", "FRONTEND", "REQUESTS", "ERRORS"]);
        let rows: Vec<_> = std::iter::once(names).chain(status.guests.iter().map(row)).collect();
        text = format!("{text}\n{}", table(&rows));
    }
    let repaired = status.repaired.iter().map(|text| format!("\nrepaired: {text}"));
    let problems = status.problems.iter().map(|text| format!("\nproblem: {text}"));
    let notes: String = repaired.chain(problems).collect();
    if !notes.is_empty() {
        text = format!("{text}{notes}\n");
    }
    text
}

//! Answers as text for people.

use std::fmt::Write;

use super::{explained, network, paths};
use crate::protocol::{FunctionView, StatusView, Success, VfView};

/// The answer as text; empty where there is nothing to say.
pub fn render(success: &Success) -> String {
    match success {
        Success::Changed { message, warnings, .. } => warnings
            .iter()
            .fold(format!("{message}\n"), |text, warning| format!("{text}warning: {warning}\n")),
        Success::Already { message } => format!("{message}\n"),
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
        Success::VfNetworks { physical_function, vfs } => network::vf_networks(*physical_function, vfs),
        Success::Policy(view) => explained::policy(view),
        Success::Explained { devices, damage } => explained::explanations(devices, damage),
        Success::Learned { functions } => explained::learned(functions),
        Success::Reloaded { files, functions } => explained::reloaded(*files, functions),
        Success::Checked { files } => explained::checked(files),
        Success::Schema { schema } => format!("{schema:#}\n"),
        Success::Events { events } => {
            events.iter().fold(String::new(), |text, event| format!("{text}{event}\n"))
        }
        Success::Status(status) => status_text(status),
    }
}

/// Columns as wide as their widest cell, two spaces apart.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

fn head(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn dash<T: ToString>(value: Option<&T>) -> String {
    value.map_or_else(|| "-".to_owned(), T::to_string)
}

fn function_row(function: &FunctionView) -> Vec<String> {
    let seen_as = function.guest_address.map(|address| address.to_string());
    vec![
        function.address.to_string(),
        function.id.clone(),
        function.state.to_string(),
        dash(function.domain.as_ref()),
        dash(seen_as.as_ref()),
        dash(function.driver.as_ref()),
        note(function),
    ]
}

fn note(function: &FunctionView) -> String {
    let persistent = function.persistent.as_ref().map(|persistent| {
        let guest = persistent.name.clone().unwrap_or_else(|| persistent.guest.to_string());
        format!("persistent for {guest}")
    });
    function
        .note
        .iter()
        .cloned()
        .chain(persistent)
        .reduce(|note, more| format!("{note}; {more}"))
        .unwrap_or_default()
}

const FUNCTION_HEAD: [&str; 7] = ["FUNCTION", "ID", "STATE", "DOMAIN", "SEEN AS", "DRIVER", "NOTE"];

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
        text.push_str("\nIt looks after no function; 'xpci pci-assignable-add BDF' takes one.\n");
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

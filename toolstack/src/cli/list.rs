//! `xpci list` and `xpci show`: text output.

use std::collections::BTreeMap;
use std::fmt::Write;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use pciback::{FunctionState, Sbdf};

use super::table::{bulleted, dash, head, table_within};
use crate::protocol::{FunctionView, ListFilter, ListedView, ShownView};

/// The states, by their words.
const STATES: [(&str, FunctionState); 8] = [
    ("host", FunctionState::Host),
    ("held", FunctionState::Held),
    ("attaching", FunctionState::Attaching),
    ("attached", FunctionState::Attached),
    ("detaching", FunctionState::Detaching),
    ("resetting", FunctionState::Resetting),
    ("gone", FunctionState::Gone),
    ("quarantined", FunctionState::Quarantined),
];

/// The arguments of `list`.
#[derive(Debug, Args)]
pub struct ListArguments {
    /// Only functions of this class: the first digits of a class code (02), or a part of a class's name (network).
    #[arg(long)]
    class: Option<String>,
    /// Only functions that are bound to this driver in dom0; 'none': to no driver.
    #[arg(long)]
    driver: Option<String>,
    /// Only functions in this state.
    #[arg(long, value_parser = PossibleValuesParser::new(STATES.map(|(word, _)| word)).map(state))]
    state: Option<FunctionState>,
    /// Only functions that can be attached now, as in pci-assignable-list.
    #[arg(long)]
    assignable: bool,
    /// Shows VFs below their PFs, and functions below the bridges above them.
    #[arg(long)]
    pub tree: bool,
}

impl ListArguments {
    pub(super) fn filter(self) -> ListFilter {
        let Self { class, driver, state, assignable, .. } = self;
        ListFilter { class, driver, state, assignable }
    }
}

fn state(word: String) -> FunctionState {
    let found = STATES.iter().find(|(known, _)| *known == word);
    // clap accepts no other word.
    found.map_or(FunctionState::Host, |(_, state)| *state)
}

/// Columns that are omitted on a narrow terminal, in this order.
const EXPENDABLE: [&str; 5] = ["GROUP", "CLASS", "RESET", "NETWORK", "SR-IOV"];

/// A table of functions.
pub(super) fn columns(functions: &[ListedView], width: Option<usize>) -> String {
    if functions.is_empty() {
        return String::new();
    }
    let names =
        ["FUNCTION", "STATE", "OWNER", "DRIVER", "SR-IOV", "NETWORK", "RESET", "GROUP", "CLASS", "DEVICE"];
    let row = |view: &ListedView| {
        vec![
            view.function.address.to_string(),
            view.function.state.to_string(),
            owner(view),
            dash(view.function.driver.as_ref()),
            dash(sriov(view).as_ref()),
            listed(&view.interfaces),
            listed(&view.reset_methods),
            view.iommu_group.to_string(),
            class(view).to_owned(),
            device(view),
        ]
    };
    let rows: Vec<_> = std::iter::once(head(&names)).chain(functions.iter().map(row)).collect();
    table_within(rows, width, &EXPENDABLE)
}

fn listed(words: &[String]) -> String {
    if words.is_empty() { "-".to_owned() } else { words.join(",") }
}

/// The owner: a guest, none for a held function, otherwise dom0.
fn owner(view: &ListedView) -> String {
    match (view.function.domain, &view.function.domain_name, view.function.state) {
        (Some(_), Some(name), _) => name.clone(),
        (Some(domain), None, _) => format!("domain {domain}"),
        (None, _, FunctionState::Host) => "dom0".to_owned(),
        _ => "-".to_owned(),
    }
}

fn sriov(view: &ListedView) -> Option<String> {
    match (view.total_vfs, view.vf_index) {
        (Some(total), _) => Some(format!("PF, {} of {total}", view.enabled_vfs.unwrap_or_default())),
        (None, Some(index)) => Some(format!("VF {index} of {}", view.vf_count.unwrap_or_default())),
        _ => None,
    }
}

fn class(view: &ListedView) -> &str {
    view.names.class.as_deref().unwrap_or(&view.base_class)
}

/// The names and ids of a device, as with lspci -nn.
fn device(view: &ListedView) -> String {
    let vendor = view.names.vendor.as_deref();
    let words = [vendor, view.names.device.as_deref()].into_iter().flatten();
    words.chain([format!("[{}]", view.function.id).as_str()]).collect::<Vec<_>>().join(" ")
}

/// Functions as a tree: VFs below their PF, others below the nearest bridge in the list.
pub(super) fn tree(functions: &[ListedView], width: Option<usize>) -> String {
    let listed = |address: &Sbdf| functions.iter().any(|view| view.function.address == *address);
    let parent = |view: &ListedView| {
        let above = view.function.physical_function.iter().chain(&view.ports).copied();
        above.into_iter().find(|address| listed(address))
    };
    let mut below: BTreeMap<Option<Sbdf>, Vec<&ListedView>> = BTreeMap::new();
    for view in functions {
        below.entry(parent(view)).or_default().push(view);
    }
    let mut text = String::new();
    branch(&mut text, &below, None, "", width);
    text
}

fn branch(
    text: &mut String,
    below: &BTreeMap<Option<Sbdf>, Vec<&ListedView>>,
    parent: Option<Sbdf>,
    indent: &str,
    width: Option<usize>,
) {
    let Some(children) = below.get(&parent) else { return };
    for (index, view) in children.iter().enumerate() {
        let last = index + 1 == children.len();
        let (fork, more) = match (parent, last) {
            (None, _) => ("", ""),
            (_, true) => ("\\-", "  "),
            (_, false) => ("+-", "| "),
        };
        let parts = [
            Some(view.function.state.to_string()),
            Some(owner(view)).filter(|owner| owner != "dom0" && owner != "-"),
            view.function.driver.clone(),
            sriov(view),
            Some(view.interfaces.join(",")).filter(|names| !names.is_empty()),
        ];
        let parts = parts.into_iter().flatten().collect::<Vec<_>>().join("; ");
        let line =
            format!("{indent}{fork}{} {}: {} ({parts})", view.function.address, class(view), device(view));
        let _ = writeln!(text, "{}", cut(&line, width));
        branch(text, below, Some(view.function.address), &format!("{indent}{more}"), width);
    }
}

/// Cuts a line to the width of the terminal.
pub(super) fn cut(line: &str, width: Option<usize>) -> String {
    match width {
        Some(width) if line.chars().count() > width => {
            let kept: String = line.chars().take(width.saturating_sub(1)).collect();
            format!("{}…", kept.trim_end())
        }
        _ => line.to_owned(),
    }
}

/// The details of one function.
pub(super) fn shown(view: &ShownView) -> String {
    let (listed_view, function) = (&view.listed, &view.listed.function);
    let mut text = format!(
        "{} {}: {} (rev {})\n",
        function.address,
        class(listed_view),
        device(listed_view),
        view.revision
    );
    let persistent = function
        .persistent
        .as_ref()
        .map(|persistent| persistent.name.clone().unwrap_or_else(|| persistent.guest.to_string()));
    let group = match view.group_members.is_empty() {
        true => format!("{}, alone", listed_view.iommu_group),
        false => format!("{}, with {}", listed_view.iommu_group, addresses(&view.group_members)),
    };
    let rows = [
        ("state", Some(function.state.to_string())),
        ("owner", Some(owned(listed_view, function)).filter(|owner| owner != "-")),
        ("persistent for", persistent),
        ("note", function.note.clone()),
        ("driver", function.driver.clone()),
        ("original driver", function.original_driver.clone()),
        ("SR-IOV", placed(listed_view, function)),
        ("interfaces", Some(listed_view.interfaces.join(", "))),
        ("used by", Some(view.uses.join("; "))),
        ("class", Some(format!("{} ({})", listed_view.class, listed_view.base_class))),
        ("subsystem", Some(view.subsystem.clone())),
        ("serial number", view.serial_number.clone()),
        ("path", view.path.clone()),
        ("reset methods", Some(listed(&listed_view.reset_methods).replace(',', ", "))),
        ("IOMMU group", Some(group)),
        ("ports above", Some(addresses(&listed_view.ports))),
        ("NUMA node", listed_view.numa_node.map(|node| node.to_string())),
        ("interrupt line", view.interrupt_line.map(|line| line.to_string())),
    ];
    for (name, value) in rows {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            let _ = writeln!(text, "  {name:<16} {value}");
        }
    }
    for bar in &view.bars {
        let (name, value) = bar.split_once(": ").unwrap_or(("", bar));
        let _ = writeln!(text, "  {name:<16} {value}");
    }
    match view.obstacles.as_slice() {
        [] => text.push_str("\nIt can be attached.\n"),
        obstacles => {
            text.push_str("\nIt cannot be attached now:\n");
            text.push_str(&bulleted(obstacles, "  "));
        }
    }
    text
}

fn addresses(list: &[Sbdf]) -> String {
    list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn owned(view: &ListedView, function: &FunctionView) -> String {
    let number = function.domain.filter(|_| function.domain_name.is_some());
    let number = number.map(|domain| format!(" (domain {domain})")).unwrap_or_default();
    let seen = function.guest_address.map(|seen| format!(", which sees it at {seen}")).unwrap_or_default();
    format!("{}{number}{seen}", owner(view))
}

fn placed(view: &ListedView, function: &FunctionView) -> Option<String> {
    match (view.total_vfs, function.physical_function) {
        (Some(total), _) => {
            Some(format!("PF, {} of {total} VFs enabled", view.enabled_vfs.unwrap_or_default()))
        }
        (None, Some(pf)) => Some(match view.vf_index.zip(view.vf_count) {
            Some((index, count)) => format!("VF {index} of {count} of {pf}"),
            None => format!("VF of {pf}"),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_cut_where_the_terminal_ends() {
        assert_eq!(cut("0000:01:00.0 Ethernet", Some(12)), "0000:01:00.…");
        assert_eq!(cut("0000:01:00.0", Some(12)), "0000:01:00.0");
        assert_eq!(cut("0000:01:00.0 Ethernet", None), "0000:01:00.0 Ethernet");
    }

    #[test]
    fn every_state_has_its_word() {
        for (word, state) in STATES {
            assert_eq!(state.to_string(), word);
        }
    }
}

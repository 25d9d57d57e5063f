//! `xpci aer status` and `xpci blast-radius` as text.

use std::fmt::Write;

use pciback::containment::Role;
use pciback::containment::radius::{Radius, Sharer, Stance};

use super::table::table;
use crate::protocol::{AerOwner, AerStatusView, MemberView};

/// The registers on the paths of functions.
pub(super) fn aer_status(view: &AerStatusView) -> String {
    let paths = view.functions.iter().map(|path| {
        let owner = match path.aer_owner {
            AerOwner::Linux => "AER is handled by Linux",
            AerOwner::Platform => {
                "the firmware does not grant Linux control of AER: its registers are not changed"
            }
            AerOwner::NoRootPort => "no root port above: AER's registers are not changed",
        };
        let members: String = path.members.iter().map(member).collect();
        format!("{}: {owner}\n{members}", path.address)
    });
    paths.collect::<Vec<_>>().join("\n")
}

fn member(member: &MemberView) -> String {
    let role = match member.role {
        Role::RootPort => "root port",
        Role::Port => "port",
        Role::Physical => "function",
        Role::Virtual => "VF",
    };
    let counted = member.counters.map_or_else(
        || "no error counters".to_owned(),
        |counters| {
            let (correctable, non_fatal, fatal) = (counters.correctable, counters.non_fatal, counters.fatal);
            format!("{correctable} correctable, {non_fatal} non-fatal, {fatal} fatal errors")
        },
    );
    let users: Vec<String> = member.users.iter().map(ToString::to_string).collect();
    let users = match users.as_slice() {
        [] => String::new(),
        users => format!(", set for {}", users.join(" ")),
    };
    let mut text = format!("  {} ({role}): {counted}{users}\n", member.address);
    if member.registers.is_empty() {
        return text;
    }
    let head =
        ["    REGISTER", "AT", "READS", "BITS", "WANTED", "BEFORE", "NOTE"].map(str::to_owned).to_vec();
    let rows = member.registers.iter().map(|register| {
        let digits = usize::from(register.width) * 2;
        let hex = |value: u32| format!("{value:0digits$x}");
        let note = match (register.as_wanted, register.before) {
            (false, Some(_)) => "not as wanted: hardwired, or changed by another program",
            _ => "",
        };
        vec![
            format!("    {}", register.name),
            format!("{:03x}", register.offset),
            hex(register.value),
            hex(register.mask),
            hex(register.wanted),
            register.before.map_or_else(|| "-".to_owned(), hex),
            note.to_owned(),
        ]
    });
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    text.push_str(&table(&rows));
    text
}

/// The functions and guests that a failure of a function affects.
pub(super) fn blast_radius(radius: &Radius) -> String {
    let ports: Vec<String> = radius.ports.iter().map(ToString::to_string).collect();
    let above = match ports.as_slice() {
        [] => "on a root bus".to_owned(),
        ports => format!("below {}", ports.join(", below ")),
    };
    let mut text = format!("{}, {above}\n", radius.address);
    let because = format!("cannot be isolated by the IOMMU ({})", radius.iommu_group_because);
    for (what, sharers) in [
        ("affected by a reset of its link", &radius.link),
        ("also affected by a reset at its root port", &radius.root_port),
        ("on the same interrupt line", &radius.line),
        ("with a BAR in the same page of memory", &radius.page),
        (because.as_str(), &radius.iommu_group),
        ("preventing Linux's recovery of everything below the port", &radius.vetoes),
    ] {
        let _ = writeln!(text, "{what}:{}", if sharers.is_empty() { " none" } else { "" });
        sharers.iter().for_each(|sharer| text.push_str(&line(sharer)));
    }
    text
}

fn line(sharer: &Sharer) -> String {
    let recovery = match sharer.recovery {
        Stance::Recovers => "takes part in recovery",
        Stance::Vetoes => "vetoes recovery",
        Stance::Unknown => "may veto recovery",
    };
    let driver = sharer.driver.as_deref().unwrap_or("no driver");
    format!("  {} ({driver}, {recovery})\n", sharer.address)
}

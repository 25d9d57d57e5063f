//! The order of the modules of this crate.

use std::path::Path;

use xpci_test_support::layers::{Layer, violations, violations_within};

/// From the bottom up: each module, and those that it may name.
const ORDER: &[Layer] = &[
    ("outcome", &[]),
    ("durable", &[]),
    ("drop_ins", &[]),
    ("steps", &[]),
    ("reset_plan", &[]),
    ("supervisor", &[]),
    ("successor", &[]),
    ("descriptors", &[]),
    ("domains", &["outcome"]),
    ("spec", &["outcome"]),
    ("policies", &["durable", "drop_ins", "outcome"]),
    ("target", &[]),
    ("pci_path", &["outcome"]),
    ("device", &["outcome", "spec", "pci_path"]),
    ("names", &["outcome", "spec", "target", "pci_path", "device"]),
    ("saved", &["outcome", "durable", "spec", "device"]),
    ("protocol", &["outcome", "domains", "target", "saved"]),
    ("audit", &["protocol"]),
    ("settings", &["outcome", "durable", "drop_ins", "reset_plan", "spec", "names", "target", "protocol"]),
    ("journal", &["durable", "outcome", "steps"]),
    ("ledger", &["durable", "journal"]),
    ("former_owners", &["durable", "outcome", "journal"]),
    ("reservations", &["durable", "outcome", "target", "journal", "device"]),
    ("suspensions", &["durable", "outcome", "journal"]),
    ("moves", &["durable", "outcome", "journal"]),
    ("persistent_settings", &["durable", "outcome", "journal", "device"]),
    (
        "transaction",
        &[
            "outcome",
            "steps",
            "reset_plan",
            "domains",
            "spec",
            "settings",
            "journal",
            "ledger",
            "former_owners",
            "persistent_settings",
        ],
    ),
    ("doctor", &["outcome", "spec", "protocol", "transaction"]),
    ("reply", &["outcome", "protocol"]),
    ("guest_names", &["outcome", "domains", "protocol"]),
    (
        "engine",
        &[
            "outcome",
            "durable",
            "reset_plan",
            "supervisor",
            "successor",
            "domains",
            "spec",
            "target",
            "pci_path",
            "names",
            "policies",
            "protocol",
            "audit",
            "settings",
            "journal",
            "ledger",
            "former_owners",
            "reservations",
            "suspensions",
            "moves",
            "device",
            "saved",
            "persistent_settings",
            "transaction",
            "doctor",
            "reply",
            "guest_names",
        ],
    ),
    ("control", &["outcome", "protocol", "reply", "guest_names", "engine"]),
    ("client", &["outcome", "protocol", "target"]),
    ("cli", &["outcome", "target", "policies", "saved", "protocol", "settings", "client"]),
    ("bin", &[]),
];

/// The parts of the engine, from the bottom up: each, and those that it may name.
const ENGINE: &[Layer] = &[
    ("problems", &[]),
    ("notes", &[]),
    ("changes", &[]),
    ("files", &["problems"]),
    ("inbox", &["problems"]),
    ("background", &["problems", "inbox"]),
    ("functions", &[]),
    ("events", &["problems"]),
    ("tasks", &["problems", "notes", "changes", "files", "inbox", "functions"]),
    ("requests", &["problems", "notes", "functions", "tasks"]),
    ("inventory", &["problems", "changes", "tasks"]),
    ("errors", &["problems", "inbox", "functions", "tasks"]),
    ("guests", &["problems", "notes", "tasks", "requests", "errors"]),
    ("holds", &["problems", "files", "functions", "tasks", "requests"]),
    ("persistent", &["problems", "notes", "files", "inbox", "functions", "tasks", "requests"]),
    ("vfs", &["problems", "functions", "tasks", "requests"]),
    ("saving", &["problems", "requests", "guests", "persistent"]),
    ("policies", &["problems", "functions", "tasks", "guests"]),
    ("libxl", &[]),
    ("mailbox", &[]),
    ("recover", &["problems", "functions", "tasks", "guests"]),
    ("store_events", &["libxl"]),
    ("succession", &[]),
];

#[test]
fn no_part_of_the_engine_names_one_above_it() {
    let wrong = violations_within(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "engine", ENGINE);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_module_names_one_above_it() {
    let wrong = violations(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), ORDER);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

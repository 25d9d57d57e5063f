//! The order of the modules of this crate.

use std::path::Path;

use xpci_test_support::layers::{Layer, violations};

/// From the bottom up: each module, and those that it may name.
const ORDER: &[Layer] = &[
    ("devfn", &[]),
    ("address", &[]),
    ("uuid", &[]),
    ("hash", &[]),
    ("memory", &[]),
    ("function", &[]),
    ("host", &[]),
    ("dump", &["address"]),
    ("spec", &[]),
    ("config", &["hash", "memory", "host", "spec"]),
    ("mailbox", &["memory", "spec", "config"]),
    ("containment", &["memory", "host", "dump", "spec", "config"]),
    ("fault", &["spec"]),
    ("inventory", &["host"]),
    ("policy", &["host", "dump", "spec", "config", "fault"]),
    ("abi", &["config", "fault"]),
];

#[test]
fn no_module_names_one_above_it() {
    let wrong = violations(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), ORDER);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

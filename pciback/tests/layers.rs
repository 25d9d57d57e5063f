//! The order of the modules of this crate.

use std::path::Path;

use xpci_test_support::layers::{Layer, violations};

/// From the bottom up: each module, and those that it may name.
const ORDER: &[Layer] = &[
    ("platform", &[]),
    ("platform::linux", &["platform"]),
    ("platform::xen", &["platform", "platform::linux"]),
    ("platform::sim", &["platform"]),
    ("live", &["platform"]),
    ("serve", &["platform", "live"]),
    ("serve::pv", &["platform", "serve"]),
    ("serve::hvm", &["platform", "live", "serve"]),
];

#[test]
fn no_module_names_one_above_it() {
    let wrong = violations(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), ORDER);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

//! `deny.toml` against the crates that are built: what cargo-deny checks of licences, for those who have it not.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The licences that `deny.toml` allows.
fn allowed(text: &str) -> Vec<&str> {
    let list =
        text.split("allow = [").nth(1).and_then(|rest| rest.split(']').next()).expect("a list 'allow'");
    list.split('"').skip(1).step_by(2).collect()
}

/// Whether a licence expression can be met: one of each alternative, all of each conjunction. Parentheses stand around alternatives only.
fn is_met(expression: &str, allowed: &[&str]) -> bool {
    let one = |licence: &str| allowed.contains(&licence.trim());
    let any = |alternatives: &str| alternatives.replace('/', " OR ").split(" OR ").any(one);
    expression.split(" AND ").all(|part| any(part.trim_matches(['(', ')'])))
}

#[test]
fn the_licences_of_all_crates_are_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = fs::read_to_string(root.join("deny.toml")).unwrap();
    let allowed = allowed(&text);
    assert!(allowed.len() > 3, "{allowed:?}");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([
        "metadata",
        "--locked",
        "--format-version",
        "1",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ]);
    let output = cargo.current_dir(&root).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 20, "{}", packages.len());
    for package in packages {
        let (name, licence) = (&package["name"], package["license"].as_str().unwrap_or("none"));
        assert!(is_met(licence, &allowed), "{name}: {licence}");
    }
}

#[test]
fn of_alternative_licences_one_must_be_allowed_and_of_combined_ones_all() {
    let allowed = ["MIT", "Zlib"];
    for (expression, met) in [
        ("MIT", true),
        ("GPL-3.0-only", false),
        ("GPL-3.0-only OR MIT", true),
        ("GPL-3.0-only/MIT", true),
        ("(GPL-3.0-only OR MIT) AND Zlib", true),
        ("(GPL-3.0-only OR MIT) AND BSD-3-Clause", false),
    ] {
        assert_eq!(is_met(expression, &allowed), met, "{expression}");
    }
}

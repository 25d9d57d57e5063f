//! What the documents say of the repository's files and tests.

use std::fs;
use std::io;
use std::path::Path;

/// The names in backquotes that are paths of files or folders of this repository.
fn paths(text: &str) -> Vec<&str> {
    const TOP: [&str; 6] = ["pciback/", "toolstack/", "tests/", "docs/", "configs/", "udev-rules/"];
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| TOP.iter().any(|top| name.starts_with(top)) && !name.contains([' ', '*'])).collect()
}

/// The names in backquotes that are long enough to be those of tests.
fn tests_named(text: &str) -> Vec<&str> {
    let is_test = |name: &&str| {
        name.len() > 20
            && name.contains('_')
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    text.split('`').skip(1).step_by(2).filter(is_test).collect()
}

/// The sources below a folder, one after the other.
fn sources(folder: &Path, into: &mut String) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            sources(&path, into)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push_str(&fs::read_to_string(path)?);
        }
    }
    Ok(())
}

#[test]
fn the_tests_that_the_threat_model_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let mut code = String::new();
    for folder in ["pciback", "toolstack", "tests"] {
        sources(&root.join(folder), &mut code).unwrap();
    }
    let named = tests_named(&text);
    assert!(named.len() > 20, "{named:?}");
    let missing: Vec<_> = named.into_iter().filter(|name| !code.contains(&format!("fn {name}("))).collect();
    assert!(missing.is_empty(), "SECURITY.md names tests that do not exist: {missing:?}");
}

#[test]
fn the_files_that_the_documents_for_engineers_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for document in ["ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(root.join(document)).expect(document);
        let named = paths(&text);
        assert!(named.len() > 5, "{document} names hardly any file: {named:?}");
        let missing: Vec<_> = named.into_iter().filter(|name| !root.join(name).exists()).collect();
        assert!(missing.is_empty(), "{document} names files that do not exist: {missing:?}");
    }
}

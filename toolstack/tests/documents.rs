//! What the documents say of the repository's files.

use std::fs;
use std::path::Path;

/// The names in backquotes that are paths of files or folders of this repository.
fn paths(text: &str) -> Vec<&str> {
    const TOP: [&str; 6] = ["pciback/", "toolstack/", "tests/", "docs/", "configs/", "udev-rules/"];
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| TOP.iter().any(|top| name.starts_with(top)) && !name.contains([' ', '*'])).collect()
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

//! What the documents say of the repository's files, tests and commands.

#![expect(clippy::unwrap_used, reason = "a test that fails says so by panicking")]

mod commands_page;
mod licences;
mod protocol_schema;

use std::fs;
use std::io;
use std::path::Path;

use toolstack::protocol::{Call, Envelope};
use xpci_test_support::schema::Schema;

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
fn the_tests_that_the_threat_model_and_the_comparison_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut code = String::new();
    for folder in ["pciback", "toolstack", "tests"] {
        sources(&root.join(folder), &mut code).unwrap();
    }
    for document in ["docs/security.md", "docs/comparison.md"] {
        let text = fs::read_to_string(root.join(document)).expect(document);
        let named = tests_named(&text);
        assert!(named.len() > 20, "{document}: {named:?}");
        let missing: Vec<_> =
            named.into_iter().filter(|name| !code.contains(&format!("fn {name}("))).collect();
        assert!(missing.is_empty(), "{document} names tests that do not exist: {missing:?}");
    }
}

#[test]
fn each_claim_of_the_comparison_names_a_test() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/comparison.md");
    let text = fs::read_to_string(path).unwrap();
    let compared = text.split("## Sources").next().unwrap();
    let rows = compared.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    let claims: Vec<&str> = rows.filter(|row| !row.starts_with("| ---")).collect();
    assert!(claims.len() > 20, "{claims:?}");
    for claim in claims {
        let shown_by = claim.split(" | ").nth(2).expect(claim);
        assert!(!tests_named(shown_by).is_empty(), "no test shows: {claim}");
    }
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

/// The files to which a document links, without those of the network.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let files = targets.filter_map(|target| target.split('#').next());
    files.filter(|file| !file.is_empty() && !file.contains("://")).collect()
}

#[test]
fn the_files_to_which_the_documents_link_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut followed = 0;
    for folder in ["", "docs", "configs/policies"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            for link in links(&text) {
                assert!(path.with_file_name(link).exists(), "{} links to {link}", path.display());
                followed += 1;
            }
        }
    }
    assert!(followed > 30, "{followed}");
}

#[test]
fn the_dashboard_and_the_document_name_existing_metrics() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = fs::read_to_string(root.join("src/cli/metrics.rs")).unwrap();
    let names = |text: &str| -> Vec<String> {
        let words = text.split(|sign: char| !sign.is_ascii_alphanumeric() && sign != '_');
        let named = words.filter(|word| word.starts_with("xpci_")).map(str::to_owned);
        named.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
    };
    let document = fs::read_to_string(root.join("../docs/fleet.md")).unwrap();
    let document = document.split("## Prometheus").nth(1).unwrap();
    let dashboard = fs::read_to_string(root.join("../configs/grafana/xpci.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&dashboard).unwrap();
    let there: Vec<String> =
        names(&source).into_iter().filter(|name| source.contains(&format!("\"{name}\""))).collect();
    assert!(there.len() > 8, "{there:?}");
    for named in names(&dashboard) {
        // A histogram is several series.
        let metric = named.trim_end_matches("_bucket").to_owned();
        assert!(there.contains(&metric), "{named} is in the dashboard alone");
    }
    let missing: Vec<&String> =
        there.iter().filter(|name| *name != "xpci_up" && !names(document).contains(name)).collect();
    assert!(missing.is_empty(), "docs/fleet.md lacks {missing:?}");
}

/// The rows of the table of commands: the command's word and the arguments of a request, or nothing.
fn commands(text: &str) -> Vec<(&str, &str)> {
    let table = text.split("## The commands").nth(1).unwrap_or_default();
    table
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split(" | ");
            let (word, arguments) = (cells.next()?.strip_suffix('`')?, cells.nth(1).unwrap_or_default());
            Some((word, arguments.trim_end_matches(" |").trim_matches(['|', ' ', '`'])))
        })
        .collect()
}

#[test]
fn the_protocol_document_has_a_valid_request_for_each_command() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("../docs/protocol.md")).unwrap();
    let documented = commands(&text);
    let requests = Schema::read(root.join("../docs/schema/request.json")).unwrap();
    for (word, arguments) in &documented {
        let arguments =
            if arguments.is_empty() { String::new() } else { format!(r#","arguments":{arguments}"#) };
        let line = format!(r#"{{"version":1,"id":1,"command":"{word}"{arguments}}}"#);
        let call: Call = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let mistakes = requests.mistakes(&serde_json::from_str(&line).unwrap());
        assert_eq!(mistakes, [""; 0], "docs/schema/request.json refuses {line}");
        assert_eq!(call.request.name(), *word);
    }
    let source = fs::read_to_string(root.join("src/protocol/request.rs")).unwrap();
    let names = source.split("pub const fn name").nth(1).unwrap().split("\n}\n").next().unwrap();
    let known: Vec<&str> = names.split('"').skip(1).step_by(2).collect();
    let missing: Vec<_> =
        known.iter().filter(|name| !documented.iter().any(|(word, _)| word == *name)).collect();
    assert!(known.len() > 20 && missing.is_empty(), "docs/protocol.md lacks {missing:?}");
}

#[test]
fn the_examples_in_the_protocol_document_are_valid() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/protocol.md")).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("{\"version\"")).collect();
    assert!(lines.len() > 3, "{lines:?}");
    for line in lines {
        let is_request = serde_json::from_str::<Call>(line).is_ok_and(|_| !line.contains("\"ok\""));
        let answer = serde_json::from_str::<Envelope>(line);
        assert!(is_request || answer.is_ok(), "{line}: {answer:?}");
    }
}

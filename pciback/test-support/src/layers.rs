//! The order of a crate's modules, checked against its sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A module below the root of the crate, and the ones that it may name.
pub type Layer = (&'static str, &'static [&'static str]);

/// What is wrong with a crate whose sources are in the folder `src`, one line each. `layers` has each of its modules, from the bottom up,
/// so that a module may name only what stands before it; what it may name and does not is wrong, too.
pub fn violations(src: &Path, layers: &[Layer]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut lower = BTreeSet::new();
    for (module, allowed) in layers {
        for name in allowed.iter().filter(|name| !lower.contains(*name)) {
            wrong.push(format!("{module} may not name {name}, which does not stand below it"));
        }
        lower.insert(*module);
    }
    let mut named: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (file, path) in sources(src) {
        let Some(module) = path.first() else { continue };
        let Some((_, allowed)) = layers.iter().find(|(layer, _)| layer == module) else {
            wrong.push(format!("{file}: the module {module} has no place in the order"));
            continue;
        };
        let text = match fs::read_to_string(src.join(&file)) {
            Ok(text) => text,
            Err(error) => {
                wrong.push(format!("{file}: {error}"));
                continue;
            }
        };
        for name in names(&text, &path) {
            if name == *module || !layers.iter().any(|(layer, _)| *layer == name) {
                continue;
            }
            if !allowed.contains(&name.as_str()) {
                wrong.push(format!("{file} names {name}, which {module} may not"));
            }
            named.entry(module.clone()).or_default().insert(name);
        }
    }
    for (module, allowed) in layers {
        let named = named.remove(*module).unwrap_or_default();
        for name in allowed.iter().filter(|name| !named.contains(**name)) {
            wrong.push(format!("{module} may name {name}, and does not"));
        }
    }
    wrong
}

/// The files below `src`, with the path of the module that each holds.
fn sources(src: &Path) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(src.join(&folder)).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            if entry.path().is_dir() {
                folders.push(path);
            } else if let Some(stem) = path.strip_suffix(".rs") {
                let mut module: Vec<String> = stem.split('/').map(str::to_owned).collect();
                if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
                    module.pop();
                }
                found.push((path, module));
            }
        }
    }
    found.sort();
    found
}

/// The names at the root of the crate that a text names with `crate::` or `super::`, in the module `path`.
fn names(text: &str, path: &[String]) -> BTreeSet<String> {
    let tokens = tokens(text);
    let mut found = BTreeSet::new();
    // The braces that are open, and for each whether it is a module's.
    let mut braces = Vec::new();
    let mut index = 0;
    while let Some(token) = tokens.get(index) {
        let before = index.checked_sub(1).and_then(|before| tokens.get(before)).map(String::as_str);
        match token.as_str() {
            "{" => braces.push(index >= 2 && tokens[index - 2] == "mod"),
            "}" => {
                braces.pop();
            }
            // `pub(crate)` and `pub(in crate::...)` name nothing.
            "crate" if before != Some("in") && next_is(&tokens, index + 1, "::") => {
                first_names(&tokens, index + 2, &mut found);
            }
            // `pub(super)` names nothing.
            "super" if before != Some("::") && next_is(&tokens, index + 1, "::") => {
                let mut up = 0;
                while tokens.get(index).is_some_and(|token| token == "super")
                    && next_is(&tokens, index + 1, "::")
                {
                    (up, index) = (up + 1, index + 2);
                }
                let depth = path.len() + braces.iter().filter(|module| **module).count();
                if up == depth {
                    first_names(&tokens, index, &mut found);
                }
                continue;
            }
            _ => {}
        }
        index += 1;
    }
    found
}

fn next_is(tokens: &[String], index: usize, token: &str) -> bool {
    tokens.get(index).is_some_and(|found| found == token)
}

/// The first name of each path in the tree that begins at `index`: one name, or several in braces.
fn first_names(tokens: &[String], index: usize, found: &mut BTreeSet<String>) {
    if !next_is(tokens, index, "{") {
        found.extend(tokens.get(index).cloned());
        return;
    }
    let mut depth = 0;
    for (at, token) in tokens.iter().enumerate().skip(index) {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ if depth == 1 && matches!(tokens[at - 1].as_str(), "{" | ",") => {
                found.insert(token.clone());
            }
            _ => {}
        }
        if depth == 0 {
            return;
        }
    }
}

/// Words, braces, commas and `::`, without what stands in comments and literals.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
        } else if let Some(raw) = raw_string(rest) {
            rest = raw;
        } else if first == '"' {
            rest = behind_string(&rest[1..]);
        } else if let Some(behind) = behind_character(rest) {
            rest = behind;
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push(rest[..end].to_owned());
            rest = &rest[end..];
        } else if let Some(behind) = rest.strip_prefix("::") {
            tokens.push("::".to_owned());
            rest = behind;
        } else {
            if matches!(first, '{' | '}' | ',') {
                tokens.push(first.to_string());
            }
            rest = &rest[first.len_utf8()..];
        }
    }
    tokens
}

/// What follows a raw string that `text` begins with.
fn raw_string(text: &str) -> Option<&str> {
    let behind = text.strip_prefix('r')?;
    let hashes = behind.len() - behind.trim_start_matches('#').len();
    let body = behind[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(body.split_once(end.as_str()).map_or("", |(_, rest)| rest))
}

/// What follows the string whose first character `text` begins with.
fn behind_string(text: &str) -> &str {
    let mut escaped = false;
    for (index, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return &text[index + 1..],
            _ => {}
        }
    }
    ""
}

/// What follows a character literal that `text` begins with; `None` for a lifetime.
fn behind_character(text: &str) -> Option<&str> {
    let body = text.strip_prefix('\'')?;
    let length = match body.strip_prefix('\\') {
        Some(escape) => 1 + escape.char_indices().nth(1)?.0 + escape[1..].find('\'')?,
        None => body.chars().next()?.len_utf8(),
    };
    body.get(length..)?.strip_prefix('\'')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str, path: &[&str]) -> Vec<String> {
        let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
        names(text, &path).into_iter().collect()
    }

    #[test]
    fn a_path_from_the_root_names_its_first_module() {
        assert_eq!(
            named("use crate::config::{Access, Width}; fn f() { crate::spec::X }", &["pv"]),
            ["config", "spec"]
        );
        assert_eq!(
            named("use crate::{config::{Access, list}, hvm, Sbdf as B};", &["pv"]),
            ["Sbdf", "config", "hvm"]
        );
    }

    #[test]
    fn only_as_many_supers_as_lead_to_the_root_name_a_module() {
        assert!(named("use super::{wire, nodes};", &["pv", "server"]).is_empty());
        assert_eq!(named("use super::super::hvm::Device;", &["pv", "server"]), ["hvm"]);
        assert_eq!(named("mod tests { use super::super::super::hvm; }", &["pv", "server"]), ["hvm"]);
        assert!(named("mod tests { use super::super::hvm; }", &["pv", "server"]).is_empty());
    }

    #[test]
    fn comments_literals_and_visibility_name_nothing() {
        let text = r##"// crate::a
            //! [`crate::b`]
            pub(crate) fn f<'a>(x: &'a str) -> char { g("crate::c \" crate::d", r#"crate::e"#, '"', '\'', '\u{7f}'); 'x' }
            pub(in crate::f) fn h() {} pub(super) fn i() {} crate::g"##;
        assert_eq!(named(text, &["pv"]), ["g"]);
    }

    #[test]
    fn a_lower_layer_that_names_a_higher_one_is_reported() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/layers");
        assert_eq!(
            violations(&src, &[("low", &[]), ("high", &["low"])]),
            ["low.rs names high, which low may not", "high may name low, and does not"]
        );
        assert_eq!(
            violations(&src, &[("low", &["high"])]),
            [
                "low may not name high, which does not stand below it",
                "high.rs: the module high has no place in the order",
                "low may name high, and does not"
            ]
        );
    }
}

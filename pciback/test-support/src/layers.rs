//! The order of a crate's modules, checked against its sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A module of the crate, by its path from the root (`serve` or `serve::pv`), and the ones that it may name. What is in it and is no
/// layer itself belongs to it.
pub type Layer = (&'static str, &'static [&'static str]);

/// What is wrong with a crate whose sources are in the folder `src`, one line each. `layers` has each of its modules, from the bottom up,
/// so that a module may name only what stands before it; what it may name and does not is wrong, too.
pub fn violations(src: &Path, layers: &[Layer]) -> Vec<String> {
    violations_in(src, None, layers)
}

/// [`violations`] for the parts of one module of the crate. `parts` has each of them, by its path from that module. Each part may name the
/// module itself.
pub fn violations_within(src: &Path, module: &str, parts: &[Layer]) -> Vec<String> {
    violations_in(src, Some(module), parts)
}

fn violations_in(src: &Path, parent: Option<&str>, layers: &[Layer]) -> Vec<String> {
    let within = |path: &[String]| match parent {
        None => Some(path.to_vec()),
        Some(parent) => {
            path.split_first().filter(|(first, _)| *first == parent).map(|(_, rest)| rest.to_vec())
        }
    };
    let mut wrong = Vec::new();
    let mut lower = BTreeSet::new();
    for (module, allowed) in layers {
        for name in allowed.iter().filter(|name| !lower.contains(*name)) {
            wrong.push(format!("{module} may not name {name}, which does not stand below it"));
        }
        lower.insert(*module);
    }
    let mut named: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (file, full_path) in sources(src) {
        let Some(path) = within(&full_path).filter(|path| !path.is_empty()) else { continue };
        let Some((module, allowed)) = layer_of(layers, &path) else {
            wrong.push(format!("{file}: the module {} has no place in the order", path.join("::")));
            continue;
        };
        let text = match fs::read_to_string(src.join(&file)) {
            Ok(text) => text,
            Err(error) => {
                wrong.push(format!("{file}: {error}"));
                continue;
            }
        };
        let names = names(&text, &full_path);
        let found: BTreeSet<&str> =
            names.iter().filter_map(|name| Some(layer_of(layers, &within(name)?)?.0)).collect();
        for name in found.into_iter().filter(|name| *name != module) {
            if !allowed.contains(&name) {
                wrong.push(format!("{file} names {name}, which {module} may not"));
            }
            named.entry(module).or_default().insert(name);
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

/// The innermost layer that has what a path from the root names.
fn layer_of(layers: &[Layer], path: &[String]) -> Option<Layer> {
    let has = |(layer, _): &&Layer| {
        let mut parts = path.iter();
        layer.split("::").all(|part| parts.next().is_some_and(|found| found == part))
    };
    layers.iter().filter(has).max_by_key(|(layer, _)| layer.split("::").count()).copied()
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

/// The paths from the root of the crate that a text names, in the module `path`, with `crate::` or `super::`, or from that module on.
fn names(text: &str, path: &[String]) -> BTreeSet<Vec<String>> {
    let tokens = tokens(text);
    let mut found = BTreeSet::new();
    // The braces that are open, and for each the module that it holds.
    let mut braces: Vec<Option<&String>> = Vec::new();
    let mut index = 0;
    while let Some(token) = tokens.get(index) {
        let before = index.checked_sub(1).and_then(|before| tokens.get(before)).map(String::as_str);
        let mut module = path.to_vec();
        module.extend(braces.iter().flatten().map(|name| (*name).clone()));
        let is_path = before != Some("::") && next_is(&tokens, index + 1, "::");
        match token.as_str() {
            "{" => {
                let name = index.checked_sub(1).and_then(|before| tokens.get(before));
                braces.push(name.filter(|_| index >= 2 && tokens[index - 2] == "mod"));
            }
            "}" => {
                braces.pop();
            }
            // `pub(crate)`, `pub(super)` and `pub(in crate::...)` name nothing.
            _ if !is_path || before == Some("in") => {}
            first => {
                while next_is(&tokens, index, "super") && next_is(&tokens, index + 1, "::") {
                    module.pop();
                    index += 2;
                }
                if first == "crate" {
                    module.clear();
                    index += 2;
                }
                // A path without either begins with a module of this one, a type, or another crate: those two are no layers.
                index = add_paths(&tokens, index, module, &mut found);
                continue;
            }
        }
        index += 1;
    }
    found
}

fn next_is(tokens: &[String], index: usize, token: &str) -> bool {
    tokens.get(index).is_some_and(|found| found == token)
}

/// Adds the paths of the tree that begins at `index`, all below `module`; what is behind the tree.
fn add_paths(
    tokens: &[String],
    mut index: usize,
    mut module: Vec<String>,
    found: &mut BTreeSet<Vec<String>>,
) -> usize {
    while let Some(word) = tokens.get(index).filter(|token| is_word(token)) {
        if word != "self" {
            module.push(word.clone());
        }
        index += 1;
        if !next_is(tokens, index, "::") {
            break;
        }
        index += 1;
    }
    if !next_is(tokens, index, "{") || tokens[index - 1] != "::" {
        found.insert(module);
        return index;
    }
    index += 1;
    while let Some(token) = tokens.get(index).filter(|token| *token != "}") {
        index = match token.as_str() {
            "as" => index + 2,
            token if is_word(token) || token == "{" => add_paths(tokens, index, module.clone(), found),
            // A comma, or what is left of `::*`.
            _ => index + 1,
        };
    }
    index + 1
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphanumeric() || c == '_')
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
        names(text, &path).into_iter().map(|path| path.join("::")).collect()
    }

    #[test]
    fn a_path_from_the_root_names_what_it_leads_to() {
        assert_eq!(
            named("use crate::config::{Access, rules::{self, Width}}; fn f() { crate::spec::X }", &["pv"]),
            ["config::Access", "config::rules", "config::rules::Width", "spec::X"]
        );
        assert_eq!(
            named("use crate::{config::{Access, list}, hvm, Sbdf as B}; use crate::live::*;", &["pv"]),
            ["Sbdf", "config::Access", "config::list", "hvm", "live"]
        );
    }

    #[test]
    fn a_relative_path_names_what_it_leads_to() {
        assert_eq!(named("use super::{wire, nodes::X};", &["pv", "server"]), ["pv::nodes::X", "pv::wire"]);
        assert_eq!(named("use super::super::hvm::Device;", &["pv", "server"]), ["hvm::Device"]);
        assert_eq!(named("mod tests { use super::super::super::hvm; }", &["pv", "server"]), ["hvm"]);
        assert_eq!(named("mod tests { use super::super::hvm; }", &["pv", "server"]), ["pv::hvm"]);
        assert_eq!(
            named("pub use hvm::Device; fn f() { self::pv::g() }", &["serve"]),
            ["serve::hvm::Device", "serve::pv::g"]
        );
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
    fn a_part_of_a_module_that_names_a_higher_part_is_reported() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parts");
        assert_eq!(
            violations_within(&src, "parent", &[("first", &[]), ("second", &["first"])]),
            ["parent/first.rs names second, which first may not"]
        );
    }

    #[test]
    fn a_lower_layer_that_names_a_higher_one_is_reported() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/layers");
        assert_eq!(
            violations(&src, &[("low", &[]), ("high", &["low"]), ("high::inner", &[])]),
            [
                "low.rs names high, which low may not",
                "low/part.rs names high, which low may not",
                "low/part.rs names high::inner, which low may not",
                "high may name low, and does not"
            ]
        );
        assert_eq!(
            violations(&src, &[("low", &["high"]), ("high::inner", &[])]),
            [
                "low may not name high, which does not stand below it",
                "high.rs: the module high has no place in the order",
                "low/part.rs names high::inner, which low may not",
                "low may name high, and does not"
            ]
        );
    }
}

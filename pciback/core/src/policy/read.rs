//! Reading words, numbers and lists out of a tree, with a message for everything that is something else.

use super::diagnostic::Diagnostics;
use super::yaml::{Key, Node, Value};

/// A key of a mapping as the schema shows it.
#[derive(Debug, Clone, Copy)]
pub struct KeyWord {
    /// The key.
    pub word: &'static str,
    /// What it says, for people.
    pub help: &'static str,
}

pub const fn key(word: &'static str, help: &'static str) -> KeyWord {
    KeyWord { word, help }
}

/// The longest free text (a reason, a description, a guest's name), in characters.
const TEXT_LIMIT: usize = 500;

/// The entries of a mapping whose keys are known; others are reported.
pub fn entries<'a>(
    node: &'a Node,
    what: &str,
    keys: &'static [KeyWord],
    diagnostics: &mut Diagnostics,
) -> Vec<(&'static str, &'a Node)> {
    let Some(map) = mapping(node, what, diagnostics) else { return Vec::new() };
    let mut known = Vec::new();
    for (key, value) in map {
        match keys.iter().find(|known| known.word == key.text) {
            Some(keyword) => known.push((keyword.word, value)),
            None => {
                let words = keys.iter().map(|key| key.word);
                diagnostics.unknown(key.at, &format!("key of {what}"), &key.text, words);
            }
        }
    }
    known
}

pub fn mapping<'a>(node: &'a Node, what: &str, diagnostics: &mut Diagnostics) -> Option<&'a [(Key, Node)]> {
    if let Value::Map(entries) = &node.value {
        return Some(entries);
    }
    diagnostics.say(node.at, format!("{what} is a mapping, not {}", node.kind()));
    None
}

/// The items of a list; one thing alone is a list of one.
pub fn items(node: &Node) -> &[Node] {
    match &node.value {
        Value::List(items) => items,
        _ => std::slice::from_ref(node),
    }
}

/// A word.
pub fn scalar<'a>(node: &'a Node, what: &str, diagnostics: &mut Diagnostics) -> Option<&'a str> {
    match &node.value {
        Value::Scalar(text) if !text.is_empty() => Some(text),
        _ => {
            diagnostics.say(node.at, format!("{what} is a word, not {}", node.kind()));
            None
        }
    }
}

/// Free text.
pub fn text(node: &Node, what: &str, diagnostics: &mut Diagnostics) -> Option<String> {
    let text = scalar(node, what, diagnostics)?;
    if text.chars().count() > TEXT_LIMIT || text.chars().any(|sign| sign.is_control() && sign != '\n') {
        let problem =
            format!("{what} is text of at most {TEXT_LIMIT} characters, without control characters");
        diagnostics.say(node.at, problem);
        return None;
    }
    Some(text.trim().to_owned())
}

/// One of some words.
pub fn choice<T: Copy>(
    node: &Node,
    what: &str,
    words: &[(&'static str, T)],
    diagnostics: &mut Diagnostics,
) -> Option<T> {
    let found = scalar(node, what, diagnostics)?;
    let choice = words.iter().find(|(word, _)| *word == found);
    if choice.is_none() {
        diagnostics.unknown(node.at, what, found, words.iter().map(|(word, _)| *word));
    }
    choice.map(|(_, value)| *value)
}

/// A number, decimal or hexadecimal with `0x`.
pub fn number(node: &Node, what: &str, most: u32, diagnostics: &mut Diagnostics) -> Option<u32> {
    let found = scalar(node, what, diagnostics)?;
    let number = parse_number(found).filter(|number| *number <= most);
    if number.is_none() {
        let found: String = found.chars().take(60).collect();
        diagnostics.say(
            node.at,
            format!("'{found}' is not a valid {what}: a number from 0 to {most:#x} is expected"),
        );
    }
    number
}

pub fn parse_number(text: &str) -> Option<u32> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // `from_str_radix` takes a sign.
    let all_digits = !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix));
    all_digits.then(|| u32::from_str_radix(digits, radix).ok()).flatten()
}

/// A list of things that `parse` understands; one thing alone is a list of one.
pub fn list<T>(
    node: &Node,
    what: &str,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
    diagnostics: &mut Diagnostics,
) -> Vec<T> {
    let items = items(node);
    if items.is_empty() {
        diagnostics.say(node.at, format!("an empty list: no function has any {what}"));
    }
    let mut values = Vec::new();
    for item in items {
        let Some(found) = scalar(item, what, diagnostics) else { continue };
        match parse(found) {
            Some(value) => values.push(value),
            None => {
                let found: String = found.chars().take(60).collect();
                diagnostics.say(item.at, format!("'{found}' is not a valid {what}: {expected}"));
            }
        }
    }
    values
}

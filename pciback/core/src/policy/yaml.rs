//! A YAML document as a tree that knows where each word stands.
//!
//! The parser is the one that serde-saphyr reads with. Its events are used directly because a policy file is checked as a whole:
//! every mistake is reported with its line and column, not only the first, and numbers keep their digits (`class: 0200`).

use granit_parser::{Event, Parser};

use super::diagnostic::{Diagnostics, Spot};

/// The largest policy file, in bytes.
pub const FILE_LIMIT: usize = 1 << 20;
/// How deep lists and mappings may be nested; a policy needs five levels.
const DEPTH_LIMIT: usize = 16;
/// How many entries one list or mapping may have.
const ENTRY_LIMIT: usize = 1000;

/// One node and where it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub at: Spot,
    pub value: Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A word or number as it stands there; empty where nothing stands.
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key of a mapping and where it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub text: String,
    pub at: Spot,
}

impl Node {
    /// What it is, for a message that expected something else.
    pub fn kind(&self) -> &'static str {
        match &self.value {
            Value::Scalar(text) if text.is_empty() => "nothing",
            Value::Scalar(_) => "a word",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

/// What is being filled while events come in.
enum Open {
    List(Spot, Vec<Node>),
    Map(Spot, Vec<(Key, Node)>, Option<Key>),
}

/// Reads the one document of a file. `None` where it cannot be read on, with the reason in `diagnostics`; a file with comments
/// only is an empty mapping.
pub fn parse(text: &str, diagnostics: &mut Diagnostics) -> Option<Node> {
    if text.len() > FILE_LIMIT {
        let size = text.len();
        diagnostics.say(Spot::START, format!("the file has {size} bytes; a policy has at most {FILE_LIMIT}"));
        return None;
    }
    let mut open: Vec<Open> = Vec::new();
    let mut root: Option<Node> = None;
    for next in Parser::new_from_str(text) {
        let (event, span) = match next {
            Ok(event) => event,
            Err(error) => {
                let marker = error.marker();
                diagnostics
                    .say(Spot::new(marker.line(), marker.col()), format!("not YAML: {}", error.info()));
                return None;
            }
        };
        let at = Spot::new(span.start.line(), span.start.col());
        let node = match event {
            Event::DocumentStart(..) if root.is_some() => {
                diagnostics.say(at, "a second document: a policy file holds one".to_owned());
                return None;
            }
            Event::Alias(..) => {
                diagnostics.say(at, "an alias: policy files use none".to_owned());
                return None;
            }
            Event::SequenceStart(..) | Event::MappingStart(..) if open.len() == DEPTH_LIMIT => {
                diagnostics.say(at, format!("nested deeper than {DEPTH_LIMIT} levels"));
                return None;
            }
            Event::SequenceStart(..) => {
                open.push(Open::List(at, Vec::new()));
                continue;
            }
            Event::MappingStart(..) => {
                open.push(Open::Map(at, Vec::new(), None));
                continue;
            }
            Event::Scalar(text, ..) => {
                let text = if text == "~" { String::new() } else { text.into_owned() };
                Node { at, value: Value::Scalar(text) }
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop()? {
                Open::List(at, items) => Node { at, value: Value::List(items) },
                Open::Map(at, entries, _) => Node { at, value: Value::Map(entries) },
            },
            _ => continue,
        };
        let entries = match open.last() {
            Some(Open::List(_, items)) => items.len(),
            Some(Open::Map(_, entries, _)) => entries.len(),
            None => 0,
        };
        if entries == ENTRY_LIMIT {
            diagnostics.say(node.at, format!("more than {ENTRY_LIMIT} entries"));
            return None;
        }
        match open.last_mut() {
            None => root = Some(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, key)) => match key.take() {
                None => *key = Some(as_key(node, diagnostics)?),
                Some(key) => {
                    if entries.iter().any(|(known, _)| known.text == key.text) {
                        diagnostics.say(key.at, format!("'{}' stands here a second time", key.text));
                    }
                    entries.push((key, node));
                }
            },
        }
    }
    Some(root.unwrap_or(Node { at: Spot::START, value: Value::Map(Vec::new()) }))
}

fn as_key(node: Node, diagnostics: &mut Diagnostics) -> Option<Key> {
    if let Value::Scalar(text) = node.value {
        return Some(Key { text, at: node.at });
    }
    diagnostics.say(node.at, format!("{} as a key: keys are words", node.kind()));
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let mut diagnostics = Diagnostics::new("f.yaml");
        assert_eq!(parse(text, &mut diagnostics), None, "{text}");
        diagnostics.into_list()[0].to_string()
    }

    #[test]
    fn words_keep_their_digits_and_know_their_place() {
        let mut diagnostics = Diagnostics::new("f.yaml");
        let root = parse("a: 0200\nb:\n  - 0x1f\n", &mut diagnostics).unwrap();
        let Value::Map(entries) = root.value else { panic!("{root:?}") };
        assert_eq!(entries[0].1.value, Value::Scalar("0200".into()));
        let Value::List(items) = &entries[1].1.value else { panic!("{entries:?}") };
        assert_eq!((items[0].at.line, items[0].at.column), (3, 5));
        assert_eq!(items[0].value, Value::Scalar("0x1f".into()));
    }

    #[test]
    fn what_is_no_tree_of_words_is_refused_where_it_stands() {
        assert_eq!(refused("a: &x 1\nb: *x\n"), "f.yaml:2:4: an alias: policy files use none");
        assert_eq!(refused("a: [1\n"), "f.yaml:1:4: not YAML: unclosed bracket '['");
        assert_eq!(refused("a: 1\n---\nb: 2\n"), "f.yaml:2:1: a second document: a policy file holds one");
        assert_eq!(refused("? [a]\n: 1\n"), "f.yaml:1:3: a list as a key: keys are words");
        let deep = format!("{}{}", "[".repeat(40), "]".repeat(40));
        assert!(refused(&deep).contains("nested deeper than 16 levels"));
        assert!(refused(&"#".repeat(FILE_LIMIT + 1)).contains("bytes"));
    }

    #[test]
    fn a_key_that_stands_twice_is_reported() {
        let mut diagnostics = Diagnostics::new("f.yaml");
        parse("a: 1\na: 2\n", &mut diagnostics).unwrap();
        assert_eq!(diagnostics.into_list()[0].to_string(), "f.yaml:2:1: 'a' stands here a second time");
    }
}

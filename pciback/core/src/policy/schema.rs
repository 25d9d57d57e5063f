//! The JSON schema of policy files, for editors: made from the tables that the parser reads by.

use serde_json::{Map, Value, json};

use super::errors::{ERROR_KEYS, SWITCH, actions, most};
use super::file::{Holding, KEYS, MATCH_KEYS, Permission, Profile, RdmPolicy, Reuse};
use super::mailbox::{OFF, PEERS};
use super::matching::Kind;
use super::names::CAPABILITIES;
use super::read::KeyWord;
use super::reset::{RESET_KEYS, RESET_METHODS, WithoutReset};
use super::rom::RomSource;
use super::rules::{
    CAPABILITY_KEYS, REGISTER_KEYS, RegisterAction, UNKNOWN_KEYS, UNKNOWN_WORDS, WholeAction,
};
use super::virtual_functions::VIRTUAL_FUNCTION_KEYS;
use crate::config::MOST_BY_GUEST;

/// The schema, in JSON Schema draft-07, which is what editors know best.
pub fn schema() -> Value {
    let mut schema = object(KEYS, |key| match key {
        "description" => text(),
        "match" => object(MATCH_KEYS, matching),
        "permit" => {
            let word = words(Permission::WORDS);
            json!({"oneOf": [word, {"type": "array", "items": word}]})
        }
        "hold" => words(Holding::WORDS),
        "reuse" => words(Reuse::WORDS),
        "reset" => object(RESET_KEYS, |key| match key {
            "methods" => {
                let word = json!({"enum": RESET_METHODS});
                json!({"oneOf": [word, {"type": "array", "items": word, "minItems": 1}]})
            }
            "together" => switch(),
            _ => words(WithoutReset::WORDS),
        }),
        "rdm-policy" => words(RdmPolicy::WORDS),
        "rom" => json!({"anyOf": [{"enum": RomSource::WORDS}, {"type": "string", "pattern": "^/"}]}),
        "virtual-functions" => object(
            VIRTUAL_FUNCTION_KEYS,
            |_| json!({"type": "integer", "minimum": 1, "maximum": MOST_BY_GUEST}),
        ),
        "mailbox" => {
            let both = json!({"type": "array", "items": {"enum": PEERS}, "minItems": 1});
            json!({"oneOf": [{"enum": [PEERS[0], PEERS[1], OFF]}, both]})
        }
        "profile" => words(Profile::WORDS),
        "unknown" => one_or_mapping(
            words(UNKNOWN_WORDS),
            object(UNKNOWN_KEYS, |key| match key {
                "action" => words(UNKNOWN_WORDS),
                _ => text(),
            }),
        ),
        "capabilities" => capabilities(),
        "errors" => object(ERROR_KEYS, error),
        _ => registers(),
    });
    if let Some(map) = schema.as_object_mut() {
        map.insert("$schema".into(), json!("http://json-schema.org/draft-07/schema#"));
        map.insert("title".into(), json!("xpci filter policy"));
        map.insert("definitions".into(), json!({"capability": capability(), "register": register()}));
    }
    schema
}

fn matching(key: &str) -> Value {
    let one = match key {
        "function" => return words(Kind::WORDS),
        "class" => json!({"type": ["string", "integer"], "pattern": "^(0x)?([0-9A-Fa-f]{2}){1,3}$"}),
        "address" => {
            json!({"type": "string", "pattern": "^([0-9A-Fa-f]{1,4}:)?[0-9A-Fa-f]{1,2}:[0-9A-Fa-f]{1,2}\\.[0-7]$"})
        }
        "domain" => json!({"type": "string", "maxLength": 255}),
        _ => json!({"type": ["string", "integer"], "pattern": "^(0x)?[0-9A-Fa-f]{1,4}$"}),
    };
    json!({"oneOf": [one, {"type": "array", "items": one, "minItems": 1}]})
}

fn switch() -> Value {
    json!({"enum": SWITCH.iter().map(|(_, value)| *value).collect::<Vec<_>>()})
}

fn error(key: &str) -> Value {
    match key {
        "mmio-enabled" => switch(),
        "correctable" | "non-fatal" | "fatal" | "link-reset" | "unanswered" | "storm" => words(actions(key)),
        _ => json!({"type": "integer", "minimum": 1, "maximum": most(key)}),
    }
}

fn capabilities() -> Value {
    let one = json!({"$ref": "#/definitions/capability"});
    let named: Map<String, Value> =
        CAPABILITIES.iter().map(|(word, _)| ((*word).to_owned(), one.clone())).collect();
    let others = "^(legacy-0x[0-9A-Fa-f]{1,2}|extended-0x[0-9A-Fa-f]{1,4}|vsec:[0-9A-Fa-f]{1,4}|\
                  dvsec:[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4})$";
    json!({
        "type": "object",
        "properties": named,
        "patternProperties": {others: one},
        "additionalProperties": false,
    })
}

fn capability() -> Value {
    let mapping = object(CAPABILITY_KEYS, |key| match key {
        "action" => words(WholeAction::WORDS),
        "registers" => registers(),
        _ => text(),
    });
    one_or_mapping(words(WholeAction::WORDS), mapping)
}

fn registers() -> Value {
    json!({"type": "array", "items": {"$ref": "#/definitions/register"}})
}

fn register() -> Value {
    let mut schema = object(REGISTER_KEYS, |key| match key {
        "at" => json!({"type": ["string", "integer"]}),
        "width" => json!({"enum": [1, 2, 4]}),
        "action" => words(RegisterAction::WORDS),
        "reason" => text(),
        _ => json!({"type": ["string", "integer"], "pattern": "^(0x[0-9A-Fa-f]{1,8}|[0-9]{1,10})$"}),
    });
    if let Some(map) = schema.as_object_mut() {
        map.insert("required".into(), json!(["at", "action"]));
    }
    schema
}

fn object(keys: &[KeyWord], value: impl Fn(&str) -> Value) -> Value {
    let properties: Map<String, Value> = keys
        .iter()
        .map(|key| {
            let mut value = value(key.word);
            if let Some(map) = value.as_object_mut() {
                map.insert("description".into(), json!(key.help));
            }
            (key.word.to_owned(), value)
        })
        .collect();
    json!({"type": "object", "properties": properties, "additionalProperties": false})
}

fn one_or_mapping(word: Value, mapping: Value) -> Value {
    json!({"oneOf": [word, mapping]})
}

fn words<T>(words: &[(&str, T)]) -> Value {
    json!({"enum": words.iter().map(|(word, _)| *word).collect::<Vec<_>>()})
}

fn text() -> Value {
    json!({"type": "string", "maxLength": 500})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_schema_is_what_the_parser_reads_by() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/policies/policy.schema.json");
        let text = format!("{:#}\n", schema());
        if std::env::var_os("XPCI_BLESS").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        let shipped = std::fs::read_to_string(path).unwrap();
        assert!(shipped == text, "rewrite it: XPCI_BLESS=1 cargo test -p pciback schema");
    }
}

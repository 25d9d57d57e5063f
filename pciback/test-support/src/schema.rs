//! JSON against a JSON schema, as far as the schemas of this repository go.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value};

/// A schema of draft 2020-12.
#[derive(Debug)]
pub struct Schema(Value);

impl Schema {
    /// Reads one from a file.
    ///
    /// # Errors
    /// The file cannot be read, or is not JSON.
    pub fn read(path: impl AsRef<Path>) -> io::Result<Self> {
        Ok(Self(serde_json::from_str(&fs::read_to_string(path)?)?))
    }

    /// What is wrong with a value, with the place in it; nothing where it is valid. A keyword that is not known here is wrong, too.
    pub fn mistakes(&self, value: &Value) -> Vec<String> {
        let mut found = Vec::new();
        self.check(&self.0, value, "", &mut found);
        found
    }

    fn allows(&self, schema: &Value, value: &Value) -> bool {
        let mut found = Vec::new();
        self.check(schema, value, "", &mut found);
        found.is_empty()
    }

    fn referred(&self, rule: &Value) -> Option<&Value> {
        self.0.pointer(rule.as_str()?.strip_prefix('#')?)
    }

    fn check(&self, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
        let rules = match schema {
            Value::Bool(true) => return,
            Value::Object(rules) => rules,
            _ => return found.push(format!("{at}: must not be there")),
        };
        for (keyword, rule) in rules {
            let mut wrong = |what: String| found.push(format!("{at}: {what}"));
            let below = |rule: &Value| rule.as_array().cloned().unwrap_or_default();
            match keyword.as_str() {
                // What a text looks like is not checked here: its type prints and reads it.
                "$schema" | "$defs" | "title" | "description" | "default" | "format" | "pattern" => {}
                "$ref" => match self.referred(rule) {
                    Some(schema) => self.check(schema, value, at, found),
                    None => wrong(format!("{rule} does not exist")),
                },
                "type" => {
                    let one = |name: &Value| name.as_str().is_some_and(|name| is_of_type(name, value));
                    if !one(rule) && !below(rule).iter().any(one) {
                        wrong(format!("{value} is no {rule}"));
                    }
                }
                "const" if rule != value => wrong(format!("{value} is not {rule}")),
                "enum" if !below(rule).contains(value) => wrong(format!("{value} is none of {rule}")),
                "minimum" if value.is_number() && value.as_f64() < rule.as_f64() => {
                    wrong(format!("{value} is less than {rule}"));
                }
                "maximum" if value.is_number() && value.as_f64() > rule.as_f64() => {
                    wrong(format!("{value} is more than {rule}"));
                }
                "minLength" if value == "" => wrong("is empty".to_owned()),
                "const" | "enum" | "minimum" | "maximum" | "minLength" => {}
                "properties" => {
                    for (name, schema) in rule.as_object().into_iter().flatten() {
                        if let Some(value) = value.get(name) {
                            self.check(schema, value, &format!("{at}/{name}"), found);
                        }
                    }
                }
                "required" => {
                    for name in below(rule).iter().filter_map(Value::as_str) {
                        if value.as_object().is_some_and(|object| !object.contains_key(name)) {
                            found.push(format!("{at}: lacks {name}"));
                        }
                    }
                }
                "additionalProperties" => {
                    let known =
                        |name: &str| rules.get("properties").is_some_and(|all| all.get(name).is_some());
                    self.check_others(rule, value, known, at, found);
                }
                "unevaluatedProperties" => {
                    let known = self.evaluated(rules, value);
                    self.check_others(rule, value, |name| known.contains(name), at, found);
                }
                "items" => {
                    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                        self.check(rule, item, &format!("{at}/{index}"), found);
                    }
                }
                "allOf" => below(rule).iter().for_each(|schema| self.check(schema, value, at, found)),
                "anyOf" | "oneOf" => {
                    let fit = below(rule).iter().filter(|schema| self.allows(schema, value)).count();
                    if fit == 0 || (fit > 1 && keyword == "oneOf") {
                        wrong(format!("{value} fits {fit} of {keyword}"));
                    }
                }
                _ => wrong(format!("the keyword {keyword} is not known here")),
            }
        }
    }

    fn check_others(
        &self,
        rule: &Value,
        value: &Value,
        is_known: impl Fn(&str) -> bool,
        at: &str,
        found: &mut Vec<String>,
    ) {
        for (name, value) in value.as_object().into_iter().flatten().filter(|(name, _)| !is_known(name)) {
            self.check(rule, value, &format!("{at}/{name}"), found);
        }
    }

    /// The properties of a value that a schema describes.
    fn evaluated(&self, rules: &Map<String, Value>, value: &Value) -> BTreeSet<String> {
        let named = rules.get("properties").and_then(Value::as_object).into_iter().flatten();
        let mut known: BTreeSet<String> = named.map(|(name, _)| name.clone()).collect();
        let several =
            ["allOf", "anyOf", "oneOf"].iter().filter_map(|keyword| rules.get(*keyword)?.as_array());
        let referred = rules.get("$ref").and_then(|rule| self.referred(rule));
        for schema in several.flatten().chain(referred).filter(|schema| self.allows(schema, value)) {
            known.extend(schema.as_object().into_iter().flat_map(|rules| self.evaluated(rules, value)));
        }
        known
    }
}

fn is_of_type(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_does_not_fit_is_found() {
        let schema = Schema(json!({
            "type": "object",
            "required": ["id"],
            "properties": {"id": {"$ref": "#/$defs/id"}, "list": {"items": {"enum": ["a", "b"]}}},
            "oneOf": [{"properties": {"x": {"const": 1}}, "required": ["x"]}, {"properties": {"y": true}, "required": ["y"]}],
            "unevaluatedProperties": false,
            "$defs": {"id": {"type": ["integer", "null"], "minimum": 1, "maximum": 9}},
        }));
        for good in [json!({"id": 9, "x": 1, "list": []}), json!({"id": null, "y": 2, "list": ["a", "b"]})] {
            assert_eq!(schema.mistakes(&good), [""; 0], "{good}");
        }
        for wrong in [
            json!([]),
            json!({"x": 1}),
            json!({"id": 10, "x": 1}),
            json!({"id": 0, "x": 1}),
            json!({"id": "1", "x": 1}),
            json!({"id": 1}),
            json!({"id": 1, "x": 2}),
            json!({"id": 1, "x": 1, "y": 1}),
            json!({"id": 1, "x": 1, "z": 1}),
            json!({"id": 1, "x": 1, "list": ["c"]}),
        ] {
            assert!(!schema.mistakes(&wrong).is_empty(), "{wrong}");
        }
        assert!(!Schema(json!({"contains": {}})).mistakes(&json!({})).is_empty());
    }
}

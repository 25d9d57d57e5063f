//! The JSON schemas of the control protocol, made of the types that are read and printed.

use std::path::Path;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use toolstack::protocol::{Answers, Call, Envelope};
use xpci_test_support::reviewed;

/// What `xpci --json` prints, and what the service sends.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[expect(dead_code, reason = "it is only described")]
enum Answer {
    /// A line of the service, and what `xpci --json` prints for one request.
    One(Box<Envelope>),
    /// What `xpci --json` prints for a command that makes several requests.
    Several(Answers),
}

fn text<T: JsonSchema>(settings: SchemaSettings) -> String {
    let schema = settings.into_generator().into_root_schema_for::<T>();
    format!("{:#}\n", schema.to_value())
}

#[test]
fn the_schemas_of_requests_and_answers_are_those_of_the_types() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schema");
    let settings = SchemaSettings::draft2020_12;
    reviewed::assert_is(docs.join("request.json"), &text::<Call>(settings().for_deserialize())).unwrap();
    reviewed::assert_is(docs.join("answer.json"), &text::<Answer>(settings().for_serialize())).unwrap();
}

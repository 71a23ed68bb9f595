//! The checked-in schema definitions, and which of them a set of kinds needs.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// zlib of a JSON object: definition name to schema, in OpenAPI v2's form.
pub(super) const COMPRESSED: &[u8] = include_bytes!("../gen/definitions.json.zlib");

const REF: &str = "#/definitions/";

/// All definitions, decoded.
pub(super) struct Definitions(Map<String, Value>);

impl Definitions {
    /// Decodes them: a few megabytes for as long as the value lives.
    pub(super) fn load() -> Self {
        let json = miniz_oxide::inflate::decompress_to_vec_zlib(COMPRESSED)
            .expect("the blob is checked by the generator's test");
        Self(serde_json::from_slice(&json).expect("the blob is checked by the generator's test"))
    }

    /// All of them.
    pub(super) fn into_all(self) -> Map<String, Value> {
        self.0
    }

    /// One of them.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// The names in `roots` and everything they refer to.
    pub(super) fn closure<'a>(&'a self, roots: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
        let mut found = BTreeSet::new();
        let mut open: Vec<&str> = roots.collect();
        while let Some(name) = open.pop() {
            if let Some(schema) = self.0.get(name)
                && found.insert(name)
            {
                collect_refs(schema, &mut open);
            }
        }
        found
    }
}

/// The definition names that a document part refers to.
pub(super) fn collect_refs<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(map) => {
            if let Some(name) = map.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix(REF)) {
                found.push(name);
            }
            map.values().for_each(|child| collect_refs(child, found));
        }
        Value::Array(items) => items.iter().for_each(|child| collect_refs(child, found)),
        _ => {}
    }
}

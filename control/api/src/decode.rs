//! Request bodies to `Value`, with what a `Value` cannot say: keys that occurred twice.
//!
//! Input: JSON bytes. Output: the value and the paths of duplicate keys. Never looks at the meaning of a field.

use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::status::ApiError;

/// The most duplicates that are reported.
const MAX_REPORTED: usize = 100;

/// A decoded body.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// The document; of duplicate keys the last one counts.
    pub value: Value,
    /// `duplicate field "spec.foo"`, one per repeated key.
    pub duplicates: Vec<String>,
}

/// Decodes a JSON document.
pub fn json(body: &[u8]) -> Result<Decoded, ApiError> {
    let mut duplicates = Vec::new();
    let mut input = serde_json::Deserializer::from_slice(body);
    let node = Node { path: &Path::Root, duplicates: &mut duplicates };
    let decoded = node.deserialize(&mut input).and_then(|value| input.end().map(|()| value));
    match decoded {
        Ok(value) => Ok(Decoded { value, duplicates }),
        Err(why) => Err(ApiError::bad_request(format!("error decoding the body as JSON: {why}"))),
    }
}

/// Where in the document we are; lives on the stack, becomes text only for a duplicate.
enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Field(Self::Root, name) => f.write_str(name),
            Self::Field(parent, name) => write!(f, "{parent}.{name}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

struct Node<'a> {
    path: &'a Path<'a>,
    duplicates: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        loop {
            let path = Path::Index(self.path, out.len());
            let node = Node { path: &path, duplicates: &mut *self.duplicates };
            match items.next_element_seed(node)? {
                Some(item) => out.push(item),
                None => return Ok(Value::Array(out)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            let path = Path::Field(self.path, &name);
            let value = entries.next_value_seed(Node { path: &path, duplicates: &mut *self.duplicates })?;
            if out.contains_key(&name) && self.duplicates.len() < MAX_REPORTED {
                self.duplicates.push(format!("duplicate field \"{path}\""));
            }
            out.insert(name, value);
        }
        Ok(Value::Object(out))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn duplicates_are_named_and_the_last_wins() {
        let body = br#"{"spec": {"replicas": 1, "replicas": 2, "list": [{"a": 1}, {"a": 1, "a": null}]}}"#;
        let decoded = super::json(body).unwrap();
        assert_eq!(decoded.value, json!({"spec": {"replicas": 2, "list": [{"a": 1}, {"a": null}]}}));
        assert_eq!(
            decoded.duplicates,
            ["duplicate field \"spec.replicas\"", "duplicate field \"spec.list[1].a\""]
        );
    }

    #[test]
    fn broken_documents_are_client_errors() {
        for bad in ["", "{", "{} x", "nul"] {
            assert_eq!(super::json(bad.as_bytes()).unwrap_err().code(), 400, "{bad}");
        }
    }
}

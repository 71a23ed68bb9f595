//! How an object lies in the store, and how it is turned into what clients see.
//!
//! A stored value is a four-byte offset and then the object's JSON without `metadata.resourceVersion`; the offset says where that field
//! belongs. So the one encoded copy that all readers share is made by a splice, without parsing. Pure; damaged bytes give `None`.

use bytes::{BufMut as _, Bytes, BytesMut};
use control_store::Revision;
use serde::Serialize;
use serde_json::{Map, Value};

/// Encode an object for the store. `metadata.resourceVersion` is left out.
pub(crate) fn encode(object: &Value) -> Result<Bytes, serde_json::Error> {
    let empty = Map::new();
    let fields = object.as_object().unwrap_or(&empty);
    let mut out = BytesMut::with_capacity(512).writer();
    std::io::Write::write_all(&mut out, b"\0\0\0\0{").map_err(serde_json::Error::io)?;
    let mut first = true;
    for name in ["kind", "apiVersion"] {
        if let Some(value) = fields.get(name) {
            write_field(&mut out, &mut first, name, value)?;
        }
    }
    let separator = if first { "" } else { "," };
    std::io::Write::write_all(&mut out, separator.as_bytes()).map_err(serde_json::Error::io)?;
    std::io::Write::write_all(&mut out, b"\"metadata\":{").map_err(serde_json::Error::io)?;
    let offset = out.get_ref().len() - 4;
    let mut first_meta = true;
    for (name, value) in fields.get("metadata").and_then(Value::as_object).unwrap_or(&empty) {
        if name != "resourceVersion" {
            write_field(&mut out, &mut first_meta, name, value)?;
        }
    }
    std::io::Write::write_all(&mut out, b"}").map_err(serde_json::Error::io)?;
    first = false;
    for (name, value) in fields {
        if !matches!(name.as_str(), "kind" | "apiVersion" | "metadata") {
            write_field(&mut out, &mut first, name, value)?;
        }
    }
    std::io::Write::write_all(&mut out, b"}").map_err(serde_json::Error::io)?;
    let mut bytes = out.into_inner();
    // Both prefix fields are bounded by the request body limit, so that the offset fits.
    bytes[..4].copy_from_slice(&u32::try_from(offset).unwrap_or(u32::MAX).to_be_bytes());
    Ok(bytes.freeze())
}

fn write_field(
    out: &mut bytes::buf::Writer<BytesMut>,
    first: &mut bool,
    name: &str,
    value: &Value,
) -> Result<(), serde_json::Error> {
    if !std::mem::replace(first, false) {
        out.get_mut().put_u8(b',');
    }
    name.serialize(&mut serde_json::Serializer::new(&mut *out))?;
    out.get_mut().put_u8(b':');
    value.serialize(&mut serde_json::Serializer::new(out))
}

/// The JSON that clients see: the stored object with its `resourceVersion`.
pub(crate) fn splice(stored: &[u8], revision: Revision) -> Option<Bytes> {
    let (offset, json) = stored.split_first_chunk::<4>()?;
    let offset = usize::try_from(u32::from_be_bytes(*offset)).ok()?;
    let (head, tail) = json.split_at_checked(offset)?;
    let comma = if tail.first() == Some(&b'}') { "" } else { "," };
    let field = format!("\"resourceVersion\":\"{revision}\"{comma}");
    let mut out = BytesMut::with_capacity(json.len() + field.len());
    out.put_slice(head);
    out.put_slice(field.as_bytes());
    out.put_slice(tail);
    Some(out.freeze())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(object: &Value) {
        let stored = encode(object).unwrap();
        let seen: Value = serde_json::from_slice(&splice(&stored, Revision(42)).unwrap()).unwrap();
        let mut want = object.clone();
        want["metadata"]["resourceVersion"] = json!("42");
        assert_eq!(seen, want);
    }

    #[test]
    fn the_resource_version_is_spliced_in_and_a_sent_one_is_dropped() {
        check(
            &json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "a", "labels": {"x": "\"}{"}}, "spec": {"n": 1}}),
        );
        check(&json!({"metadata": {"name": "a", "resourceVersion": "7"}, "data": {"metadata": "{}"}}));
        check(&json!({"kind": "X", "metadata": {}}));
    }

    #[test]
    fn damaged_values_are_refused() {
        assert_eq!(splice(b"", Revision(1)), None);
        assert_eq!(splice(b"\0\0\xff\xff{}", Revision(1)), None);
    }
}

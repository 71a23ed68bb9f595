//! Request bodies in Kubernetes' protobuf encoding, decoded to the same JSON that a client could have sent instead.
//!
//! Input: the bytes of an `application/vnd.kubernetes.protobuf` body: the magic `k8s\0`, then a `runtime.Unknown` that names a kind and holds
//! its message. Output: a JSON object. Answers are always JSON, which such clients accept too.
//!
//! Go writes fields that are not pointers even when they are empty; those are left out here, as Go's JSON leaves them out. Unknown field
//! numbers are skipped, as protobuf demands. Damaged input is an error, never a panic, and nesting is bounded.

mod wire;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use self::wire::{Reader, Wire};
use crate::generated::messages::{MESSAGES, ROOTS};

/// First bytes of every body.
const MAGIC: &[u8] = b"k8s\0";
/// Deepest nesting of messages; a pod template is about ten deep.
const DEPTH: usize = 40;

/// Why a body cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtobufError {
    /// The body does not begin with the magic.
    #[error("the body does not begin with the Kubernetes protobuf prefix")]
    NoMagic,
    /// The body ends early or is not protobuf.
    #[error("the body is not a well-formed protobuf message")]
    Malformed,
    /// Messages are nested too deeply.
    #[error("the body is nested more than {DEPTH} messages deep")]
    TooDeep,
    /// The kind cannot be sent in this encoding.
    #[error("no kind \"{kind}\" is known for version \"{api_version}\" in the protobuf encoding")]
    UnknownKind {
        /// The named version.
        api_version: String,
        /// The named kind.
        kind: String,
    },
}

/// How a field is written in JSON.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// A string.
    Text,
    /// A boolean.
    Bool,
    /// An integer.
    Int,
    /// Bytes, base64 in JSON.
    Bytes,
    /// `metav1.Time`.
    Time,
    /// `metav1.MicroTime`.
    MicroTime,
    /// `resource.Quantity`.
    Quantity,
    /// `intstr.IntOrString`.
    IntOrString,
    /// `runtime.RawExtension`: an object of any kind, as JSON.
    Raw,
    /// Another message, by index.
    Nested(u16),
    /// Repeated.
    List(&'static Kind),
    /// A map from strings.
    Map(&'static Kind),
}

/// One field of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    number: u32,
    /// JSON name; empty for a struct that Go embeds.
    name: &'static str,
    kind: Kind,
    /// A zero value means something.
    keep_zero: bool,
}

/// The fields of a message, by number.
#[derive(Debug)]
pub(crate) struct Message(pub(crate) &'static [Field]);

/// A field whose zero value is left out.
pub(crate) const fn f(number: u32, name: &'static str, kind: Kind) -> Field {
    Field { number, name, kind, keep_zero: false }
}

/// A field whose zero value is kept.
pub(crate) const fn k(number: u32, name: &'static str, kind: Kind) -> Field {
    Field { number, name, kind, keep_zero: true }
}

/// Decode a body.
pub(crate) fn decode(body: &[u8]) -> Result<Value, ProtobufError> {
    let unknown = body.strip_prefix(MAGIC).ok_or(ProtobufError::NoMagic)?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    let mut reader = Reader::new(unknown);
    while let Some((number, wire)) = reader.field()? {
        match (number, wire) {
            (1, Wire::Bytes(type_meta)) => {
                let mut reader = Reader::new(type_meta);
                while let Some((number, wire)) = reader.field()? {
                    match number {
                        1 => api_version = text(wire)?,
                        2 => kind = text(wire)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let root = ROOTS
        .iter()
        .find(|(version, name, _)| *name == kind && (*version == api_version || *name == "DeleteOptions"));
    let Some((_, _, index)) = root else { return Err(ProtobufError::UnknownKind { api_version, kind }) };
    let mut object = message(*index, raw, DEPTH)?;
    object.insert("apiVersion".to_owned(), json!(api_version));
    object.insert("kind".to_owned(), json!(kind));
    Ok(Value::Object(object))
}

fn message(index: u16, bytes: &[u8], depth: usize) -> Result<Map<String, Value>, ProtobufError> {
    let depth = depth.checked_sub(1).ok_or(ProtobufError::TooDeep)?;
    let Message(fields) = &MESSAGES[usize::from(index)];
    let mut object = Map::new();
    let mut reader = Reader::new(bytes);
    while let Some((number, wire)) = reader.field()? {
        let Some(field) = fields.iter().find(|field| field.number == number) else { continue };
        read_field(&mut object, field, wire, depth)?;
    }
    Ok(object)
}

fn read_field(
    object: &mut Map<String, Value>,
    field: &Field,
    wire: Wire<'_>,
    depth: usize,
) -> Result<(), ProtobufError> {
    match field.kind {
        Kind::List(element) => {
            let element = scalar(*element, wire, depth)?;
            if let Value::Array(list) = object.entry(field.name).or_insert_with(|| json!([])) {
                list.push(element);
            }
        }
        Kind::Map(element) => {
            let (key, value) = map_entry(*element, wire, depth)?;
            if let Value::Object(map) = object.entry(field.name).or_insert_with(|| json!({})) {
                map.insert(key, value);
            }
        }
        Kind::Nested(index) if field.name.is_empty() => object.extend(message(index, wire.bytes()?, depth)?),
        kind => {
            let value = scalar(kind, wire, depth)?;
            if field.keep_zero || !is_zero(&value) {
                object.insert(field.name.to_owned(), value);
            }
        }
    }
    Ok(())
}

/// Values that Go's JSON leaves out. Empty objects stay: `emptyDir: {}` means something.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(_) | Value::Object(_) => false,
    }
}

fn scalar(kind: Kind, wire: Wire<'_>, depth: usize) -> Result<Value, ProtobufError> {
    Ok(match kind {
        Kind::Text => json!(text(wire)?),
        Kind::Bool => json!(wire.number()? != 0),
        Kind::Int => json!(wire.number()?.cast_signed()),
        Kind::Bytes => json!(STANDARD.encode(wire.bytes()?)),
        Kind::Time => time(wire.bytes()?, "%Y-%m-%dT%H:%M:%SZ")?,
        Kind::MicroTime => time(wire.bytes()?, "%Y-%m-%dT%H:%M:%S%.6fZ")?,
        Kind::Quantity => first_text(wire.bytes()?)?,
        Kind::IntOrString => int_or_string(wire.bytes()?)?,
        Kind::Raw => raw(wire.bytes()?)?,
        Kind::Nested(index) => Value::Object(message(index, wire.bytes()?, depth)?),
        // Neither occurs inside the other in any message of the API.
        Kind::List(_) | Kind::Map(_) => return Err(ProtobufError::Malformed),
    })
}

fn text(wire: Wire<'_>) -> Result<String, ProtobufError> {
    let text = std::str::from_utf8(wire.bytes()?).map_err(|_not_utf8| ProtobufError::Malformed)?;
    Ok(text.to_owned())
}

fn map_entry(element: Kind, wire: Wire<'_>, depth: usize) -> Result<(String, Value), ProtobufError> {
    let (mut key, mut value) = (String::new(), None);
    let mut reader = Reader::new(wire.bytes()?);
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => key = text(wire)?,
            2 => value = Some(scalar(element, wire, depth)?),
            _ => {}
        }
    }
    let value = match value {
        Some(value) => value,
        None => scalar(element, Wire::Bytes(&[]), depth)?,
    };
    Ok((key, value))
}

/// Field 1 as JSON.
fn raw(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let mut reader = Reader::new(bytes);
    while let Some((number, wire)) = reader.field()? {
        if number == 1 {
            return serde_json::from_slice(wire.bytes()?).map_err(|_no_json| ProtobufError::Malformed);
        }
    }
    Ok(Value::Null)
}

/// Field 1 as a string: what a Quantity consists of.
fn first_text(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let mut reader = Reader::new(bytes);
    while let Some((number, wire)) = reader.field()? {
        if number == 1 {
            return Ok(json!(text(wire)?));
        }
    }
    Ok(json!("0"))
}

/// `{seconds, nanos}`; the zero time is null.
fn time(bytes: &[u8], format: &str) -> Result<Value, ProtobufError> {
    let (mut seconds, mut nanos) = (0, 0);
    let mut reader = Reader::new(bytes);
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => seconds = wire.number()?.cast_signed(),
            2 => {
                nanos = i32::try_from(wire.number()?.cast_signed())
                    .map_err(|_too_big| ProtobufError::Malformed)?;
            }
            _ => {}
        }
    }
    if seconds == 0 && nanos == 0 {
        return Ok(Value::Null);
    }
    let time = jiff::Timestamp::new(seconds, nanos).map_err(|_out_of_range| ProtobufError::Malformed)?;
    Ok(json!(time.strftime(format).to_string()))
}

fn int_or_string(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let (mut is_text, mut number_value, mut text_value) = (false, 0, String::new());
    let mut reader = Reader::new(bytes);
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => is_text = wire.number()? == 1,
            2 => number_value = wire.number()?.cast_signed(),
            3 => text_value = text(wire)?,
            _ => {}
        }
    }
    Ok(if is_text { json!(text_value) } else { json!(number_value) })
}

#[cfg(test)]
mod tests;

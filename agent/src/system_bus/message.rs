//! D-Bus messages, as far as logind and systemd need them: calls with texts, numbers and properties, replies with one value, one signal. Pure.
//!
//! <https://dbus.freedesktop.org/doc/dbus-specification.html>, "Message Protocol". Little-endian only: what a machine sends
//! itself.

/// A longer message is refused: nobody who is asked here has so much to say.
pub(crate) const MAX_SIZE: usize = 1 << 16;
/// Bytes of the fixed part of a header, with the length of its fields.
pub(crate) const FIXED: usize = 16;

const CALL: u8 = 1;
pub(crate) const REPLY: u8 = 2;
pub(crate) const ERROR: u8 = 3;
pub(crate) const SIGNAL: u8 = 4;

/// An argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    /// `s`
    Text(&'a str),
    /// `i`
    Int(i32),
    /// `b`
    Truth(bool),
    /// `a(sv)`
    Properties(&'a [(&'static str, Property<'a>)]),
    /// `a(sa(sv))` with nothing in it: further units of a call that starts one.
    NoUnits,
}

/// The value of a unit's property.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Property<'a> {
    /// `s`
    Text(&'a str),
    /// `b`
    Truth(bool),
    /// `t`
    Number(u64),
}

/// Who is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target<'a> {
    pub(crate) destination: &'a str,
    pub(crate) path: &'a str,
    pub(crate) interface: &'a str,
    pub(crate) member: &'a str,
}

/// What came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: u8,
    pub(crate) reply_to: u32,
    pub(crate) interface: String,
    pub(crate) member: String,
    pub(crate) error: String,
    pub(crate) signature: String,
    /// File descriptors that belong to it.
    pub(crate) descriptors: u32,
    pub(crate) body: Vec<u8>,
}

/// The bytes of a call.
pub(crate) fn call(serial: u32, target: Target<'_>, arguments: &[Value<'_>]) -> Vec<u8> {
    let (mut body, mut signature) = (Vec::new(), String::new());
    for argument in arguments {
        match argument {
            Value::Text(text) => {
                put_text(&mut body, text);
                signature.push('s');
            }
            Value::Int(number) => {
                pad(&mut body, 4);
                body.extend(number.to_le_bytes());
                signature.push('i');
            }
            Value::Truth(truth) => {
                put_truth(&mut body, *truth);
                signature.push('b');
            }
            Value::Properties(list) => {
                put_properties(&mut body, list);
                signature.push_str("a(sv)");
            }
            Value::NoUnits => {
                put_array(&mut body, |_| ());
                signature.push_str("a(sa(sv))");
            }
        }
    }
    let mut fields = Vec::new();
    for (code, kind, text) in [
        (1, b'o', target.path),
        (2, b's', target.interface),
        (3, b's', target.member),
        (6, b's', target.destination),
    ] {
        pad(&mut fields, 8);
        fields.extend([code, 1, kind, 0]);
        put_text(&mut fields, text);
    }
    if !signature.is_empty() {
        pad(&mut fields, 8);
        fields.extend([8, 1, b'g', 0]);
        put_signature(&mut fields, &signature);
    }
    assemble(CALL, serial, &fields, &body)
}

/// Header and body.
pub(crate) fn assemble(kind: u8, serial: u32, fields: &[u8], body: &[u8]) -> Vec<u8> {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
    let mut message = vec![b'l', kind, 0, 1];
    message.extend(length(body));
    message.extend(serial.to_le_bytes());
    message.extend(length(fields));
    message.extend(fields);
    pad(&mut message, 8);
    message.extend(body);
    message
}

/// Bytes of the whole message that begins with these [`FIXED`] bytes.
pub(crate) fn size(head: &[u8]) -> Result<usize, &'static str> {
    if head.first() != Some(&b'l') {
        return Err("not a little-endian D-Bus message");
    }
    let number = |at: usize| u32_at(head, at).and_then(|number| usize::try_from(number).ok());
    let (body, fields) = (number(4).ok_or("too short")?, number(12).ok_or("too short")?);
    let size = FIXED.saturating_add(fields).next_multiple_of(8).saturating_add(body);
    if size <= MAX_SIZE { Ok(size) } else { Err("a D-Bus message that is too large") }
}

/// Reads a whole message.
pub(crate) fn decode(bytes: &[u8]) -> Result<Message, &'static str> {
    if size(bytes)? != bytes.len() {
        return Err("a D-Bus message of another length");
    }
    let fields_end = FIXED + usize::try_from(u32_at(bytes, 12).unwrap_or(0)).unwrap_or(0);
    let mut message = Message { kind: bytes[1], ..Message::default() };
    let mut at = FIXED;
    while at < fields_end {
        at = at.next_multiple_of(8);
        let (Some(&code), Some(&kind)) = (bytes.get(at), bytes.get(at + 2)) else { return Err(CUT) };
        at += 4;
        match kind {
            b's' | b'o' => {
                let (text, next) = text_at(bytes, at).ok_or(CUT)?;
                match code {
                    2 => message.interface = text,
                    3 => message.member = text,
                    4 => message.error = text,
                    _ => {}
                }
                at = next;
            }
            b'g' => {
                let length = usize::from(*bytes.get(at).ok_or(CUT)?);
                let text = bytes.get(at + 1..at + 1 + length).ok_or(CUT)?;
                if code == 8 {
                    message.signature = String::from_utf8_lossy(text).into_owned();
                }
                at += length + 2;
            }
            b'u' => {
                let number = u32_at(bytes, at).ok_or(CUT)?;
                match code {
                    5 => message.reply_to = number,
                    9 => message.descriptors = number,
                    _ => {}
                }
                at += 4;
            }
            _ => return Err("a D-Bus header field of an unknown type"),
        }
    }
    message.body = bytes.get(fields_end.next_multiple_of(8)..).ok_or(CUT)?.to_vec();
    Ok(message)
}

const CUT: &str = "a D-Bus message that is cut off";

impl Message {
    /// The text that is its body.
    pub(crate) fn text(&self) -> Option<String> {
        self.signature.starts_with('s').then(|| text_at(&self.body, 0))?.map(|(text, _)| text)
    }

    /// The truth value that is its body, alone or in a variant.
    pub(crate) fn flag(&self) -> Option<bool> {
        let at = self.value_of(b'b', 4)?;
        u32_at(&self.body, at).map(|number| number != 0)
    }

    /// The number in the variant that is its body.
    pub(crate) fn number(&self) -> Option<u64> {
        let at = self.value_of(b't', 8)?;
        Some(u64::from_le_bytes(self.body.get(at..at + 8)?.try_into().ok()?))
    }

    /// Where a value of that type begins.
    fn value_of(&self, kind: u8, align: usize) -> Option<usize> {
        match self.signature.as_str() {
            "v" => {
                let inner = [1, kind, 0];
                self.body.starts_with(&inner).then(|| inner.len().next_multiple_of(align))
            }
            signature => (signature.as_bytes() == [kind]).then_some(0),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn text_at(bytes: &[u8], at: usize) -> Option<(String, usize)> {
    let length = usize::try_from(u32_at(bytes, at)?).ok()?;
    let text = bytes.get(at + 4..(at + 4).checked_add(length)?)?;
    Some((String::from_utf8_lossy(text).into_owned(), at + 4 + length + 1))
}

fn pad(bytes: &mut Vec<u8>, align: usize) {
    bytes.resize(bytes.len().next_multiple_of(align), 0);
}

fn put_truth(bytes: &mut Vec<u8>, truth: bool) {
    pad(bytes, 4);
    bytes.extend(u32::from(truth).to_le_bytes());
}

fn put_properties(bytes: &mut Vec<u8>, list: &[(&str, Property<'_>)]) {
    put_array(bytes, |bytes| {
        for (name, value) in list {
            pad(bytes, 8);
            put_text(bytes, name);
            match value {
                Property::Text(text) => {
                    put_signature(bytes, "s");
                    put_text(bytes, text);
                }
                Property::Truth(truth) => {
                    put_signature(bytes, "b");
                    put_truth(bytes, *truth);
                }
                Property::Number(number) => {
                    put_signature(bytes, "t");
                    pad(bytes, 8);
                    bytes.extend(number.to_le_bytes());
                }
            }
        }
    });
}

/// An array of structures: its length, which does not count what fills up to the first one.
fn put_array(bytes: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) {
    pad(bytes, 4);
    let length_at = bytes.len();
    bytes.extend([0; 4]);
    pad(bytes, 8);
    let begin = bytes.len();
    put(bytes);
    let length = u32::try_from(bytes.len() - begin).unwrap_or(u32::MAX);
    if let Some(place) = bytes.get_mut(length_at..length_at + 4) {
        place.copy_from_slice(&length.to_le_bytes());
    }
}

pub(crate) fn put_text(bytes: &mut Vec<u8>, text: &str) {
    pad(bytes, 4);
    bytes.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

pub(crate) fn put_signature(bytes: &mut Vec<u8>, signature: &str) {
    bytes.push(u8::try_from(signature.len()).unwrap_or(u8::MAX));
    bytes.extend(signature.as_bytes());
    bytes.push(0);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TARGET: Target<'_> = Target {
        destination: "org.freedesktop.login1",
        path: "/org/freedesktop/login1",
        interface: "org.freedesktop.login1.Manager",
        member: "Inhibit",
    };

    #[test]
    fn properties_lie_where_their_types_want_them() {
        let list = [("A", Property::Truth(true)), ("Bc", Property::Number(7))];
        let arguments = [Value::Text("x.slice"), Value::Properties(&list), Value::NoUnits];
        let message = decode(&call(1, TARGET, &arguments)).unwrap();
        assert_eq!(message.signature, "sa(sv)a(sa(sv))");
        let mut expected = Vec::new();
        put_text(&mut expected, "x.slice");
        // The length of the array, then its first structure at a multiple of eight.
        expected.extend([40, 0, 0, 0]);
        expected.extend([1, 0, 0, 0, b'A', 0, 1, b'b', 0, 0, 0, 0, 1, 0, 0, 0]);
        expected.extend([2, 0, 0, 0, b'B', b'c', 0, 1, b't', 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([7, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(message.body.len(), expected.len(), "{:?}", message.body);
        assert_eq!(message.body, expected);
    }

    #[test]
    fn calls_are_read_back() {
        let bytes = call(7, TARGET, &[Value::Text("shutdown"), Value::Int(-1), Value::Text("é")]);
        assert_eq!(size(&bytes[..FIXED]), Ok(bytes.len()));
        let message = decode(&bytes).unwrap();
        assert_eq!((message.member.as_str(), message.signature.as_str()), ("Inhibit", "sis"));
        assert_eq!(message.text().as_deref(), Some("shutdown"));
        let nothing = decode(&call(1, TARGET, &[])).unwrap();
        assert!(nothing.signature.is_empty() && nothing.body.is_empty());
    }

    #[test]
    fn values_are_found_alone_and_in_variants() {
        let message = |signature: &str, body: &[u8]| Message {
            signature: signature.to_owned(),
            body: body.to_vec(),
            ..Message::default()
        };
        assert_eq!(message("b", &[1, 0, 0, 0]).flag(), Some(true));
        assert_eq!(message("v", &[1, b'b', 0, 0, 0, 0, 0, 0]).flag(), Some(false));
        let seconds = message("v", &[1, b't', 0, 0, 0, 0, 0, 0, 64, 75, 76, 0, 0, 0, 0, 0]);
        assert_eq!((seconds.number(), seconds.flag()), (Some(5_000_000), None));
        assert_eq!(message("v", &[1, b't']).number(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = b'l';
            }
            prop_assert!(size(&bytes).is_ok_and(|size| size <= MAX_SIZE) || size(&bytes).is_err());
            if let Ok(message) = decode(&bytes) {
                drop((message.text(), message.flag(), message.number()));
            }
        }

        #[test]
        fn a_changed_call_is_read_or_refused(at in 0_usize..150, value in any::<u8>()) {
            let mut bytes = call(7, TARGET, &[Value::Text("shutdown")]);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            if let Ok(message) = decode(&bytes) {
                drop((message.text(), message.flag(), message.number()));
            }
        }
    }
}

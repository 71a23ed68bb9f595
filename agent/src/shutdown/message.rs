//! D-Bus messages, as far as logind needs them: calls with texts and numbers, replies with one value, one signal. Pure.
//!
//! <https://dbus.freedesktop.org/doc/dbus-specification.html>, "Message Protocol". Little-endian only: what a machine sends
//! itself.

/// A longer message is refused: nobody who is asked here has so much to say.
pub(super) const MAX_SIZE: usize = 1 << 16;
/// Bytes of the fixed part of a header, with the length of its fields.
pub(super) const FIXED: usize = 16;

const CALL: u8 = 1;
pub(super) const REPLY: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const SIGNAL: u8 = 4;

/// An argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    /// `s`
    Text(&'a str),
    /// `i`
    Int(i32),
}

/// Who is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target<'a> {
    pub(super) destination: &'a str,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) member: &'a str,
}

/// What came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: u8,
    pub(super) reply_to: u32,
    pub(super) interface: String,
    pub(super) member: String,
    pub(super) error: String,
    pub(super) signature: String,
    /// File descriptors that belong to it.
    pub(super) descriptors: u32,
    pub(super) body: Vec<u8>,
}

/// The bytes of a call.
pub(super) fn call(serial: u32, target: Target<'_>, arguments: &[Value<'_>]) -> Vec<u8> {
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
pub(super) fn assemble(kind: u8, serial: u32, fields: &[u8], body: &[u8]) -> Vec<u8> {
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
pub(super) fn size(head: &[u8]) -> Result<usize, &'static str> {
    if head.first() != Some(&b'l') {
        return Err("not a little-endian D-Bus message");
    }
    let number = |at: usize| u32_at(head, at).and_then(|number| usize::try_from(number).ok());
    let (body, fields) = (number(4).ok_or("too short")?, number(12).ok_or("too short")?);
    let size = FIXED.saturating_add(fields).next_multiple_of(8).saturating_add(body);
    if size <= MAX_SIZE { Ok(size) } else { Err("a D-Bus message that is too large") }
}

/// Reads a whole message.
pub(super) fn decode(bytes: &[u8]) -> Result<Message, &'static str> {
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
    pub(super) fn text(&self) -> Option<String> {
        self.signature.starts_with('s').then(|| text_at(&self.body, 0))?.map(|(text, _)| text)
    }

    /// The truth value that is its body, alone or in a variant.
    pub(super) fn flag(&self) -> Option<bool> {
        let at = self.value_of(b'b', 4)?;
        u32_at(&self.body, at).map(|number| number != 0)
    }

    /// The number in the variant that is its body.
    pub(super) fn number(&self) -> Option<u64> {
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

pub(super) fn put_text(bytes: &mut Vec<u8>, text: &str) {
    pad(bytes, 4);
    bytes.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

pub(super) fn put_signature(bytes: &mut Vec<u8>, signature: &str) {
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

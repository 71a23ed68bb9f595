//! Netlink messages as bytes: a builder for requests and an iterator over attributes.
//!
//! Input: numbers of the kernel's `linux/*netlink*.h` headers. Output: aligned messages. Plugins live for
//! milliseconds and use a handful of message types, so this is all of the protocol they carry: a crate
//! that knows every message of the kernel is several times the size of a plugin.

/// Length of `nlmsghdr`.
pub const HEADER: usize = 16;
/// Set on attributes that hold attributes.
const NLA_F_NESTED: u16 = 0x8000;
/// Masks the flags out of an attribute's type.
const NLA_TYPE_MASK: u16 = 0x3fff;

/// A request in the making: `nlmsghdr`, the family's own header, attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message(Vec<u8>);

/// The `nlmsghdr` of a received message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Message type.
    pub kind: u16,
    /// `NLM_F_…`.
    pub flags: u16,
    /// Sequence number of the request it answers.
    pub sequence: u32,
}

impl Message {
    /// A message of type `kind` with `flags`; `NLM_F_REQUEST` is added when it is sent.
    pub fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        Self(bytes)
    }

    /// Appends the family's header (`ifinfomsg`, `rtmsg`, `nfgenmsg`, …).
    #[must_use]
    pub fn header(mut self, header: &[u8]) -> Self {
        self.0.extend_from_slice(header);
        self.align();
        self
    }

    /// Appends an attribute.
    #[must_use]
    pub fn attr(mut self, kind: u16, payload: &[u8]) -> Self {
        let len = u16::try_from(payload.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(payload);
        self.align();
        self
    }

    /// Appends a byte.
    #[must_use]
    pub fn u8(self, kind: u16, value: u8) -> Self {
        self.attr(kind, &[value])
    }

    /// Appends a number in host order.
    #[must_use]
    pub fn u16(self, kind: u16, value: u16) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends a number in host order.
    #[must_use]
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends a number in host order.
    #[must_use]
    pub fn u64(self, kind: u16, value: u64) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends a number in network order.
    #[must_use]
    pub fn be16(self, kind: u16, value: u16) -> Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends a number in network order.
    #[must_use]
    pub fn be32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends a number in network order.
    #[must_use]
    pub fn be64(self, kind: u16, value: u64) -> Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends a zero-terminated string.
    #[must_use]
    pub fn string(self, kind: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Appends an attribute that holds what `fill` appends.
    #[must_use]
    pub fn nested(self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        self.container(kind | NLA_F_NESTED, fill)
    }

    /// As [`Message::nested`] without the flag, for the old families that do not know it.
    #[must_use]
    pub fn container(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        let mut filled = fill(self);
        let len = u16::try_from(filled.0.len() - start).unwrap_or(u16::MAX);
        filled.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        filled
    }

    /// Applies `change` when `value` is there; keeps chains of optional attributes readable.
    #[must_use]
    pub fn when<T>(self, value: Option<T>, change: impl FnOnce(Self, T) -> Self) -> Self {
        match value {
            Some(value) => change(self, value),
            None => self,
        }
    }

    /// The finished bytes, numbered and with `extra_flags`.
    pub fn finish(&self, sequence: u32, extra_flags: u16) -> Vec<u8> {
        let mut bytes = self.0.clone();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        let flags = u16::from_ne_bytes([bytes[6], bytes[7]]) | extra_flags;
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes
    }

    fn align(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// The messages in what one `recv` gave: header and the rest. Stops at anything malformed.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::try_from(u32_at(bytes, 0)?).ok()?;
        if len < HEADER || len > bytes.len() {
            return None;
        }
        let header =
            Header { kind: u16_at(bytes, 4)?, flags: u16_at(bytes, 6)?, sequence: u32_at(bytes, 8)? };
        let body = &bytes[HEADER..len];
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((header, body))
    })
}

/// The attributes in `bytes`: type without flags, payload. Stops at anything malformed.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        if len < 4 || len > bytes.len() {
            return None;
        }
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        let payload = &bytes[4..len];
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The payload of the first attribute of a type.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, payload)| payload)
}

/// A number in host order at `offset`.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..offset + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// A number in host order at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// A string up to its zero.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_back() {
        let message = Message::new(16, 1)
            .header(&[7; 16])
            .string(3, "eth0")
            .nested(18, |info| info.string(1, "veth").nested(2, |data| data.u8(1, 9)))
            .u32(4, 1450);
        let bytes = message.finish(5, 4);
        let (header, body) = messages(&bytes).next().unwrap();
        assert_eq!(header, Header { kind: 16, flags: 5, sequence: 5 });
        assert_eq!(bytes.len() % 4, 0);
        let body = &body[16..];
        assert_eq!(text(find(body, 3).unwrap()), "eth0");
        assert_eq!(u32_at(find(body, 4).unwrap(), 0), Some(1450));
        let data = find(find(body, 18).unwrap(), 2).unwrap();
        assert_eq!(find(data, 1), Some(&[9][..]));
    }

    #[test]
    fn malformed_bytes_end_the_iteration() {
        for bytes in [&[][..], &[1], &[2, 0, 1, 0], &[255, 0, 1, 0, 0]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
            assert_eq!(messages(bytes).count(), 0, "{bytes:?}");
        }
    }
}

//! Netlink attributes: type, length and payload, padded to four bytes, nested at will. Writing and reading.

/// `NLA_F_NESTED` of linux/netlink.h.
const NESTED: u16 = 0x8000;
/// Bits of the type that are flags.
const FLAGS: u16 = 0xc000;

/// A sequence of attributes in the making.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    /// Appends one.
    pub(super) fn put(&mut self, kind: u16, payload: &[u8]) -> &mut Self {
        let length = u16::try_from(payload.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(payload);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a number as nf_tables wants all of them.
    pub(super) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// Appends a text with its closing zero.
    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.put(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Appends one that holds others.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes)) -> &mut Self {
        let mut inner = Attributes::default();
        fill(&mut inner);
        self.put(kind | NESTED, &inner.0)
    }
}

/// The attributes of a payload, in order; ends at the first that does not fit.
pub(super) fn read(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]);
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !FLAGS, payload))
    })
}

/// The first attribute of a type.
pub(super) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    read(bytes).find(|(kind, _)| *kind == wanted).map(|(_, payload)| payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut all = Attributes::default();
        all.text(1, "ab").be32(2, 7).nest(3, |inner| {
            inner.put(4, &[1, 2, 3, 4, 5]);
        });
        assert_eq!(all.0.len() % 4, 0);
        assert_eq!(find(&all.0, 1), Some(b"ab\0".as_slice()));
        assert_eq!(find(&all.0, 2), Some([0, 0, 0, 7].as_slice()));
        assert_eq!(find(find(&all.0, 3).unwrap(), 4), Some([1, 2, 3, 4, 5].as_slice()));
        assert_eq!(find(&all.0, 9), None);
    }

    #[test]
    fn broken_lengths_end_the_reading() {
        for bytes in [&[3, 0, 1, 0][..], &[200, 0, 1, 0, 5], &[0, 0, 0, 0], &[8, 0]] {
            assert_eq!(read(bytes).count(), 0, "{bytes:?}");
        }
    }
}

//! Layout of the records inside the database file.
//!
//! A *current* record is `created u64, modified u64, value`. A *log* record is `kind u8, created u64, previous-revision u64, key length u32,
//! previous length u32, key, previous value, value`; integers are big-endian, and a previous revision of 0 means that there was no previous
//! value. Pure functions over bytes; damaged input gives `None`, never a panic.

use bytes::Bytes;

use crate::{Event, EventKind, KeyValue, Revision};

/// Number of the layout described above, stored in the file.
pub(crate) const FORMAT: u64 = 1;

/// Encode a current record.
pub(crate) fn encode_current(created: Revision, modified: Revision, value: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(16 + value.len());
    record.extend_from_slice(&created.0.to_be_bytes());
    record.extend_from_slice(&modified.0.to_be_bytes());
    record.extend_from_slice(value);
    record
}

/// Decode a current record.
pub(crate) fn decode_current(key: &[u8], record: &[u8]) -> Option<KeyValue> {
    let (created, rest) = take_u64(record)?;
    let (modified, value) = take_u64(rest)?;
    Some(KeyValue {
        key: Bytes::copy_from_slice(key),
        value: Bytes::copy_from_slice(value),
        created: Revision(created),
        modified: Revision(modified),
    })
}

/// Encode an event as a log record; `None` where a key or value is longer than the layout can say (4 GiB).
pub(crate) fn encode_event(event: &Event) -> Option<Vec<u8>> {
    let (previous, previous_revision) = match &event.previous {
        Some((value, revision)) => (value.as_ref(), revision.0),
        None => (&[][..], 0),
    };
    // The last value of a deleted key is its previous value: kept once.
    let value = if event.kind == EventKind::Deleted { &[][..] } else { event.value.as_ref() };
    let mut record = Vec::with_capacity(25 + event.key.len() + previous.len() + value.len());
    record.push(match event.kind {
        EventKind::Created => 1,
        EventKind::Updated => 2,
        EventKind::Deleted => 3,
    });
    record.extend_from_slice(&event.created.0.to_be_bytes());
    record.extend_from_slice(&previous_revision.to_be_bytes());
    record.extend_from_slice(&u32::try_from(event.key.len()).ok()?.to_be_bytes());
    record.extend_from_slice(&u32::try_from(previous.len()).ok()?.to_be_bytes());
    record.extend_from_slice(&event.key);
    record.extend_from_slice(previous);
    record.extend_from_slice(value);
    Some(record)
}

/// Decode a log record written at `revision`.
pub(crate) fn decode_event(revision: Revision, record: &[u8]) -> Option<Event> {
    let (&kind, rest) = record.split_first()?;
    let kind = match kind {
        1 => EventKind::Created,
        2 => EventKind::Updated,
        3 => EventKind::Deleted,
        _ => return None,
    };
    let (created, rest) = take_u64(rest)?;
    let (previous_revision, rest) = take_u64(rest)?;
    let (key_len, rest) = take_u32(rest)?;
    let (previous_len, rest) = take_u32(rest)?;
    let (key, rest) = rest.split_at_checked(key_len)?;
    let (previous, value) = rest.split_at_checked(previous_len)?;
    let previous = Bytes::copy_from_slice(previous);
    let value = if kind == EventKind::Deleted { previous.clone() } else { Bytes::copy_from_slice(value) };
    Some(Event {
        kind,
        key: Bytes::copy_from_slice(key),
        value,
        previous: (previous_revision != 0).then_some((previous, Revision(previous_revision))),
        created: Revision(created),
        revision,
    })
}

fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*head), rest))
}

fn take_u32(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    Some((usize::try_from(u32::from_be_bytes(*head)).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_round_trip_and_truncation_is_refused() {
        let event = Event {
            kind: EventKind::Updated,
            key: Bytes::from_static(b"/a/b"),
            value: Bytes::from_static(b"new"),
            previous: Some((Bytes::from_static(b"old"), Revision(4))),
            created: Revision(2),
            revision: Revision(9),
        };
        let record = encode_event(&event).unwrap();
        assert_eq!(decode_event(Revision(9), &record), Some(event));
        for cut in 0..25 {
            assert_eq!(decode_event(Revision(9), &record[..cut]), None, "cut at {cut}");
        }
    }

    #[test]
    fn a_deletion_carries_the_last_value() {
        let event = Event {
            kind: EventKind::Deleted,
            key: Bytes::from_static(b"k"),
            value: Bytes::from_static(b"last"),
            previous: Some((Bytes::from_static(b"last"), Revision(4))),
            created: Revision(2),
            revision: Revision(9),
        };
        assert_eq!(decode_event(Revision(9), &encode_event(&event).unwrap()), Some(event));
    }
}

//! Comments of elements, by which they are told apart, as `nft` writes and shows them: type 0, length, text with a closing
//! zero.

use super::attributes::{Attributes, find};

/// `NFTA_SET_ELEM_USERDATA`.
const USER_DATA: u16 = 6;

/// Gives an element its comment; at most 254 bytes.
pub(super) fn put(element: &mut Attributes, comment: &str) {
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    element.put(USER_DATA, &[&[0, length], comment.as_bytes(), &[0]].concat());
}

/// The comment of an element; empty where it has none.
pub(super) fn read(element: &[u8]) -> String {
    find(element, USER_DATA).and_then(|data| data.get(2..)).map(text).unwrap_or_default()
}

/// Text with closing zeros.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

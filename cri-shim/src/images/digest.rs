//! `sha256:` digests, the names of everything in a content store.

use sha2::{Digest, Sha256};

/// The digest of `bytes`.
pub fn of(bytes: impl AsRef<[u8]>) -> String {
    finish(Sha256::new_with_prefix(bytes))
}

/// The digest of what was hashed.
pub fn finish(hash: Sha256) -> String {
    let mut text = String::from("sha256:");
    for byte in hash.finalize() {
        text.extend(
            [byte >> 4, byte & 0xf].into_iter().filter_map(|nibble| char::from_digit(nibble.into(), 16)),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_known_digest_of_nothing() {
        assert_eq!(of(""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}

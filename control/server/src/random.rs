//! Random identity: uids, name suffixes, token ids. The one place that draws random numbers.

use control_api::meta::NAME_ALPHABET;
use rustls::crypto::SecureRandom;

/// Draws from the crypto provider's generator.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(&'static dyn SecureRandom);

impl Default for Random {
    fn default() -> Self {
        Self(rustls::crypto::aws_lc_rs::default_provider().secure_random)
    }
}

impl Random {
    /// Random bytes.
    pub(crate) fn bytes<const N: usize>(self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0
            .fill(&mut bytes)
            .expect("the crypto provider draws from getrandom(2), which does not fail once booted");
        bytes
    }

    /// A number below `bound`, which must not be 0.
    pub(crate) fn below(self, bound: u64) -> u64 {
        u64::from_be_bytes(self.bytes()) % bound.max(1)
    }

    /// A version 4 UUID.
    pub(crate) fn uuid(self) -> String {
        let mut bytes: [u8; 16] = self.bytes();
        bytes[6] = (bytes[6] & 0x0f) | 0x40;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        let mut text = String::with_capacity(36);
        for (index, byte) in bytes.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                text.push('-');
            }
            text.push(char::from(b"0123456789abcdef"[usize::from(byte >> 4)]));
            text.push(char::from(b"0123456789abcdef"[usize::from(byte & 15)]));
        }
        text
    }

    /// Five characters for a generated name.
    pub(crate) fn name_suffix(self) -> String {
        let bytes: [u8; 5] = self.bytes();
        bytes.iter().map(|byte| char::from(NAME_ALPHABET[usize::from(*byte) % NAME_ALPHABET.len()])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_look_like_uuids() {
        let uuid = Random::default().uuid();
        assert_eq!(uuid.len(), 36);
        assert_eq!(uuid.as_bytes()[14], b'4');
        assert_ne!(uuid, Random::default().uuid());
    }
}

//! SPDY/3 header blocks: name/value lists, compressed with one zlib state per connection and direction.
//!
//! A block that cannot be read leaves the state unusable, so every error here ends the connection. Sizes are bounded
//! before and after decompression.

use bytes::{Buf, Bytes};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::SpdyError;
use super::dictionary::DICTIONARY;

/// Most bytes of one block, decompressed.
pub const MAX_BLOCK: usize = 16 * 1024;

/// Most headers of one block.
const MAX_HEADERS: usize = 64;

/// Names (lower case) and values in the order they came.
pub type Headers = Vec<(String, String)>;

/// Finds the first value of `name`, which is given in lower case.
pub fn header<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// Reads the blocks of one peer.
pub(crate) struct HeaderReader(Decompress);

impl HeaderReader {
    pub(crate) fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// Decompresses and parses one block.
    pub(crate) fn read(&mut self, compressed: &[u8]) -> Result<Headers, SpdyError> {
        let mut plain = Vec::with_capacity(1024);
        let mut rest = compressed;
        loop {
            let (read, written) = (self.0.total_in(), self.0.total_out());
            if plain.len() == plain.capacity() {
                plain.reserve(plain.len());
            }
            let outcome = self.0.decompress_vec(rest, &mut plain, FlushDecompress::Sync);
            let consumed =
                usize::try_from(self.0.total_in() - read).map_err(|_cause| SpdyError::Compression)?;
            rest = rest.get(consumed..).ok_or(SpdyError::Compression)?;
            match outcome {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&DICTIONARY).map_err(|_cause| SpdyError::Compression)?;
                }
                Err(_) | Ok(Status::StreamEnd) => return Err(SpdyError::Compression),
                Ok(_) if plain.len() > MAX_BLOCK => return Err(SpdyError::TooLong("header block")),
                Ok(_) => {
                    let stuck = consumed == 0 && self.0.total_out() == written;
                    let done = rest.is_empty() && plain.len() < plain.capacity();
                    if done || stuck {
                        break;
                    }
                }
            }
        }
        parse(Bytes::from(plain))
    }
}

/// Writes blocks for one peer.
pub(crate) struct HeaderWriter(Compress);

impl HeaderWriter {
    pub(crate) fn new() -> Self {
        let mut state = Compress::new(Compression::fast(), true);
        state.set_dictionary(&DICTIONARY).expect("a fresh zlib state takes a dictionary");
        Self(state)
    }

    /// Forms and compresses one block.
    pub(crate) fn write(&mut self, headers: &Headers) -> Result<Vec<u8>, SpdyError> {
        let plain = form(headers)?;
        let mut compressed = Vec::with_capacity(plain.len() + 64);
        let mut rest = plain.as_slice();
        loop {
            let read = self.0.total_in();
            if compressed.len() == compressed.capacity() {
                compressed.reserve(256);
            }
            let outcome = self.0.compress_vec(rest, &mut compressed, FlushCompress::Sync);
            outcome.map_err(|_cause| SpdyError::Compression)?;
            let consumed =
                usize::try_from(self.0.total_in() - read).map_err(|_cause| SpdyError::Compression)?;
            rest = &rest[consumed..];
            if rest.is_empty() && compressed.len() < compressed.capacity() {
                return Ok(compressed);
            }
        }
    }
}

fn form(headers: &Headers) -> Result<Vec<u8>, SpdyError> {
    let length = |length: usize| u32::try_from(length).map_err(|_cause| SpdyError::TooLong("header"));
    let mut plain = length(headers.len())?.to_be_bytes().to_vec();
    for text in headers.iter().flat_map(|(name, value)| [name, value]) {
        plain.extend_from_slice(&length(text.len())?.to_be_bytes());
        plain.extend_from_slice(text.as_bytes());
    }
    Ok(plain)
}

fn parse(mut plain: Bytes) -> Result<Headers, SpdyError> {
    let count = take_length(&mut plain)?;
    if count > MAX_HEADERS {
        return Err(SpdyError::TooLong("header list"));
    }
    let mut headers = Headers::with_capacity(count);
    for _ in 0..count {
        let name = take_text(&mut plain)?.to_ascii_lowercase();
        // Several values of one name are joined by NUL; nothing we read has more than one that counts.
        let value = take_text(&mut plain)?;
        let first = value.split('\0').next().unwrap_or_default().to_owned();
        headers.push((name, first));
    }
    Ok(headers)
}

fn take_length(plain: &mut Bytes) -> Result<usize, SpdyError> {
    let length = plain.try_get_u32().map_err(|_cause| SpdyError::Malformed("header block"))?;
    usize::try_from(length).map_err(|_cause| SpdyError::TooLong("header"))
}

fn take_text(plain: &mut Bytes) -> Result<String, SpdyError> {
    let length = take_length(plain)?;
    if length > plain.len() {
        return Err(SpdyError::Malformed("header block"));
    }
    String::from_utf8(plain.split_to(length).to_vec()).map_err(|_cause| SpdyError::Malformed("header text"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn blocks_follow_each_other_on_one_state() {
        let (mut writer, mut reader) = (HeaderWriter::new(), HeaderReader::new());
        for list in [
            headers(&[("streamtype", "stdin")]),
            headers(&[]),
            headers(&[("port", "80"), ("requestid", "7")]),
        ] {
            let block = writer.write(&list).expect("written");
            assert_eq!(reader.read(&block).expect("read"), list);
        }
        let first = HeaderWriter::new().write(&headers(&[])).expect("written");
        assert_eq!(
            first[2..6],
            [0xe3, 0xc6, 0xa7, 0xc2],
            "the dictionary is announced as every SPDY/3 peer does"
        );
    }

    #[test]
    fn a_bomb_is_refused() {
        let long = headers(&[("x", &"a".repeat(1 << 20))]);
        let block = HeaderWriter::new().write(&long).expect("written");
        assert!(block.len() < 16 * 1024);
        assert!(matches!(HeaderReader::new().read(&block), Err(SpdyError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn any_list_comes_back(list in prop::collection::vec(("[a-z-]{0,20}", "[ -~]{0,300}"), 0..20)) {
            let block = HeaderWriter::new().write(&list).expect("written");
            prop_assert_eq!(HeaderReader::new().read(&block).expect("read"), list);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), plain: bool) {
            if plain {
                drop(parse(Bytes::from(bytes)));
            } else {
                drop(HeaderReader::new().read(&bytes));
            }
        }
    }
}

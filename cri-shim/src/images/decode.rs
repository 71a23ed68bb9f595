//! Undoes a layer's compression and measures what comes out: bytes, digest, and whether it stays within the limits.
//!
//! The compression is told by the first bytes, as containerd does, not by the media type.

use std::io::{self, BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use super::archive::read_up_to;
use super::digest;
use super::settings::Settings;

/// Bytes read from the compressed side at a time.
const INPUT: usize = 128 * 1024;

/// A compression that layers come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

/// The compression that data beginning like this is in.
pub fn compression(start: &[u8]) -> Option<Compression> {
    match start {
        [0x1f, 0x8b, ..] => Some(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
        _ => None,
    }
}

/// Reads what `reader` has compressed, or as it is.
pub fn decode<'a>(mut reader: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = [0; 4];
    let length = read_up_to(&mut reader, &mut magic)?;
    let whole = BufReader::with_capacity(INPUT, Cursor::new(magic).take(length as u64).chain(reader));
    Ok(match compression(&magic[..length]) {
        Some(Compression::Gzip) => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Some(Compression::Zstd) => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        None => Box::new(whole),
    })
}

/// A limit that a layer went over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Its own size.
    #[error("it unpacks to more than the allowed {0} bytes (images.maxLayerBytes)")]
    Layer(u64),
    /// The image's.
    #[error("the image unpacks to more than the allowed {0} bytes (images.maxImageBytes)")]
    Image(u64),
    /// What compression can plausibly gain.
    #[error("it unpacks to more than {0} times its compressed size (images.maxCompressionRatio)")]
    Ratio(u64),
}

/// What an image's layers may take together. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Budget {
    layer: u64,
    ratio: u64,
    image: u64,
    used: Arc<AtomicU64>,
}

impl Budget {
    /// A budget that nothing is taken of yet.
    pub fn new(settings: &Settings) -> Self {
        Self {
            layer: settings.max_layer_bytes,
            ratio: settings.max_compression_ratio,
            image: settings.max_image_bytes,
            used: Arc::default(),
        }
    }

    /// Starts to measure one layer of `compressed` bytes.
    pub fn layer(&self, compressed: u64) -> Meter {
        Meter { budget: self.clone(), compressed, bytes: 0 }
    }
}

/// What one layer has taken.
#[derive(Debug)]
pub struct Meter {
    budget: Budget,
    compressed: u64,
    bytes: u64,
}

impl Meter {
    /// Takes `more` bytes, or says which limit that breaks.
    pub fn take(&mut self, more: u64) -> Result<(), LimitError> {
        self.bytes = self.bytes.saturating_add(more);
        let Budget { layer, ratio, image, used } = &self.budget;
        if self.bytes > *layer {
            return Err(LimitError::Layer(*layer));
        }
        if self.bytes > Settings::RATIO_FROM && self.bytes > self.compressed.saturating_mul(*ratio) {
            return Err(LimitError::Ratio(*ratio));
        }
        let before = used.fetch_add(more, Ordering::Relaxed);
        if before.saturating_add(more) > *image { Err(LimitError::Image(*image)) } else { Ok(()) }
    }
}

/// Hashes and counts what is read through it.
pub struct Measured<R> {
    reader: R,
    hash: Sha256,
    meter: Meter,
    broken: Option<LimitError>,
}

impl<R: Read> Measured<R> {
    /// Measures `reader` against `meter`.
    pub fn new(reader: R, meter: Meter) -> Self {
        Self { reader, hash: Sha256::new(), meter, broken: None }
    }

    /// Counts bytes that are not in the stream but will be on the disk.
    pub fn take(&mut self, more: u64) -> io::Result<()> {
        self.meter.take(more).map_err(|limit| {
            self.broken = Some(limit);
            io::Error::other(limit)
        })
    }

    /// The limit that made reading fail.
    pub fn broken(&self) -> Option<LimitError> {
        self.broken
    }

    /// Digest of all that was read.
    pub fn digest(self) -> String {
        digest::finish(self.hash)
    }
}

impl<R: Read> Read for Measured<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.take(count as u64)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).expect("compressed");
        encoder.finish().expect("compressed")
    }

    #[test]
    fn every_form_gives_the_same_bytes_and_digest() {
        let plain: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        let (first, second) = plain.split_at(100_000);
        let members = [gzip(first), gzip(second)].concat();
        let zstd = zstd::encode_all(plain.as_slice(), 1).expect("compressed");
        for encoded in [plain.clone(), gzip(&plain), members, zstd] {
            let budget = Budget::new(&Settings::default());
            let mut reader = Measured::new(decode(encoded.as_slice()).expect("opened"), budget.layer(1));
            let mut got = Vec::new();
            reader.read_to_end(&mut got).expect("read");
            assert!(got == plain, "the bytes differ");
            assert_eq!(reader.digest(), digest::of(&plain));
        }
    }

    #[test]
    fn each_limit_is_told() {
        let settings = |layer, image, ratio| Settings {
            max_layer_bytes: layer,
            max_image_bytes: image,
            max_compression_ratio: ratio,
            ..Settings::default()
        };
        let many = Settings::RATIO_FROM + 1;
        let budget = Budget::new(&settings(10, 15, 2));
        assert_eq!(budget.layer(1).take(10), Ok(()));
        assert_eq!(budget.layer(1).take(11), Err(LimitError::Layer(10)));
        assert_eq!(budget.layer(1).take(6), Err(LimitError::Image(15)), "two layers share one image");
        let budget = Budget::new(&settings(u64::MAX, u64::MAX, 2));
        assert_eq!(budget.layer(1).take(many - 1), Ok(()), "small ones are never suspicious");
        assert_eq!(budget.layer(1).take(many), Err(LimitError::Ratio(2)));
        assert_eq!(budget.layer(many / 2 + 1).take(many), Ok(()));
    }

    #[test]
    fn a_limit_ends_the_reading() {
        let settings = Settings { max_layer_bytes: 1000, ..Settings::default() };
        let bomb = gzip(&vec![0; 1 << 20]);
        let meter = Budget::new(&settings).layer(bomb.len() as u64);
        let mut reader = Measured::new(decode(bomb.as_slice()).expect("opened"), meter);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).expect_err("stopped");
        assert_eq!(reader.broken(), Some(LimitError::Layer(1000)));
        assert!(got.len() <= 1000 + (1 << 16), "{}", got.len());
    }
}

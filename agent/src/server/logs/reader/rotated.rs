//! Which file of a rotated log follows another, and how a compressed one is read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use agent_core::logs::rotated;
use flate2::read::GzDecoder;
use jiff::Timestamp;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A rotated file is not larger than this, as far as memory is spent on it: `containerLogMaxSize` and a little.
const MAX_UNPACKED: u64 = 1 << 30;
/// What is read to find the first line's time.
const PREFIX: u64 = 64;

/// The oldest file of the log at `path` that begins after `last`; the one at `path` when no rotated one does.
pub(super) fn successor(path: &Path, last: Option<Timestamp>) -> io::Result<File> {
    if let (Some(last), Some(dir), Some(name)) = (last, path.parent(), path.file_name()) {
        let names: io::Result<Vec<String>> = std::fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .collect();
        for name in rotated(&name.to_string_lossy(), &names?) {
            match open_later(&dir.join(&name), last) {
                Ok(Some(file)) => return Ok(file),
                Ok(None) => {}
                // Compressed or removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    File::open(path)
}

/// The file, unpacked, when its first line is later than `last`.
fn open_later(path: &Path, last: Timestamp) -> io::Result<Option<File>> {
    let mut file = File::open(path)?;
    let is_packed = path.extension().is_some_and(|extension| extension == "gz");
    let begins = if is_packed { first_time(GzDecoder::new(&file)) } else { first_time(&file) };
    if begins.is_none_or(|begins| begins <= last) {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(0))?;
    if !is_packed {
        return Ok(Some(file));
    }
    let mut unpacked = File::from(memfd_create(c"rotated log", MFdFlags::MFD_CLOEXEC)?);
    io::copy(&mut GzDecoder::new(BufReader::new(file)).take(MAX_UNPACKED), &mut unpacked)?;
    unpacked.seek(SeekFrom::Start(0))?;
    Ok(Some(unpacked))
}

fn first_time(content: impl Read) -> Option<Timestamp> {
    let mut prefix = Vec::new();
    BufReader::new(content.take(PREFIX)).read_until(b' ', &mut prefix).ok()?;
    std::str::from_utf8(&prefix).ok()?.trim_end().parse().ok()
}

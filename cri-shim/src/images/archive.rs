//! Image archives: tar files as `docker save`, `podman save`, `ctr export` and the OCI image layout make them.
//!
//! Read in two passes and never unpacked: the first keeps the small JSON documents and measures everything else, the
//! second hands on the bytes of chosen entries. gzip and zstd around the archive are undone on the way. Blocking: not
//! for async code.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};

use super::decode::{self, Compression, compression};
use super::digest;

/// Most bytes of one document, and of all.
const MAX_DOCUMENT: u64 = 8 << 20;
const MAX_DOCUMENTS: u64 = 64 << 20;

/// Most entries of an archive.
const MAX_ENTRIES: usize = 100_000;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file cannot be opened or read, or is no tar archive.
    #[error("cannot read archive {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// More than an image archive has.
    #[error("archive {} has too many or too large documents", .0.display())]
    TooLarge(PathBuf),
}

/// One file of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its length.
    pub size: u64,
    /// `sha256:` and its hash.
    pub digest: String,
    /// Whether it is compressed with gzip or zstd.
    pub compression: Option<Compression>,
    /// Its content, where it looks like a JSON document.
    pub document: Option<Vec<u8>>,
}

/// What is in an archive, by normalised path. Links are resolved.
pub type Survey = BTreeMap<String, Entry>;

/// The first pass.
pub fn survey(path: &Path) -> Result<Survey, ArchiveError> {
    let failed = |source| ArchiveError::Read { path: path.to_owned(), source };
    let (mut survey, mut links, mut documents) = (Survey::new(), Vec::new(), 0);
    let mut archive = tar::Archive::new(open(path).map_err(failed)?);
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let name = entry_name(&entry).map_err(failed)?;
        let kind = entry.header().entry_type();
        if let (true, Some(target)) =
            (kind.is_symlink() || kind.is_hard_link(), entry.link_name().map_err(failed)?)
        {
            let base = if kind.is_symlink() { Path::new(&name).parent() } else { None };
            links.push((name.clone(), normal(&base.unwrap_or(Path::new("")).join(target))));
        }
        if kind.is_file() {
            let measured = measure(&mut entry).map_err(failed)?;
            documents += measured.document.as_ref().map_or(0, |bytes| bytes.len() as u64);
            survey.insert(name, measured);
        }
        if documents > MAX_DOCUMENTS || survey.len() + links.len() > MAX_ENTRIES {
            return Err(ArchiveError::TooLarge(path.to_owned()));
        }
    }
    for (name, target) in links {
        if let Some(entry) = survey.get(&target).cloned() {
            survey.insert(name, entry);
        }
    }
    Ok(survey)
}

/// The second pass: calls `take` with the digest of each file in `wanted` and a reader of its bytes, once per digest.
pub fn stream(
    path: &Path,
    survey: &Survey,
    mut wanted: std::collections::BTreeSet<String>,
    mut take: impl FnMut(&str, &mut dyn Read) -> io::Result<()>,
) -> Result<(), ArchiveError> {
    let failed = |source| ArchiveError::Read { path: path.to_owned(), source };
    let mut archive = tar::Archive::new(open(path).map_err(failed)?);
    for entry in archive.entries().map_err(failed)? {
        if wanted.is_empty() {
            break;
        }
        let mut entry = entry.map_err(failed)?;
        let name = entry_name(&entry).map_err(failed)?;
        let known = survey.get(&name).filter(|_| entry.header().entry_type().is_file());
        if let Some(known) = known
            && wanted.remove(&known.digest)
        {
            take(&known.digest, &mut entry).map_err(failed)?;
        }
    }
    Ok(())
}

fn open(path: &Path) -> io::Result<Box<dyn Read>> {
    decode::decode(BufReader::with_capacity(256 * 1024, File::open(path)?))
}

fn measure(reader: &mut impl Read) -> io::Result<Entry> {
    let mut buffer = vec![0; 64 * 1024];
    let (mut hash, mut size, mut kept, mut kind) = (Sha256::new(), 0, Some(Vec::new()), None);
    loop {
        let count = read_up_to(reader, &mut buffer)?;
        let piece = &buffer[..count];
        if size == 0 {
            kind = compression(piece);
            if !piece.first().is_some_and(|byte| b"{[ \n\t".contains(byte)) {
                kept = None;
            }
        }
        size += count as u64;
        hash.update(piece);
        if size > MAX_DOCUMENT {
            kept = None;
        }
        if let Some(kept) = &mut kept {
            kept.extend_from_slice(piece);
        }
        if count < buffer.len() {
            let digest = digest::finish(hash);
            return Ok(Entry { size, digest, compression: kind, document: kept });
        }
    }
}

/// Fills `buffer` as far as there is something to read.
pub fn read_up_to(reader: &mut (impl Read + ?Sized), buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn entry_name<R: Read>(entry: &tar::Entry<'_, R>) -> io::Result<String> {
    Ok(normal(&entry.path()?))
}

/// A path without `.` and with `..` undone, relative to the archive.
fn normal(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn tar(files: &[(&str, &[u8])], link: Option<(&str, &str)>) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, *content).expect("appended");
        }
        if let Some((path, target)) = link {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            archive.append_link(&mut header, path, target).expect("appended");
        }
        archive.into_inner().expect("finished")
    }

    #[test]
    fn finds_documents_blobs_and_links_through_compression() {
        let plain = tar(
            &[("./manifest.json", b"[]"), ("a/layer.tar", b"\x1f\x8bxx")],
            Some(("b/layer.tar", "../a/layer.tar")),
        );
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&plain).expect("compressed");
        let file = tempfile::NamedTempFile::new().expect("temp file");
        for bytes in [plain, encoder.finish().expect("compressed")] {
            std::fs::write(file.path(), bytes).expect("written");
            let survey = survey(file.path()).expect("read");
            assert_eq!(survey["manifest.json"].document.as_deref(), Some(&b"[]"[..]));
            assert_eq!(survey["b/layer.tar"], survey["a/layer.tar"]);
            assert_eq!(survey["a/layer.tar"].compression, Some(Compression::Gzip));
            let wanted = [survey["b/layer.tar"].digest.clone()].into();
            let mut got = Vec::new();
            stream(file.path(), &survey, wanted, |_, reader| reader.read_to_end(&mut got).map(drop))
                .expect("read");
            assert_eq!(got, b"\x1f\x8bxx");
        }
        std::fs::write(file.path(), b"no archive at all, but long enough to be none").expect("written");
        assert!(survey(file.path()).is_err() || survey(file.path()).expect("empty").is_empty());
    }
}

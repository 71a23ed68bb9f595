//! Applies a layer: a tar stream in, a directory tree with overlayfs' marks out, as containerd's own applier makes it.
//!
//! Input: the compressed layer as it arrives, a directory that is ours, limits. Output: [`Applied`]: the digest of the
//! uncompressed layer and what could not be known without the layers below. [`stream`] reads, [`root`] keeps everything inside the
//! directory, [`merge`] brings a tree that was made apart in between the layers below and those above. It blocks.
//!
//! What it cannot do (files with holes) it says as [`ApplyError::Unsupported`], after it has checked the limits to the
//! end, so that containerd can be asked instead.

pub mod merge;
pub mod root;
pub mod stream;

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use self::root::{Place, Root};
use self::stream::{Header, Kind, TarReader};
use super::decode::{LimitError, Measured, Meter, decode};

/// Bytes copied at a time.
const COPY: usize = 256 * 1024;

/// A file of this name hides what lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A file whose name begins so takes away what lower layers have under the rest of the name.
const WHITEOUT: &[u8] = b".wh.";

/// What becomes of the marks of removed files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// Nothing is below: they only take away what the layer itself has.
    Remove,
    /// They are made as overlayfs understands them.
    Overlay,
}

/// What was made of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Digest of the uncompressed layer.
    pub diff_id: String,
    /// Directories without an entry of their own, which take their looks from the layers below.
    pub implicit: Vec<PathBuf>,
    /// The layer hides all that is below it.
    pub opaque_root: bool,
}

/// Why a layer was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// It cannot be read: damaged, or its source failed.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It goes over a limit.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// An entry says something that is not allowed.
    #[error("entry {path:?} {problem}")]
    Entry {
        /// Its path, as far as it is text.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An entry could not be made.
    #[error("cannot make entry {path:?}")]
    Make {
        /// Its path, as far as it is text.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The directory to fill cannot be used.
    #[error("cannot fill {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It has something that only containerd can unpack.
    #[error("it has {0}")]
    Unsupported(&'static str),
}

/// Applies a layer to the empty directory `target`.
pub fn apply(
    layer: impl Read,
    target: &Path,
    whiteouts: Whiteouts,
    meter: Meter,
) -> Result<Applied, ApplyError> {
    let directory = |source| ApplyError::Directory { path: target.to_owned(), source };
    let root = Root::open(target).map_err(directory)?;
    let decoded = decode(layer).map_err(ApplyError::Read)?;
    let reader = BufReader::with_capacity(COPY, Measured::new(decoded, meter));
    let mut work = Work {
        root,
        tar: TarReader::new(reader),
        whiteouts,
        directories: Vec::new(),
        opaque_root: false,
        buffer: vec![0; COPY],
    };
    let result = work.run();
    let Work { root, tar, opaque_root, .. } = work;
    let mut reader = tar.into_inner();
    // What follows the archive's end counts towards the digest.
    let result =
        result.and_then(|()| io::copy(&mut reader, &mut io::sink()).map(drop).map_err(ApplyError::Read));
    let measured = reader.into_inner();
    if let Some(limit) = measured.broken() {
        return Err(limit.into());
    }
    result?;
    Ok(Applied { diff_id: measured.digest(), implicit: root.into_implicit(), opaque_root })
}

struct Work<R: Read> {
    root: Root,
    tar: TarReader<BufReader<Measured<R>>>,
    whiteouts: Whiteouts,
    /// Directories' times are set last: what is made in them changes them.
    directories: Vec<(PathBuf, (i64, u32))>,
    opaque_root: bool,
    buffer: Vec<u8>,
}

impl<R: Read> Work<R> {
    fn run(&mut self) -> Result<(), ApplyError> {
        while let Some(header) = self.tar.next_entry().map_err(ApplyError::Read)? {
            if header.kind == Kind::Sparse {
                return Err(self.give_up(&header));
            }
            if let Some(path) = root::clean(&header.path) {
                self.entry(&header, &path)?;
            }
        }
        for (path, modified) in std::mem::take(&mut self.directories) {
            let set = self.root.set_directory_time(&path, modified);
            set.map_err(|source| ApplyError::Make { path: path.display().to_string(), source })?;
        }
        Ok(())
    }

    /// Measures the rest: whoever unpacks it must not be led over the limits either.
    fn give_up(&mut self, first: &Header) -> ApplyError {
        let mut holes = first.real_size.saturating_sub(first.size);
        loop {
            let counted = self.tar.get_mut().get_mut().take(holes);
            match counted.and_then(|()| self.tar.next_entry()) {
                Ok(Some(header)) => holes = header.real_size.saturating_sub(header.size),
                Ok(None) => return ApplyError::Unsupported("files with holes"),
                Err(error) => return ApplyError::Read(error),
            }
        }
    }

    fn entry(&mut self, header: &Header, path: &Path) -> Result<(), ApplyError> {
        let failed = |source| ApplyError::Make { path: text(&header.path), source };
        let place = self.root.place(path).map_err(failed)?;
        let name = path.file_name().map(std::os::unix::ffi::OsStrExt::as_bytes).unwrap_or_default();
        if name.starts_with(WHITEOUT) {
            return self.whiteout(header, path, &place, name);
        }
        let mut is_link = false;
        match header.kind {
            Kind::File => return self.file(header, &place),
            Kind::Directory => {
                self.root.make_directory(&place).map_err(failed)?;
                self.root.is_explicit(path);
                self.directories.push((path.to_owned(), header.modified));
            }
            Kind::Symlink => {
                self.root.create_symlink(&place, &header.link).map_err(failed)?;
                is_link = true;
            }
            Kind::Hardlink => {
                let target = root::clean(&header.link).ok_or_else(|| ApplyError::Entry {
                    path: text(&header.path),
                    problem: "is a hard link to the root",
                })?;
                let target = self.root.target(&target).map_err(failed)?;
                self.root.create_hardlink(&place, &target).map_err(failed)?;
                is_link = root::is_symlink(&place).map_err(failed)?;
            }
            Kind::Character(major, minor) => {
                let made = self.root.create_node(&place, FileType::CharacterDevice, (major, minor));
                made.map_err(failed)?;
            }
            Kind::Block(major, minor) => {
                let made = self.root.create_node(&place, FileType::BlockDevice, (major, minor));
                made.map_err(failed)?;
            }
            Kind::Fifo => self.root.create_node(&place, FileType::Fifo, (0, 0)).map_err(failed)?,
            Kind::Sparse => return Err(self.give_up(header)),
            Kind::Other(_) => {
                return Err(ApplyError::Entry { path: text(&header.path), problem: "is of an unknown type" });
            }
        }
        root::dress(&place, header, is_link).map_err(failed)
    }

    fn file(&mut self, header: &Header, place: &Place) -> Result<(), ApplyError> {
        let failed = |source| ApplyError::Make { path: text(&header.path), source };
        let mut file = self.root.create_file(place).map_err(failed)?;
        loop {
            let count = self.tar.read(&mut self.buffer).map_err(ApplyError::Read)?;
            if count == 0 {
                break;
            }
            io::Write::write_all(&mut file, &self.buffer[..count]).map_err(failed)?;
        }
        drop(file);
        root::dress(place, header, false).map_err(failed)
    }

    fn whiteout(
        &mut self,
        header: &Header,
        path: &Path,
        place: &Place,
        name: &[u8],
    ) -> Result<(), ApplyError> {
        let failed = |source| ApplyError::Make { path: text(&header.path), source };
        if name == OPAQUE {
            match (self.whiteouts, path.parent()) {
                // Nothing is below that could show through.
                (Whiteouts::Remove, _) => return Ok(()),
                (Whiteouts::Overlay, Some(parent)) if !parent.as_os_str().is_empty() => {}
                (Whiteouts::Overlay, _) => self.opaque_root = true,
            }
            return self.root.mark_opaque(place).map_err(failed);
        }
        let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(ApplyError::Entry { path: text(&header.path), problem: "takes away no file" });
        }
        let hidden = place.beside(hidden);
        match self.whiteouts {
            Whiteouts::Remove => self.root.remove(&hidden).map_err(failed),
            Whiteouts::Overlay => match self.root.create_whiteout(&hidden, header.uid, header.gid) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(ApplyError::Entry {
                    path: text(&header.path),
                    problem: "takes away a file of the same layer",
                }),
                other => other.map_err(failed),
            },
        }
    }
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
mod tests;

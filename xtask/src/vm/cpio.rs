//! A writer of the `newc` archive that the kernel unpacks as its first file system.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;

/// An archive under construction.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    count: u32,
    known: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory and its parents; one that is there is left as it is.
    pub(super) fn directory(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        let mut end = 0;
        while end < path.len() {
            end = path[end + 1..].find('/').map_or(path.len(), |next| end + 1 + next);
            let part = &path[..end];
            if self.known.insert(part.to_owned()) {
                self.entry(part, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file with its content, and the directories it is in; a path that is there stays as it is.
    pub(super) fn content(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.add(path, FILE | mode, content)
    }

    /// Adds a file of this machine at `path`; links are followed.
    pub(super) fn file(&mut self, path: &str, source: &Path) -> Result<()> {
        let content = fs::read(source).with_context(|| format!("reading {}", source.display()))?;
        let mode = fs::metadata(source)?.permissions().mode() & 0o777;
        self.content(path, mode, &content)
    }

    /// Adds a program of this machine, and the libraries it needs at the places it looks for them.
    pub(super) fn program(&mut self, path: &str, source: &Path) -> Result<()> {
        self.file(path, source)?;
        for library in super::libraries::of(source)? {
            self.file(&library.to_string_lossy(), &library)?;
        }
        Ok(())
    }

    /// Adds a file or a directory of this machine, with everything in it, at its own path.
    pub(super) fn tree(&mut self, source: &Path) -> Result<()> {
        if !source.is_dir() {
            return self.file(&source.to_string_lossy(), source);
        }
        self.directory(&source.to_string_lossy())?;
        let entries = fs::read_dir(source).with_context(|| format!("reading {}", source.display()))?;
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        paths.iter().try_for_each(|path| self.tree(path))
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.add(path, LINK, target.as_bytes())
    }

    /// The finished archive.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn add(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/');
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent)?;
        }
        if self.known.insert(path.to_owned()) {
            self.entry(path, mode, content)?;
        }
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        use std::fmt::Write as _;
        self.count += 1;
        let size = u32::try_from(content.len()).with_context(|| format!("{name} is too large"))?;
        let name_size = u32::try_from(name.len() + 1)?;
        // inode, mode, uid, gid, links, time, size, device (2), special device (2), name size, checksum
        let fields = [self.count, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let header = fields.iter().fold("070701".to_owned(), |mut text, field| {
            // Writing to a String cannot fail.
            write!(text, "{field:08x}").ok();
            text
        });
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_parents_come_first() {
        let mut archive = Archive::default();
        archive.content("a/b/c", 0o755, b"12345").unwrap();
        archive.content("/a/b/c", 0o755, b"again").unwrap();
        archive.link("a/d", "b/c").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let places: Vec<_> = ["a\0", "a/b\0", "a/b/c\0", "a/d\0", "TRAILER!!!\0"]
            .iter()
            .map(|name| text.find(name).unwrap())
            .collect();
        assert!(places.is_sorted(), "{places:?}");
        assert!(text.contains("12345") && !text.contains("again"), "the first one of a path counts");
        assert_eq!(text.matches("070701").count(), 5);
    }
}

//! An image layer: a sorted tree of entries, packed as tar and gzip with fixed times, so that equal trees give
//! equal digests.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// One file-system object of a layer.
pub(crate) enum Entry {
    /// A directory with its mode.
    Dir(u32),
    /// A file with its mode and content.
    File(u32, Vec<u8>),
    /// A symbolic link with its target.
    Link(String),
}

/// The objects of a layer by their path without a leading slash.
#[derive(Default)]
pub(crate) struct Tree {
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// Adds one object, replacing what had its path, and its parent directories (mode 0755).
    pub(crate) fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/');
        let mut end = 0;
        while let Some(next) = path[end..].find('/') {
            let parent = &path[..end + next];
            self.entries.entry(parent.to_owned()).or_insert(Entry::Dir(0o755));
            end += next + 1;
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Adds a file from text.
    pub(crate) fn text(&mut self, path: &str, content: &str) {
        self.add(path, Entry::File(0o644, content.as_bytes().to_vec()));
    }

    /// Adds all below `root` whose path `keep` accepts.
    pub(crate) fn add_dir(&mut self, root: &Path, keep: &dyn Fn(&str) -> bool) -> Result<()> {
        self.add_below(root, root, keep)
    }

    fn add_below(&mut self, root: &Path, dir: &Path, keep: &dyn Fn(&str) -> bool) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry?.path();
            let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
            if !keep(&name) {
                continue;
            }
            let meta = fs::symlink_metadata(&path)?;
            let mode = meta.permissions().mode() & 0o7777;
            if meta.is_symlink() {
                self.add(&name, Entry::Link(fs::read_link(&path)?.to_string_lossy().into_owned()));
            } else if meta.is_dir() {
                self.add(&name, Entry::Dir(mode));
                self.add_below(root, &path, keep)?;
            } else {
                self.add(&name, Entry::File(mode, fs::read(&path)?));
            }
        }
        Ok(())
    }

    fn tar(&self) -> Result<Vec<u8>> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, entry) in &self.entries {
            let mut header = tar::Header::new_gnu();
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            match entry {
                Entry::Dir(mode) => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_mode(*mode);
                    header.set_size(0);
                    builder.append_data(&mut header, format!("{path}/"), std::io::empty())?;
                }
                Entry::File(mode, content) => {
                    header.set_mode(*mode);
                    header.set_size(content.len() as u64);
                    builder.append_data(&mut header, path, content.as_slice())?;
                }
                Entry::Link(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_mode(0o777);
                    header.set_size(0);
                    builder.append_link(&mut header, path, target)?;
                }
            }
        }
        Ok(builder.into_inner()?)
    }
}

/// A packed layer.
pub(crate) struct Layer {
    /// Digest of the tar archive.
    pub(crate) diff_id: String,
    /// Digest of the compressed archive.
    pub(crate) digest: String,
    /// The compressed archive.
    pub(crate) compressed: Vec<u8>,
}

impl Layer {
    /// Packs a tree.
    pub(crate) fn pack(tree: &Tree) -> Result<Self> {
        Self::of_archive(&tree.tar()?)
    }

    /// Compresses an archive made elsewhere.
    pub(crate) fn of_archive(archive: &[u8]) -> Result<Self> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(archive)?;
        let compressed = encoder.finish()?;
        Ok(Self { diff_id: digest(archive), digest: digest(&compressed), compressed })
    }
}

/// `sha256:<hex>` of some bytes.
pub(crate) fn digest(content: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(content).iter().fold("sha256:".to_owned(), |mut text, byte| {
        // Writing to a String cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_trees_have_equal_digests_and_parents_come_first() {
        let make = |order: [&str; 2]| {
            let mut tree = Tree::default();
            for path in order {
                tree.text(path, "content");
            }
            tree
        };
        let one = make(["etc/a/b", "bin/sh"]);
        let two = make(["bin/sh", "/etc/a/b"]);
        assert_eq!(Layer::pack(&one).unwrap().digest, Layer::pack(&two).unwrap().digest);
        let archive = one.tar().unwrap();
        let mut tar = tar::Archive::new(archive.as_slice());
        let paths: Vec<String> = tar
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(paths, ["bin/", "bin/sh", "etc/", "etc/a/", "etc/a/b"]);
    }
}

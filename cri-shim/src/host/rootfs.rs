//! Reads single files of a container's root file system without mounting it.
//!
//! Input: the mounts of an overlay snapshot. Output: the text of a file as the container will see it. Symbolic links are
//! followed inside the layer only (openat2 with RESOLVE_IN_ROOT), so an image cannot make us read the node's files.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::error::RuntimeError;

/// More than any sane passwd file; the rest is not read.
const LIMIT: u64 = 4 << 20;

/// The text of `path` (relative to the root), empty when there is no such file.
pub fn read(mounts: &[Mount], path: &str) -> Result<String, RuntimeError> {
    for layer in layers(mounts) {
        match open_in(&layer, path) {
            Ok(file) => {
                let metadata = file.metadata().map_err(RuntimeError::host("inspect", &layer))?;
                if metadata.file_type().is_char_device() && metadata.rdev() == 0 {
                    // A whiteout: this layer took the file away.
                    return Ok(String::new());
                }
                let mut bytes = Vec::new();
                let place = layer.join(path);
                if metadata.is_file() {
                    file.take(LIMIT).read_to_end(&mut bytes).map_err(RuntimeError::host("read", &place))?;
                }
                return Ok(String::from_utf8_lossy(&bytes).into_owned());
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENXIO) => {}
            Err(errno) => return Err(RuntimeError::host("open", &layer.join(path))(errno.into())),
        }
    }
    Ok(String::new())
}

/// The directories of the layers, uppermost first.
fn layers(mounts: &[Mount]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for mount in mounts {
        if mount.r#type != "overlay" {
            found.push(PathBuf::from(&mount.source));
        }
        let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
        found.extend(option("upperdir=").map(PathBuf::from));
        found.extend(option("lowerdir=").into_iter().flat_map(|all| all.split(':')).map(PathBuf::from));
    }
    found
}

fn open_in(layer: &Path, path: &str) -> Result<File, Errno> {
    let root =
        File::open(layer).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))?;
    // Not blocking: a FIFO in an image must not hold us up.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(&root, path, how).map(File::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(layers: &[&Path]) -> Vec<Mount> {
        let lower: Vec<_> = layers.iter().map(|layer| layer.to_string_lossy()).collect();
        let options = vec![format!("lowerdir={}", lower.join(":"))];
        vec![Mount { r#type: "overlay".into(), options, ..Mount::default() }]
    }

    #[test]
    fn the_upper_layer_wins_and_links_stay_inside() {
        let upper = tempfile::tempdir().unwrap();
        let lower = tempfile::tempdir().unwrap();
        for (layer, text) in [(&upper, "upper"), (&lower, "lower")] {
            std::fs::create_dir(layer.path().join("etc")).unwrap();
            std::fs::write(layer.path().join("etc/passwd"), text).unwrap();
        }
        std::fs::write(lower.path().join("etc/group"), "groups").unwrap();
        std::os::unix::fs::symlink("/../../../etc/hostname", upper.path().join("etc/shadow")).unwrap();
        let mounts = overlay(&[upper.path(), lower.path()]);
        assert_eq!(read(&mounts, "etc/passwd").unwrap(), "upper");
        assert_eq!(read(&mounts, "etc/group").unwrap(), "groups");
        assert_eq!(read(&mounts, "etc/shadow").unwrap(), "", "the node's own file is out of reach");
    }
}

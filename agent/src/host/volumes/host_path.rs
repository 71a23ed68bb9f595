//! hostPath volumes: checks the type, creates for the `…OrCreate` types; messages as upstream's.

use std::fs::{DirBuilder, FileType, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::HostPathVolumeSource;
use rustix::fs::AtFlags;

use crate::host::asked::known;

/// Checks that `source.path` is what `source.type` says.
pub(super) fn check(source: &HostPathVolumeSource) -> Result<(), String> {
    let path = Path::new(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let created = match kind {
        // Nothing is checked; like container runtimes, a missing path becomes a directory.
        "" => {
            return if known(path, AtFlags::empty()).is_ok() { Ok(()) } else { told(path, create_dir(path)) };
        }
        "DirectoryOrCreate" => create_dir(path),
        "FileOrCreate" => create_file(path),
        _ => Ok(()),
    };
    told(path, created)?;
    let (is_right, expected): (fn(&FileType) -> bool, &str) = match kind {
        "Directory" | "DirectoryOrCreate" => (FileType::is_dir, "a directory"),
        "File" | "FileOrCreate" => (FileType::is_file, "a file"),
        "Socket" => (FileType::is_socket, "a socket file"),
        "CharDevice" => (FileType::is_char_device, "a character device"),
        "BlockDevice" => (FileType::is_block_device, "a block device"),
        other => return Err(format!("{other} is an invalid volume type")),
    };
    let found = std::fs::metadata(path).map(|metadata| metadata.file_type());
    if found.is_ok_and(|found| is_right(&found)) {
        return Ok(());
    }
    Err(format!("hostPath type check failed: {} is not {expected}", source.path))
}

fn told(path: &Path, outcome: io::Result<()>) -> Result<(), String> {
    outcome.map_err(|error| format!("cannot create hostPath {}: {error}", path.display()))
}

fn create_dir(path: &Path) -> io::Result<()> {
    if path.exists() { Ok(()) } else { DirBuilder::new().recursive(true).mode(0o755).create(path) }
}

fn create_file(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o644).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &Path, kind: &str) -> HostPathVolumeSource {
        HostPathVolumeSource { path: path.display().to_string(), type_: Some(kind.to_owned()) }
    }

    #[test]
    fn types_are_checked_with_upstreams_words() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let missing = dir.path().join("missing");
        for (path, kind, expected) in [
            (dir.path(), "Directory", None),
            (&file, "File", None),
            (Path::new("/dev/null"), "CharDevice", None),
            (&file, "Directory", Some("is not a directory")),
            (dir.path(), "File", Some("is not a file")),
            (&missing, "Directory", Some("is not a directory")),
            (&file, "Socket", Some("is not a socket file")),
            (&file, "CharDevice", Some("is not a character device")),
            (&file, "BlockDevice", Some("is not a block device")),
        ] {
            let outcome = check(&source(path, kind));
            match expected {
                None => assert_eq!(outcome, Ok(())),
                Some(text) => {
                    let message = format!("hostPath type check failed: {} {text}", path.display());
                    assert_eq!(outcome, Err(message));
                }
            }
        }
    }

    #[test]
    fn or_create_types_create() {
        let dir = tempfile::tempdir().unwrap();
        check(&source(&dir.path().join("a/b"), "DirectoryOrCreate")).unwrap();
        assert!(dir.path().join("a/b").is_dir());
        check(&source(&dir.path().join("a/f"), "FileOrCreate")).unwrap();
        assert!(dir.path().join("a/f").is_file());
        assert!(check(&source(&dir.path().join("a/f"), "DirectoryOrCreate")).is_err());
    }
}

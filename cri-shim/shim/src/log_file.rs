//! The CRI log file of one container: appended to, reopened after rotation.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An open log file, or none, which takes everything and keeps nothing.
#[derive(Debug)]
pub struct LogFile {
    path: Option<PathBuf>,
    file: Option<File>,
}

impl LogFile {
    /// Opens `path`, making it and its directory.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let mut log = Self { path: path.map(Path::to_owned), file: None };
        log.reopen()?;
        Ok(log)
    }

    /// Opens the path again; when that fails the old file goes on being written.
    pub fn reopen(&mut self) -> io::Result<()> {
        if let Some(path) = &self.path {
            self.file = Some(open(path)?);
        }
        Ok(())
    }

    /// Appends `lines`. What cannot be written is lost: a container never waits for a full disk.
    pub fn write(&mut self, lines: &[u8]) {
        if let Some(file) = &mut self.file {
            file.write_all(lines).ok();
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let told =
        |error: io::Error| io::Error::new(error.kind(), format!("open log {}: {error}", path.display()));
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(told)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o640).open(path).map_err(told)
}

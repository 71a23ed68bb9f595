//! Files that a configuration or a directory names: opened without waiting for anybody.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// What keeps an `open` from waiting: for the other end of a pipe, or for a device.
pub const NEVER_WAIT: i32 = libc::O_NONBLOCK | libc::O_NOCTTY;

/// Opens a regular file for reading. Anything else is refused: opening a pipe may wait for ever, and reading a device need
/// not end.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(NEVER_WAIT).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
}

/// Reads a regular file of at most so many bytes.
pub fn read_regular(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    match u64::try_from(bytes.len()) {
        Ok(length) if length <= most => Ok(bytes),
        _ => Err(io::Error::other(format!("it is larger than {most} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn what_is_no_regular_file_is_told_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (pipe, file) = (dir.path().join("pipe"), dir.path().join("file"));
        mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        fs::write(&file, "12345").unwrap();
        for special in [pipe.as_path(), dir.path(), Path::new("/dev/zero")] {
            let told = read_regular(special, 10).unwrap_err().to_string();
            assert_eq!(told, "it is not a regular file", "{}", special.display());
        }
        assert_eq!(read_regular(&file, 5).unwrap(), b"12345");
        assert_eq!(read_regular(&file, 4).unwrap_err().to_string(), "it is larger than 4 bytes");
    }
}

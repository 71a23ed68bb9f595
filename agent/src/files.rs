//! What the standard library leaves to say about files. Blocks.

use std::io;
use std::path::Path;

/// Removes a file; none there is as good.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

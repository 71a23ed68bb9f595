//! Kernel parameters below `/proc/sys`.
//!
//! Network parameters belong to the namespace of the calling thread; use [`crate::netns::run_in`] to
//! reach those of another one. A value that is already right is not written, so that a read-only
//! `/proc/sys` with the right content is no error.

use std::{fs, io, path::PathBuf};

/// A parameter that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot set sysctl {name} to {value}")]
pub struct SysctlError {
    /// The parameter with slashes, `net/ipv4/ip_forward`.
    pub name: String,
    /// The value wanted.
    pub value: String,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Sets `name` (with slashes) to `value`; tells whether it had to be changed.
pub fn set(name: &str, value: &str) -> Result<bool, SysctlError> {
    let path = PathBuf::from("/proc/sys").join(name);
    let write = || {
        if fs::read_to_string(&path)?.trim() == value {
            return Ok(false);
        }
        fs::write(&path, value).map(|()| true)
    };
    write().map_err(|source| SysctlError { name: name.to_owned(), value: value.to_owned(), source })
}

//! Kernel parameters below `/proc/sys`.
//!
//! Network parameters belong to the namespace of the calling thread; use [`crate::netns::visit`] to
//! reach those of another one. A value that is already right is not written, so that a read-only
//! `/proc/sys` with the right content is no error.

use std::{fs, io, path::PathBuf};

/// A parameter that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot set sysctl {name} to {value}")]
pub struct SysctlError {
    /// The parameter with slashes, `net/ipv4/ip_forward`.
    pub name: String,
    /// The value wanted; empty when it was read only.
    pub value: String,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// The value of `name` (with slashes), without the newline.
pub fn get(name: &str) -> Result<String, SysctlError> {
    fs::read_to_string(path(name)).map(|text| text.trim_end().to_owned()).map_err(|source| SysctlError {
        name: name.to_owned(),
        value: String::new(),
        source,
    })
}

/// Sets `name` (with slashes) to `value`; tells whether it had to be changed.
pub fn set(name: &str, value: &str) -> Result<bool, SysctlError> {
    let path = path(name);
    let write = || {
        if fs::read_to_string(&path).is_ok_and(|text| same(&text, value)) {
            return Ok(false);
        }
        fs::write(&path, value).map(|()| true)
    };
    write().map_err(|source| SysctlError { name: name.to_owned(), value: value.to_owned(), source })
}

/// Whether two values are the same to the kernel, which separates numbers by tabs and takes spaces.
pub fn same(one: &str, other: &str) -> bool {
    one.split_ascii_whitespace().eq(other.split_ascii_whitespace())
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_compared_as_the_kernel_reads_them() {
        assert!(same("1024\t65000\n", "1024 65000"));
        assert!(!same("1", "0"));
    }
}

//! Kernel settings that a node of Kubernetes has: memory is promised freely, and a kernel that is broken boots anew.
//!
//! The list is upstream's (`protectKernelDefaults`). Reads and writes below `/proc/sys`, or below another root in tests.

use std::fmt;
use std::path::Path;

use tracing::{info, warn};

/// Where the kernel has them.
pub(super) const ROOT: &str = "/proc/sys";

/// Name below `/proc/sys`, and value.
const WANTED: [(&str, u64); 6] = [
    ("vm/overcommit_memory", 1),
    ("vm/panic_on_oom", 0),
    ("kernel/panic", 10),
    ("kernel/panic_on_oops", 1),
    ("kernel/keys/root_maxkeys", 1_000_000),
    ("kernel/keys/root_maxbytes", 25_000_000),
];

/// A setting that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Deviation {
    name: &'static str,
    wanted: u64,
    /// What is there instead, or why that cannot be told.
    found: String,
}

impl fmt::Display for Deviation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, wanted, found } = self;
        write!(f, "invalid kernel flag: {name}, expected value: {wanted}, actual value: {found}")
    }
}

/// Settings that deviate.
pub(super) fn deviations(root: &Path) -> Vec<Deviation> {
    let deviation = |(name, wanted): (&'static str, u64)| {
        let found = match std::fs::read_to_string(root.join(name)) {
            Ok(text) if text.trim().parse() == Ok(wanted) => return None,
            Ok(text) => text.trim().to_owned(),
            Err(error) => error.to_string(),
        };
        Some(Deviation { name, wanted, found })
    };
    WANTED.into_iter().filter_map(deviation).collect()
}

/// Sets those that deviate; what is not permitted is told and left.
pub(super) fn set(root: &Path) {
    for Deviation { name, wanted, found } in deviations(root) {
        match std::fs::write(root.join(name), wanted.to_string()) {
            Ok(()) => info!("kernel setting {name} is {wanted} now, it was {found}"),
            Err(error) => warn!(%error, "kernel setting {name} stays {found}; {wanted} is usual on a node"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_deviates_is_told_and_set() {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in WANTED {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{value}\n")).unwrap();
        }
        assert_eq!(deviations(dir.path()), []);
        std::fs::write(dir.path().join("kernel/panic"), "0\n").unwrap();
        std::fs::remove_dir_all(dir.path().join("kernel/keys")).unwrap();
        let told: Vec<String> = deviations(dir.path()).iter().map(ToString::to_string).collect();
        assert_eq!(told[0], "invalid kernel flag: kernel/panic, expected value: 10, actual value: 0");
        assert_eq!(told.len(), 3);
        set(dir.path());
        assert_eq!(deviations(dir.path()).len(), 2, "what the kernel does not have stays away");
    }
}

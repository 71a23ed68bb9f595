//! Joining namespaces and writing id maps.

use std::os::fd::{AsFd, OwnedFd};

use crate::host::sys;
use crate::steps::{At, Outcome, Step};

/// A namespace to join: open, with its `CLONE_NEW*`.
#[derive(Debug)]
pub(crate) struct Join {
    pub(crate) file: OwnedFd,
    pub(crate) kind: u32,
    /// For messages.
    pub(crate) path: String,
}

/// Joins them in their order. Runs in the child.
pub(crate) fn join(list: &[Join]) -> Outcome<()> {
    for (index, namespace) in list.iter().enumerate() {
        sys::setns(namespace.file.as_fd(), namespace.kind).at_index(Step::JoinNamespace, index)?;
    }
    Ok(())
}

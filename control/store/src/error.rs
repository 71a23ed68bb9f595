//! What can go wrong in the store, in words a caller can act on.

use std::path::PathBuf;

use crate::{KeyValue, Revision};

/// An error of the store. Names the key, revision or file concerned.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A condition of the transaction did not hold; nothing was written.
    #[error("key {key} is not in the expected state")]
    Conflict {
        /// The key whose condition failed, as text.
        key: String,
        /// What is stored there now.
        current: Option<Box<KeyValue>>,
    },
    /// History does not reach back to the asked revision.
    #[error("revision {asked} is compacted, the oldest is {oldest}")]
    Compacted {
        /// What the caller wanted.
        asked: Revision,
        /// The oldest revision that would have worked.
        oldest: Revision,
    },
    /// The asked revision does not exist yet.
    #[error("revision {asked} is in the future, the newest is {newest}")]
    Future {
        /// What the caller wanted.
        asked: Revision,
        /// The newest revision.
        newest: Revision,
    },
    /// The file could not be opened, or is not a store.
    #[error("open store {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// Another process has the file open.
    #[error("store {path} is in use by another process")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file was written by a version this one does not know.
    #[error("store {path} has format {found}, this version knows format {known}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Format number found.
        found: u64,
        /// Format number understood.
        known: u64,
    },
    /// Reading or writing the file failed (disk full, IO error). Nothing of the request was kept; it may be tried again.
    #[error("store {path} cannot be {action}: {reason}")]
    Unavailable {
        /// The file.
        path: PathBuf,
        /// `read` or `written`.
        action: &'static str,
        /// The cause, already as text because one failed commit answers many callers.
        reason: String,
    },
    /// A record does not decode.
    #[error("store {path} holds a damaged record ({what})")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which record.
        what: &'static str,
    },
    /// The directory of the store could not be made.
    #[error("create directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The writer's queue stayed full until the deadline.
    #[error("the store did not accept the write in time")]
    Overloaded,
    /// The store has been closed.
    #[error("the store is closed")]
    Closed,
}

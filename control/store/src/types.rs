//! The store's vocabulary: revisions, transactions, ranges, events, and the [`Store`] trait that every backend implements.
//!
//! Inputs and outputs are plain data. Nothing here does IO.

use std::{fmt, future::Future, pin::Pin};

use bytes::Bytes;

use crate::StoreError;

/// A boxed future, so that [`Store`] can be used as a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The number of a committed transaction. Grows by one with each, survives restarts, never moves backwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision that follows this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One stored pair with the revisions of its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// The value as it was written.
    pub value: Bytes,
    /// Revision that created the key.
    pub created: Revision,
    /// Revision that last wrote the key.
    pub modified: Revision,
}

/// A condition on one key that must hold for a transaction to commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The key must not exist.
    Absent(Bytes),
    /// The key must exist and have been last written at this revision.
    ModifiedAt(Bytes, Revision),
}

impl Expect {
    /// The key the condition speaks of.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Absent(key) | Self::ModifiedAt(key, _) => key,
        }
    }
}

/// One change of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write a value, creating the key where it is missing.
    Put(Bytes, Bytes),
    /// Remove a key; no effect where it is missing.
    Delete(Bytes),
}

/// Conditions and changes that commit together or not at all, at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold.
    pub expects: Vec<Expect>,
    /// Done in order. At most one change per key.
    pub ops: Vec<Op>,
}

impl Txn {
    /// Create `key`, failing with [`StoreError::Conflict`] when it exists.
    pub fn create(key: Bytes, value: Bytes) -> Self {
        Self { expects: vec![Expect::Absent(key.clone())], ops: vec![Op::Put(key, value)] }
    }

    /// Overwrite `key`, which must have been last written at `expected`.
    pub fn update(key: Bytes, expected: Revision, value: Bytes) -> Self {
        Self { expects: vec![Expect::ModifiedAt(key.clone(), expected)], ops: vec![Op::Put(key, value)] }
    }

    /// Remove `key`, which must have been last written at `expected`.
    pub fn delete(key: Bytes, expected: Revision) -> Self {
        Self { expects: vec![Expect::ModifiedAt(key.clone(), expected)], ops: vec![Op::Delete(key)] }
    }
}

/// What to list.
#[derive(Clone, Debug, Default)]
pub struct Range {
    /// Only keys that start with this.
    pub prefix: Bytes,
    /// Only keys greater than this one, where set.
    pub after: Option<Bytes>,
    /// At most so many; 0 means all.
    pub limit: usize,
    /// The state as of this revision; `None` means the newest.
    pub at: Option<Revision>,
}

/// A page of a listing.
#[derive(Clone, Debug, Default)]
pub struct RangePage {
    /// Pairs in key order.
    pub items: Vec<KeyValue>,
    /// The revision the page shows.
    pub revision: Revision,
    /// How many more pairs match after the last one of this page.
    pub remaining: usize,
}

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The key came into being.
    Created,
    /// The value was replaced.
    Updated,
    /// The key was removed.
    Deleted,
}

/// One change of one key, as watchers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The key.
    pub key: Bytes,
    /// The new value; for [`EventKind::Deleted`] the last one.
    pub value: Bytes,
    /// Value and revision before the change, where the key existed.
    pub previous: Option<(Bytes, Revision)>,
    /// Revision that created the key.
    pub created: Revision,
    /// Revision of the change.
    pub revision: Revision,
}

/// A revisioned key-value store.
///
/// Futures resolve only when the answer is durable: a transaction that returned `Ok` survives `kill -9` and power loss.
pub trait Store: Send + Sync + 'static {
    /// Commit a transaction and return its revision.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Revision, StoreError>>;

    /// Read one key as of the newest revision.
    fn get(&self, key: Bytes) -> BoxFuture<'_, Result<Option<KeyValue>, StoreError>>;

    /// List a page of keys; [`StoreError::Compacted`] where the asked revision is gone, [`StoreError::Future`] where it is not there yet.
    fn range(&self, range: Range) -> BoxFuture<'_, Result<RangePage, StoreError>>;

    /// The newest committed revision. Anything acknowledged before the call is at or below it.
    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>>;

    /// The oldest revision after which history is complete: `watch` and `range` accept it and everything newer.
    fn compacted(&self) -> BoxFuture<'_, Result<Revision, StoreError>>;

    /// All changes of keys below `prefix` after the given revision, in order; [`StoreError::Compacted`] where history does not reach back.
    fn watch(&self, prefix: Bytes, after: Revision) -> BoxFuture<'_, Result<Box<dyn Watch>, StoreError>>;

    /// Forget history up to and including `revision`. Current values stay.
    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Finish what was accepted, flush and stop. Later calls fail with [`StoreError::Closed`].
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// A running watch.
pub trait Watch: Send {
    /// The next events, never empty, together with the revision up to which the watch has now seen everything.
    ///
    /// Cancel safe: a dropped future loses no event.
    fn next(&mut self) -> BoxFuture<'_, Result<(Vec<Event>, Revision), StoreError>>;
}

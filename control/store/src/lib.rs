//! Revisioned key-value store: what the API server keeps its objects in.
//!
//! Purpose: an ordered map of bytes to bytes in which every committed transaction gets the next [`Revision`], and whose recent history can be
//! listed and watched. [`Store`] is the contract; [`RedbStore`] keeps it in one file with group commit. A second backend (etcd) has to
//! implement the same trait and nothing else.
//!
//! How the parts connect: callers send [`Txn`]s over a bounded channel to one writer thread, which batches whatever is waiting into one redb
//! commit (one fsync), answers every caller after that commit, and then publishes the events to the watchers. Readers open their own
//! snapshot and never wait for the writer.
//!
//! Reading order: [`types`] (vocabulary and trait), [`error`], `codec` (record layout), `redb` (backend).
//!
//! This crate never looks into a value and knows nothing of Kubernetes.

mod codec;
pub mod error;
mod redb;
pub mod types;

pub use error::StoreError;
pub use redb::{RedbOptions, RedbStore};
pub use types::{
    BoxFuture, Event, EventKind, Expect, KeyValue, Op, Range, RangePage, Revision, Store, Txn, Watch,
};

//! Object metadata: what the server owns and what a write may change.
//!
//! Input: the object a client sent, the stored one, and identity made by the caller. Output: the object to store, or
//! an error, or what a deletion amounts to. resourceVersion is the server's: set when an object is read from the
//! store, checked here by [`check_preconditions`].

use serde_json::Value;

use crate::{kinds::ResourceInfo, status::ApiError};

/// What a new object is given; made by the caller, since this crate has no clock and no random source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewIdentity<'a> {
    /// Fresh UUID.
    pub uid: &'a str,
    /// Now, RFC 3339 with whole seconds and `Z`.
    pub now: &'a str,
    /// Five characters out of [`NAME_ALPHABET`], appended to `generateName`.
    pub name_suffix: &'a str,
}

/// Characters that generated names are made of, as upstream: no vowels and no look-alikes.
pub const NAME_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Which part of an object a write may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateTarget {
    /// The object itself; `status` is kept where it has a subresource.
    Main,
    /// `/status`: everything but `status` and metadata is kept.
    Status,
    /// Another subresource (`scale`, `binding`, `ephemeralcontainers`, `finalize`): status is kept, spec may change.
    Spec,
}

/// What a DELETE request asks for (`metav1.DeleteOptions`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// `gracePeriodSeconds`.
    pub grace_period_seconds: Option<i64>,
    /// `preconditions.uid`.
    pub uid: Option<String>,
    /// `preconditions.resourceVersion`.
    pub resource_version: Option<String>,
    /// `propagationPolicy` (or the old `orphanDependents`).
    pub propagation: Option<Propagation>,
    /// `dryRun` contains `All`.
    pub dry_run: bool,
}

/// What happens to dependents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// The collector deletes them later.
    Background,
    /// They go first.
    Foreground,
    /// They stay, without the owner reference.
    Orphan,
}

/// What a deletion does to the stored object.
#[derive(Debug, Clone, PartialEq)]
pub enum Deletion {
    /// Remove it now.
    Remove,
    /// Store this (deletionTimestamp, grace period, finalizers) and wait.
    Update(Value),
    /// It is already being deleted at least that fast: answer with the object as it is.
    Pending,
}

//! What a controller has written and its cache may not show yet.
//!
//! Deciding on a cache that lacks one's own last write repeats that write, or loses a race against it. So
//! each controller notes the versions it was answered with and waits until its cache has caught up.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use control_decide::replicaset::expectations::Expectations;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::{context::now, informer::Key, write::version_number};

/// When to look again at a cache that has not caught up, should its event get lost.
pub(crate) const CATCH_UP: Duration = Duration::from_secs(5);

/// Writes to objects of one kind, by the key of the object they were made for.
#[derive(Default)]
pub(crate) struct Written(Mutex<Expectations<Key>>);

impl Written {
    fn with<T>(&self, look: impl FnOnce(&mut Expectations<Key>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The API server answered a write with this object.
    pub(crate) fn note(&self, key: &Key, answer: &ObjectMeta) {
        self.with(|written| written.wrote(key, version_number(answer), now()));
    }

    /// The API server accepted the deletion of the object with this uid.
    pub(crate) fn note_deletion(&self, key: &Key, uid: &str) {
        self.with(|written| written.deleted(key, uid, now()));
    }

    /// True when a cache at this version shows it all. `still_live(uid)` tells whether the cache holds the
    /// object and does not know of its deletion. Read the version before the objects: a cache that moves on
    /// in between then only looks older than it is.
    pub(crate) fn is_seen(&self, key: &Key, version: u64, still_live: impl Fn(&str) -> bool) -> bool {
        self.with(|written| written.are_met(key, version, still_live, now()))
    }

    /// Nothing will be written for this key any more.
    pub(crate) fn forget(&self, key: &Key) {
        self.with(|written| written.forget(key));
    }
}

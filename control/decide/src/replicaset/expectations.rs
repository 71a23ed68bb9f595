//! Own writes that a cache may not show yet.
//!
//! A controller that has just created pods must not create them again because its cache is late. After each
//! step the executor records the newest resourceVersion it got back and the uids it deleted; until the
//! cache has caught up with both, it decides nothing new. Resource versions of one resource are comparable
//! numbers on every API server since 1.35 (KEP-5504), and were so with etcd before.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};

/// After this time a missing event no longer holds the controller up.
const EXPIRY: SignedDuration = SignedDuration::from_mins(5);

/// What each owner (by key) has written and not yet seen. Bounded by the number of owners; an owner's entry
/// by the pods of one step.
#[derive(Clone, Debug)]
pub struct Expectations<K> {
    pending: BTreeMap<K, Pending>,
}

impl<K> Default for Expectations<K> {
    fn default() -> Self {
        Expectations { pending: BTreeMap::new() }
    }
}

#[derive(Clone, Debug)]
struct Pending {
    resource_version: u64,
    deleted: BTreeSet<String>,
    since: Timestamp,
}

impl<K: Ord + Clone> Expectations<K> {
    /// Records that the API server answered a write with this resourceVersion.
    pub fn wrote(&mut self, key: &K, resource_version: u64, now: Timestamp) {
        let pending = self.entry(key, now);
        pending.resource_version = pending.resource_version.max(resource_version);
    }

    /// Records that the API server accepted the deletion of the object with this uid.
    pub fn deleted(&mut self, key: &K, uid: &str, now: Timestamp) {
        self.entry(key, now).deleted.insert(uid.to_owned());
    }

    fn entry(&mut self, key: &K, now: Timestamp) -> &mut Pending {
        let pending = self.pending.entry(key.clone()).or_insert_with(|| Pending {
            resource_version: 0,
            deleted: BTreeSet::new(),
            since: now,
        });
        pending.since = now;
        pending
    }

    /// True when a cache at `cache_version` shows all that the owner wrote. `still_live(uid)` tells whether
    /// the cache holds the object without a deletion timestamp.
    pub fn are_met(
        &mut self,
        key: &K,
        cache_version: u64,
        still_live: impl Fn(&str) -> bool,
        now: Timestamp,
    ) -> bool {
        let Some(pending) = self.pending.get(key) else { return true };
        let met =
            cache_version >= pending.resource_version && !pending.deleted.iter().any(|uid| still_live(uid));
        let settled = met || now.duration_since(pending.since) > EXPIRY;
        if settled {
            self.pending.remove(key);
        }
        settled
    }

    /// Forgets an owner that is gone.
    pub fn forget(&mut self, key: &K) {
        self.pending.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_decided_until_the_cache_has_caught_up() {
        let start = Timestamp::UNIX_EPOCH;
        let mut expectations = Expectations::default();
        expectations.wrote(&"set", 40, start);
        expectations.wrote(&"set", 38, start);
        expectations.deleted(&"set", "pod-1", start);
        assert!(!expectations.are_met(&"set", 39, |_| false, start), "creation not seen");
        assert!(!expectations.are_met(&"set", 41, |uid| uid == "pod-1", start), "deletion not seen");
        assert!(expectations.are_met(&"other", 0, |_| true, start), "others are not held up");
        assert!(expectations.are_met(&"set", 41, |_| false, start));
        assert!(expectations.are_met(&"set", 0, |_| true, start), "met once, forgotten");
    }

    #[test]
    fn a_lost_event_holds_the_owner_up_for_a_while_only() {
        let mut expectations = Expectations::default();
        expectations.wrote(&1, 40, Timestamp::UNIX_EPOCH);
        let later = Timestamp::UNIX_EPOCH + SignedDuration::from_mins(6);
        assert!(expectations.are_met(&1, 0, |_| true, later));
    }
}

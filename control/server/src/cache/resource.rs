//! The cache of one resource: its objects in key order and the most recent changes.
//!
//! Written by the feed only; read by lists and watches under a short read lock. A watch keeps a position and reads the ring of changes
//! itself, so that a slow client costs nothing: when the ring has moved past its position it has to start over.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    sync::{Arc, PoisonError, RwLock},
};

use control_api::kinds::ResourceInfo;
use control_store::{EventKind, Revision};
use tokio::sync::watch;

use super::Object;

/// At most so many changes are kept per resource.
const RING_CHANGES: usize = 1024;
/// Above this many bytes of objects held only for the ring, it shrinks (not below [`RING_LEAST`]).
const RING_BYTES: usize = 2 << 20;
/// So many changes are kept whatever their size.
const RING_LEAST: usize = 64;

/// A change of one object.
#[derive(Debug)]
pub(crate) struct Change {
    /// What happened.
    pub kind: EventKind,
    /// The object afterwards; for a deletion its last state with the deletion's revision.
    pub object: Arc<Object>,
    /// The object before, where there was one.
    pub previous: Option<Arc<Object>>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<Box<str>, Arc<Object>>,
    ring: VecDeque<Arc<Change>>,
    ring_bytes: usize,
    /// Every change after this revision is in the ring.
    floor: Revision,
    /// Revision of the newest change.
    newest: Revision,
}

/// A consistent view of some objects.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// The objects in key order.
    pub objects: Vec<Arc<Object>>,
    /// The newest change that the view contains.
    pub newest: Revision,
}

/// The ring no longer reaches back to the asked position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooOld {
    /// The oldest position that would have worked.
    pub floor: Revision,
}

/// Objects and recent changes of one resource.
#[derive(Debug)]
pub(crate) struct ResourceCache {
    info: &'static ResourceInfo,
    state: RwLock<State>,
    newest: watch::Sender<Revision>,
}

impl ResourceCache {
    /// An empty cache.
    pub(crate) fn new(info: &'static ResourceInfo) -> Self {
        Self { info, state: RwLock::default(), newest: watch::Sender::new(Revision(0)) }
    }

    /// The row of the resource; where several API versions share the objects, the one they are stored in.
    pub(crate) fn info(&self) -> &'static ResourceInfo {
        self.info
    }

    /// Replace everything, at start; changes after `floor` follow through [`Self::remember`].
    pub(super) fn reset(&self, objects: Vec<Object>, floor: Revision) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let objects = objects.into_iter().map(|object| (object.key.clone(), Arc::new(object)));
        *state = State { objects: objects.collect(), floor, ..State::default() };
    }

    /// Put an older change into the ring without touching the objects, which already contain it.
    pub(super) fn remember(&self, change: Change) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.push(change);
    }

    /// Apply a change.
    pub(super) fn apply(&self, kind: EventKind, object: Object) {
        let object = Arc::new(object);
        let revision = object.revision;
        {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            let previous = match kind {
                EventKind::Deleted => state.objects.remove(&object.key),
                _ => state.objects.insert(object.key.clone(), Arc::clone(&object)),
            };
            state.push(Change { kind, object, previous });
        }
        self.newest.send_replace(revision);
    }

    /// One object.
    pub(crate) fn get(&self, key: &str) -> Option<Arc<Object>> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).objects.get(key).cloned()
    }

    /// How many objects there are.
    pub(crate) fn len(&self) -> usize {
        self.state.read().unwrap_or_else(PoisonError::into_inner).objects.len()
    }

    /// The objects of a namespace (all where `None`) that `select` accepts.
    pub(crate) fn snapshot(&self, namespace: Option<&str>, select: impl Fn(&Object) -> bool) -> Snapshot {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let objects = match namespace {
            // '0' follows '/' in ASCII: all keys that start with `namespace/`.
            Some(namespace) => {
                let (low, high) = (format!("{namespace}/"), format!("{namespace}0"));
                let bounds = (Bound::Included(low.as_str()), Bound::Excluded(high.as_str()));
                collect(state.objects.range::<str, _>(bounds), select)
            }
            None => collect(state.objects.iter(), select),
        };
        Snapshot { objects, newest: state.newest }
    }

    /// The changes after `position`, oldest first.
    pub(crate) fn changes_after(&self, position: Revision) -> Result<Vec<Arc<Change>>, TooOld> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        if position < state.floor {
            return Err(TooOld { floor: state.floor });
        }
        let start = state.ring.partition_point(|change| change.object.revision <= position);
        Ok(state.ring.range(start..).cloned().collect())
    }

    /// Resolves when there may be changes after the ones seen so far.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Revision> {
        self.newest.subscribe()
    }
}

fn collect<'a>(
    objects: impl Iterator<Item = (&'a Box<str>, &'a Arc<Object>)>,
    select: impl Fn(&Object) -> bool,
) -> Vec<Arc<Object>> {
    objects.map(|(_, object)| object).filter(|object| select(object)).cloned().collect()
}

impl State {
    fn push(&mut self, change: Change) {
        self.newest = self.newest.max(change.object.revision);
        self.ring_bytes += change.object.cost();
        self.ring.push_back(Arc::new(change));
        while self.ring.len() > RING_CHANGES || (self.ring_bytes > RING_BYTES && self.ring.len() > RING_LEAST)
        {
            let Some(dropped) = self.ring.pop_front() else { break };
            self.ring_bytes = self.ring_bytes.saturating_sub(dropped.object.cost());
            self.floor = dropped.object.revision;
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn object(name: &str, revision: u64) -> Object {
        let info = control_api::kinds::find("", "v1", "configmaps").unwrap();
        Object::new(info, name, Revision(revision), Bytes::from_static(b"{}")).unwrap()
    }

    fn cache() -> ResourceCache {
        ResourceCache::new(control_api::kinds::find("", "v1", "configmaps").unwrap())
    }

    #[test]
    fn a_position_that_the_ring_left_behind_is_too_old() {
        let cache = cache();
        cache.reset(Vec::new(), Revision(1));
        for revision in 2..=2000 {
            cache.apply(EventKind::Updated, object("default/a", revision));
        }
        let TooOld { floor } = cache.changes_after(Revision(5)).unwrap_err();
        let after: Vec<_> =
            cache.changes_after(floor).unwrap().iter().map(|change| change.object.revision.0).collect();
        assert_eq!(after, (floor.0 + 1..=2000).collect::<Vec<_>>());
        assert!(cache.changes_after(Revision(2000)).unwrap().is_empty());
    }

    #[test]
    fn a_namespace_is_cut_out_exactly() {
        let cache = cache();
        for (revision, key) in ["a/x", "a-b/x", "a/y", "ab/x"].into_iter().enumerate() {
            cache.apply(EventKind::Created, object(key, revision as u64 + 2));
        }
        let names: Vec<_> =
            cache.snapshot(Some("a"), |_| true).objects.iter().map(|object| object.key.to_string()).collect();
        assert_eq!(names, ["a/x", "a/y"]);
    }
}

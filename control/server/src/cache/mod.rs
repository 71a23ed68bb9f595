//! The watch cache: every object once in memory, encoded, with the recent changes of each resource.
//!
//! Input: one watch of the whole store, read by the feed task ([`WatchCache::follow`]). Output: reads that are as fresh as the store was when
//! the read began ([`WatchCache::wait_fresh`]), lists, and positions in the change rings for watchers. It never writes to the store.

mod object;
mod resource;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use control_api::kinds::{RESOURCES, ResourceInfo, Storage};
use control_store::{Event, EventKind, KeyValue, Range, Revision, Store, StoreError, Watch};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) use self::{
    object::Object,
    resource::{Change, ResourceCache},
};
use crate::codec;

/// Everything the server stores lies below this.
pub(crate) const ROOT: &str = "/registry/";
/// How long a read waits for the cache to reach the revision it needs.
pub(crate) const FRESH_DEADLINE: Duration = Duration::from_secs(3);

/// How long the feed waits after the store could not be read.
const FEED_RETRY: Duration = Duration::from_secs(1);

/// The cache did not reach a revision in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotFresh {
    /// The wanted revision.
    pub wanted: Revision,
    /// The revision that the cache has.
    pub current: Revision,
}

/// Caches of all stored resources.
pub(crate) struct WatchCache {
    store: Arc<dyn Store>,
    /// By storage prefix, which API versions may share.
    resources: HashMap<&'static str, Arc<ResourceCache>>,
    /// Every change up to this revision has been applied.
    progress: watch::Sender<Revision>,
}

impl std::fmt::Debug for WatchCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchCache").field("progress", &*self.progress.borrow()).finish_non_exhaustive()
    }
}

impl WatchCache {
    /// Fill the cache from the store, recent history included, so that watches survive a restart of the server.
    pub(crate) async fn load(store: Arc<dyn Store>) -> Result<(Arc<Self>, Box<dyn Watch>), StoreError> {
        let mut resources = HashMap::new();
        for info in RESOURCES {
            if let Storage::Stored { prefix } = info.storage {
                resources.entry(prefix).or_insert_with(|| Arc::new(ResourceCache::new(info)));
            }
        }
        let cache = Self { store, resources, progress: watch::Sender::new(Revision(0)) };
        let revision = cache.fill().await?;
        let feed = cache.store.watch(Bytes::from_static(ROOT.as_bytes()), revision).await?;
        Ok((Arc::new(cache), feed))
    }

    async fn fill(&self) -> Result<Revision, StoreError> {
        let floor = self.store.compacted().await?;
        let prefix = Bytes::from_static(ROOT.as_bytes());
        let page = self.store.range(Range { prefix: prefix.clone(), ..Range::default() }).await?;
        let revision = page.revision;
        let mut objects: BTreeMap<&str, Vec<Object>> = BTreeMap::new();
        for pair in page.items {
            if let Some((cache, object)) = self.decode(&pair) {
                objects.entry(storage_prefix(cache.info())).or_default().push(object);
            }
        }
        for (prefix, cache) in &self.resources {
            cache.reset(objects.remove(prefix).unwrap_or_default(), floor);
        }
        if floor < revision {
            let mut history = self.store.watch(prefix, floor).await?;
            let mut seen = floor;
            while seen < revision {
                let (events, upto) = history.next().await?;
                events
                    .iter()
                    .filter(|event| event.revision <= revision)
                    .for_each(|event| self.remember(event));
                // Revisions without an event below the prefix do not exist: every write is below it.
                seen = upto.max(events.last().map_or(seen, |event| event.revision));
            }
        }
        self.progress.send_replace(revision);
        Ok(revision)
    }

    /// Apply the store's events until cancelled. Ends the process's usefulness when it fails, so the caller must treat that as fatal.
    pub(crate) async fn follow(
        &self,
        mut feed: Box<dyn Watch>,
        cancel: CancellationToken,
    ) -> Result<(), StoreError> {
        loop {
            // Cancel safe: `next` loses nothing, and events are applied outside the select.
            let next = tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                next = feed.next() => next,
            };
            let (events, upto) = match next {
                Ok(next) => next,
                // The file cannot be read just now (disk full, IO error): the feed goes on where it was.
                Err(error @ StoreError::Unavailable { .. }) => {
                    tracing::error!(%error, "the watch cache waits for the store");
                    tokio::time::sleep(FEED_RETRY).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            for event in &events {
                self.apply(event);
            }
            self.progress.send_replace(upto);
        }
    }

    /// The cache of a stored resource.
    pub(crate) fn resource(&self, info: &ResourceInfo) -> Option<&Arc<ResourceCache>> {
        self.resources.get(storage_prefix(info))
    }

    /// All caches.
    pub(crate) fn resources(&self) -> impl Iterator<Item = &Arc<ResourceCache>> {
        self.resources.values()
    }

    /// The revision up to which everything has been applied.
    pub(crate) fn revision(&self) -> Revision {
        *self.progress.borrow()
    }

    /// Wait until the cache shows everything that was acknowledged before this call.
    pub(crate) async fn wait_fresh(&self) -> Result<Result<Revision, NotFresh>, StoreError> {
        let wanted = self.store.revision().await?;
        Ok(self.wait_for(wanted).await)
    }

    /// Wait until the cache has reached a revision.
    pub(crate) async fn wait_for(&self, wanted: Revision) -> Result<Revision, NotFresh> {
        let mut progress = self.progress.subscribe();
        let reached = progress.wait_for(|revision| *revision >= wanted);
        match tokio::time::timeout(FRESH_DEADLINE, reached).await {
            Ok(Ok(revision)) => Ok(*revision),
            _ => Err(NotFresh { wanted, current: self.revision() }),
        }
    }

    /// The cached form of a stored pair, with the cache it belongs to.
    pub(crate) fn decode(&self, pair: &KeyValue) -> Option<(&Arc<ResourceCache>, Object)> {
        self.object(&pair.key, &pair.value, pair.modified)
    }

    fn object(&self, key: &[u8], value: &[u8], revision: Revision) -> Option<(&Arc<ResourceCache>, Object)> {
        let key = std::str::from_utf8(key).ok()?;
        let (cache, rest) = self.locate(key)?;
        let body = codec::splice(value, revision);
        if let Some(Ok(object)) = body.map(|body| Object::new(cache.info(), rest, revision, body)) {
            return Some((cache, object));
        }
        tracing::error!(key, "a stored object does not decode and is left out");
        None
    }

    /// Split `/registry/services/specs/default/web` into the cache of services and `default/web`.
    fn locate<'k>(&self, key: &'k str) -> Option<(&Arc<ResourceCache>, &'k str)> {
        let path = key.strip_prefix(ROOT)?;
        path.match_indices('/').find_map(|(at, _)| Some((self.resources.get(&path[..at])?, &path[at + 1..])))
    }

    fn apply(&self, event: &Event) {
        if let Some((cache, object)) = self.object(&event.key, &event.value, event.revision) {
            cache.apply(event.kind, object);
        }
    }

    fn remember(&self, event: &Event) {
        let Some((cache, object)) = self.object(&event.key, &event.value, event.revision) else { return };
        let previous = event.previous.as_ref().and_then(|(value, revision)| {
            self.object(&event.key, value, *revision).map(|(_, object)| Arc::new(object))
        });
        let object = match cache.get(&object.key) {
            // Share the copy that the cache holds already.
            Some(held) if held.revision == object.revision && event.kind != EventKind::Deleted => held,
            _ => Arc::new(object),
        };
        cache.remember(Change { kind: event.kind, object, previous });
    }
}

fn storage_prefix(info: &ResourceInfo) -> &'static str {
    match info.storage {
        Storage::Stored { prefix } => prefix,
        Storage::CreateOnly => "",
    }
}

//! A local copy of all objects of one kind, kept up to date by a watch and shared by all controllers.
//!
//! Input: a [`Source`] (list and watch of one kind). Output: lookups, and [`Change`]s to handlers, without
//! any delay. A broken watch is resumed where it stopped; an expired one starts over with a list, whose
//! differences reach the handlers as changes. Memory is bounded by the objects that exist, each slimmed
//! before it is stored.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt, stream::BoxStream};
use k8s_openapi::{Metadata, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api,
    api::{DynamicObject, ListParams, ObjectList, PartialObjectMeta, WatchEvent, WatchParams},
    core::Resource,
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    queue::Backoff,
    write::{chain, is_expired},
};

/// Namespace and name: the identity of an object within its kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// Empty for cluster-scoped objects.
    pub(crate) namespace: String,
    /// The object's name.
    pub(crate) name: String,
}

impl Key {
    /// The key of an object.
    pub(crate) fn of(meta: &ObjectMeta) -> Self {
        Key {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
        }
    }

    /// The key of a named object.
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Key { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.namespace.is_empty() {
            write!(formatter, "{}/", self.namespace)?;
        }
        formatter.write_str(&self.name)
    }
}

/// What an informer needs to know of its objects.
pub(crate) trait Cached: Send + Sync + 'static {
    /// The object's metadata.
    fn meta(&self) -> &ObjectMeta;
}

impl<K: Metadata<Ty = ObjectMeta> + Send + Sync + 'static> Cached for K {
    fn meta(&self) -> &ObjectMeta {
        self.metadata()
    }
}

/// The metadata of an object of any kind.
#[derive(Clone, Debug)]
pub(crate) struct MetadataOnly(pub(crate) ObjectMeta);

impl Cached for MetadataOnly {
    fn meta(&self) -> &ObjectMeta {
        &self.0
    }
}

/// A change of one object: created (`old` is none), changed, or gone (`new` is none).
#[derive(Debug)]
pub(crate) struct Change<K> {
    pub(crate) old: Option<Arc<K>>,
    pub(crate) new: Option<Arc<K>>,
}

impl<K> Clone for Change<K> {
    fn clone(&self) -> Self {
        Change { old: self.old.clone(), new: self.new.clone() }
    }
}

impl<K: Cached> Change<K> {
    /// The states the object was in before and is in now.
    pub(crate) fn states(&self) -> impl Iterator<Item = &Arc<K>> {
        self.old.iter().chain(&self.new)
    }

    /// The object as last seen.
    pub(crate) fn latest(&self) -> Option<&Arc<K>> {
        self.new.as_ref().or(self.old.as_ref())
    }

    /// The object's key.
    pub(crate) fn key(&self) -> Key {
        self.latest().map(|object| Key::of(object.meta())).unwrap_or_default()
    }
}

type Handler<K> = Box<dyn Fn(&Change<K>) + Send + Sync>;

/// The shared cache of one kind.
pub(crate) struct Informer<K> {
    kind: String,
    objects: RwLock<BTreeMap<Key, Arc<K>>>,
    handlers: RwLock<Vec<Handler<K>>>,
    version: AtomicU64,
    synced: watch::Sender<bool>,
}

impl<K: Cached> Informer<K> {
    /// An empty cache; it fills once [`Self::run`] is running.
    pub(crate) fn new(kind: &str) -> Arc<Self> {
        Arc::new(Informer {
            kind: kind.to_owned(),
            objects: RwLock::default(),
            handlers: RwLock::default(),
            version: AtomicU64::new(0),
            synced: watch::Sender::new(false),
        })
    }

    /// Calls the handler for every change from now on. Handlers must be quick: they run on the watch.
    pub(crate) fn on_change(&self, handler: impl Fn(&Change<K>) + Send + Sync + 'static) {
        self.handlers.write().unwrap_or_else(PoisonError::into_inner).push(Box::new(handler));
    }

    /// The object, as the cache has it.
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// All objects of a namespace, by name.
    pub(crate) fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let objects = self.objects.read().unwrap_or_else(PoisonError::into_inner);
        let from = objects.range(Key::new(namespace, "")..);
        from.take_while(|(key, _)| key.namespace == namespace).map(|(_, object)| Arc::clone(object)).collect()
    }

    /// All objects.
    pub(crate) fn all(&self) -> Vec<Arc<K>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The newest resourceVersion this cache has caught up with.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Waits until the first list is in the cache.
    pub(crate) async fn wait_until_synced(&self) {
        let mut synced = self.synced.subscribe();
        // The sender lives in `self`, so the channel cannot be closed.
        let _closed = synced.wait_for(|synced| *synced).await;
    }

    /// Keeps the cache up to date until `cancel` fires.
    pub(crate) async fn run<S: Source<K>>(self: Arc<Self>, source: S, cancel: CancellationToken) {
        // Cancel-safe: a cache that stops half-way is thrown away with the process.
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.follow(source) => {}
        }
    }

    async fn follow<S: Source<K>>(&self, source: S) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let mut resume: Option<String> = None;
        loop {
            let began = Instant::now();
            let step = if resume.is_some() {
                self.watch(&source, &mut resume).await
            } else {
                match self.list(&source).await {
                    Ok(version) => {
                        resume = Some(version);
                        continue;
                    }
                    Err(error) => Err(error),
                }
            };
            if began.elapsed() > SHORT_LIVED {
                backoff.reset();
            }
            if let Err(error) = step {
                tracing::warn!(kind = self.kind, error = %chain(&error), "watch failed, trying again");
                // What keeps failing at one version may work after a fresh list.
                if backoff.failures() >= TRIES_TO_RESUME {
                    resume = None;
                }
            }
            // A watch that ends at once, again and again, must not spin either.
            if began.elapsed() <= SHORT_LIVED {
                sleep(backoff.next_wait()).await;
            }
        }
    }

    async fn list<S: Source<K>>(&self, source: &S) -> Result<String, SourceError> {
        let mut fresh = BTreeMap::new();
        let mut continue_token = None;
        let version = loop {
            let page = source.list(continue_token.take()).await?;
            for object in page.items {
                fresh.insert(Key::of(object.meta()), Arc::new(object));
            }
            if page.continue_token.is_none() {
                break page.version;
            }
            continue_token = page.continue_token;
        };
        self.replace(fresh, &version);
        Ok(version)
    }

    /// Follows the watch to its end, with `resume` always telling where to go on; none if that is no longer
    /// possible.
    async fn watch<S: Source<K>>(&self, source: &S, resume: &mut Option<String>) -> Result<(), SourceError> {
        let mut events = match source.watch(resume.as_deref().unwrap_or_default()).await {
            Ok(events) => events,
            Err(SourceError::Api(error)) if is_expired(&error) => {
                *resume = None;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        while let Some(event) = events.next().await {
            match event? {
                Incoming::Applied(object) => {
                    *resume = Some(version_of(object.meta()).to_owned());
                    self.apply(object);
                }
                Incoming::Deleted(object) => {
                    *resume = Some(version_of(object.meta()).to_owned());
                    self.remove(object);
                }
                Incoming::Bookmark(version) => {
                    self.advance(&version);
                    *resume = Some(version);
                }
                Incoming::Expired => {
                    *resume = None;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn apply(&self, object: K) {
        let object = Arc::new(object);
        let key = Key::of(object.meta());
        let old = {
            let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
            objects.insert(key, Arc::clone(&object))
        };
        self.advance(version_of(object.meta()));
        self.tell(replaced(old, Some(object)));
    }

    fn remove(&self, object: K) {
        let key = Key::of(object.meta());
        let known = {
            let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
            objects.remove(&key)
        };
        self.advance(version_of(object.meta()));
        self.tell([Change { old: Some(known.unwrap_or_else(|| Arc::new(object))), new: None }]);
    }

    fn replace(&self, fresh: BTreeMap<Key, Arc<K>>, version: &str) {
        let stale = {
            let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *objects, fresh.clone())
        };
        self.advance(version);
        for (key, old) in &stale {
            if !fresh.contains_key(key) {
                self.tell([Change { old: Some(Arc::clone(old)), new: None }]);
            }
        }
        for (key, new) in fresh {
            let old = stale.get(&key).cloned();
            let same = old.as_ref().is_some_and(|old| {
                old.meta().resource_version == new.meta().resource_version && old.meta().uid == new.meta().uid
            });
            if !same {
                self.tell(replaced(old, Some(new)));
            }
        }
        self.synced.send_replace(true);
    }

    fn advance(&self, version: &str) {
        if let Ok(version) = version.parse() {
            self.version.fetch_max(version, Ordering::AcqRel);
        }
    }

    fn tell(&self, changes: impl IntoIterator<Item = Change<K>>) {
        let handlers = self.handlers.read().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            for handler in handlers.iter() {
                handler(&change);
            }
        }
    }
}

/// An object that was deleted and made anew under the same name in one event is two changes.
fn replaced<K: Cached>(old: Option<Arc<K>>, new: Option<Arc<K>>) -> Vec<Change<K>> {
    match (old, new) {
        (Some(old), Some(new)) if old.meta().uid != new.meta().uid => {
            vec![Change { old: Some(old), new: None }, Change { old: None, new: Some(new) }]
        }
        (old, new) => vec![Change { old, new }],
    }
}

fn version_of(meta: &ObjectMeta) -> &str {
    meta.resource_version.as_deref().unwrap_or_default()
}

/// One page of a list.
pub(crate) struct Page<K> {
    pub(crate) items: Vec<K>,
    pub(crate) version: String,
    pub(crate) continue_token: Option<String>,
}

/// One event of a watch.
pub(crate) enum Incoming<K> {
    /// The object exists in this form.
    Applied(K),
    /// The object is gone; this was its last form.
    Deleted(K),
    /// Everything up to this version has been sent.
    Bookmark(String),
    /// The watch cannot be resumed from where it was: list again.
    Expired,
}

/// Why a list or watch broke.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// The API server refused or could not be reached.
    #[error("API request failed")]
    Api(#[source] kube::Error),
    /// The API server ended the watch with an error.
    #[error("the API server ended the watch: {0}")]
    Ended(String),
    /// No answer in time.
    #[error("no answer to the list request within {} s", LIST_DEADLINE.as_secs())]
    Deadline,
}

/// How to list and watch one kind.
pub(crate) trait Source<K>: Send + 'static {
    /// One page of all objects.
    fn list(
        &self,
        continue_token: Option<String>,
    ) -> impl Future<Output = Result<Page<K>, SourceError>> + Send;
    /// Changes after the version.
    fn watch(
        &self,
        from: &str,
    ) -> impl Future<Output = Result<BoxStream<'static, Result<Incoming<K>, SourceError>>, SourceError>> + Send;
}

/// A watch that lives shorter than this counts as a failure.
const SHORT_LIVED: Duration = Duration::from_secs(1);
/// Failures in a row after which the cache is listed anew.
const TRIES_TO_RESUME: u32 = 3;
const LIST_DEADLINE: Duration = Duration::from_secs(60);
const PAGE: u32 = 500;
/// Below the client's and stock API servers' own limits.
const WATCH_SECONDS: u32 = 290;

/// Whole objects, slimmed of what no controller reads.
pub(crate) struct Objects<K> {
    pub(crate) api: Api<K>,
    pub(crate) fields: Option<&'static str>,
    pub(crate) slim: fn(&mut K),
}

fn list_params(fields: Option<&str>, continue_token: Option<String>) -> ListParams {
    ListParams {
        limit: Some(PAGE),
        continue_token,
        field_selector: fields.map(str::to_owned),
        ..ListParams::default()
    }
}

fn watch_params(fields: Option<&str>) -> WatchParams {
    let params = WatchParams::default().timeout(WATCH_SECONDS);
    match fields {
        Some(fields) => params.fields(fields),
        None => params,
    }
}

async fn page_of<T: Clone, K>(
    request: impl Future<Output = kube::Result<ObjectList<T>>>,
    convert: impl Fn(T) -> K,
) -> Result<Page<K>, SourceError> {
    let answer = timeout(LIST_DEADLINE, request).await.map_err(|_elapsed| SourceError::Deadline)?;
    let list = answer.map_err(SourceError::Api)?;
    Ok(Page {
        items: list.items.into_iter().map(convert).collect(),
        version: list.metadata.resource_version.unwrap_or_default(),
        continue_token: list.metadata.continue_.filter(|token| !token.is_empty()),
    })
}

fn incoming<T, K>(
    events: impl Stream<Item = kube::Result<WatchEvent<T>>> + Send + 'static,
    convert: impl Fn(T) -> K + Send + 'static,
) -> BoxStream<'static, Result<Incoming<K>, SourceError>> {
    let convert = move |event: kube::Result<WatchEvent<T>>| match event.map_err(SourceError::Api)? {
        WatchEvent::Added(object) | WatchEvent::Modified(object) => Ok(Incoming::Applied(convert(object))),
        WatchEvent::Deleted(object) => Ok(Incoming::Deleted(convert(object))),
        WatchEvent::Bookmark(bookmark) => Ok(Incoming::Bookmark(bookmark.metadata.resource_version)),
        WatchEvent::Error(status) if status.code == 410 => Ok(Incoming::Expired),
        WatchEvent::Error(status) => Err(SourceError::Ended(status.message)),
    };
    events.map(convert).boxed()
}

impl<K> Source<K> for Objects<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    async fn list(&self, continue_token: Option<String>) -> Result<Page<K>, SourceError> {
        let params = list_params(self.fields, continue_token);
        page_of(self.api.list(&params), |mut object| {
            (self.slim)(&mut object);
            object
        })
        .await
    }

    async fn watch(
        &self,
        from: &str,
    ) -> Result<BoxStream<'static, Result<Incoming<K>, SourceError>>, SourceError> {
        let events = self.api.watch(&watch_params(self.fields), from).await.map_err(SourceError::Api)?;
        let slim = self.slim;
        Ok(incoming(events, move |mut object| {
            slim(&mut object);
            object
        }))
    }
}

/// Nothing but the metadata of objects of any kind.
pub(crate) struct MetadataSource(pub(crate) Api<DynamicObject>);

fn owner_facts(object: PartialObjectMeta<DynamicObject>) -> MetadataOnly {
    let mut meta = object.metadata;
    meta.managed_fields = None;
    meta.labels = None;
    meta.annotations = None;
    MetadataOnly(meta)
}

impl Source<MetadataOnly> for MetadataSource {
    async fn list(&self, continue_token: Option<String>) -> Result<Page<MetadataOnly>, SourceError> {
        page_of(self.0.list_metadata(&list_params(None, continue_token)), owner_facts).await
    }

    async fn watch(
        &self,
        from: &str,
    ) -> Result<BoxStream<'static, Result<Incoming<MetadataOnly>, SourceError>>, SourceError> {
        let events = self.0.watch_metadata(&watch_params(None), from).await.map_err(SourceError::Api)?;
        Ok(incoming(events, owner_facts))
    }
}

#[cfg(test)]
mod tests;

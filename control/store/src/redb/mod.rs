//! The redb backend: one file, one writer thread with group commit, snapshot readers.
//!
//! [`RedbStore`] is the cheap handle; `engine` opens the file and reads from it, `writer` is the thread that owns all writes, `watch` follows
//! the log. Nothing outside this folder touches redb.

mod engine;
mod watch;
mod writer;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{broadcast, mpsc, oneshot};

use self::{
    engine::Engine,
    writer::{Request, Writer},
};
use crate::{BoxFuture, KeyValue, Range, RangePage, Revision, Store, StoreError, Txn, Watch};

/// Bound of the queue in front of the writer; callers wait when it is full.
const QUEUE: usize = 1024;
/// Bound of the event queue per watcher; one that falls behind reads the rest from the log.
const LIVE_EVENTS: usize = 1024;
/// How long a writer may wait for a place in the queue and for its commit.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

/// Where and how to open a [`RedbStore`].
#[derive(Clone, Debug)]
pub struct RedbOptions {
    /// The database file; made where it is missing.
    pub path: PathBuf,
    /// Bytes of page cache that redb may hold.
    pub cache_bytes: usize,
}

impl RedbOptions {
    /// Options with a small page cache, because the API server keeps its own copy of every object.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), cache_bytes: 8 << 20 }
    }
}

/// Handle of an open store. Dropping the last one stops the writer after what it has accepted.
#[derive(Debug)]
pub struct RedbStore {
    engine: Arc<Engine>,
    requests: Mutex<Option<mpsc::Sender<Request>>>,
    live: broadcast::Sender<watch::Batch>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl RedbStore {
    /// Open or create the store, recovering what an unclean end left behind. Blocks.
    pub fn open(options: &RedbOptions) -> Result<Self, StoreError> {
        Self::start(Engine::open(options)?)
    }

    fn start(engine: Engine) -> Result<Self, StoreError> {
        let engine = Arc::new(engine);
        let (live, _) = broadcast::channel(LIVE_EVENTS);
        let (requests, queue) = mpsc::channel(QUEUE);
        let writer = Writer::new(Arc::clone(&engine), queue, live.clone());
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| engine.unavailable("written", &error))?;
        Ok(Self { engine, requests: Mutex::new(Some(requests)), live, thread: Mutex::new(Some(thread)) })
    }

    fn sender(&self) -> Result<mpsc::Sender<Request>, StoreError> {
        let guard = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        guard.clone().ok_or(StoreError::Closed)
    }

    async fn send<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Request,
    ) -> Result<T, StoreError> {
        let sender = self.sender()?;
        let (answer, waiter) = oneshot::channel();
        let request = request(answer);
        let exchange = async {
            sender.send(request).await.map_err(|_closed| StoreError::Closed)?;
            waiter.await.map_err(|_dropped| StoreError::Closed)?
        };
        tokio::time::timeout(WRITE_DEADLINE, exchange).await.unwrap_or(Err(StoreError::Overloaded))
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Engine) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let engine = Arc::clone(&self.engine);
        tokio::task::spawn_blocking(move || read(&engine)).await.map_err(|_cancelled| StoreError::Closed)?
    }
}

impl Store for RedbStore {
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(self.send(|answer| Request::Txn(txn, answer)))
    }

    fn get(&self, key: Bytes) -> BoxFuture<'_, Result<Option<KeyValue>, StoreError>> {
        Box::pin(self.read(move |engine| engine.get(&key)))
    }

    fn range(&self, range: Range) -> BoxFuture<'_, Result<RangePage, StoreError>> {
        Box::pin(self.read(move |engine| engine.range(&range)))
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(std::future::ready(Ok(self.engine.revision())))
    }

    fn compacted(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(std::future::ready(Ok(self.engine.compacted())))
    }

    fn watch(&self, prefix: Bytes, after: Revision) -> BoxFuture<'_, Result<Box<dyn Watch>, StoreError>> {
        // Subscribed before the log is read, so that no event falls between the two.
        let live = self.live.subscribe();
        let engine = Arc::clone(&self.engine);
        Box::pin(async move {
            engine.check_retained(after)?;
            Ok(Box::new(watch::LogWatch::new(engine, live, prefix, after)) as Box<dyn Watch>)
        })
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.send(move |answer| Request::Compact(revision, answer)))
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        let sender = self.requests.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(sender);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(async move {
            let Some(thread) = thread else { return };
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the store's writer ended abnormally");
            }
        })
    }
}

#[cfg(test)]
mod tests;

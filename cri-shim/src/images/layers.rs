//! The layers of one pull: fetched in parallel, each unpacked while it arrives, put on top of one another in order.
//!
//! Input: an image's [`Details`] and the hosts that have it. Output: its blobs and snapshots, held by the session's lease.
//! One task per layer; the first failure ends all. Who calls waits for the tracked threads before it cleans up.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, oneshot};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;
use tonic::Code;

use super::content::{self, CHUNK, Writer};
use super::decode::Budget;
use super::feed::Feed;
use super::progress::Progress;
use super::pull::{PullError, Shared};
use super::records::{self, Details};
use super::registry::{FetchError, HostError, Registry};
use super::settings::Unpacker;
use super::unpack::{self, Layer, Staged, UnpackError};
use super::untar::{Applied, ApplyError};
use crate::telemetry;

/// Tries per host for a layer whose transfer breaks; each goes on where the last one stopped.
const TRIES: u32 = 4;

/// Pause before the first such try; it doubles with each.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Fetches and unpacks all layers.
pub async fn fetch(
    shared: &Shared,
    registry: &Arc<Registry>,
    details: &Details,
    progress: &Progress,
    threads: &TaskTracker,
) -> Result<(), PullError> {
    let source = Source::Registry(Arc::clone(registry));
    all(shared, source, details, progress, threads).await
}

/// Unpacks all layers from the content store.
pub async fn unpack_stored(
    shared: &Shared,
    details: &Details,
    threads: &TaskTracker,
) -> Result<(), PullError> {
    all(shared, Source::Store, details, &Progress::default(), threads).await
}

async fn all(
    shared: &Shared,
    source: Source,
    details: &Details,
    progress: &Progress,
    threads: &TaskTracker,
) -> Result<(), PullError> {
    let job = Job {
        shared: shared.clone(),
        source,
        threads: threads.clone(),
        budget: Budget::new(&shared.settings),
        transfers: Arc::new(Semaphore::new(shared.settings.parallel_layers.max(1))),
        progress: progress.clone(),
    };
    let mut tasks = JoinSet::new();
    let mut below = None;
    for layer in unpack::layers(details) {
        let (done, next) = oneshot::channel();
        tasks.spawn(Box::pin(job.clone().run(layer, below.replace(next), done)));
    }
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        result = ended.map_err(PullError::from).and_then(|result| result);
        if result.is_err() {
            break;
        }
    }
    // Tasks are gone after this, and threads that nobody feeds any more end soon.
    tasks.shutdown().await;
    result
}

/// Where a layer's bytes come from.
#[derive(Clone)]
enum Source {
    Registry(Arc<Registry>),
    Store,
}

#[derive(Clone)]
struct Job {
    shared: Shared,
    source: Source,
    threads: TaskTracker,
    budget: Budget,
    /// Those of this pull; beside them `shared.transfers` counts all.
    transfers: Arc<Semaphore>,
    progress: Progress,
}

type Permit<'a> = Result<SemaphorePermit<'a>, AcquireError>;

/// What the layer above waits for.
type Below = Option<oneshot::Receiver<()>>;

impl Job {
    async fn run(self, layer: Layer, below: Below, done: oneshot::Sender<()>) -> Result<(), PullError> {
        let (session, snapshotter) = (&self.shared.session, &self.shared.snapshotter);
        // Chains are locked from the top down only by tasks that hold no transfer, so nobody waits in a circle.
        let chain = format!("chain {}", layer.chain_id);
        let _one_unpacker = self.progress.in_turn(self.shared.locks.lock(&chain)).await;
        if unpack::is_unpacked(session, snapshotter, &layer.chain_id).await? {
            done.send(()).ok();
            self.download(&layer).await?;
            self.progress.layer_done();
            return Ok(());
        }
        let staged = match self.shared.settings.unpacker {
            Unpacker::Builtin => unpack::stage(session, snapshotter, &layer).await?,
            Unpacker::Containerd => None,
        };
        let applied = if let Some(staged) = staged {
            let (staged, applied) = self.download_and_apply(&layer, staged).await?;
            wait(below).await;
            if let Some(applied) = applied {
                let placed = unpack::finish(session, snapshotter, &layer, staged, applied);
                telemetry::stage("layer_place", placed).await?;
                true
            } else {
                unpack::discard(session, snapshotter, staged).await;
                false
            }
        } else {
            self.download(&layer).await?;
            wait(below).await;
            false
        };
        if !applied {
            let unpacked = unpack::by_containerd(session, snapshotter, &layer);
            telemetry::stage("layer_unpack", Box::pin(self.progress.patiently(unpacked))).await?;
        }
        self.progress.layer_done();
        // Nobody waits for the topmost one.
        done.send(()).ok();
        Ok(())
    }

    /// `None` when only containerd can apply the layer.
    async fn download_and_apply(
        &self,
        layer: &Layer,
        mut staged: Staged,
    ) -> Result<(Staged, Option<Applied>), PullError> {
        let mut feed = self.fetched(layer, Some(&staged)).await?;
        if let Some(open) = feed.take_if(|open| !open.has_all_of(layer.descriptor.size())) {
            let written = open.given() > 0;
            open.give_up().await?;
            if written {
                staged = self.restage(layer, staged).await?;
            }
        }
        let outcome = if let Some(open) = feed {
            telemetry::stage("layer_unpack", open.end()).await?
        } else {
            // It came from somewhere else, or not from the first byte in one go.
            let _turn = self.turn().await;
            let mut feed = self.feed(layer, &staged);
            content::read_into(&self.shared.session, &layer.digest(), &mut feed).await?;
            telemetry::stage("layer_unpack", feed.end()).await?
        };
        match outcome {
            Ok(applied) => Ok((staged, Some(applied))),
            Err(ApplyError::Unsupported(what)) => {
                tracing::info!(layer = %layer.digest(), what, "containerd unpacks a layer");
                Ok((staged, None))
            }
            Err(source) => Err(UnpackError::Apply { layer: layer.digest(), source }.into()),
        }
    }

    fn feed(&self, layer: &Layer, staged: &Staged) -> Feed {
        let meter = self.budget.layer(layer.descriptor.size());
        Feed::start(&self.threads, layer, &staged.target, meter, self.progress.clone())
    }

    async fn restage(&self, layer: &Layer, staged: Staged) -> Result<Staged, PullError> {
        let (session, snapshotter) = (&self.shared.session, &self.shared.snapshotter);
        unpack::discard(session, snapshotter, staged).await;
        let anew = unpack::stage(session, snapshotter, layer).await?;
        let source = || std::io::Error::other("the snapshotter gave another kind of mount");
        anew.ok_or_else(|| UnpackError::Merge { layer: layer.digest(), source: source() }.into())
    }

    /// Waits until a layer may be read and unpacked: threads are few, and other work needs them too.
    async fn turn(&self) -> (Permit<'_>, Permit<'_>) {
        let own = self.progress.in_turn(self.transfers.acquire()).await;
        (own, self.progress.in_turn(self.shared.transfers.acquire()).await)
    }

    async fn download(&self, layer: &Layer) -> Result<(), PullError> {
        self.fetched(layer, None).await.map(drop)
    }

    async fn fetched(&self, layer: &Layer, staged: Option<&Staged>) -> Result<Option<Feed>, PullError> {
        // Boxed: the future is large, and measuring it would keep it twice.
        telemetry::stage("layer_fetch", Box::pin(self.fetch(layer, staged))).await
    }

    /// Brings the blob into the content store. What comes over the network is unpacked into `staged` at the same time.
    async fn fetch(&self, layer: &Layer, staged: Option<&Staged>) -> Result<Option<Feed>, PullError> {
        let Source::Registry(registry) = &self.source else { return Ok(None) };
        let digest = layer.digest();
        // Named apart from chains: the chain of a bottom layer that is not compressed has its blob's digest.
        let _one_writer = self.progress.in_turn(self.shared.locks.lock(&format!("blob {digest}"))).await;
        let _turn = self.turn().await;
        let _under_way = self.progress.transferring();
        let mut feed = staged.map(|staged| self.feed(layer, staged));
        let mut failures = FetchError::nobody();
        for host in 0..registry.host_count() {
            for attempt in 1..=TRIES {
                let error = match self.transfer(registry, host, layer, &mut feed).await? {
                    Ok(()) => return Ok(feed),
                    Err(error) => error,
                };
                if attempt == TRIES || !error.is_worth_another_try() {
                    failures = failures.and(error);
                    break;
                }
                tracing::info!(%digest, %error, attempt, "a layer's transfer broke; trying again");
                tokio::time::sleep(RETRY_PAUSE * 2_u32.pow(attempt - 1)).await;
            }
        }
        Err(PullError::Fetch { what: "layer", digest, source: failures })
    }

    /// Copies one layer from one host. The inner error is the host's fault, the outer one containerd's or the layer's.
    async fn transfer(
        &self,
        registry: &Registry,
        host: usize,
        layer: &Layer,
        feed: &mut Option<Feed>,
    ) -> Result<Result<(), FetchError>, PullError> {
        let (digest, size) = (layer.digest(), layer.descriptor.size());
        let session = &self.shared.session;
        let Some(mut writer) = Writer::open(session, &digest, size).await? else { return Ok(Ok(())) };
        let at_fault = |error| Ok(Err(FetchError::of(registry.host_name(host), error)));
        if writer.offset() < size {
            let (mut response, from) = match registry.blob(host, &digest, writer.offset()).await {
                Ok(opened) => opened,
                Err(error) => return Ok(Err(error)),
            };
            self.progress.tick();
            if from != writer.offset() {
                writer = writer.restart().await?;
                if from > 0 {
                    return at_fault(HostError::Length { wanted: size });
                }
            }
            if response.content_length().is_some_and(|length| length != size - writer.offset()) {
                writer.discard().await?;
                return at_fault(HostError::Length { wanted: size });
            }
            let mut buffer = BytesMut::with_capacity(CHUNK);
            loop {
                let chunk = match response.chunk().await {
                    Ok(chunk) => chunk,
                    Err(error) => {
                        // What has arrived need not be sent again.
                        self.hand_on(&mut writer, feed, buffer.freeze()).await?;
                        writer.settle().await?;
                        return at_fault(HostError::Transport(error));
                    }
                };
                self.progress.received(chunk.as_ref().map_or(0, Bytes::len));
                let ended = chunk.is_none();
                buffer.extend_from_slice(&chunk.unwrap_or_default());
                if writer.offset() + buffer.len() as u64 > size {
                    writer.discard().await?;
                    return at_fault(HostError::Length { wanted: size });
                }
                if !buffer.is_empty() && (ended || buffer.len() >= CHUNK) {
                    let full = std::mem::replace(&mut buffer, BytesMut::with_capacity(CHUNK));
                    self.hand_on(&mut writer, feed, full.freeze()).await?;
                }
                if ended {
                    break;
                }
            }
        }
        writer.settle().await?;
        if writer.offset() != size {
            return at_fault(HostError::Length { wanted: size });
        }
        self.progress.tick();
        let committed = writer.commit(records::layer_labels(&layer.diff_id));
        match self.progress.patiently(committed).await {
            Ok(()) => Ok(Ok(())),
            // containerd hashed it and found something else; it forgets such a write by itself only much later.
            Err(error) if error.code() == Code::FailedPrecondition => {
                content::abort(session, &digest).await?;
                if let Some(open) = feed {
                    open.spoil();
                }
                at_fault(HostError::Content { digest })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives a piece to containerd and to the thread that unpacks, where that has had all before.
    async fn hand_on(
        &self,
        writer: &mut Writer,
        feed: &mut Option<Feed>,
        piece: Bytes,
    ) -> Result<(), PullError> {
        if piece.is_empty() {
            return Ok(());
        }
        match feed {
            Some(open) if open.given() == writer.offset() => open.give(piece.clone()).await?,
            Some(open) => open.spoil(),
            None => {}
        }
        Ok(writer.write(piece).await?)
    }
}

/// Waits until the layer below is in its place. When that fails this task is ended from outside.
async fn wait(below: Below) {
    if let Some(below) = below
        && below.map(|done| done.is_err()).await
    {
        std::future::pending::<()>().await;
    }
}

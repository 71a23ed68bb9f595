//! [`ImageStore`]: what images there are, and getting or removing them.
//!
//! Input: references and ids as people and the kubelet write them. Output: [`Image`]s. The truth is in containerd;
//! what is kept here is a cache by digest, which cannot be wrong, so nothing has to be recovered after a restart.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_client::services::v1::Image as Record;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared as SharedFuture};
use oci_spec::image::ImageConfiguration;
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;
use tonic::Code;
use tracing::Instrument;

use super::auth::Credentials;
use super::hosts;
use super::known::{Changes, Known};
use super::layers;
use super::mount::MountError;
use super::progress::Pulls;
use super::pull::{self, PullError, Resolved, Shared};
use super::records::{self, Details, LoadError};
use super::reference::{self, Reference, ReferenceError};
use super::registry::Registry;
use super::session::{CallError, Session};
use super::settings::{Places, Settings};
use super::unpack;
use crate::containerd::Client;
use crate::keyed::KeyedLocks;
use crate::telemetry::stage;

/// How long the removal of an image waits for containers that are being removed.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

/// One image with everything that names it.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of the configuration, `sha256:…`: the id the CRI knows it by.
    pub id: String,
    /// References with a tag.
    pub repo_tags: Vec<String>,
    /// References with a digest.
    pub repo_digests: Vec<String>,
    /// Must not be collected.
    pub pinned: bool,
    details: Arc<Details>,
}

impl Image {
    /// The snapshot that holds all its layers, the parent of a container's own; empty for an image without layers.
    pub fn chain_id(&self) -> &str {
        &self.details.chain_id
    }

    /// Bytes of its blobs as stored.
    pub fn size(&self) -> u64 {
        self.details.size
    }

    /// Environment, entry point, user and the rest.
    pub fn config(&self) -> &ImageConfiguration {
        &self.details.config
    }
}

/// Why an image operation failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The reference cannot be understood.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// No such image here.
    #[error("image {0:?} is not present")]
    NotPresent(String),
    /// A shortened id fits several images.
    #[error("image id {0:?} is ambiguous")]
    Ambiguous(String),
    /// A pull failed.
    #[error("failed to pull and unpack image {reference:?}")]
    Pull {
        /// The normalised reference.
        reference: String,
        /// The step that failed.
        #[source]
        source: PullError,
    },
    /// A layer that lost its snapshot could not be unpacked again.
    #[error("failed to unpack image {id}")]
    Unpack {
        /// The image.
        id: String,
        /// The step that failed.
        #[source]
        source: PullError,
    },
    /// An image volume could not be mounted.
    #[error("failed to mount image {id}")]
    Mount {
        /// The image.
        id: String,
        /// The step that failed.
        #[source]
        source: MountError,
    },
    /// An image volume could not be unmounted.
    #[error("failed to unmount image volume {key:?}")]
    Unmount {
        /// Whose it is.
        key: String,
        /// The step that failed.
        #[source]
        source: MountError,
    },
    /// containerd failed.
    #[error("containerd failed")]
    Containerd(#[from] CallError),
    /// The pull's task was lost.
    #[error("the pull of {0:?} ended early")]
    Lost(String),
}

/// A pull under way, for everybody who asked for it. Errors are shared too.
type Flight = SharedFuture<BoxFuture<'static, Result<Arc<Image>, Arc<ImageError>>>>;

/// The images of one containerd namespace. Cloning is cheap.
#[derive(Clone)]
pub struct ImageStore(Arc<Inner>);

struct Inner {
    shared: Shared,
    places: Places,
    /// Normalised names of images that must not be collected.
    pinned: BTreeSet<String>,
    /// By target digest; bounded by the records there are, as each listing drops the rest.
    details: Mutex<HashMap<String, Arc<Details>>>,
    /// The last listing while it holds.
    known: Known,
    /// Bounded by the distinct images being pulled.
    flights: Mutex<HashMap<(Reference, Option<Credentials>), Flight>>,
    /// How many containers are being taken off their layers.
    releases: watch::Sender<usize>,
}

/// Somebody is about to take a container off its image's layers; until this is dropped the removal of an image waits, so
/// that it frees what it is thought to free.
pub struct LayerUse(Arc<Inner>);

impl Drop for LayerUse {
    fn drop(&mut self) {
        self.0.releases.send_modify(|releases| *releases = releases.saturating_sub(1));
    }
}

impl ImageStore {
    /// A store over containerd's images.
    pub fn new(client: Client, places: Places, settings: Settings) -> Self {
        let pinned = settings.pinned.iter().filter_map(|name| {
            Reference::parse(name)
                .inspect_err(|error| tracing::error!(%error, "images.pinned names no image"))
                .ok()
        });
        let pinned = pinned.map(|name| name.to_string()).collect();
        let shared = Shared {
            session: Session::new(client),
            snapshotter: places.snapshotter.clone(),
            locks: Arc::new(KeyedLocks::default()),
            transfers: Arc::new(Semaphore::new(settings.parallel_transfers.max(1))),
            settings: Arc::new(settings),
            pulls: Arc::default(),
        };
        Self(Arc::new(Inner {
            shared,
            places,
            pinned,
            details: Mutex::default(),
            known: Known::default(),
            flights: Mutex::default(),
            releases: watch::Sender::new(0),
        }))
    }

    /// Where layers are unpacked.
    pub fn snapshotter(&self) -> &str {
        &self.0.shared.snapshotter
    }

    /// All images, by id. A record whose content cannot be read is left out.
    pub async fn list(&self) -> Result<Vec<Arc<Image>>, CallError> {
        let session = &self.0.shared.session;
        let begun = Known::begin(session.changes());
        let records = records::list(session).await?;
        let mut images: BTreeMap<String, Image> = BTreeMap::new();
        let mut known = HashMap::new();
        for record in records {
            let Some((digest, details)) = self.details(&record).await else { continue };
            known.insert(digest, Arc::clone(&details));
            let image = images.entry(details.id.clone()).or_insert_with(|| Image {
                id: details.id.clone(),
                repo_tags: Vec::new(),
                repo_digests: Vec::new(),
                pinned: false,
                details,
            });
            image.pinned |= records::is_pinned(&record);
            image.pinned |= self.0.pinned.contains(&record.name);
            match record.name {
                name if name.starts_with("sha256:") => {}
                name if name.contains('@') => image.repo_digests.push(name),
                name => image.repo_tags.push(name),
            }
        }
        *self.0.details.lock().unwrap_or_else(PoisonError::into_inner) = known;
        let images: Vec<Arc<Image>> = images.into_values().map(Arc::new).collect();
        self.0.known.put(begun, &images, session.changes());
        Ok(images)
    }

    /// Changes of images. Once those of others are followed, [`Self::resolve_known`] need not ask containerd.
    pub fn changes(&self) -> &Changes {
        self.0.shared.session.changes()
    }

    /// As [`Self::resolve`], without asking containerd when it was listed and has not changed since.
    pub async fn resolve_known(&self, text: &str) -> Result<Arc<Image>, ImageError> {
        let known = self.0.known.get(self.changes());
        match known.map(|images| find(&images, text)) {
            Some(Ok(image)) => Ok(image),
            // Not known yet, perhaps.
            _ => self.resolve(text).await,
        }
    }

    /// Finds an image by reference or (possibly shortened) id.
    pub async fn resolve(&self, text: &str) -> Result<Arc<Image>, ImageError> {
        find(&self.list().await?, text)
    }

    /// Makes sure that the image's snapshot is there, unpacking from stored layers what is missing.
    pub async fn ensure_unpacked(&self, image: &Image) -> Result<(), ImageError> {
        let shared = &self.0.shared;
        if image.chain_id().is_empty() {
            return Ok(());
        }
        if unpack::is_unpacked(&shared.session, &shared.snapshotter, image.chain_id()).await? {
            return Ok(());
        }
        let unpacked = pull::leased(shared, async |leased: &Shared, threads: &TaskTracker| {
            layers::unpack_stored(leased, &image.details, threads).await
        });
        Box::pin(unpacked).await.map_err(|source| ImageError::Unpack { id: image.id.clone(), source })
    }

    /// Pulls an image, or joins the pull of the same image that is under way. The pull goes on when a caller gives up.
    pub async fn pull(
        &self,
        text: &str,
        credentials: Option<Credentials>,
    ) -> Result<Arc<Image>, Arc<ImageError>> {
        let reference = Reference::parse(text).map_err(|error| Arc::new(error.into()))?;
        let key = (reference.clone(), credentials.clone());
        let flight = {
            let mut flights = self.0.flights.lock().unwrap_or_else(PoisonError::into_inner);
            flights.entry(key.clone()).or_insert_with(|| self.start_pull(key, reference, credentials)).clone()
        };
        flight.await
    }

    /// Tells that a container is being taken off its image's layers.
    pub fn use_layers(&self) -> LayerUse {
        self.0.releases.send_modify(|releases| *releases += 1);
        LayerUse(Arc::clone(&self.0))
    }

    /// Removes an image with all its names. One that is not here is fine.
    pub async fn remove(&self, text: &str) -> Result<(), ImageError> {
        // Also when it takes longer: what a container still holds is collected later.
        let mut releases = self.0.releases.subscribe();
        drop(tokio::time::timeout(RELEASE_PATIENCE, releases.wait_for(|releases| *releases == 0)).await);
        let image = match self.resolve(text).await {
            Err(ImageError::NotPresent(_)) => return Ok(()),
            other => other?,
        };
        let session = &self.0.shared.session;
        for name in image.repo_tags.iter().chain(&image.repo_digests) {
            records::delete(session, name, false).await?;
        }
        Ok(records::delete(session, &image.id, true).await?)
    }

    /// The session other parts of the image service use.
    pub(super) fn session(&self) -> &Session {
        &self.0.shared.session
    }

    /// Locks by name; mounts and layers have names that do not clash.
    pub(super) fn locks(&self) -> &KeyedLocks {
        &self.0.shared.locks
    }

    /// Where image volumes are mounted.
    pub(super) fn mounts_dir(&self) -> PathBuf {
        self.0.places.state_dir.join("image-mounts")
    }

    fn start_pull(
        &self,
        key: (Reference, Option<Credentials>),
        reference: Reference,
        credentials: Option<Credentials>,
    ) -> Flight {
        let store = self.clone();
        let name = reference.to_string();
        let pull = async move {
            let result = Box::pin(store.pull_now(&reference, credentials)).await;
            store.0.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            result.map_err(Arc::new)
        };
        // What it logs belongs to the request that began it.
        let task = tokio::spawn(pull.in_current_span());
        let joined = async move { task.await.unwrap_or_else(|_lost| Err(Arc::new(ImageError::Lost(name)))) };
        joined.boxed().shared()
    }

    async fn pull_now(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Arc<Image>, ImageError> {
        let begun = std::time::Instant::now();
        let failed = |source| ImageError::Pull { reference: reference.to_string(), source };
        let (directory, registry) =
            (self.0.places.registry_config_dir.clone(), reference.registry().to_owned());
        let hosts = tokio::task::spawn_blocking(move || hosts::load(&directory, &registry)).await;
        let hosts = hosts.map_err(|lost| failed(lost.into()))?.map_err(|error| failed(error.into()))?;
        let registry = Arc::new(Registry::new(reference.clone(), hosts, credentials));
        let deadline = self.0.shared.settings.progress_deadline();
        let progress = self.0.shared.pulls.begin(reference.to_string());
        let asked = progress.watch(deadline, Resolved::ask(&registry, reference));
        let asked = stage("pull_resolve", asked).await;
        let resolved = asked.map_err(failed)?;
        if let Some(image) = self.current(reference, resolved.digest()).await? {
            return Ok(image);
        }
        let pulled = Box::pin(pull::pull(&self.0.shared, registry, reference, resolved, &progress));
        let name = reference.to_string();
        // Cancel-safe: the report has nothing to lose, the pull is what ends this.
        let details = tokio::select! {
            details = stage("pull", pulled) => details.map_err(failed)?,
            never = progress.report(&name) => match never {},
        };
        let (id, size) = (details.id, details.size);
        tracing::info!(image = %reference, %id, bytes = size, elapsed = ?begun.elapsed(), "pulled an image");
        self.resolve(&id).await
    }

    /// The image of `reference`, if it is what the registry says now and is whole.
    async fn current(&self, reference: &Reference, digest: &str) -> Result<Option<Arc<Image>>, ImageError> {
        let image = match self.resolve(&reference.to_string()).await {
            Err(ImageError::NotPresent(_)) => return Ok(None),
            other => other?,
        };
        let by_digest = reference.with_digest(digest).to_string();
        let shared = &self.0.shared;
        let whole = image.repo_digests.contains(&by_digest)
            && (image.chain_id().is_empty()
                || unpack::is_unpacked(&shared.session, &shared.snapshotter, image.chain_id()).await?);
        Ok(whole.then_some(image))
    }

    /// What pulls and imports share.
    pub(super) fn shared(&self) -> &Shared {
        &self.0.shared
    }

    /// The pulls under way.
    pub fn pulls(&self) -> &Arc<Pulls> {
        &self.0.shared.pulls
    }

    /// Deletes what pulls of processes that died hold on to.
    pub async fn sweep(&self) -> Result<(), CallError> {
        self.0.shared.session.sweep().await
    }

    async fn details(&self, record: &Record) -> Option<(String, Arc<Details>)> {
        let target = record.target.as_ref()?;
        let cached =
            self.0.details.lock().unwrap_or_else(PoisonError::into_inner).get(&target.digest).cloned();
        if let Some(details) = cached {
            return Some((target.digest.clone(), details));
        }
        match records::load(&self.0.shared.session, target).await {
            Ok(details) => Some((target.digest.clone(), Arc::new(details))),
            // Removed between the listing and now.
            Err(LoadError::Content(error)) if error.code() == Code::NotFound => None,
            Err(error) => {
                let error = super::registry::chain(&error);
                tracing::warn!(image = record.name, error, "an image record cannot be used");
                None
            }
        }
    }
}
/// The image that a reference or (possibly shortened) id names.
fn find(images: &[Arc<Image>], text: &str) -> Result<Arc<Image>, ImageError> {
    if let Some(prefix) = reference::id_prefix(text) {
        let mut fitting = images.iter().filter(|image| image.id.starts_with(&prefix));
        match (fitting.next(), fitting.next()) {
            (Some(image), None) => return Ok(Arc::clone(image)),
            (Some(_), Some(_)) => return Err(ImageError::Ambiguous(text.to_owned())),
            // Twelve hexadecimal digits may also be a name.
            (None, _) => {}
        }
    }
    let not_present = || ImageError::NotPresent(text.to_owned());
    if text.starts_with("sha256:") {
        return Err(not_present());
    }
    let name = Reference::parse(text)?.to_string();
    let named = |image: &&Arc<Image>| image.repo_tags.contains(&name) || image.repo_digests.contains(&name);
    images.iter().find(named).cloned().ok_or_else(not_present)
}

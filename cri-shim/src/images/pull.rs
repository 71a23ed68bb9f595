//! One pull: resolve the reference, fetch the documents, stream the layers into containerd, unpack them, record the image.
//!
//! Input: a reference, the hosts that may have it, credentials. Output: the image's [`Details`] and its records.
//! Layers are fetched in parallel and unpacked as they arrive ([`layers`]). Everything is held by a lease until the records exist, so a pull that dies leaves nothing for good.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::types;
use oci_spec::image::{Descriptor, ImageManifest};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::content;
use super::hosts::HostsError;
use super::layers;
use super::manifest::{self, ManifestError, Parsed};
use super::progress::{Progress, Pulls};
use super::records::{self, Details};
use super::reference::Reference;
use super::registry::{Document, FetchError, Registry};
use super::session::{CallError, Session};
use super::settings::Settings;
use super::unpack::UnpackError;
use crate::keyed::KeyedLocks;

/// How long threads that unpack may take to end after a failure; what they still hold goes with the lease's expiry.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry's configuration is wrong.
    #[error("the registry's configuration cannot be used")]
    Hosts(#[from] HostsError),
    /// No host has the image, or none could be asked.
    #[error("failed to resolve reference {reference:?}")]
    Resolve {
        /// The reference.
        reference: String,
        /// Each host's answer.
        #[source]
        source: FetchError,
    },
    /// A part of the image could not be fetched.
    #[error("failed to fetch {what} {digest}")]
    Fetch {
        /// What it is.
        what: &'static str,
        /// Its digest.
        digest: String,
        /// Each host's answer.
        #[source]
        source: FetchError,
    },
    /// The image is none we can run.
    #[error("the image cannot be used")]
    Manifest(#[from] ManifestError),
    /// A layer could not be unpacked.
    #[error("failed to unpack")]
    Unpack(#[from] UnpackError),
    /// containerd failed.
    #[error("containerd failed")]
    Containerd(#[from] CallError),
    /// Its blobs alone are more than the image may take.
    #[error("the image has {bytes} bytes, more than the allowed {limit} (images.maxImageBytes)")]
    TooLarge {
        /// What its manifest adds up to.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Nothing has happened for too long.
    #[error("no progress for {0:?} (images.progressDeadlineSeconds)")]
    Stalled(Duration),
    /// The task of a layer was lost.
    #[error("a layer's task ended early")]
    Lost(#[from] tokio::task::JoinError),
}

/// What every pull shares.
#[derive(Clone)]
pub struct Shared {
    /// Unleased session.
    pub session: Session,
    /// Where layers are unpacked.
    pub snapshotter: String,
    /// One writer per blob and one unpacker per chain id.
    pub locks: Arc<KeyedLocks>,
    /// How many layers may be in transfer at once, over all pulls.
    pub transfers: Arc<Semaphore>,
    /// Limits and patience.
    pub settings: Arc<Settings>,
    /// The pulls under way.
    pub pulls: Arc<Pulls>,
}

/// A resolved reference: what the registry says it stands for now.
pub struct Resolved {
    document: Document,
    parsed: Parsed,
}

impl Resolved {
    /// Asks the registry what `reference` stands for.
    pub async fn ask(registry: &Registry, reference: &Reference) -> Result<Self, PullError> {
        let document = registry.manifest(reference.version()).await;
        let document =
            document.map_err(|source| PullError::Resolve { reference: reference.to_string(), source })?;
        let parsed = manifest::parse(&document.bytes, &document.media_type, &document.digest)?;
        Ok(Self { document, parsed })
    }

    /// Digest of the manifest or index.
    pub fn digest(&self) -> &str {
        &self.document.digest
    }
}

/// Fetches, unpacks and records what was resolved.
pub async fn pull(
    shared: &Shared,
    registry: Arc<Registry>,
    reference: &Reference,
    resolved: Resolved,
    progress: &Progress,
) -> Result<Details, PullError> {
    let deadline = shared.settings.progress_deadline();
    let work = leased(shared, async |leased: &Shared, threads: &TaskTracker| {
        let work = Box::pin(run(leased, registry, reference, resolved, progress, threads));
        Box::pin(progress.watch(deadline, work)).await
    });
    Box::pin(work).await
}

/// Runs `work` under a lease. After a failure nothing of it is left when this returns.
pub async fn leased<T, E: From<CallError>>(
    shared: &Shared,
    work: impl AsyncFnOnce(&Shared, &TaskTracker) -> Result<T, E>,
) -> Result<T, E> {
    let session = shared.session.leased().await?;
    let leased = Shared { session: session.clone(), ..shared.clone() };
    let threads = TaskTracker::new();
    let result = work(&leased, &threads).await;
    threads.close();
    // Directories that are still being written to cannot be removed.
    let ended = tokio::time::timeout(END_PATIENCE, threads.wait()).await.is_ok();
    session.release(result.is_err() && ended).await;
    result
}

async fn run(
    shared: &Shared,
    registry: Arc<Registry>,
    reference: &Reference,
    resolved: Resolved,
    progress: &Progress,
    threads: &TaskTracker,
) -> Result<Details, PullError> {
    let Resolved { document, parsed } = resolved;
    let target = target(&document, &parsed);
    let mut documents = document.bytes.len() as u64;
    let (manifest, manifest_document) = match parsed {
        Parsed::Manifest(manifest) => (*manifest, document),
        Parsed::Index(index) => {
            let chosen = manifest::select(&index)?;
            let digest = chosen.digest().to_string();
            let labels = records::index_labels(&digest);
            content::store(&shared.session, &document.digest, document.bytes, labels).await?;
            let inner = fetch_manifest(&registry, chosen).await?;
            documents += inner.1.bytes.len() as u64;
            inner
        }
    };
    let labels = records::manifest_labels(&manifest);
    content::store(&shared.session, &manifest_document.digest, manifest_document.bytes, labels).await?;
    let details = fetch_config(shared, &registry, documents, manifest).await?;
    if details.size > shared.settings.max_image_bytes {
        return Err(PullError::TooLarge { bytes: details.size, limit: shared.settings.max_image_bytes });
    }
    progress.expect(&details);
    layers::fetch(shared, &registry, &details, progress, threads).await?;
    record(&shared.session, reference, &details.id, target).await?;
    Ok(details)
}

/// Writes the image's three records: the reference, its digest form and its id.
pub async fn record(
    session: &Session,
    reference: &Reference,
    id: &str,
    target: types::Descriptor,
) -> Result<(), CallError> {
    let by_digest = reference.with_digest(&target.digest).to_string();
    let mut names = vec![by_digest, id.to_owned()];
    if reference.digest().is_none() {
        names.push(reference.to_string());
    }
    for name in names {
        records::put(session, &name, target.clone(), false).await?;
    }
    Ok(())
}

async fn fetch_manifest(
    registry: &Registry,
    chosen: &Descriptor,
) -> Result<(ImageManifest, Document), PullError> {
    let digest = chosen.digest().to_string();
    let fetched = registry.manifest(&digest).await;
    let fetched =
        fetched.map_err(|source| PullError::Fetch { what: "manifest", digest: digest.clone(), source })?;
    manifest::check_size("manifest", chosen, fetched.bytes.len())?;
    match manifest::parse(&fetched.bytes, chosen.media_type().as_ref(), &digest)? {
        Parsed::Manifest(manifest) => Ok((*manifest, fetched)),
        Parsed::Index(_) => Err(ManifestError::Nested(digest).into()),
    }
}

async fn fetch_config(
    shared: &Shared,
    registry: &Registry,
    documents: u64,
    manifest: ImageManifest,
) -> Result<Details, PullError> {
    let digest = manifest.config().digest().to_string();
    let fetched = registry.small_blob(&digest).await;
    let fetched = fetched.map_err(|source| PullError::Fetch {
        what: "image configuration",
        digest: digest.clone(),
        source,
    })?;
    manifest::check_size("image configuration", manifest.config(), fetched.bytes.len())?;
    let config = manifest::parse_config(&fetched.bytes, &manifest)?;
    let details = records::details(documents, manifest, config);
    let labels = records::config_labels(&shared.snapshotter, &details.chain_id);
    content::store(&shared.session, &digest, fetched.bytes, labels).await?;
    Ok(details)
}

/// The descriptor records point at.
fn target(document: &Document, parsed: &Parsed) -> types::Descriptor {
    let own = match parsed {
        Parsed::Index(index) => index.media_type().as_ref(),
        Parsed::Manifest(manifest) => manifest.media_type().as_ref(),
    };
    let media_type = match (own, parsed) {
        (Some(own), _) => own.to_string(),
        (None, Parsed::Index(_)) => oci_spec::image::MediaType::ImageIndex.to_string(),
        (None, Parsed::Manifest(_)) => oci_spec::image::MediaType::ImageManifest.to_string(),
    };
    types::Descriptor {
        media_type,
        digest: document.digest.clone(),
        size: i64::try_from(document.bytes.len()).unwrap_or(i64::MAX),
        ..types::Descriptor::default()
    }
}

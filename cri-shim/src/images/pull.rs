//! One pull: resolve the reference, fetch the documents, stream the layers into containerd, unpack them, record the image.
//!
//! Input: a reference, the hosts that may have it, credentials. Output: the image's [`Details`] and its records.
//! Layers are fetched in parallel and unpacked in order as they arrive; each byte goes straight from the network into
//! containerd. Everything is held by a lease until the records exist, so a pull that dies leaves nothing for good.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::types;
use oci_spec::image::{Descriptor, ImageManifest};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;

use super::content::{self, CHUNK, Writer};
use super::hosts::HostsError;
use super::keyed::KeyedLocks;
use super::manifest::{self, ManifestError, Parsed};
use super::records::{self, Details};
use super::reference::Reference;
use super::registry::{Document, FetchError, HostError, Registry};
use super::session::{CallError, Session};
use super::unpack::{self, Layer, UnpackError};

/// Tries per host for a layer whose transfer breaks; each goes on where the last one stopped.
const TRIES: u32 = 3;

/// Pause before such a try.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

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
) -> Result<Details, PullError> {
    let session = shared.session.leased().await?;
    let leased = Shared { session: session.clone(), ..shared.clone() };
    let result = run(&leased, registry, reference, resolved).await;
    session.release().await;
    result
}

async fn run(
    shared: &Shared,
    registry: Arc<Registry>,
    reference: &Reference,
    resolved: Resolved,
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
    fetch_layers(shared, &registry, &details).await?;
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
    let config = manifest::parse_config(&fetched.bytes, &manifest)?;
    let details = records::details(documents, manifest, config);
    let labels = records::config_labels(&shared.snapshotter, &details.chain_id);
    content::store(&shared.session, &digest, fetched.bytes, labels).await?;
    Ok(details)
}

async fn fetch_layers(shared: &Shared, registry: &Arc<Registry>, details: &Details) -> Result<(), PullError> {
    let layers = details.manifest.layers();
    let diff_ids = details.config.rootfs().diff_ids();
    // Dropping the handles, on any error, ends the transfers.
    let transfers = layers.iter().zip(diff_ids).map(|(layer, diff_id)| {
        let work = fetch_layer(shared.clone(), Arc::clone(registry), layer.clone(), diff_id.clone());
        AbortOnDropHandle::new(tokio::spawn(work))
    });
    let transfers: Vec<_> = transfers.collect();
    let mut parent = String::new();
    let chain = manifest::chain_ids(diff_ids);
    for (((transfer, descriptor), diff_id), chain_id) in
        transfers.into_iter().zip(layers).zip(diff_ids).zip(chain)
    {
        transfer.await??;
        let layer = Layer { descriptor, diff_id, chain_id: &chain_id, parent: &parent };
        let _one_unpacker = shared.locks.lock(&chain_id).await;
        unpack::unpack(&shared.session, &shared.snapshotter, &layer).await?;
        parent = chain_id;
    }
    Ok(())
}

async fn fetch_layer(
    shared: Shared,
    registry: Arc<Registry>,
    layer: Descriptor,
    diff_id: String,
) -> Result<(), PullError> {
    let digest = layer.digest().to_string();
    let _one_writer = shared.locks.lock(&digest).await;
    let _permit = shared.transfers.acquire().await;
    let mut failures: Option<FetchError> = None;
    for host in 0..registry.host_count() {
        for attempt in 1..=TRIES {
            let error = match transfer(&shared.session, &registry, host, &layer, &diff_id).await? {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let hopeless = error.is_not_found() || error.is_denied() || attempt == TRIES;
            if hopeless {
                failures = Some(match failures {
                    Some(earlier) => earlier.and(error),
                    None => error,
                });
                break;
            }
            tracing::info!(%digest, %error, attempt, "a layer's transfer broke; trying again");
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }
    let source = failures.unwrap_or_else(FetchError::nobody);
    Err(PullError::Fetch { what: "layer", digest, source })
}

/// Copies one layer from one host into containerd. The inner error is the host's fault, the outer one containerd's.
async fn transfer(
    session: &Session,
    registry: &Registry,
    host: usize,
    layer: &Descriptor,
    diff_id: &str,
) -> Result<Result<(), FetchError>, PullError> {
    let digest = layer.digest().to_string();
    let Some(mut writer) = Writer::open(session, &digest, layer.size()).await? else { return Ok(Ok(())) };
    let at_fault = |error| Ok(Err(FetchError::of(registry.host_name(host), error)));
    if writer.offset() < layer.size() {
        let (mut response, at_offset) = match registry.blob(host, &digest, writer.offset()).await {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(error)),
        };
        if !at_offset {
            writer = writer.restart().await?;
        }
        let mut buffer = Vec::with_capacity(CHUNK);
        loop {
            let chunk = match response.chunk().await {
                Ok(chunk) => chunk,
                Err(error) => return at_fault(HostError::Transport(error)),
            };
            let ended = chunk.is_none();
            buffer.extend_from_slice(&chunk.unwrap_or_default());
            if writer.offset() + buffer.len() as u64 > layer.size() {
                writer.discard().await?;
                return at_fault(HostError::Length { wanted: layer.size() });
            }
            if !buffer.is_empty() && (ended || buffer.len() >= CHUNK) {
                writer.write(std::mem::replace(&mut buffer, Vec::with_capacity(CHUNK))).await?;
            }
            if ended {
                break;
            }
        }
    }
    if writer.offset() != layer.size() {
        return at_fault(HostError::Length { wanted: layer.size() });
    }
    match writer.commit(records::layer_labels(diff_id)).await {
        Ok(()) => Ok(Ok(())),
        // containerd hashed it and found something else; it forgets such a write by itself only much later.
        Err(error) if error.code() == Code::FailedPrecondition => {
            content::abort(session, &digest).await?;
            at_fault(HostError::Content { digest })
        }
        Err(error) => Err(error.into()),
    }
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

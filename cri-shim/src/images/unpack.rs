//! Turns layers into snapshots, one per chain id: through a staged directory that this process fills, or by containerd.
//!
//! Input: a layer's descriptor, its diff id and the chain it belongs to. Output: a committed snapshot that containerd
//! keeps as long as the image's configuration refers to it. A layer that is unpacked already is left as it is.
//! [`stage`], [`super::untar::apply`] and [`finish`] together do what [`by_containerd`] does alone.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use containerd_client::services::v1::ApplyRequest;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::types;
use oci_spec::image::Descriptor;
use tonic::Code;

use super::manifest;
use super::records::Details;
use super::session::{CALL_DEADLINE, CallError, Session, allow, call, random_name};
use super::untar::merge::{self, Target};
use super::untar::{Applied, ApplyError};
use crate::containerd::snapshots::SNAPSHOTTER;

/// How long one layer may take containerd to unpack.
const APPLY_DEADLINE: Duration = Duration::from_secs(900);

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// containerd refused a step.
    #[error("containerd failed")]
    Containerd(#[from] CallError),
    /// The layer cannot be applied.
    #[error("layer {layer} cannot be unpacked")]
    Apply {
        /// The layer's digest.
        layer: String,
        /// What is wrong.
        #[source]
        source: ApplyError,
    },
    /// The unpacked layer could not be brought to its place.
    #[error("layer {layer} cannot be moved to its snapshot")]
    Merge {
        /// The layer's digest.
        layer: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The layer's content is not what the image configuration says.
    #[error("layer {layer} unpacks to {got}, the image configuration promises {wanted}")]
    DiffId {
        /// The layer's digest.
        layer: String,
        /// The promised diff id.
        wanted: String,
        /// The real one.
        got: String,
    },
    /// The thread that unpacked was lost.
    #[error("the unpacking thread ended early")]
    Lost(#[from] tokio::task::JoinError),
}

/// One layer and its place.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The compressed layer in the content store.
    pub descriptor: Descriptor,
    /// Digest of its uncompressed form.
    pub diff_id: String,
    /// The snapshot to make.
    pub chain_id: String,
    /// The snapshot below, empty for the first.
    pub parent: String,
}

impl Layer {
    /// Digest of the compressed layer.
    pub fn digest(&self) -> String {
        self.descriptor.digest().to_string()
    }
}

/// The layers of an image, lowest first.
pub fn layers(details: &Details) -> Vec<Layer> {
    let diff_ids = details.config.rootfs().diff_ids();
    let mut parent = String::new();
    let all = details.manifest.layers().iter().zip(diff_ids).zip(manifest::chain_ids(diff_ids));
    all.map(|((descriptor, diff_id), chain_id)| Layer {
        descriptor: descriptor.clone(),
        diff_id: diff_id.clone(),
        parent: std::mem::replace(&mut parent, chain_id.clone()),
        chain_id,
    })
    .collect()
}

/// Tells whether the snapshot of a chain id is there; if so it is put under the session's lease.
pub async fn is_unpacked(session: &Session, snapshotter: &str, chain_id: &str) -> Result<bool, CallError> {
    if !exists(session, snapshotter, chain_id).await? {
        return Ok(false);
    }
    session.hold(&format!("snapshots/{snapshotter}"), chain_id).await?;
    // Garbage collection may have been quicker than the lease; what is there now stays.
    exists(session, snapshotter, chain_id).await
}

async fn exists(session: &Session, snapshotter: &str, chain_id: &str) -> Result<bool, CallError> {
    let message = StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: chain_id.to_owned() };
    let mut snapshots = SnapshotsClient::new(session.channel());
    let request = session.request(message, CALL_DEADLINE);
    let stat = call("look up snapshot", chain_id, snapshots.stat(request)).await;
    Ok(allow(stat, Code::NotFound)?.is_some())
}

/// A directory to unpack a layer into, before the snapshots below it need to be there.
#[derive(Debug)]
pub struct Staged {
    key: String,
    /// Where to write.
    pub target: Target,
}

/// Makes a directory for a layer; `None` where the snapshotter has none that can be filled without mounting it.
pub async fn stage(session: &Session, snapshotter: &str, layer: &Layer) -> Result<Option<Staged>, CallError> {
    if snapshotter != SNAPSHOTTER {
        return Ok(None);
    }
    let (key, mounts) = prepare(session, snapshotter, layer, "").await?;
    let Some(target) = Target::of(&mounts) else {
        remove(session, snapshotter, &key).await;
        return Ok(None);
    };
    Ok(Some(Staged { key, target }))
}

/// Makes the snapshot of a layer that was applied to its staged directory. The snapshot below must be there now.
pub async fn finish(
    session: &Session,
    snapshotter: &str,
    layer: &Layer,
    staged: Staged,
    applied: Applied,
) -> Result<(), UnpackError> {
    let result = place(session, snapshotter, layer, &staged, applied).await;
    // What was staged for the lowest layer has become its snapshot.
    if !(layer.parent.is_empty() && matches!(result, Ok(true))) {
        remove(session, snapshotter, &staged.key).await;
    }
    result.map(drop)
}

/// `false` when the snapshot was made by somebody else meanwhile.
async fn place(
    session: &Session,
    snapshotter: &str,
    layer: &Layer,
    staged: &Staged,
    applied: Applied,
) -> Result<bool, UnpackError> {
    if applied.diff_id != layer.diff_id {
        let (wanted, got) = (layer.diff_id.clone(), applied.diff_id);
        return Err(UnpackError::DiffId { layer: layer.digest(), wanted, got });
    }
    if layer.parent.is_empty() {
        return Ok(commit(session, snapshotter, layer, &staged.key).await?);
    }
    let failed = |source| UnpackError::Merge { layer: layer.digest(), source };
    let (key, mounts) = prepare(session, snapshotter, layer, &layer.parent).await?;
    let placed: Result<bool, UnpackError> = async {
        let target = Target::of(&mounts);
        let target = target.ok_or_else(|| failed(io::Error::other("its mounts cannot be understood")))?;
        let source = staged.target.upper.clone();
        let merged = tokio::task::spawn_blocking(move || merge::merge(&source, &applied, &target));
        merged.await?.map_err(failed)?;
        Ok(commit(session, snapshotter, layer, &key).await?)
    }
    .await;
    if !matches!(placed, Ok(true)) {
        remove(session, snapshotter, &key).await;
    }
    placed
}

/// Gives up a staged directory.
pub async fn discard(session: &Session, snapshotter: &str, staged: Staged) {
    remove(session, snapshotter, &staged.key).await;
}

/// Lets containerd unpack a layer that is in the content store. The snapshot below must be there.
pub async fn by_containerd(session: &Session, snapshotter: &str, layer: &Layer) -> Result<(), UnpackError> {
    let (key, mounts) = prepare(session, snapshotter, layer, &layer.parent).await?;
    let result = async {
        apply(session, layer, mounts).await?;
        Ok(commit(session, snapshotter, layer, &key).await?)
    }
    .await;
    if !matches!(result, Ok(true)) {
        remove(session, snapshotter, &key).await;
    }
    result.map(drop)
}

async fn prepare(
    session: &Session,
    snapshotter: &str,
    layer: &Layer,
    parent: &str,
) -> Result<(String, Vec<types::Mount>), CallError> {
    let key = format!("extract-{} {}", random_name(), layer.chain_id);
    let message = PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.clone(),
        parent: parent.to_owned(),
        labels: labels(layer),
    };
    let mut snapshots = SnapshotsClient::new(session.channel());
    let request = session.request(message, CALL_DEADLINE);
    let prepared = call("prepare snapshot", &key, snapshots.prepare(request)).await?;
    Ok((key, prepared.mounts))
}

/// `false` when the snapshot was made by somebody else meanwhile.
async fn commit(session: &Session, snapshotter: &str, layer: &Layer, key: &str) -> Result<bool, CallError> {
    let message = CommitSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        name: layer.chain_id.clone(),
        key: key.to_owned(),
        labels: labels(layer),
    };
    let mut snapshots = SnapshotsClient::new(session.channel());
    let request = session.request(message, CALL_DEADLINE);
    let committed = call("commit snapshot", &layer.chain_id, snapshots.commit(request)).await;
    Ok(allow(committed, Code::AlreadyExists)?.is_some())
}

fn labels(layer: &Layer) -> HashMap<String, String> {
    HashMap::from([("containerd.io/snapshot.ref".to_owned(), layer.chain_id.clone())])
}

async fn apply(session: &Session, layer: &Layer, mounts: Vec<types::Mount>) -> Result<(), UnpackError> {
    let digest = layer.digest();
    let message =
        ApplyRequest { diff: Some(descriptor(&layer.descriptor)), mounts, ..ApplyRequest::default() };
    let mut diff = DiffClient::new(session.channel());
    let applied = call("unpack layer", &digest, diff.apply(session.request(message, APPLY_DEADLINE))).await?;
    let got = applied.applied.map(|applied| applied.digest).unwrap_or_default();
    if got == layer.diff_id {
        return Ok(());
    }
    Err(UnpackError::DiffId { layer: digest, wanted: layer.diff_id.clone(), got })
}

/// Removes a half-made snapshot; when that fails the lease's end does.
async fn remove(session: &Session, snapshotter: &str, key: &str) {
    let message = RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
    let mut snapshots = SnapshotsClient::new(session.channel());
    let removed =
        call("remove snapshot", key, snapshots.remove(session.request(message, CALL_DEADLINE))).await;
    if let Err(error) = allow(removed, Code::NotFound) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "a half-made snapshot stays until its lease ends"
        );
    }
}

/// An image specification's descriptor in containerd's form.
pub fn descriptor(descriptor: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type().to_string(),
        digest: descriptor.digest().to_string(),
        size: i64::try_from(descriptor.size()).unwrap_or(i64::MAX),
        annotations: HashMap::new(),
    }
}

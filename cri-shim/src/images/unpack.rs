//! Turns layers in the content store into snapshots, one per chain id.
//!
//! Input: a layer's descriptor, its diff id and the chain it belongs to. Output: a committed snapshot that containerd
//! keeps as long as the image's configuration refers to it. A layer that is unpacked already is left as it is.

use std::collections::HashMap;
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

use super::session::{CALL_DEADLINE, CallError, Session, allow, call, random_name};

/// How long one layer may take to unpack.
const APPLY_DEADLINE: Duration = Duration::from_secs(900);

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// containerd refused a step.
    #[error("containerd failed")]
    Containerd(#[from] CallError),
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
}

/// One layer and its place.
pub struct Layer<'a> {
    /// The compressed layer in the content store.
    pub descriptor: &'a Descriptor,
    /// Digest of its uncompressed form.
    pub diff_id: &'a str,
    /// The snapshot to make.
    pub chain_id: &'a str,
    /// The snapshot below, empty for the first.
    pub parent: &'a str,
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

/// Unpacks one layer on top of its parent.
pub async fn unpack(session: &Session, snapshotter: &str, layer: &Layer<'_>) -> Result<(), UnpackError> {
    if is_unpacked(session, snapshotter, layer.chain_id).await? {
        return Ok(());
    }
    let key = format!("extract-{} {}", random_name(), layer.chain_id);
    let labels = HashMap::from([("containerd.io/snapshot.ref".to_owned(), layer.chain_id.to_owned())]);
    let message = PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.clone(),
        parent: layer.parent.to_owned(),
        labels: labels.clone(),
    };
    let mut snapshots = SnapshotsClient::new(session.channel());
    let prepared =
        call("prepare snapshot", &key, snapshots.prepare(session.request(message, CALL_DEADLINE))).await?;
    let result = async {
        apply(session, layer, prepared.mounts).await?;
        let message = CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: layer.chain_id.to_owned(),
            key: key.clone(),
            labels,
        };
        let request = session.request(message, CALL_DEADLINE);
        let committed = call("commit snapshot", layer.chain_id, snapshots.clone().commit(request)).await;
        Ok(allow(committed, Code::AlreadyExists)?.is_some())
    }
    .await;
    if !matches!(result, Ok(true)) {
        remove(session, snapshotter, &key).await;
    }
    result.map(drop)
}

async fn apply(session: &Session, layer: &Layer<'_>, mounts: Vec<types::Mount>) -> Result<(), UnpackError> {
    let digest = layer.descriptor.digest().to_string();
    let message =
        ApplyRequest { diff: Some(descriptor(layer.descriptor)), mounts, ..ApplyRequest::default() };
    let mut diff = DiffClient::new(session.channel());
    let applied = call("unpack layer", &digest, diff.apply(session.request(message, APPLY_DEADLINE))).await?;
    let got = applied.applied.map(|applied| applied.digest).unwrap_or_default();
    if got == layer.diff_id {
        return Ok(());
    }
    Err(UnpackError::DiffId { layer: digest, wanted: layer.diff_id.to_owned(), got })
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

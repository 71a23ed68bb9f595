//! Snapshots: the layered file systems below containers and images.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::snapshots::{
    Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, UsageRequest,
    UsageResponse,
};
use containerd_client::types::Mount;

use super::error::gone;
use super::{Client, ContainerdError, METADATA_DEADLINE, call};

/// The snapshotter every image is unpacked with.
pub const SNAPSHOTTER: &str = "overlayfs";
/// Keeps an object out of garbage collection for as long as it exists.
pub const GC_ROOT: &str = "containerd.io/gc.root";

impl Client {
    /// Prepares a writable snapshot `key` on `parent` ("" for none); gives its mounts.
    pub async fn prepare_snapshot(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, ContainerdError> {
        let request = PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let answer =
            call("Snapshots.Prepare", key, METADATA_DEADLINE, self.snapshots_client().prepare(request))
                .await?;
        Ok(answer.mounts)
    }

    /// The mounts of the writable snapshot `key`.
    pub async fn snapshot_mounts(&self, key: &str) -> Result<Vec<Mount>, ContainerdError> {
        let request = MountsRequest { snapshotter: SNAPSHOTTER.to_owned(), key: key.to_owned() };
        let answer =
            call("Snapshots.Mounts", key, METADATA_DEADLINE, self.snapshots_client().mounts(request)).await?;
        Ok(answer.mounts)
    }

    /// Removes the snapshot `key`; one that is gone is fine.
    pub async fn remove_snapshot(&self, key: &str) -> Result<(), ContainerdError> {
        let request = RemoveSnapshotRequest { snapshotter: SNAPSHOTTER.to_owned(), key: key.to_owned() };
        gone(call("Snapshots.Remove", key, METADATA_DEADLINE, self.snapshots_client().remove(request)).await)
    }

    /// Size and inodes of the snapshot `key` without its parents.
    pub async fn snapshot_usage(&self, key: &str) -> Result<UsageResponse, ContainerdError> {
        let request = UsageRequest { snapshotter: SNAPSHOTTER.to_owned(), key: key.to_owned() };
        call("Snapshots.Usage", key, METADATA_DEADLINE, self.snapshots_client().usage(request)).await
    }

    /// The directory that the snapshotter keeps its snapshots in, where it tells.
    pub async fn snapshot_directory(&self) -> Result<Option<PathBuf>, ContainerdError> {
        let filters = vec![format!("type==io.containerd.snapshotter.v1,id=={SNAPSHOTTER}")];
        let mut client = IntrospectionClient::new(self.service());
        let request = PluginsRequest { filters };
        let answer =
            call("Introspection.Plugins", SNAPSHOTTER, METADATA_DEADLINE, client.plugins(request)).await?;
        Ok(answer.plugins.into_iter().find_map(|plugin| plugin.exports.get("root").map(PathBuf::from)))
    }

    /// Every snapshot that matches one of `filters` (all, when there is none).
    pub async fn snapshots(&self, filters: Vec<String>) -> Result<Vec<Info>, ContainerdError> {
        const NAME: &str = "Snapshots.List";
        let request = ListSnapshotsRequest { snapshotter: SNAPSHOTTER.to_owned(), filters };
        let mut stream = call(NAME, "", METADATA_DEADLINE, self.snapshots_client().list(request)).await?;
        let mut found = Vec::new();
        let fill = async {
            while let Some(page) = stream.message().await? {
                found.extend(page.info);
            }
            Ok(tonic::Response::new(()))
        };
        call(NAME, "", METADATA_DEADLINE, fill).await?;
        Ok(found)
    }
}

//! Read-only mounts of images, for image volumes: a view snapshot mounted below the state directory, one per key.
//!
//! Input: an image and the key of its user, `<container id>/<anything>`. Output: a directory. Each mount is recorded in a
//! directory of its own before it is made, so after `kill -9` [`ImageStore::retain_mounts`] finds everything that exists:
//! `<state>/image-mounts/<hash of the key>/{key,fs}`. The view keeps the layers from garbage collection, the image record
//! may go meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    ListSnapshotsRequest, RemoveSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::types::Mount;
use tonic::Code;

use super::digest;
use super::session::{CALL_DEADLINE, CallError, allow, call, failed};
use super::store::{Image, ImageError, ImageStore};
use crate::containerd::snapshots::GC_ROOT;
use crate::host::{files, mounts, snapshot};

/// Marks our view snapshots; the value is the name of the mount's directory.
const LABEL: &str = "io.keelson.image-mount";

/// Why an image was not mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// containerd failed.
    #[error("containerd failed")]
    Containerd(#[from] CallError),
    /// The host refused.
    #[error("cannot {step} {}", path.display())]
    Host {
        /// What was to be done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A helper of the mount table failed.
    #[error("the mount table")]
    Table(#[from] Box<crate::error::RuntimeError>),
    /// The blocking task was lost.
    #[error("the work ended early")]
    Lost(#[from] tokio::task::JoinError),
}

/// One mount's place.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    name: String,
    directory: PathBuf,
}

impl Place {
    fn of(root: &Path, key: &str) -> Self {
        let name = digest::of(key).split_off("sha256:".len());
        let name = name[..32].to_owned();
        Self { directory: root.join(&name), name }
    }

    fn snapshot(&self) -> String {
        format!("keelson-image-mount-{}", self.name)
    }

    fn target(&self) -> PathBuf {
        self.directory.join("fs")
    }

    /// Writes down whose mount this is; then its directory exists too.
    fn record(&self, key: &str) -> Result<(), MountError> {
        let target = self.target();
        std::fs::create_dir_all(&target).map_err(host("make", &target))?;
        let (path, new) = (self.directory.join("key"), self.directory.join("key.new"));
        std::fs::write(&new, key).map_err(host("write", &new))?;
        std::fs::rename(&new, &path).map_err(host("replace", &path))
    }
}

impl ImageStore {
    /// Mounts the image's file system read-only and gives the directory. A repeated call with the same key gives the same
    /// mount; what is not unpacked yet is.
    pub async fn mount_readonly(&self, image: &Image, key: &str) -> Result<PathBuf, ImageError> {
        let place = Place::of(&self.mounts_dir(), key);
        let failed = |source| ImageError::Mount { id: image.id.clone(), source };
        let _one_at_a_time = self.locks().lock(&place.snapshot()).await;
        let target = place.target();
        let probed = target.clone();
        if blocking(move || Ok(snapshot::is_mount_point(&probed))).await.map_err(failed)? {
            return Ok(target);
        }
        // Whatever a try that was cut off left of it is replaced.
        self.undo(&place).await.map_err(failed)?;
        let (recorded, key) = (place.clone(), key.to_owned());
        blocking(move || recorded.record(&key)).await.map_err(failed)?;
        let made = async {
            self.ensure_unpacked(image).await?;
            let mounts = self.view(&place, image.chain_id()).await.map_err(failed)?;
            let at = target.clone();
            let mounted =
                move || snapshot::mount_readonly(&mounts, &at).map_err(host("mount an image at", &at));
            blocking(mounted).await.map_err(failed)
        };
        if let Err(error) = made.await {
            if let Err(left) = self.undo(&place).await {
                let left = super::registry::chain(&left);
                tracing::warn!(path = %target.display(), left, "a failed image mount stays until the next start");
            }
            return Err(error);
        }
        Ok(target)
    }

    /// Undoes [`ImageStore::mount_readonly`]; an unknown key is fine.
    pub async fn unmount(&self, key: &str) -> Result<(), ImageError> {
        let place = Place::of(&self.mounts_dir(), key);
        let _one_at_a_time = self.locks().lock(&place.snapshot()).await;
        self.undo(&place).await.map_err(|source| ImageError::Unmount { key: key.to_owned(), source })
    }

    /// Undoes every mount whose key is `owner` or begins with `<owner>/`.
    pub async fn unmount_all(&self, owner: &str) -> Result<(), ImageError> {
        for key in self.mounted().await?.into_values().filter(|key| owner_of(key) == owner) {
            self.unmount(&key).await?;
        }
        Ok(())
    }

    /// Undoes every mount whose owner (its key up to the first `/`) is not wanted, half-made ones, and views of a boot before.
    pub async fn retain_mounts(&self, wanted: impl Fn(&str) -> bool) -> Result<(), ImageError> {
        let unmount = |key: &str| {
            let key = key.to_owned();
            move |source| ImageError::Unmount { key, source }
        };
        let mut kept = BTreeSet::new();
        for (name, key) in self.mounted().await? {
            if wanted(owner_of(&key)) && !key.is_empty() {
                kept.insert(name);
                continue;
            }
            tracing::warn!(key, "removing an image mount that nothing explains");
            let place = Place { directory: self.mounts_dir().join(&name), name };
            self.undo(&place).await.map_err(unmount(&key))?;
        }
        for name in self.views().await? {
            if !kept.contains(&name) {
                let place = Place { directory: self.mounts_dir().join(&name), name };
                self.undo(&place).await.map_err(unmount(&place.name))?;
            }
        }
        Ok(())
    }

    /// Directory names and keys of what is recorded; a half-written record has an empty key.
    async fn mounted(&self) -> Result<HashMap<String, String>, ImageError> {
        let directory = self.mounts_dir();
        let read = move || {
            let names = files::names_in(&directory).map_err(Box::new)?;
            let key = |name: &str| std::fs::read_to_string(directory.join(name).join("key"));
            Ok(names
                .into_iter()
                .map(|name| (key(&name).unwrap_or_default(), name))
                .map(|(k, n)| (n, k))
                .collect())
        };
        blocking(read).await.map_err(|source| ImageError::Unmount { key: String::new(), source })
    }

    async fn view(&self, place: &Place, chain_id: &str) -> Result<Vec<Mount>, MountError> {
        let labels =
            HashMap::from([(GC_ROOT.to_owned(), place.name.clone()), (LABEL.to_owned(), place.name.clone())]);
        let message = ViewSnapshotRequest {
            snapshotter: self.snapshotter().to_owned(),
            key: place.snapshot(),
            parent: chain_id.to_owned(),
            labels,
        };
        let session = self.session();
        let mut snapshots = SnapshotsClient::new(session.channel());
        let request = session.request(message, CALL_DEADLINE);
        Ok(call("view snapshot", chain_id, snapshots.view(request)).await?.mounts)
    }

    /// Mount, snapshot, directory, in this order, so that what is left is always found again.
    async fn undo(&self, place: &Place) -> Result<(), MountError> {
        let target = place.target();
        blocking(move || Ok(mounts::unmount(&target).map_err(Box::new)?)).await?;
        let session = self.session();
        let key = place.snapshot();
        let message = RemoveSnapshotRequest { snapshotter: self.snapshotter().to_owned(), key: key.clone() };
        let mut snapshots = SnapshotsClient::new(session.channel());
        let request = session.request(message, CALL_DEADLINE);
        allow(call("remove snapshot", &key, snapshots.remove(request)).await, Code::NotFound)?;
        let directory = place.directory.clone();
        blocking(move || Ok(files::remove_tree(&directory).map_err(Box::new)?)).await
    }

    /// Mount names of the view snapshots that are ours.
    async fn views(&self) -> Result<Vec<String>, CallError> {
        const STEP: &str = "list snapshots of";
        let snapshotter = self.snapshotter().to_owned();
        let message = ListSnapshotsRequest {
            snapshotter: snapshotter.clone(),
            filters: vec![format!("labels.\"{LABEL}\"")],
        };
        let session = self.session();
        let mut client = SnapshotsClient::new(session.channel());
        let request = session.request(message, CALL_DEADLINE);
        let mut stream = call(STEP, &snapshotter, client.list(request)).await?;
        let mut found = Vec::new();
        while let Some(part) = stream.message().await.map_err(|status| failed(STEP, &snapshotter, status))? {
            found.extend(part.info.into_iter().filter_map(|mut info| info.labels.remove(LABEL)));
        }
        Ok(found)
    }
}

fn owner_of(key: &str) -> &str {
    key.split('/').next().unwrap_or(key)
}

fn host(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MountError {
    let path = path.to_owned();
    move |source| MountError::Host { step, path, source }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MountError> + Send + 'static,
) -> Result<T, MountError> {
    tokio::task::spawn_blocking(work).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_place_and_an_owner_of_its_own() {
        let root = Path::new("/run/k/image-mounts");
        let (one, two) = (Place::of(root, "c1/0"), Place::of(root, "c1/1"));
        assert_ne!(one, two);
        assert_eq!(one, Place::of(root, "c1/0"));
        assert!(one.directory.starts_with(root) && one.name.len() == 32);
        assert_eq!((owner_of("c1/0"), owner_of("c1")), ("c1", "c1"));
    }

    #[test]
    fn a_record_tells_its_key() {
        let root = tempfile::tempdir().expect("temp dir");
        let place = Place::of(root.path(), "c1/../x");
        place.record("c1/../x").expect("written");
        assert_eq!(std::fs::read_to_string(place.directory.join("key")).expect("read"), "c1/../x");
        assert!(place.target().is_dir());
    }
}

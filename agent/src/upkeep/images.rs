//! Removes images that nobody uses when their file system fills up, or when they have grown old.
//!
//! What was used when is remembered by this process only: after a restart every image counts as old and unused until a
//! container is seen with it. Images that a pod is about to use are spared, whatever the disk says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use agent_core::images::{FoundImage, ImageMemory, ImagePolicy, shortage};
use cri_shim_api::v1;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::events::{EventRecorder, EventType};
use crate::host::stats::{FsFigures, file_system};
use crate::pods::directory::PodDirectory;
use crate::runtime::auth::full_reference;
use crate::runtime::cri::{Cri, CriError};
use crate::runtime::images::Images;
use crate::sources::node::NodeWatch;

/// Pause between looks.
const PERIOD: Duration = Duration::from_secs(300);

/// Removes images; shared by the loop here and by whoever needs the space at once.
pub struct ImageGc {
    cri: Cri,
    images: Images,
    pods: PodDirectory,
    policy: ImagePolicy,
    memory: Mutex<ImageMemory>,
}

/// Why images were not removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageGcError {
    /// The runtime did not say what there is.
    #[error("the runtime's images are not known")]
    Cri(#[from] CriError),
    /// The file system of the images cannot be looked at.
    #[error("cannot look at the images' file system {path}")]
    FileSystem {
        /// Directory that the runtime named.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// There is less to remove than had to be.
    #[error(
        "Failed to garbage collect required amount of images. Attempted to free {wanted} bytes, but only found \
         {freed} bytes eligible to free."
    )]
    NotEnough {
        /// To be freed.
        wanted: u64,
        /// Freed.
        freed: u64,
    },
}

impl ImageGc {
    /// Over the runtime's images; `images` knows which ones were just asked for, `pods` which ones will be.
    pub fn new(cri: Cri, images: Images, pods: PodDirectory, policy: ImagePolicy) -> Self {
        Self { cri, images, pods, policy, memory: Mutex::default() }
    }

    /// Removes old images, and then what the disk needs.
    pub async fn collect(&self) -> Result<(), ImageGcError> {
        self.images.forgetting(self.collect_now()).await
    }

    async fn collect_now(&self) -> Result<(), ImageGcError> {
        let now = self.look().await?;
        if let Some(max_age) = self.policy.max_age {
            let old = self.memory.lock().unwrap_or_else(PoisonError::into_inner).outdated(max_age, now);
            self.remove(old).await;
        }
        let Some(path) = self.cri.image_directory().await? else { return Ok(()) };
        let figures = figures(&path).await?;
        let Some(short) = shortage(self.policy, figures.capacity, figures.available) else { return Ok(()) };
        info!(usage = short.usage, bytes = short.bytes, path = %path.display(), "the images' file system is nearly full");
        let freed = self.free(short.bytes, now).await;
        if freed < short.bytes {
            return Err(ImageGcError::NotEnough { wanted: short.bytes, freed });
        }
        Ok(())
    }

    /// Removes every unused image that is not too young; bytes freed.
    pub async fn free_all(&self) -> Result<u64, ImageGcError> {
        let freeing = async {
            let now = self.look().await?;
            Ok(self.free(u64::MAX, now).await)
        };
        self.images.forgetting(freeing).await
    }

    async fn free(&self, bytes: u64, now: Timestamp) -> u64 {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.remove(memory.to_free(bytes, self.policy.min_age, now)).await
    }

    async fn remove(&self, chosen: Vec<(String, u64)>) -> u64 {
        let mut freed = 0_u64;
        for (id, size) in chosen {
            // A pod may have begun to use it since the look.
            if self.images.recent().contains(&id) {
                continue;
            }
            match self.cri.remove_image(&id).await {
                Ok(()) => {
                    info!(image = %id, size, "unused image removed");
                    freed = freed.saturating_add(size);
                }
                Err(error) => warn!(image = %id, %error, "unused image not removed"),
            }
        }
        freed
    }

    /// Brings the memory up to date.
    async fn look(&self) -> Result<Timestamp, CriError> {
        let (images, containers) = tokio::try_join!(self.cri.images(), self.cri.list_containers(None))?;
        let now = Timestamp::now();
        let mut named = self.pods.images();
        named.extend(self.cri.sandbox_image().await);
        let mut in_use = in_use(&images, &containers, &named);
        in_use.extend(self.images.recent());
        let found: Vec<FoundImage> = images
            .iter()
            .map(|image| FoundImage { id: image.id.clone(), size: image.size, pinned: image.pinned })
            .collect();
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).observe(&found, &in_use, now);
        Ok(now)
    }
}

/// Ids of the images that containers were made from, by whatever name each of them says so, and of those `named` by pods.
fn in_use(images: &[v1::Image], containers: &[v1::Container], named: &BTreeSet<String>) -> BTreeSet<String> {
    let mut ids: BTreeMap<&str, &str> = BTreeMap::new();
    for image in images {
        let names = image.repo_tags.iter().chain(&image.repo_digests).chain(std::iter::once(&image.id));
        ids.extend(names.map(|name| (name.as_str(), image.id.as_str())));
    }
    let names = containers.iter().flat_map(|container| {
        let given = container.image.as_ref().map(|image| image.image.as_str());
        [given.unwrap_or_default(), container.image_ref.as_str(), container.image_id.as_str()]
    });
    let full: Vec<String> = named.iter().map(|name| full_reference(name)).collect();
    names
        .chain(named.iter().chain(&full).map(String::as_str))
        .filter_map(|name| ids.get(name))
        .map(|id| (*id).to_owned())
        .collect()
}

/// Figures of the file system at `path`, read where blocking does no harm.
pub(super) async fn figures(path: &Path) -> Result<FsFigures, ImageGcError> {
    let target = path.to_owned();
    let read = tokio::task::spawn_blocking(move || file_system(&target)).await;
    read.map_err(std::io::Error::other)
        .and_then(|read| read)
        .map_err(|source| ImageGcError::FileSystem { path: path.to_owned(), source })
}

/// Collects every five minutes until `cancel`.
pub async fn run(
    gc: std::sync::Arc<ImageGc>,
    events: EventRecorder,
    node: NodeWatch,
    cancel: CancellationToken,
) {
    loop {
        // Cancel-safe: a removal that is cut off is found by the next look.
        let collected = tokio::select! {
            () = cancel.cancelled() => return,
            collected = gc.collect() => collected,
        };
        if let Err(error) = collected {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            warn!(%error, cause, "image garbage collection");
            if let (ImageGcError::NotEnough { .. }, Some(node)) = (&error, node.borrow().as_ref()) {
                events.node(node, EventType::Warning, "FreeDiskSpaceFailed", error.to_string());
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_keeps_its_image_whatever_it_calls_it() {
        let image = |id: &str, tag: &str, digest: &str| v1::Image {
            id: id.to_owned(),
            repo_tags: vec![tag.to_owned()],
            repo_digests: vec![digest.to_owned()],
            ..v1::Image::default()
        };
        let images = [
            image("sha256:1", "a:1", "a@sha256:x"),
            image("sha256:2", "b:1", "b@sha256:y"),
            image("sha256:3", "c:1", "c"),
        ];
        let by_tag = v1::Container {
            image: Some(v1::ImageSpec { image: "a:1".to_owned(), ..v1::ImageSpec::default() }),
            ..v1::Container::default()
        };
        let by_digest = v1::Container { image_ref: "b@sha256:y".to_owned(), ..v1::Container::default() };
        let used = in_use(&images, &[by_tag, by_digest], &BTreeSet::new());
        assert_eq!(used.into_iter().collect::<Vec<_>>(), ["sha256:1", "sha256:2"]);
    }

    #[test]
    fn what_pods_name_is_in_use_before_there_is_a_container() {
        let images = [v1::Image {
            id: "sha256:1".to_owned(),
            repo_tags: vec!["docker.io/library/tools:latest".to_owned()],
            ..v1::Image::default()
        }];
        let of = |name: &str| in_use(&images, &[], &BTreeSet::from([name.to_owned()]));
        for name in ["tools", "tools:latest", "docker.io/library/tools:latest", "sha256:1"] {
            assert_eq!(of(name).len(), 1, "{name}");
        }
        assert!(of("tools:1").is_empty() && of("example.org/tools").is_empty());
    }
}

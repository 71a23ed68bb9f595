//! Mounts whose source we make ourselves: volumes that the image declares, image volumes, and the shifted copies that a pod
//! with a user namespace needs.
//!
//! Everything is in two directories of the container, `<root>/containers/<id>` (content of volumes) and
//! `<state>/containers/<id>` (mounts), or kept by the image store under the container's id; both are removed with the
//! container, and by recovery when no record explains them.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use cri_shim_api::v1;
use cri_shim_core::oci::mounts::{HostMount, HostPropagation, WantedMount, clean};
use cri_shim_core::oci::userns::IdMaps;

use crate::error::RuntimeError;
use crate::host::{blocking, copy, idmap};
use crate::images::Image;
use crate::runtime::Runtime;

/// Options of image volumes: what is in an image belongs to whoever made it.
const IMAGE_OPTIONS: &[&str] = &["nosuid", "nodev"];
/// The user of the image store that copies volumes, below the container's id.
const CONTENT: &str = "content";

/// The user namespace of a pod, open.
#[derive(Debug)]
pub struct Users {
    /// The namespace.
    pub namespace: File,
    /// Its maps.
    pub maps: IdMaps,
}

impl Runtime {
    /// Makes the volumes that the image declares and that CRI mounts nothing over, filled from the image.
    pub(super) async fn declared_volumes(
        &self,
        id: &str,
        image: &Image,
        declared: &[String],
        mounts: &[v1::Mount],
    ) -> Result<Vec<HostMount>, RuntimeError> {
        let covered = |path: &str| mounts.iter().any(|mount| clean(&mount.container_path) == path);
        let mut paths: Vec<String> = declared.iter().map(|path| clean(path)).collect();
        paths.sort();
        paths.dedup();
        paths.retain(|path| path != "/" && !covered(path));
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        let key = format!("{id}/{CONTENT}");
        let content = self.images.mount_readonly(image, &key).await?;
        let directory = self.container_root(id).join("volumes");
        let made = blocking(move || make_volumes(&content, &directory, &paths)).await;
        self.images.unmount(&key).await?;
        made
    }

    /// Mounts the images that CRI wants as volumes.
    pub(super) async fn image_volumes(
        &self,
        id: &str,
        mounts: &[v1::Mount],
    ) -> Result<Vec<HostMount>, RuntimeError> {
        let mut found = Vec::new();
        for (index, mount) in mounts.iter().enumerate() {
            let Some(wanted) = &mount.image else { continue };
            let name = if wanted.image_ref.is_empty() { &wanted.image } else { &wanted.image_ref };
            let image = self.images.resolve(name).await?;
            let content = self.images.mount_readonly(&image, &format!("{id}/{index}")).await?;
            let target = self.container_state(id).join(format!("image-{index}"));
            let sub_path = mount.image_sub_path.clone();
            let source = blocking(move || sub_path_of(content, &target, &sub_path)).await?;
            let wanted = WantedMount { readonly: true, extra: IMAGE_OPTIONS, ..WantedMount::from(mount) };
            let source = source.to_string_lossy().into_owned();
            found.push(HostMount { source, wanted, host: HostPropagation::default() });
        }
        Ok(found)
    }

    /// The container's directory that outlives a reboot.
    pub(crate) fn container_root(&self, id: &str) -> PathBuf {
        self.paths.root_dir.join("containers").join(id)
    }

    /// The container's directory of pipes and mounts.
    pub(crate) fn container_state(&self, id: &str) -> PathBuf {
        self.paths.state_dir.join("containers").join(id)
    }
}

/// One directory per path, like the image's where it has one.
fn make_volumes(content: &Path, directory: &Path, paths: &[String]) -> Result<Vec<HostMount>, RuntimeError> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o711).create(directory).map_err(RuntimeError::host("make", directory))?;
    let mut volumes = Vec::new();
    for (index, path) in paths.iter().enumerate() {
        let volume = directory.join(index.to_string());
        std::fs::DirBuilder::new()
            .mode(0o755)
            .create(&volume)
            .map_err(RuntimeError::host("make", &volume))?;
        if let Some((source, held)) = copy::find_in(content, path)?
            && held.metadata().is_ok_and(|metadata| metadata.is_dir())
        {
            copy::directory(&source, &volume)?;
        }
        let wanted = WantedMount { container_path: path.clone(), ..WantedMount::default() };
        let source = volume.to_string_lossy().into_owned();
        volumes.push(HostMount { source, wanted, host: HostPropagation::default() });
    }
    Ok(volumes)
}

/// The part of an image that a volume shows: all of it, or what is at `sub_path`, mounted at `target` so that its name cannot
/// lead elsewhere later.
fn sub_path_of(content: PathBuf, target: &Path, sub_path: &str) -> Result<PathBuf, RuntimeError> {
    if sub_path.is_empty() {
        return Ok(content);
    }
    let refuse = |problem: &str| {
        let problem = format!("{sub_path:?} {problem}");
        Err(RuntimeError::Invalid { field: "mounts.image_sub_path", problem })
    };
    if sub_path.starts_with('/') || sub_path.contains('\0') || sub_path.split('/').any(|part| part == "..") {
        return refuse("is not a path below the image's root");
    }
    let Some((source, held)) = copy::find_in(&content, sub_path)? else {
        return refuse("does not exist in the image");
    };
    let metadata = held.metadata().map_err(RuntimeError::host("inspect", &content))?;
    if metadata.is_dir() {
        std::fs::create_dir_all(target).map_err(RuntimeError::host("make", target))?;
    } else if metadata.is_file() {
        let parent = target.parent().unwrap_or(target);
        std::fs::create_dir_all(parent).map_err(RuntimeError::host("make", parent))?;
        File::create(target).map_err(RuntimeError::host("make", target))?;
    } else {
        return refuse("is neither a directory nor a file");
    }
    idmap::bind_plain(&source, target)?;
    Ok(target.to_owned())
}

/// Whether a mount shows the owners on disk as users of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    /// As they are on the node.
    Never,
    /// As the pod's, or not at all.
    Always,
    /// As the pod's where its file system can; otherwise they are nobody's and can be read by all.
    WherePossible,
}

/// Replaces the sources of mounts that show the pod's own owners by shifted copies below `directory`. Blocks.
pub(super) fn shift(
    mounts: &mut [(HostMount, Shift)],
    directory: &Path,
    users: &Users,
) -> Result<(), RuntimeError> {
    for (index, (mount, shift)) in mounts.iter_mut().enumerate() {
        if *shift == Shift::Never {
            continue;
        }
        let source = PathBuf::from(&mount.source);
        let target = directory.join("mounts").join(index.to_string());
        let parent = target.parent().unwrap_or(directory);
        std::fs::create_dir_all(parent).map_err(RuntimeError::host("make", parent))?;
        if source.is_dir() {
            std::fs::create_dir_all(&target).map_err(RuntimeError::host("make", &target))?;
        } else {
            File::create(&target).map_err(RuntimeError::host("make", &target))?;
        }
        match idmap::bind(&source, &target, &users.namespace) {
            Err(RuntimeError::Invalid { problem, .. }) if *shift == Shift::WherePossible => {
                tracing::debug!(problem, "an image volume keeps its owners");
            }
            outcome => {
                outcome?;
                mount.source = target.to_string_lossy().into_owned();
            }
        }
    }
    Ok(())
}

/// The root file system as any runtime takes it.
pub(super) fn bound(path: &Path) -> Vec<Mount> {
    vec![Mount {
        r#type: "bind".to_owned(),
        source: path.to_string_lossy().into_owned(),
        options: vec!["rbind".to_owned(), "rw".to_owned()],
        ..Mount::default()
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sub_path_stays_in_the_image() {
        let image = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        let target = state.path().join("image-0");
        let problem =
            |sub_path: &str| sub_path_of(image.path().to_owned(), &target, sub_path).unwrap_err().to_string();
        assert!(problem("nothing").contains("\"nothing\" does not exist in the image"));
        assert!(problem("/etc").starts_with("mounts.image_sub_path"));
        assert!(problem("a/../../etc").contains("not a path below"));
        std::os::unix::fs::symlink("/etc/passwd", image.path().join("link")).unwrap();
        assert!(problem("link").contains("does not exist"), "the link is one of the image");
        assert_eq!(sub_path_of(image.path().to_owned(), &target, "").unwrap(), image.path());
    }
}

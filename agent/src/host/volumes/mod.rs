//! Volumes of pods below `<rootDir>/pods/<uid>/volumes`. Those of drivers are [`crate::csi`]'s.
//!
//! Input: the pod object, ConfigMaps, Secrets and tokens. Output: directories, tmpfs mounts and files, at the paths
//! where upstream's kubelet has them. Set-up is idempotent and also the update: the pod loop calls it again whenever
//! an object changes. Nothing is remembered but tokens; what is on disk is found by its path, so a restart needs no
//! recovery. hostPath volumes are checked, never removed.

mod atomic;
mod claim;
mod content;
mod empty_dir;
mod host_path;
pub(crate) mod ownership;
mod remote;
mod select;
mod sub_path;
mod teardown;
mod tmpfs;
pub(crate) mod tokens;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, PodSpec, Volume};
use kube::Client;
use tracing::debug;

use self::claim::{Found, FoundPath};
use self::content::{Content, Inputs};
use self::ownership::Ownership;
pub(crate) use self::remote::is_remote;
use self::remote::{Group, NetworkVolume, Remote};
use self::tokens::Tokens;
use crate::contracts::{
    Dependency, HostPath, MountedVolumes, ObjectSource, VolumeContext, VolumeError, VolumeFigures,
    VolumeManager, VolumeStep,
};
use crate::csi::{Csi, CsiVolume, MountOrder};
use crate::host::asked::Asked;
use crate::sources::objects::claim_of_ephemeral;

/// The volumes of one kubelet root directory.
pub struct Volumes {
    pods_dir: PathBuf,
    objects: Arc<dyn ObjectSource>,
    tokens: Tokens,
    client: Client,
    csi: Option<Csi>,
    remote: Remote,
    asked: Asked,
}

impl Volumes {
    /// Volumes below `<root_dir>/pods`; `objects` gives ConfigMaps and Secrets, `client` requests tokens and reads claims.
    pub fn new(root_dir: &Path, objects: Arc<dyn ObjectSource>, client: Client) -> Self {
        let tokens = Tokens::new(client.clone());
        let remote = Remote::new(root_dir, Arc::clone(&objects));
        let pods_dir = root_dir.join("pods");
        Self { pods_dir, objects, tokens, client, csi: None, remote, asked: Asked::default() }
    }

    /// With volumes of drivers.
    pub fn with_csi(self, csi: Csi) -> Self {
        Self { csi: Some(csi), ..self }
    }

    fn pod_dir(&self, uid: &str) -> PathBuf {
        self.pods_dir.join(uid)
    }

    async fn set_up_all(&self, pod: &Pod, context: &VolumeContext) -> Result<MountedVolumes, VolumeError> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let pod_dir = self.pod_dir(&uid);
        if !is_file_name(&uid) {
            return Err(failed("", format!("invalid pod uid {uid:?}")));
        }
        blocking("", move || make_pod_dir(&pod_dir).map_err(|error| error.to_string())).await?;
        let default = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&default);
        let mut mounted = MountedVolumes::default();
        // Image volumes are mounted by the runtime, out of what it has pulled.
        for volume in spec.volumes.iter().flatten().filter(|volume| volume.image.is_none()) {
            let path = self.set_up(pod, spec, volume, context, &mut mounted).await?;
            mounted.volumes.insert(volume.name.clone(), path);
        }
        Ok(mounted)
    }

    async fn set_up(
        &self,
        pod: &Pod,
        spec: &PodSpec,
        volume: &Volume,
        context: &VolumeContext,
        mounted: &mut MountedVolumes,
    ) -> Result<HostPath, VolumeError> {
        let name = volume.name.as_str();
        let ownership = Ownership::of(spec);
        if let Some(source) = &volume.host_path {
            let source = source.clone();
            let path = PathBuf::from(&source.path);
            self.ask(name, &path, move || host_path::check(&source)).await?;
            return Ok(HostPath { path, read_only: false });
        }
        if let Some(source) = &volume.empty_dir {
            let path = self.volume_dir(pod, "empty-dir", name)?;
            let plan = empty_dir::EmptyDir::new(source, spec, context);
            let dir = path.clone();
            self.ask(name, &path, move || empty_dir::set_up(&dir, &plan, ownership)).await?;
            return Ok(HostPath { path, read_only: false });
        }
        if let Some(source) = &volume.persistent_volume_claim {
            let read_only = source.read_only.unwrap_or(false);
            return self.set_up_claim(pod, name, (&source.claim_name, read_only, None), mounted).await;
        }
        if volume.ephemeral.is_some() {
            let claim = claim_of_ephemeral(pod, name);
            return self.set_up_claim(pod, name, (&claim, false, Some(pod)), mounted).await;
        }
        if let Some(source) = &volume.csi {
            let inline = CsiVolume::inline(pod, name, source);
            return self.set_up_csi(pod, name, (inline, None), mounted).await;
        }
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        if let Some(volume) = NetworkVolume::inline(volume, namespace) {
            return self.set_up_remote(pod, &volume).await;
        }
        let Some((plugin, in_memory)) = content::plugin(volume) else {
            return Err(failed(name, unmatched(volume)));
        };
        let path = self.volume_dir(pod, plugin, name)?;
        let inputs = Inputs { pod, spec, context, objects: self.objects.as_ref(), tokens: &self.tokens };
        let content = content::of(volume, &inputs).await.map_err(|message| failed(name, message))?;
        mounted.refresh_at = [mounted.refresh_at, content.refresh_at].into_iter().flatten().min();
        let dir = path.clone();
        self.ask(name, &path, move || write(&dir, in_memory, &content, ownership)).await?;
        Ok(HostPath { path, read_only: true })
    }

    /// What a claim leads to; `maker` is the pod that the claim was made for, if it was.
    async fn set_up_claim(
        &self,
        pod: &Pod,
        name: &str,
        (claim, read_only, maker): (&str, bool, Option<&Pod>),
        mounted: &mut MountedVolumes,
    ) -> Result<HostPath, VolumeError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let pod_dir = self.pod_dir(uid);
        if !is_file_name(name) {
            return Err(failed(name, "invalid volume name".to_owned()));
        }
        let known = claim::recall(&pod_dir, name).await;
        if let Some(Found::Path(found)) = known {
            return self.set_up_path(name, found, read_only).await;
        }
        if let Some(Found::Network { network }) = &known {
            return self.set_up_remote(pod, network).await;
        }
        let bound = match (claim::ask(&self.client, (namespace, claim), maker).await, &known, &self.csi) {
            (Ok(bound), ..) => bound,
            // A pod that has its volume goes on without the API server.
            (Err(problem), Some(Found::Csi { volume, block }), Some(csi))
                if csi.is_published(uid, volume, *block).await =>
            {
                debug!(volume = %name, %problem, "claim not read");
                return Ok(HostPath { path: csi.path(uid, volume, *block), read_only });
            }
            (Err(problem), ..) => return Err(failed(name, problem)),
        };
        let network = claim::network_of(&bound.volume, read_only);
        if let Some(network) = network.map_err(|problem| failed(name, problem))? {
            let noted =
                claim::note(&pod_dir, name, &Found::Network { network: Box::new(network.clone()) }).await;
            noted.map_err(|problem| failed(name, problem))?;
            return self.set_up_remote(pod, &network).await;
        }
        let volume = CsiVolume::of_persistent(&bound.volume, read_only);
        let Some(volume) = volume else {
            let found = claim::path_of(&bound.volume).map_err(|problem| failed(name, problem))?;
            let noted = claim::note(&pod_dir, name, &Found::Path(found.clone())).await;
            noted.map_err(|problem| failed(name, problem))?;
            return self.set_up_path(name, found, read_only).await;
        };
        let volume_name = bound.volume.metadata.name.clone().unwrap_or_default();
        self.objects.depend(uid, &[Dependency::Volume(volume_name.clone())]);
        let block = bound.volume.spec.as_ref().and_then(|spec| spec.volume_mode.as_deref()) == Some("Block");
        check_use(pod, name, block).map_err(|problem| failed(name, problem))?;
        let found = Found::Csi { volume: volume_name, block };
        if known.as_ref() != Some(&found) {
            let noted = claim::note(&pod_dir, name, &found).await;
            noted.map_err(|problem| failed(name, problem))?;
        }
        self.set_up_csi(pod, name, (volume, Some(&bound.claim)), mounted).await
    }

    /// A directory of the node that a claim leads to.
    async fn set_up_path(
        &self,
        name: &str,
        found: FoundPath,
        read_only: bool,
    ) -> Result<HostPath, VolumeError> {
        let path = self.ask(name, &found.path(), move || found.check()).await?;
        Ok(HostPath { path, read_only })
    }

    /// Does what looks at a path that others than the node answer for: any directory may be one of a server, and what a
    /// container mounts may cover those of its pod.
    async fn ask<T: Send + 'static>(
        &self,
        volume: &str,
        path: &Path,
        work: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, VolumeError> {
        self.asked.about(path, work).await.map_err(|problem| failed(volume, problem))
    }

    /// A volume on a server.
    async fn set_up_remote(&self, pod: &Pod, volume: &NetworkVolume) -> Result<HostPath, VolumeError> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let ownership = pod.spec.as_ref().map(Ownership::of).unwrap_or_default();
        let group = Group { ownership, always: changes_owner_always(pod) };
        let path = self.remote.set_up(uid, volume, group).await?;
        Ok(HostPath { path, read_only: volume.read_only })
    }

    /// A driver's volume.
    async fn set_up_csi(
        &self,
        pod: &Pod,
        name: &str,
        (volume, claim): (CsiVolume, Option<&PersistentVolumeClaim>),
        mounted: &mut MountedVolumes,
    ) -> Result<HostPath, VolumeError> {
        let Some(csi) = &self.csi else {
            return Err(failed(name, "no volume plugin matched".to_owned()));
        };
        let read_only = volume.is_read_only();
        let order = MountOrder {
            pod,
            name,
            volume,
            claim,
            group: pod.spec.as_ref().and_then(|spec| Ownership::of(spec).group),
            group_always: changes_owner_always(pod),
        };
        let done = csi.mount(&order).await?;
        mounted.refresh_at = [mounted.refresh_at, done.refresh_at].into_iter().flatten().min();
        mounted.events.extend(done.events);
        Ok(HostPath { path: done.path, read_only })
    }

    /// `<pod>/volumes/kubernetes.io~<plugin>/<name>`.
    fn volume_dir(&self, pod: &Pod, plugin: &str, name: &str) -> Result<PathBuf, VolumeError> {
        if !is_file_name(name) {
            return Err(failed(name, "invalid volume name".to_owned()));
        }
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        Ok(self.pod_dir(uid).join("volumes").join(format!("kubernetes.io~{plugin}")).join(name))
    }
}

impl VolumeManager for Volumes {
    fn mount_all<'a>(
        &'a self,
        pod: &'a Pod,
        context: &'a VolumeContext,
    ) -> BoxFuture<'a, Result<MountedVolumes, VolumeError>> {
        self.set_up_all(pod, context).boxed()
    }

    fn sub_path<'a>(
        &'a self,
        volume: &'a HostPath,
        sub_path: &'a str,
    ) -> BoxFuture<'a, Result<PathBuf, VolumeError>> {
        let (volume, wanted) = (volume.clone(), sub_path.to_owned());
        let (path, shown) = (volume.path.clone(), volume.path.display().to_string());
        async move {
            let work = move || sub_path::resolve(&volume, &wanted);
            self.ask(&shown, &path, work).await
        }
        .boxed()
    }

    fn teardown<'a>(&'a self, pod_uid: &'a str) -> BoxFuture<'a, Result<(), VolumeError>> {
        async move {
            if !is_file_name(pod_uid) {
                return Err(failed(pod_uid, "invalid pod uid".to_owned()));
            }
            self.tokens.forget(pod_uid);
            // Drivers first: what they made is theirs to undo.
            if let Some(csi) = &self.csi {
                csi.tear_down(pod_uid).await?;
            }
            // Then what must not be looked at: a server that is gone never answers.
            self.remote.tear_down(pod_uid).await?;
            let dir = self.pod_dir(pod_uid);
            let shown = dir.display().to_string();
            blocking(&shown, move || teardown::remove(&dir).map_err(|error| error.to_string())).await
        }
        .boxed()
    }

    fn figures<'a>(&'a self, pod_uid: &'a str) -> BoxFuture<'a, Vec<VolumeFigures>> {
        async move {
            match &self.csi {
                Some(csi) => csi.stats(pod_uid).await,
                None => Vec::new(),
            }
        }
        .boxed()
    }

    fn on_disk(&self) -> BoxFuture<'_, Result<Vec<String>, VolumeError>> {
        let dir = self.pods_dir.clone();
        let shown = dir.display().to_string();
        async move { blocking(&shown, move || list(&dir).map_err(|error| error.to_string())).await }.boxed()
    }
}

fn write(dir: &Path, in_memory: bool, content: &Content, ownership: Ownership) -> Result<(), String> {
    let write = || {
        make_dir(dir, 0o755)?;
        if in_memory {
            tmpfs::ensure(dir, None)?;
        }
        atomic::write(dir, &content.files, ownership)
    };
    write().map_err(|error| error.to_string())
}

fn make_pod_dir(pod_dir: &Path) -> io::Result<()> {
    make_dir(pod_dir, 0o750)?;
    make_dir(&pod_dir.join("volumes"), 0o750)
}

/// Makes `dir` and those above it; `mode` is for `dir` when it is new.
fn make_dir(dir: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::DirBuilder::new().mode(mode).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn list(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned())).collect()
}

/// `fsGroupChangePolicy`: the group is given to every file, not only where the root has another one.
fn changes_owner_always(pod: &Pod) -> bool {
    let security = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let policy = security.and_then(|security| security.fs_group_change_policy.as_deref());
    policy != Some("OnRootMismatch")
}

/// Why a volume of a kind that the agent does not have is refused, in upstream's words.
fn unmatched(volume: &Volume) -> String {
    // Upstream still has the plugin, which does nothing but say so.
    if volume.git_repo.is_some() {
        return "git-repo volume plugin has been disabled".to_owned();
    }
    "no volume plugin matched".to_owned()
}

/// A device is passed to containers, a file system is mounted into them.
fn check_use(pod: &Pod, name: &str, block: bool) -> Result<(), String> {
    let spec = pod.spec.as_ref();
    let mut containers =
        spec.into_iter().flat_map(agent_core::model::containers).map(|entry| entry.container);
    let (mode, list) = if block { ("Block", "volumeMounts") } else { ("Filesystem", "volumeDevices") };
    let wrong = containers.any(|container| {
        if block {
            container.volume_mounts.iter().flatten().any(|mount| mount.name == name)
        } else {
            container.volume_devices.iter().flatten().any(|device| device.name == name)
        }
    });
    if wrong {
        return Err(format!("volume {name} has volumeMode {mode}, but is specified in {list}"));
    }
    Ok(())
}

/// Uids and volume names become path components.
pub(crate) fn is_file_name(text: &str) -> bool {
    !text.is_empty() && text != "." && text != ".." && !text.contains('/')
}

fn failed(volume: &str, message: String) -> VolumeError {
    VolumeError { volume: volume.to_owned(), step: VolumeStep::SetUp, message, waits: false }
}

async fn blocking<T: Send + 'static>(
    volume: &str,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, VolumeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(|message| failed(volume, message)),
        Err(error) => Err(failed(volume, error.to_string())),
    }
}

#[cfg(test)]
mod tests;

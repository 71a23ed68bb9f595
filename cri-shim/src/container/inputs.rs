//! What the node and the image contribute to a container's specification: mount sources, devices, profiles, namespaces.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cri_shim_api::v1::security_profile::ProfileType;
use cri_shim_api::v1::{self, ContainerConfig, NamespaceMode, SecurityProfile};
use cri_shim_core::oci::cdi::Edits;
use cri_shim_core::oci::devices::HostDevice;
use cri_shim_core::oci::mounts::{HostMount, SandboxFiles, WantedMount, propagation_of};
use cri_shim_core::oci::namespaces::{PidNamespace, SandboxNamespaces};
use cri_shim_core::oci::process::ImageDefaults;
use cri_shim_core::oci::seccomp::{self, Profile, localhost_path};
use cri_shim_core::oci::userns::IdMaps;

use super::cdi;
use super::volumes::{self, Shift, Users};
use crate::error::RuntimeError;
use crate::host::{devices, files, idmap, mounts};
use crate::images::Image;
use crate::runtime::Runtime;
use crate::state::Sandbox;

/// Largest seccomp profile that is read.
const PROFILE_LIMIT: u64 = 4 << 20;

/// What was found on the node.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Mounts with their real sources.
    pub mounts: Vec<HostMount>,
    /// Devices asked for, or all of them for a privileged container; those of CDI among them.
    pub devices: Vec<HostDevice>,
    /// What CDI devices add besides.
    pub cdi: Edits,
    /// The system call filter.
    pub seccomp: Profile,
    /// The node's name.
    pub node_hostname: String,
}

/// Volumes that were made for the container.
#[derive(Debug, Default)]
pub struct Made {
    /// Those the image declares.
    pub declared: Vec<HostMount>,
    /// Those that show images.
    pub images: Vec<HostMount>,
}

/// What is looked for, and where.
#[derive(Debug)]
pub struct Search {
    /// What CRI asked for.
    pub config: ContainerConfig,
    /// The real sources of its mounts that are no images; see [`Runtime::mount_sources`].
    pub sources: Vec<PathBuf>,
    /// Files that describe CDI devices.
    pub cdi_dirs: Vec<PathBuf>,
    /// Where the container's own mounts go.
    pub directory: PathBuf,
    /// Files of the sandbox that it sees.
    pub pod_files: SandboxFiles,
    /// Whether the shared memory is the node's.
    pub host_ipc: bool,
    /// The pod's user namespace.
    pub users: Option<Arc<Users>>,
    /// Volumes that were made for it.
    pub made: Made,
}

/// Looks everything up. Blocks.
pub fn gather(search: Search) -> Result<Inputs, RuntimeError> {
    let config = &search.config;
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default();
    let mut mounts = Vec::new();
    // Read only where a mount depends on it.
    let table = if config.mounts.iter().any(|mount| mount.propagation != 0) {
        mounts::table()?
    } else {
        String::new()
    };
    for (mount, source) in config.mounts.iter().filter(|mount| mount.image.is_none()).zip(&search.sources) {
        let source = source.to_string_lossy().into_owned();
        let host = propagation_of(&table, &source);
        let shift = shift_of(mount, search.users.as_deref())?;
        mounts.push((HostMount { source, wanted: WantedMount::from(mount), host }, shift));
    }
    mounts.extend(search.made.declared.into_iter().map(|mount| (mount, Shift::Always)));
    mounts.extend(search.made.images.into_iter().map(|mount| (mount, Shift::WherePossible)));
    if let Some(users) = &search.users {
        volumes::shift(&mut mounts, &search.directory, users)?;
        own_files(&search.pod_files, search.host_ipc, users)?;
    }
    let (cdi, nodes) = cdi::gather(config, &search.cdi_dirs)?;
    let mut devices = if security.privileged { devices::all()? } else { devices::find(&config.devices)? };
    devices.retain(|device| !nodes.iter().any(|node| node.path == device.path));
    devices.extend(nodes);
    tell_ignored(config);
    Ok(Inputs {
        mounts: mounts.into_iter().map(|(mount, _)| mount).collect(),
        devices,
        cdi,
        seccomp: seccomp(seccomp::wish(&security)?.filter(|_| !security.privileged).as_ref())?,
        node_hostname: files::node_hostname(),
    })
}

/// The user namespace a container asks for.
pub(super) fn id_maps(config: &ContainerConfig) -> Result<Option<IdMaps>, RuntimeError> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    Ok(IdMaps::of(security.and_then(|security| security.namespace_options.as_ref()))?)
}

/// The pod's user namespace, open, when it has one of its own.
pub(super) fn users(config: &ContainerConfig, pause: u32) -> Result<Option<Users>, RuntimeError> {
    let Some(maps) = id_maps(config)? else { return Ok(None) };
    let path = PathBuf::from(format!("/proc/{pause}/ns/user"));
    let namespace = File::open(&path).map_err(RuntimeError::host("open", &path))?;
    Ok(Some(Users { namespace, maps }))
}

/// Whether a mount of CRI shows its owners as the pod's, which is only so where CRI maps them.
fn shift_of(mount: &v1::Mount, users: Option<&Users>) -> Result<Shift, RuntimeError> {
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return Ok(Shift::Never);
    }
    if users.is_some_and(|users| users.maps.is(&mount.uid_mappings, &mount.gid_mappings)) {
        return Ok(Shift::Always);
    }
    let problem = format!("{}: they are not the ones of the pod's user namespace", mount.container_path);
    Err(RuntimeError::Invalid { field: "mounts.uidMappings", problem })
}

/// The pod's own files belong to its root.
fn own_files(files: &SandboxFiles, host_ipc: bool, users: &Users) -> Result<(), RuntimeError> {
    let shm = if host_ipc { "" } else { files.shm.as_str() };
    for path in [&files.hostname, &files.hosts, &files.resolv_conf, shm] {
        if !path.is_empty() {
            idmap::own(Path::new(path), &users.maps)?;
        }
    }
    Ok(())
}

/// Says what is not done although it was asked for and nothing depends on it.
fn tell_ignored(config: &ContainerConfig) {
    const CLASSES: [&str; 2] = ["rdt.resources.beta.kubernetes.io/", "blockio.resources.beta.kubernetes.io/"];
    for key in config.annotations.keys().filter(|key| CLASSES.iter().any(|class| key.starts_with(class))) {
        tracing::warn!(annotation = key, "ignored: classes of cache, bandwidth and block IO are not offered");
    }
}

/// Without a profile a container runs unconfined: the kubelet says when it wants the default one.
fn seccomp(wanted: Option<&SecurityProfile>) -> Result<Profile, RuntimeError> {
    if let Some(path) = localhost_path(wanted) {
        let refuse = |problem: String| {
            let problem = format!("{path}: {problem}");
            RuntimeError::Invalid { field: "seccomp.localhost_ref", problem }
        };
        let place = Path::new(path);
        if !place.is_absolute() {
            return Err(refuse("is not an absolute path".to_owned()));
        }
        let metadata = place.metadata().map_err(|error| refuse(error.to_string()))?;
        if !metadata.is_file() || metadata.len() > PROFILE_LIMIT {
            return Err(refuse(format!("is no file of at most {PROFILE_LIMIT} bytes")));
        }
        let json = std::fs::read_to_string(place).map_err(|error| refuse(error.to_string()))?;
        return Ok(Profile::Localhost { path: path.to_owned(), json });
    }
    Ok(match wanted.map(SecurityProfile::profile_type) {
        Some(ProfileType::RuntimeDefault) => Profile::RuntimeDefault,
        _ => Profile::Unconfined,
    })
}

/// What the image says about its containers.
pub fn image_defaults(image: &Image) -> ImageDefaults {
    let Some(config) = image.config().config() else { return ImageDefaults::default() };
    ImageDefaults {
        env: config.env().clone().unwrap_or_default(),
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        user: config.user().clone().unwrap_or_default(),
        stop_signal: config.stop_signal().clone(),
        volumes: config.volumes().clone().unwrap_or_default(),
    }
}

impl Runtime {
    /// Where the sources of mounts really are, but for those of images. One on a file system that hangs holds up nobody but its
    /// container.
    pub(super) async fn mount_sources(&self, mounts: &[v1::Mount]) -> Result<Vec<PathBuf>, RuntimeError> {
        let paths = mounts.iter().filter(|mount| mount.image.is_none());
        let paths: Vec<String> = paths.map(|mount| mount.host_path.clone()).collect();
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        self.asked.about(paths, files::mount_source).await
    }

    /// The namespaces a new container of this sandbox joins.
    pub(crate) fn namespaces_for(
        &self,
        sandbox: &Sandbox,
        config: &ContainerConfig,
    ) -> Result<SandboxNamespaces, RuntimeError> {
        let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let options = security.and_then(|security| security.namespace_options.clone()).unwrap_or_default();
        let pod = sandbox.record.get();
        let of = |pid: u32, kind: &str| PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
        let pid = match options.pid() {
            NamespaceMode::Container => PidNamespace::New,
            NamespaceMode::Pod => PidNamespace::Join(of(pod.pid, "pid")),
            NamespaceMode::Node => PidNamespace::Host,
            NamespaceMode::Target => {
                let target = self.running_container(&options.target_id)?;
                PidNamespace::Join(of(target.record.with(|record| record.pid), "pid"))
            }
        };
        Ok(SandboxNamespaces {
            network: (!pod.host_network()).then(|| PathBuf::from(&pod.netns)),
            uts: (!pod.host_network()).then(|| of(pod.pid, "uts")),
            ipc: (options.ipc() != NamespaceMode::Node).then(|| of(pod.pid, "ipc")),
            pid,
            user: id_maps(config)?.map(|_| of(pod.pid, "user")),
        })
    }
}

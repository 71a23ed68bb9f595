//! What the node and the image contribute to a container's specification: mount sources, devices, profiles, namespaces.

use std::path::{Path, PathBuf};

use cri_shim_api::v1::security_profile::ProfileType;
use cri_shim_api::v1::{ContainerConfig, NamespaceMode, SecurityProfile};
use cri_shim_core::oci::devices::HostDevice;
use cri_shim_core::oci::mounts::{HostMount, WantedMount, propagation_of};
use cri_shim_core::oci::namespaces::{PidNamespace, SandboxNamespaces};
use cri_shim_core::oci::process::ImageDefaults;
use cri_shim_core::oci::seccomp::{Profile, localhost_path};

use crate::error::RuntimeError;
use crate::host::{devices, files, mounts};
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
    /// Devices asked for, or all of them for a privileged container.
    pub devices: Vec<HostDevice>,
    /// The system call filter.
    pub seccomp: Profile,
    /// The node's name.
    pub node_hostname: String,
}

/// Looks everything up. Blocks; a mount source on a file system that hangs holds up this container only.
pub fn gather(config: &ContainerConfig) -> Result<Inputs, RuntimeError> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let table = mounts::table()?;
    let mut found = Vec::new();
    for mount in config.mounts.iter().filter(|mount| mount.image.is_none()) {
        let source = files::mount_source(&mount.host_path)?.to_string_lossy().into_owned();
        let host = propagation_of(&table, &source);
        found.push(HostMount { source, wanted: WantedMount::from(mount), host });
    }
    let privileged = security.is_some_and(|security| security.privileged);
    Ok(Inputs {
        mounts: found,
        devices: if privileged { devices::all()? } else { devices::find(&config.devices)? },
        seccomp: seccomp(security.and_then(|security| security.seccomp.as_ref()))?,
        node_hostname: files::node_hostname(),
    })
}

/// Without a profile a container runs unconfined: the kubelet says when it wants the default one.
fn seccomp(wanted: Option<&SecurityProfile>) -> Result<Profile, RuntimeError> {
    if let Some(path) = localhost_path(wanted) {
        let place = Path::new(path);
        let size = place.metadata().map_err(RuntimeError::host("read seccomp profile", place))?.len();
        if size > PROFILE_LIMIT {
            let problem = format!("{path} is larger than {PROFILE_LIMIT} bytes");
            return Err(RuntimeError::Invalid { field: "seccomp.localhost_ref", problem });
        }
        let json =
            std::fs::read_to_string(place).map_err(RuntimeError::host("read seccomp profile", place))?;
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
    }
}

impl Runtime {
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
        })
    }
}

//! The host side of pods: cgroups, volumes, log links, and the node's own figures.
//!
//! Inputs: plans of the pod loop ([`crate::contracts`]). Outputs: directories, mounts, cgroups and links below the
//! configured roots only. Nothing here talks to the CRI or decides about pods; the API server is asked for service
//! account tokens only. `unsafe` is confined to `sys`.

mod asked;
pub mod cgroups;
pub(crate) mod descriptors;
pub mod kernel_memory;
pub mod log_links;
pub mod memory;
pub(crate) mod mount_table;
mod own;
pub mod requirements;
pub mod stall;
pub mod stats;
mod sys;
mod tunables;
pub mod usage;
pub mod volumes;

pub(crate) use self::sys::on_readable;

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use kube::Client;
use tracing::info;

use crate::config::AgentConfig;
use crate::contracts::{Host, ObjectSource};
use crate::csi::Csi;

/// Makes this process and the machine what the configuration wants them to be, before anything runs.
pub fn prepare(config: &AgentConfig) -> anyhow::Result<()> {
    let machine = &config.machine;
    own::set_oom_score(machine.oom_score_adj);
    own::allow_open_files(u64::try_from(machine.max_open_files).unwrap_or(0));
    if !machine.protect_kernel_defaults && config.keelson.set_kernel_defaults {
        tunables::set(Path::new(tunables::ROOT));
    }
    for cgroup in config.reserved_cgroups() {
        let (whose, path) = (cgroup.whose, &cgroup.path);
        cgroups::others::hold(&cgroup)
            .with_context(|| format!("failed to enforce {whose} reserved cgroup limits on {path:?}"))?;
        info!("updated limits on {whose} reserved cgroup {path}");
    }
    if !machine.kubelet_cgroups.is_empty() {
        cgroups::others::join(&machine.kubelet_cgroups)
            .with_context(|| format!("kubeletCgroups {:?} cannot be joined", machine.kubelet_cgroups))?;
    }
    if !machine.system_cgroups.is_empty() {
        cgroups::others::gather_system(&machine.system_cgroups)
            .with_context(|| format!("systemCgroups {:?} cannot be filled", machine.system_cgroups))?;
    }
    Ok(())
}

/// Everything of this module that the pod loop needs, for this configuration.
///
/// `memory` is the node's, in bytes.
pub fn assemble(
    config: &AgentConfig,
    objects: Arc<dyn ObjectSource>,
    client: Client,
    csi: Option<Csi>,
    memory: u64,
) -> Host {
    let left = memory.saturating_sub(config.reserved("memory"));
    let pods_memory = Some(left).filter(|left| *left > 0 && config.enforces_pods());
    let volumes = volumes::Volumes::new(&config.keelson.root_dir, objects, client);
    Host {
        volumes: Arc::new(match csi {
            Some(csi) => volumes.with_csi(csi),
            None => volumes,
        }),
        cgroups: Arc::new(cgroups::Cgroups::new(config.cgroup_tree()).with_pods_memory(pods_memory)),
        log_links: Arc::new(log_links::Links::new(&config.keelson.container_log_links_dir)),
    }
}

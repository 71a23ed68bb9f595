//! The host side of pods: cgroups, volumes, log links, and the node's own figures.
//!
//! Inputs: plans of the pod loop ([`crate::contracts`]). Outputs: directories, mounts, cgroups and links below the
//! configured roots only. Nothing here talks to the CRI or decides about pods; the API server is asked for service
//! account tokens only. `unsafe` is confined to `sys`.

pub mod cgroups;
pub(crate) mod descriptors;
pub mod log_links;
pub mod memory;
pub(crate) mod mount_table;
pub mod stall;
pub mod stats;
mod sys;
pub mod usage;
pub mod volumes;

pub(crate) use self::sys::on_readable;

use std::sync::Arc;

use kube::Client;

use crate::config::AgentConfig;
use crate::contracts::{Host, ObjectSource};
use crate::csi::Csi;

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
        cgroups: Arc::new(cgroups::Cgroups::new(&config.cgroup_root).with_pods_memory(pods_memory)),
        log_links: Arc::new(log_links::Links::new(&config.keelson.container_log_links_dir)),
    }
}

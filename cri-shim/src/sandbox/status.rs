//! What CRI shows of sandboxes.

use std::collections::BTreeMap;

use cri_shim_api::v1::{
    LinuxPodSandboxStatus, Namespace, PodIp, PodSandbox, PodSandboxFilter, PodSandboxNetworkStatus,
    PodSandboxStatus, PodSandboxStatusResponse,
};
use cri_shim_core::filter;
use cri_shim_core::record::{SandboxPhase, SandboxRecord};

use crate::clock;
use crate::error::RuntimeError;
use crate::runtime::Runtime;

impl Runtime {
    /// The sandboxes that match. One that is still being made is not there yet.
    pub fn list_sandboxes(&self, wanted: Option<&PodSandboxFilter>) -> Vec<PodSandbox> {
        let shown = |record: &SandboxRecord| {
            (record.phase() != SandboxPhase::Creating && filter::sandbox(wanted, record))
                .then(|| item(record))
        };
        self.registry.sandboxes().iter().filter_map(|sandbox| sandbox.record.with(shown)).collect()
    }

    /// The status of one sandbox with those of its containers.
    pub fn sandbox_status_response(
        &self,
        id: &str,
        verbose: bool,
    ) -> Result<PodSandboxStatusResponse, RuntimeError> {
        let sandbox = self.sandbox(id)?;
        if sandbox.phase() == SandboxPhase::Creating {
            return Err(RuntimeError::NotFound { kind: "sandbox", id: id.to_owned() });
        }
        Ok(PodSandboxStatusResponse {
            status: Some(sandbox.record.with(status)),
            info: if verbose { sandbox.record.with(info) } else { BTreeMap::new() },
            containers_statuses: self.container_statuses(id),
            timestamp: clock::now(),
        })
    }
}

/// The status of one sandbox.
pub(crate) fn status(record: &SandboxRecord) -> PodSandboxStatus {
    let linux = record.config.linux.as_ref();
    let security = linux.and_then(|linux| linux.security_context.as_ref());
    let options = security.and_then(|security| security.namespace_options.clone());
    PodSandboxStatus {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: record.state().into(),
        created_at: record.created_at,
        network: Some(network(record)),
        linux: Some(LinuxPodSandboxStatus { namespaces: Some(Namespace { options }) }),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

/// Addresses while the sandbox is attached; a stopped one has given them back.
fn network(record: &SandboxRecord) -> PodSandboxNetworkStatus {
    let mut addresses: &[String] = &record.addresses;
    if record.phase() >= SandboxPhase::Stopped {
        addresses = &[];
    }
    PodSandboxNetworkStatus {
        ip: addresses.first().cloned().unwrap_or_default(),
        additional_ips: addresses.iter().skip(1).map(|ip| PodIp { ip: ip.clone() }).collect(),
    }
}

fn item(record: &SandboxRecord) -> PodSandbox {
    PodSandbox {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: record.state().into(),
        created_at: record.created_at,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

/// What helps a person who debugs.
fn info(record: &SandboxRecord) -> BTreeMap<String, String> {
    let info = serde_json::json!({
        "pid": record.pid,
        "netns": record.netns,
        "network": record.network,
        "cgroupParent": record.cgroup_parent(),
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

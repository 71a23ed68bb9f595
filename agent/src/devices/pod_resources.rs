//! Answers of the pod-resources API: which container has which devices.

use std::sync::Arc;

use agent_core::devices::{Device, Ledger};
use agent_core::model::containers;
use k8s_openapi::api::core::v1::Pod;
use tonic::Status;

use super::Devices;
use super::wire::{
    AllocatableResponse, ContainerDevices, ContainerResources, GetRequest, NumaNode, PodResources, Topology,
};

/// Every pod that has not ended.
pub(super) fn list(devices: &Devices, pods: &[Arc<Pod>]) -> Vec<PodResources> {
    let ledger = devices.ledger();
    pods.iter().filter(|pod| !is_over(pod)).map(|pod| resources(&ledger, pod)).collect()
}

/// One pod.
pub(super) fn get(devices: &Devices, pods: &[Arc<Pod>], wanted: &GetRequest) -> Result<PodResources, Status> {
    let is_wanted = |pod: &&Arc<Pod>| {
        let metadata = &pod.metadata;
        metadata.name.as_deref() == Some(&wanted.pod_name)
            && metadata.namespace.as_deref() == Some(&wanted.pod_namespace)
    };
    let pod = pods.iter().find(is_wanted).ok_or_else(|| {
        Status::not_found(format!("pod {} in namespace {} not found", wanted.pod_name, wanted.pod_namespace))
    })?;
    Ok(resources(&devices.ledger(), pod))
}

/// Every device that can be given away.
pub(super) fn allocatable(devices: &Devices) -> AllocatableResponse {
    let ledger = devices.ledger();
    let mut found = Vec::new();
    for resource in ledger.resources() {
        let healthy = ledger.devices(resource).filter(|(_, device)| device.healthy);
        found.extend(healthy.map(|(id, device)| ContainerDevices {
            resource_name: resource.to_owned(),
            device_ids: vec![id.to_owned()],
            topology: topology(std::iter::once(device)),
        }));
    }
    AllocatableResponse { devices: found, cpu_ids: Vec::new() }
}

fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn resources(ledger: &Ledger, pod: &Pod) -> PodResources {
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    let container = |name: &str| ContainerResources {
        name: name.to_owned(),
        devices: ledger
            .granted(&(uid.clone(), name.to_owned()))
            .map(|(resource, grant)| {
                let given = ledger.devices(resource).filter(|(id, _)| grant.ids.contains(*id));
                ContainerDevices {
                    resource_name: resource.to_owned(),
                    device_ids: grant.ids.iter().cloned().collect(),
                    topology: topology(given.map(|(_, device)| device)),
                }
            })
            .collect(),
        cpu_ids: Vec::new(),
    };
    let names = pod.spec.iter().flat_map(containers).map(|entry| entry.container.name.as_str());
    PodResources {
        name: pod.metadata.name.clone().unwrap_or_default(),
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        containers: names.map(container).collect(),
    }
}

fn topology<'a>(devices: impl Iterator<Item = &'a Device>) -> Option<Topology> {
    let mut nodes: Vec<i64> = devices.flat_map(|device| device.nodes.iter().copied()).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let nodes: Vec<NumaNode> = nodes.into_iter().map(|id| NumaNode { id }).collect();
    (!nodes.is_empty()).then_some(Topology { nodes })
}

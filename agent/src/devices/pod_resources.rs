//! Answers of the pod-resources API: which container has which devices, processors and memory.

use std::sync::Arc;

use agent_core::cpus::CpuSet;
use agent_core::devices::{Device, Ledger};
use agent_core::model::containers;
use k8s_openapi::api::core::v1::{Container, Pod};
use tonic::Status;

use super::server::PodResourcesLister;
use super::wire::{
    AllocatableResponse, CdiDevice, ClaimResource, ContainerDevices, ContainerMemory, ContainerResources,
    DynamicResource, GetRequest, NumaNode, PodResources, Topology,
};
use crate::dra::Dra;
use crate::numa::Numa;

/// Every pod that has not ended.
pub(super) fn list(lister: &PodResourcesLister) -> Vec<PodResources> {
    let ledger = lister.devices.ledger();
    let pods = lister.pods.pods();
    pods.iter().filter(|pod| !is_over(pod)).map(|pod| resources(&ledger, lister, pod)).collect()
}

/// One pod.
pub(super) fn get(lister: &PodResourcesLister, wanted: &GetRequest) -> Result<PodResources, Status> {
    let is_wanted = |pod: &&Arc<Pod>| {
        let metadata = &pod.metadata;
        metadata.name.as_deref() == Some(&wanted.pod_name)
            && metadata.namespace.as_deref() == Some(&wanted.pod_namespace)
    };
    let pods = lister.pods.pods();
    let pod = pods.iter().find(is_wanted).ok_or_else(|| {
        Status::not_found(format!("pod {} in namespace {} not found", wanted.pod_name, wanted.pod_namespace))
    })?;
    Ok(resources(&lister.devices.ledger(), lister, pod))
}

/// Everything that can be given away.
pub(super) fn allocatable(lister: &PodResourcesLister) -> AllocatableResponse {
    let ledger = lister.devices.ledger();
    let mut found = Vec::new();
    for resource in ledger.resources() {
        let healthy = ledger.devices(resource).filter(|(_, device)| device.healthy);
        found.extend(healthy.map(|(id, device)| ContainerDevices {
            resource_name: resource.to_owned(),
            device_ids: vec![id.to_owned()],
            topology: topology(std::iter::once(device)),
        }));
    }
    let (cpus, bank) = lister.numa.allocatable();
    let of_node = |(node, amounts): (&u32, &agent_core::memory::Amounts)| {
        let node = *node;
        let each = amounts.iter().map(move |(resource, size)| memory(resource, *size, std::iter::once(node)));
        each.collect::<Vec<_>>()
    };
    AllocatableResponse {
        devices: found,
        cpu_ids: ids(&cpus),
        memory: bank.0.iter().flat_map(of_node).collect(),
    }
}

fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn resources(ledger: &Ledger, lister: &PodResourcesLister, pod: &Pod) -> PodResources {
    let (uid, numa) = (pod.metadata.uid.clone().unwrap_or_default(), &lister.numa);
    let container = |container: &Container| ContainerResources {
        name: container.name.clone(),
        devices: ledger
            .granted(&(uid.clone(), container.name.clone()))
            .map(|(resource, grant)| {
                let given = ledger.devices(resource).filter(|(id, _)| grant.ids.contains(*id));
                ContainerDevices {
                    resource_name: resource.to_owned(),
                    device_ids: grant.ids.iter().cloned().collect(),
                    topology: topology(given.map(|(_, device)| device)),
                }
            })
            .collect(),
        cpu_ids: ids(&numa.cpus_of(&uid, &container.name)),
        memory: memory_of(numa, &uid, &container.name),
        dynamic_resources: claimed(&lister.claims, pod, container),
    };
    let all = pod.spec.iter().flat_map(containers).map(|entry| entry.container);
    PodResources {
        name: pod.metadata.name.clone().unwrap_or_default(),
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        containers: all.map(container).collect(),
    }
}

/// What a container has of ResourceClaims.
fn claimed(claims: &Dra, pod: &Pod, container: &Container) -> Vec<DynamicResource> {
    let resource = |(driver, device): (String, agent_core::claims::Device)| ClaimResource {
        cdi_devices: device.cdi_ids.into_iter().map(|name| CdiDevice { name }).collect(),
        driver_name: driver,
        pool_name: device.pool,
        device_name: device.device,
        share_id: device.share_id,
    };
    let held = claims.of_container(pod, container).into_iter();
    held.map(|held| DynamicResource {
        claim_name: held.name,
        claim_namespace: held.namespace,
        claim_resources: held.devices.into_iter().map(resource).collect(),
    })
    .collect()
}

fn ids(cpus: &CpuSet) -> Vec<i64> {
    cpus.iter().map(i64::from).collect()
}

/// What a container has of each kind, with the nodes that it is on.
fn memory_of(numa: &Numa, pod_uid: &str, container: &str) -> Vec<ContainerMemory> {
    let Some(share) = numa.memory_of(pod_uid, container) else { return Vec::new() };
    let mut sizes = agent_core::memory::Amounts::new();
    for (resource, size) in share.taken.values().flatten() {
        *sizes.entry(resource.clone()).or_default() += size;
    }
    sizes.iter().map(|(resource, size)| memory(resource, *size, share.nodes.iter().copied())).collect()
}

fn memory(resource: &str, size: u64, nodes: impl Iterator<Item = u32>) -> ContainerMemory {
    let nodes = nodes.map(|node| NumaNode { id: i64::from(node) }).collect();
    ContainerMemory { memory_type: resource.to_owned(), size, topology: Some(Topology { nodes }) }
}

fn topology<'a>(devices: impl Iterator<Item = &'a Device>) -> Option<Topology> {
    let mut nodes: Vec<i64> = devices.flat_map(|device| device.nodes.iter().copied()).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let nodes: Vec<NumaNode> = nodes.into_iter().map(|id| NumaNode { id }).collect();
    (!nodes.is_empty()).then_some(Topology { nodes })
}

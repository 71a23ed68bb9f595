//! What is dropped from objects before they are cached: everything no controller reads.

use k8s_openapi::{
    Metadata,
    api::{
        apps::v1::{Deployment, ReplicaSet},
        coordination::v1::Lease,
        core::v1::{
            ConfigMap, Container, ContainerStatus, Endpoints, Namespace, Node, NodeStatus, Pod, PodSpec,
            PodStatus, Service, ServiceAccount, Volume,
        },
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

/// Drops field ownership and kubectl's copy of the manifest. Objects that are written back whole keep
/// nothing of it either: the API server retains managed fields that an update leaves out.
fn metadata<K: Metadata<Ty = ObjectMeta>>(object: &mut K) {
    let meta = object.metadata_mut();
    meta.managed_fields = None;
    if let Some(annotations) = meta.annotations.as_mut() {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

/// Keeps all that is about the object itself.
pub(crate) fn whole<K: Metadata<Ty = ObjectMeta>>(object: &mut K) {
    metadata(object);
}

/// Keeps of pods what scheduling, ranking, endpoints, evictions and claims read.
pub(crate) fn pod(pod: &mut Pod) {
    metadata(pod);
    if let Some(spec) = pod.spec.take() {
        pod.spec = Some(PodSpec {
            affinity: spec.affinity,
            containers: spec.containers.into_iter().map(container).collect(),
            hostname: spec.hostname,
            init_containers: spec.init_containers.map(|list| list.into_iter().map(container).collect()),
            node_name: spec.node_name,
            node_selector: spec.node_selector,
            overhead: spec.overhead,
            priority: spec.priority,
            resource_claims: spec.resource_claims,
            resources: spec.resources,
            restart_policy: spec.restart_policy,
            scheduler_name: spec.scheduler_name,
            scheduling_gates: spec.scheduling_gates,
            subdomain: spec.subdomain,
            tolerations: spec.tolerations,
            volumes: spec.volumes.map(claims_only).filter(|volumes| !volumes.is_empty()),
            ..PodSpec::default()
        });
    }
    if let Some(status) = pod.status.take() {
        pod.status = Some(PodStatus {
            conditions: status.conditions,
            container_statuses: status.container_statuses.map(restarts_only),
            phase: status.phase,
            pod_ip: status.pod_ip,
            pod_ips: status.pod_ips,
            reason: status.reason,
            resource_claim_statuses: status.resource_claim_statuses,
            ..PodStatus::default()
        });
    }
}

fn claims_only(volumes: Vec<Volume>) -> Vec<Volume> {
    let is_claim = |volume: &Volume| volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some();
    volumes.into_iter().filter(is_claim).collect()
}

fn container(container: Container) -> Container {
    Container {
        name: container.name,
        ports: container.ports,
        resources: container.resources,
        restart_policy: container.restart_policy,
        ..Container::default()
    }
}

fn restarts_only(statuses: Vec<ContainerStatus>) -> Vec<ContainerStatus> {
    let most = statuses.into_iter().map(|status| status.restart_count).max();
    most.map(|restart_count| ContainerStatus { restart_count, ..ContainerStatus::default() })
        .into_iter()
        .collect()
}

/// Keeps of nodes what scheduling, addresses, health and attached volumes need.
pub(crate) fn node(node: &mut Node) {
    metadata(node);
    if let Some(status) = node.status.take() {
        node.status = Some(NodeStatus {
            addresses: status.addresses,
            allocatable: status.allocatable,
            conditions: status.conditions,
            volumes_attached: status.volumes_attached,
            volumes_in_use: status.volumes_in_use,
            ..NodeStatus::default()
        });
    }
}

/// Keeps the spec and status.
pub(crate) fn deployment(object: &mut Deployment) {
    metadata(object);
}

/// Keeps the spec and status.
pub(crate) fn replica_set(object: &mut ReplicaSet) {
    metadata(object);
}

/// Keeps the spec.
pub(crate) fn service(object: &mut Service) {
    metadata(object);
    object.status = None;
}

/// Keeps the endpoints.
pub(crate) fn endpoint_slice(object: &mut EndpointSlice) {
    metadata(object);
}

/// Keeps the subsets.
pub(crate) fn endpoints(object: &mut Endpoints) {
    metadata(object);
}

/// Keeps everything but what all objects lose.
pub(crate) fn namespace(object: &mut Namespace) {
    metadata(object);
}

/// Keeps the metadata.
pub(crate) fn service_account(object: &mut ServiceAccount) {
    metadata(object);
    object.secrets = None;
    object.image_pull_secrets = None;
}

/// Keeps the renew time.
pub(crate) fn lease(object: &mut Lease) {
    metadata(object);
}

/// Keeps the data: it is compared.
pub(crate) fn config_map(object: &mut ConfigMap) {
    metadata(object);
}

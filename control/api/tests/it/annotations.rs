//! What k8s-openapi's schemas leave out: how lists and maps merge.
//!
//! Facts of the Kubernetes 1.36 API types (`patchStrategy`, `patchMergeKey`, `listType`, `listMapKey`, `mapType` tags),
//! one row per field. A new kind whose lists merge needs its rows here; everything else follows from its schema.

/// How one list or map field merges.
pub(crate) struct FieldRule {
    /// Short name of the struct and its field: `PodSpec.containers`.
    pub(crate) field: &'static str,
    /// `patchStrategy`, empty for none.
    pub(crate) patch_strategy: &'static str,
    /// `patchMergeKey`, empty for none.
    pub(crate) patch_merge_key: &'static str,
    /// `listType`: `map`, `set`, `atomic`, or empty for not a list.
    pub(crate) list_type: &'static str,
    /// `listMapKey`s.
    pub(crate) list_map_keys: &'static [&'static str],
}

const fn merge(field: &'static str, key: &'static str, keys: &'static [&'static str]) -> FieldRule {
    FieldRule { field, patch_strategy: "merge", patch_merge_key: key, list_type: "map", list_map_keys: keys }
}

const fn retain(field: &'static str, key: &'static str, keys: &'static [&'static str]) -> FieldRule {
    FieldRule { patch_strategy: "merge,retainKeys", ..merge(field, key, keys) }
}

const fn map(field: &'static str, keys: &'static [&'static str]) -> FieldRule {
    FieldRule { field, patch_strategy: "", patch_merge_key: "", list_type: "map", list_map_keys: keys }
}

const fn set(field: &'static str, patch_strategy: &'static str) -> FieldRule {
    FieldRule { field, patch_strategy, patch_merge_key: "", list_type: "set", list_map_keys: &[] }
}

/// One row per field that does not simply get replaced.
pub(crate) const FIELD_RULES: &[FieldRule] = &[
    map("AllocatedDeviceStatus.conditions", &["type"]),
    set("CSIDriverSpec.volumeLifecycleModes", ""),
    merge("CSINodeSpec.drivers", "name", &["name"]),
    map("CertificateSigningRequestStatus.conditions", &["type"]),
    merge("Container.env", "name", &["name"]),
    merge("Container.ports", "containerPort", &["containerPort", "protocol"]),
    merge("Container.volumeDevices", "devicePath", &["devicePath"]),
    merge("Container.volumeMounts", "mountPath", &["mountPath"]),
    set("ContainerRestartRuleOnExitCodes.values", ""),
    merge("ContainerStatus.allocatedResourcesStatus", "name", &["name"]),
    merge("ContainerStatus.volumeMounts", "mountPath", &["mountPath"]),
    merge("DaemonSetStatus.conditions", "type", &["type"]),
    FieldRule {
        field: "DeploymentSpec.strategy",
        patch_strategy: "retainKeys",
        patch_merge_key: "",
        list_type: "",
        list_map_keys: &[],
    },
    merge("DeploymentStatus.conditions", "type", &["type"]),
    set("Endpoint.addresses", ""),
    merge("EphemeralContainer.env", "name", &["name"]),
    merge("EphemeralContainer.ports", "containerPort", &["containerPort", "protocol"]),
    merge("EphemeralContainer.volumeDevices", "devicePath", &["devicePath"]),
    merge("EphemeralContainer.volumeMounts", "mountPath", &["mountPath"]),
    merge("NamespaceStatus.conditions", "type", &["type"]),
    set("NodeSpec.podCIDRs", "merge"),
    merge("NodeStatus.addresses", "type", &["type"]),
    merge("NodeStatus.conditions", "type", &["type"]),
    set("ObjectMeta.finalizers", "merge"),
    merge("ObjectMeta.ownerReferences", "uid", &["uid"]),
    merge("PersistentVolumeClaimStatus.conditions", "type", &["type"]),
    merge("PodSpec.containers", "name", &["name"]),
    merge("PodSpec.ephemeralContainers", "name", &["name"]),
    merge("PodSpec.hostAliases", "ip", &["ip"]),
    merge("PodSpec.imagePullSecrets", "name", &["name"]),
    merge("PodSpec.initContainers", "name", &["name"]),
    retain("PodSpec.resourceClaims", "name", &["name"]),
    merge("PodSpec.schedulingGates", "name", &["name"]),
    merge("PodSpec.topologySpreadConstraints", "topologyKey", &["topologyKey", "whenUnsatisfiable"]),
    retain("PodSpec.volumes", "name", &["name"]),
    merge("PodStatus.conditions", "type", &["type"]),
    FieldRule { list_type: "atomic", list_map_keys: &[], ..merge("PodStatus.hostIPs", "ip", &[]) },
    merge("PodStatus.podIPs", "ip", &["ip"]),
    retain("PodStatus.resourceClaimStatuses", "name", &["name"]),
    merge("ReplicaSetStatus.conditions", "type", &["type"]),
    map("ResourceClaimStatus.devices", &["driver", "device", "pool", "shareID"]),
    merge("ResourceClaimStatus.reservedFor", "uid", &["uid"]),
    map("ResourceRequirements.claims", &["name"]),
    map("ResourceStatus.resources", &["resourceID"]),
    merge("ServiceAccount.secrets", "name", &["name"]),
    merge("ServiceSpec.ports", "port", &["port", "protocol"]),
    merge("ServiceStatus.conditions", "type", &["type"]),
    merge("StatefulSetStatus.conditions", "type", &["type"]),
];

/// Structs that server-side apply replaces as a whole (`structType=atomic`).
pub(crate) const ATOMIC_STRUCTS: &[&str] = &[
    "ConfigMapKeySelector",
    "EndpointAddress",
    "EndpointPort",
    "FileKeySelector",
    "LabelSelector",
    "LocalObjectReference",
    "NodeSelector",
    "NodeSelectorTerm",
    "ObjectFieldSelector",
    "ObjectReference",
    "OwnerReference",
    "ResourceFieldSelector",
    "SecretKeySelector",
    "SecretReference",
    "TopologySelectorTerm",
    "TypedLocalObjectReference",
];

/// Maps that server-side apply replaces as a whole (`mapType=atomic`).
pub(crate) const ATOMIC_MAPS: &[&str] =
    &["PodSpec.nodeSelector", "Scheduling.nodeSelector", "ServiceSpec.selector"];

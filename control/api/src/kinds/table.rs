//! The table itself: one row per resource, data only.

use super::{NameRule, ResourceInfo, SelectableField, Storage, Subresource};

const ALL_VERBS: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const NO_COLLECTION: &[&str] = &["create", "delete", "get", "list", "patch", "update", "watch"];
const CREATE: &[&str] = &["create"];
const GET: &[&str] = &["get"];
const STREAM: &[&str] = &["create", "get"];
const EDIT: &[&str] = &["get", "patch", "update"];
const ANY: &[&str] = &["create", "delete", "get", "patch", "update"];

/// What most resources share; rows override what differs.
const BASE: ResourceInfo = ResourceInfo {
    group: "",
    version: "v1",
    plural: "",
    singular: "",
    kind: "",
    list_kind: "",
    definition: "",
    namespaced: true,
    short_names: &[],
    categories: &[],
    verbs: ALL_VERBS,
    subresources: &[],
    storage: Storage::CreateOnly,
    name_rule: NameRule::Subdomain,
    graceful_delete: false,
    generation: false,
    create_on_update: false,
    unconditional_update: true,
    selectable: &[],
};

const fn stored(prefix: &'static str) -> Storage {
    Storage::Stored { prefix }
}

const fn own(name: &'static str, kind: &'static str, verbs: &'static [&'static str]) -> Subresource {
    Subresource { name, kind, group_version: None, verbs }
}

const fn of(
    name: &'static str,
    kind: &'static str,
    group: &'static str,
    verbs: &'static [&'static str],
) -> Subresource {
    Subresource { name, kind, group_version: Some((group, "v1")), verbs }
}

const fn field(name: &'static str, pointers: &'static [&'static str]) -> SelectableField {
    SelectableField { name, pointers, default: "" }
}

const fn flag(name: &'static str, pointers: &'static [&'static str]) -> SelectableField {
    SelectableField { name, pointers, default: "false" }
}

const POD_SUBRESOURCES: &[Subresource] = &[
    own("attach", "PodAttachOptions", STREAM),
    own("binding", "Binding", CREATE),
    own("ephemeralcontainers", "Pod", EDIT),
    of("eviction", "Eviction", "policy", CREATE),
    own("exec", "PodExecOptions", STREAM),
    own("log", "Pod", GET),
    own("portforward", "PodPortForwardOptions", STREAM),
    own("resize", "Pod", EDIT),
    own("status", "Pod", EDIT),
];

const POD_FIELDS: &[SelectableField] = &[
    field("spec.nodeName", &["/spec/nodeName"]),
    field("spec.host", &["/spec/nodeName"]),
    field("spec.restartPolicy", &["/spec/restartPolicy"]),
    field("spec.schedulerName", &["/spec/schedulerName"]),
    field("spec.serviceAccountName", &["/spec/serviceAccountName"]),
    flag("spec.hostNetwork", &["/spec/hostNetwork"]),
    field("status.phase", &["/status/phase"]),
    field("status.podIP", &["/status/podIP"]),
    field("status.podIPs", &["/status/podIPs/0/ip"]),
    field("status.nominatedNodeName", &["/status/nominatedNodeName"]),
];

const EVENT_FIELDS: &[SelectableField] = &[
    field("involvedObject.kind", &["/involvedObject/kind"]),
    field("involvedObject.namespace", &["/involvedObject/namespace"]),
    field("involvedObject.name", &["/involvedObject/name"]),
    field("involvedObject.uid", &["/involvedObject/uid"]),
    field("involvedObject.apiVersion", &["/involvedObject/apiVersion"]),
    field("involvedObject.resourceVersion", &["/involvedObject/resourceVersion"]),
    field("involvedObject.fieldPath", &["/involvedObject/fieldPath"]),
    field("reason", &["/reason"]),
    field("reportingComponent", &["/reportingComponent"]),
    field("source", &["/source/component", "/reportingComponent"]),
    field("type", &["/type"]),
];

const NEW_EVENT_FIELDS: &[SelectableField] = &[
    field("regarding.kind", &["/involvedObject/kind"]),
    field("regarding.namespace", &["/involvedObject/namespace"]),
    field("regarding.name", &["/involvedObject/name"]),
    field("regarding.uid", &["/involvedObject/uid"]),
    field("regarding.apiVersion", &["/involvedObject/apiVersion"]),
    field("regarding.resourceVersion", &["/involvedObject/resourceVersion"]),
    field("regarding.fieldPath", &["/involvedObject/fieldPath"]),
    field("reason", &["/reason"]),
    field("reportingController", &["/reportingComponent"]),
    field("type", &["/type"]),
];

/// Every served resource, grouped by group and version in discovery order.
pub static RESOURCES: &[ResourceInfo] = &[
    ResourceInfo {
        plural: "bindings",
        singular: "binding",
        kind: "Binding",
        list_kind: "BindingList",
        definition: "io.k8s.api.core.v1.Binding",
        verbs: CREATE,
        ..BASE
    },
    ResourceInfo {
        plural: "configmaps",
        singular: "configmap",
        kind: "ConfigMap",
        list_kind: "ConfigMapList",
        definition: "io.k8s.api.core.v1.ConfigMap",
        short_names: &["cm"],
        storage: stored("configmaps"),
        ..BASE
    },
    ResourceInfo {
        plural: "endpoints",
        singular: "endpoints",
        kind: "Endpoints",
        list_kind: "EndpointsList",
        definition: "io.k8s.api.core.v1.Endpoints",
        short_names: &["ep"],
        storage: stored("services/endpoints"),
        create_on_update: true,
        ..BASE
    },
    ResourceInfo {
        plural: "events",
        singular: "event",
        kind: "Event",
        list_kind: "EventList",
        definition: "io.k8s.api.core.v1.Event",
        short_names: &["ev"],
        storage: stored("events"),
        create_on_update: true,
        selectable: EVENT_FIELDS,
        ..BASE
    },
    ResourceInfo {
        plural: "namespaces",
        singular: "namespace",
        kind: "Namespace",
        list_kind: "NamespaceList",
        definition: "io.k8s.api.core.v1.Namespace",
        namespaced: false,
        short_names: &["ns"],
        verbs: NO_COLLECTION,
        subresources: &[own("finalize", "Namespace", &["update"]), own("status", "Namespace", EDIT)],
        storage: stored("namespaces"),
        name_rule: NameRule::Label1123,
        selectable: &[field("status.phase", &["/status/phase"])],
        ..BASE
    },
    ResourceInfo {
        plural: "nodes",
        singular: "node",
        kind: "Node",
        list_kind: "NodeList",
        definition: "io.k8s.api.core.v1.Node",
        namespaced: false,
        short_names: &["no"],
        subresources: &[own("proxy", "NodeProxyOptions", ANY), own("status", "Node", EDIT)],
        storage: stored("minions"),
        selectable: &[flag("spec.unschedulable", &["/spec/unschedulable"])],
        ..BASE
    },
    ResourceInfo {
        plural: "persistentvolumeclaims",
        singular: "persistentvolumeclaim",
        kind: "PersistentVolumeClaim",
        list_kind: "PersistentVolumeClaimList",
        definition: "io.k8s.api.core.v1.PersistentVolumeClaim",
        short_names: &["pvc"],
        subresources: &[own("status", "PersistentVolumeClaim", EDIT)],
        storage: stored("persistentvolumeclaims"),
        ..BASE
    },
    ResourceInfo {
        plural: "persistentvolumes",
        singular: "persistentvolume",
        kind: "PersistentVolume",
        list_kind: "PersistentVolumeList",
        definition: "io.k8s.api.core.v1.PersistentVolume",
        namespaced: false,
        short_names: &["pv"],
        subresources: &[own("status", "PersistentVolume", EDIT)],
        storage: stored("persistentvolumes"),
        ..BASE
    },
    ResourceInfo {
        plural: "pods",
        singular: "pod",
        kind: "Pod",
        list_kind: "PodList",
        definition: "io.k8s.api.core.v1.Pod",
        short_names: &["po"],
        categories: &["all"],
        subresources: POD_SUBRESOURCES,
        storage: stored("pods"),
        graceful_delete: true,
        generation: true,
        selectable: POD_FIELDS,
        ..BASE
    },
    ResourceInfo {
        plural: "secrets",
        singular: "secret",
        kind: "Secret",
        list_kind: "SecretList",
        definition: "io.k8s.api.core.v1.Secret",
        storage: stored("secrets"),
        selectable: &[field("type", &["/type"])],
        ..BASE
    },
    ResourceInfo {
        plural: "serviceaccounts",
        singular: "serviceaccount",
        kind: "ServiceAccount",
        list_kind: "ServiceAccountList",
        definition: "io.k8s.api.core.v1.ServiceAccount",
        short_names: &["sa"],
        subresources: &[of("token", "TokenRequest", "authentication.k8s.io", CREATE)],
        storage: stored("serviceaccounts"),
        ..BASE
    },
    ResourceInfo {
        plural: "services",
        singular: "service",
        kind: "Service",
        list_kind: "ServiceList",
        definition: "io.k8s.api.core.v1.Service",
        short_names: &["svc"],
        categories: &["all"],
        subresources: &[own("status", "Service", EDIT)],
        storage: stored("services/specs"),
        name_rule: NameRule::Label1035,
        create_on_update: true,
        selectable: &[field("spec.clusterIP", &["/spec/clusterIP"]), field("spec.type", &["/spec/type"])],
        ..BASE
    },
    ResourceInfo {
        group: "apps",
        plural: "deployments",
        singular: "deployment",
        kind: "Deployment",
        list_kind: "DeploymentList",
        definition: "io.k8s.api.apps.v1.Deployment",
        short_names: &["deploy"],
        categories: &["all"],
        subresources: &[of("scale", "Scale", "autoscaling", EDIT), own("status", "Deployment", EDIT)],
        storage: stored("deployments"),
        generation: true,
        ..BASE
    },
    ResourceInfo {
        group: "apps",
        plural: "replicasets",
        singular: "replicaset",
        kind: "ReplicaSet",
        list_kind: "ReplicaSetList",
        definition: "io.k8s.api.apps.v1.ReplicaSet",
        short_names: &["rs"],
        categories: &["all"],
        subresources: &[of("scale", "Scale", "autoscaling", EDIT), own("status", "ReplicaSet", EDIT)],
        storage: stored("replicasets"),
        generation: true,
        selectable: &[SelectableField {
            name: "status.replicas",
            pointers: &["/status/replicas"],
            default: "0",
        }],
        ..BASE
    },
    ResourceInfo {
        group: "authentication.k8s.io",
        plural: "selfsubjectreviews",
        singular: "selfsubjectreview",
        kind: "SelfSubjectReview",
        list_kind: "SelfSubjectReviewList",
        definition: "io.k8s.api.authentication.v1.SelfSubjectReview",
        namespaced: false,
        verbs: CREATE,
        ..BASE
    },
    ResourceInfo {
        group: "authentication.k8s.io",
        plural: "tokenreviews",
        singular: "tokenreview",
        kind: "TokenReview",
        list_kind: "TokenReviewList",
        definition: "io.k8s.api.authentication.v1.TokenReview",
        namespaced: false,
        verbs: CREATE,
        ..BASE
    },
    ResourceInfo {
        group: "authorization.k8s.io",
        plural: "localsubjectaccessreviews",
        singular: "localsubjectaccessreview",
        kind: "LocalSubjectAccessReview",
        list_kind: "LocalSubjectAccessReviewList",
        definition: "io.k8s.api.authorization.v1.LocalSubjectAccessReview",
        verbs: CREATE,
        ..BASE
    },
    ResourceInfo {
        group: "authorization.k8s.io",
        plural: "selfsubjectaccessreviews",
        singular: "selfsubjectaccessreview",
        kind: "SelfSubjectAccessReview",
        list_kind: "SelfSubjectAccessReviewList",
        definition: "io.k8s.api.authorization.v1.SelfSubjectAccessReview",
        namespaced: false,
        verbs: CREATE,
        ..BASE
    },
    ResourceInfo {
        group: "authorization.k8s.io",
        plural: "subjectaccessreviews",
        singular: "subjectaccessreview",
        kind: "SubjectAccessReview",
        list_kind: "SubjectAccessReviewList",
        definition: "io.k8s.api.authorization.v1.SubjectAccessReview",
        namespaced: false,
        verbs: CREATE,
        ..BASE
    },
    ResourceInfo {
        group: "certificates.k8s.io",
        plural: "certificatesigningrequests",
        singular: "certificatesigningrequest",
        kind: "CertificateSigningRequest",
        list_kind: "CertificateSigningRequestList",
        definition: "io.k8s.api.certificates.v1.CertificateSigningRequest",
        namespaced: false,
        short_names: &["csr"],
        subresources: &[
            own("approval", "CertificateSigningRequest", EDIT),
            own("status", "CertificateSigningRequest", EDIT),
        ],
        storage: stored("certificatesigningrequests"),
        name_rule: NameRule::PathSegment,
        selectable: &[field("spec.signerName", &["/spec/signerName"])],
        ..BASE
    },
    ResourceInfo {
        group: "coordination.k8s.io",
        plural: "leases",
        singular: "lease",
        kind: "Lease",
        list_kind: "LeaseList",
        definition: "io.k8s.api.coordination.v1.Lease",
        storage: stored("leases"),
        create_on_update: true,
        unconditional_update: false,
        ..BASE
    },
    ResourceInfo {
        group: "discovery.k8s.io",
        plural: "endpointslices",
        singular: "endpointslice",
        kind: "EndpointSlice",
        list_kind: "EndpointSliceList",
        definition: "io.k8s.api.discovery.v1.EndpointSlice",
        storage: stored("endpointslices"),
        generation: true,
        ..BASE
    },
    ResourceInfo {
        group: "events.k8s.io",
        plural: "events",
        singular: "event",
        kind: "Event",
        list_kind: "EventList",
        definition: "io.k8s.api.events.v1.Event",
        short_names: &["ev"],
        storage: stored("events"),
        create_on_update: true,
        selectable: NEW_EVENT_FIELDS,
        ..BASE
    },
    ResourceInfo {
        group: "node.k8s.io",
        plural: "runtimeclasses",
        singular: "runtimeclass",
        kind: "RuntimeClass",
        list_kind: "RuntimeClassList",
        definition: "io.k8s.api.node.v1.RuntimeClass",
        namespaced: false,
        storage: stored("runtimeclasses"),
        unconditional_update: false,
        ..BASE
    },
    ResourceInfo {
        group: "resource.k8s.io",
        plural: "deviceclasses",
        singular: "deviceclass",
        kind: "DeviceClass",
        list_kind: "DeviceClassList",
        definition: "io.k8s.api.resource.v1.DeviceClass",
        namespaced: false,
        storage: stored("deviceclasses"),
        generation: true,
        ..BASE
    },
    ResourceInfo {
        group: "resource.k8s.io",
        plural: "resourceclaims",
        singular: "resourceclaim",
        kind: "ResourceClaim",
        list_kind: "ResourceClaimList",
        definition: "io.k8s.api.resource.v1.ResourceClaim",
        subresources: &[own("status", "ResourceClaim", EDIT)],
        storage: stored("resourceclaims"),
        ..BASE
    },
    ResourceInfo {
        group: "resource.k8s.io",
        plural: "resourceclaimtemplates",
        singular: "resourceclaimtemplate",
        kind: "ResourceClaimTemplate",
        list_kind: "ResourceClaimTemplateList",
        definition: "io.k8s.api.resource.v1.ResourceClaimTemplate",
        storage: stored("resourceclaimtemplates"),
        ..BASE
    },
    ResourceInfo {
        group: "resource.k8s.io",
        plural: "resourceslices",
        singular: "resourceslice",
        kind: "ResourceSlice",
        list_kind: "ResourceSliceList",
        definition: "io.k8s.api.resource.v1.ResourceSlice",
        namespaced: false,
        storage: stored("resourceslices"),
        generation: true,
        selectable: &[field("spec.driver", &["/spec/driver"]), field("spec.nodeName", &["/spec/nodeName"])],
        ..BASE
    },
    ResourceInfo {
        group: "scheduling.k8s.io",
        plural: "priorityclasses",
        singular: "priorityclass",
        kind: "PriorityClass",
        list_kind: "PriorityClassList",
        definition: "io.k8s.api.scheduling.v1.PriorityClass",
        namespaced: false,
        short_names: &["pc"],
        storage: stored("priorityclasses"),
        generation: true,
        ..BASE
    },
    ResourceInfo {
        group: "storage.k8s.io",
        plural: "csidrivers",
        singular: "csidriver",
        kind: "CSIDriver",
        list_kind: "CSIDriverList",
        definition: "io.k8s.api.storage.v1.CSIDriver",
        namespaced: false,
        storage: stored("csidrivers"),
        generation: true,
        unconditional_update: false,
        ..BASE
    },
    ResourceInfo {
        group: "storage.k8s.io",
        plural: "csinodes",
        singular: "csinode",
        kind: "CSINode",
        list_kind: "CSINodeList",
        definition: "io.k8s.api.storage.v1.CSINode",
        namespaced: false,
        storage: stored("csinodes"),
        unconditional_update: false,
        ..BASE
    },
    ResourceInfo {
        group: "storage.k8s.io",
        plural: "csistoragecapacities",
        singular: "csistoragecapacity",
        kind: "CSIStorageCapacity",
        list_kind: "CSIStorageCapacityList",
        definition: "io.k8s.api.storage.v1.CSIStorageCapacity",
        storage: stored("csistoragecapacities"),
        ..BASE
    },
    ResourceInfo {
        group: "storage.k8s.io",
        plural: "storageclasses",
        singular: "storageclass",
        kind: "StorageClass",
        list_kind: "StorageClassList",
        definition: "io.k8s.api.storage.v1.StorageClass",
        namespaced: false,
        short_names: &["sc"],
        storage: stored("storageclasses"),
        ..BASE
    },
    ResourceInfo {
        group: "storage.k8s.io",
        plural: "volumeattachments",
        singular: "volumeattachment",
        kind: "VolumeAttachment",
        list_kind: "VolumeAttachmentList",
        definition: "io.k8s.api.storage.v1.VolumeAttachment",
        namespaced: false,
        subresources: &[own("status", "VolumeAttachment", EDIT)],
        storage: stored("volumeattachments"),
        unconditional_update: false,
        ..BASE
    },
    ResourceInfo {
        group: "storage.k8s.io",
        plural: "volumeattributesclasses",
        singular: "volumeattributesclass",
        kind: "VolumeAttributesClass",
        list_kind: "VolumeAttributesClassList",
        definition: "io.k8s.api.storage.v1.VolumeAttributesClass",
        namespaced: false,
        short_names: &["vac"],
        storage: stored("volumeattributesclasses"),
        ..BASE
    },
];

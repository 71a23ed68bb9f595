//! Field numbers, JSON names and types of the protobuf messages that clients send. Data only.
//!
//! Facts of Kubernetes 1.36's `generated.proto` files: numbers and types as in the crate k8s-pb 0.9.0, names as in the OpenAPI definitions.
//! An empty name is a struct that Go embeds: its fields belong to the struct around it. `k` marks fields that are pointers in Go, whose zero
//! value is kept.

use crate::protobuf::{
    Kind::{Bool, Bytes, Int, IntOrString, List, Map, MicroTime, Nested, Quantity, Raw, Text, Time},
    Message, f, k,
};

/// The message of each kind that may come as a body: apiVersion, kind, index into [`MESSAGES`].
pub(crate) static ROOTS: &[(&str, &str, u16)] = &[
    ("apps/v1", "Deployment", 175),
    ("apps/v1", "ReplicaSet", 182),
    ("authentication.k8s.io/v1", "SelfSubjectReview", 198),
    ("authentication.k8s.io/v1", "TokenRequest", 189),
    ("authentication.k8s.io/v1", "TokenReview", 193),
    ("authorization.k8s.io/v1", "LocalSubjectAccessReview", 209),
    ("authorization.k8s.io/v1", "SelfSubjectAccessReview", 210),
    ("authorization.k8s.io/v1", "SelfSubjectRulesReview", 212),
    ("authorization.k8s.io/v1", "SubjectAccessReview", 200),
    ("autoscaling/v1", "Scale", 186),
    ("certificates.k8s.io/v1", "CertificateSigningRequest", 231),
    ("coordination.k8s.io/v1", "Lease", 217),
    ("discovery.k8s.io/v1", "EndpointSlice", 219),
    ("events.k8s.io/v1", "Event", 226),
    ("node.k8s.io/v1", "RuntimeClass", 232),
    ("policy/v1", "Eviction", 228),
    ("resource.k8s.io/v1", "DeviceClass", 233),
    ("resource.k8s.io/v1", "ResourceClaim", 234),
    ("resource.k8s.io/v1", "ResourceClaimTemplate", 235),
    ("resource.k8s.io/v1", "ResourceSlice", 236),
    ("scheduling.k8s.io/v1", "PriorityClass", 237),
    ("storage.k8s.io/v1", "CSIDriver", 238),
    ("storage.k8s.io/v1", "CSINode", 239),
    ("storage.k8s.io/v1", "CSIStorageCapacity", 240),
    ("storage.k8s.io/v1", "StorageClass", 241),
    ("storage.k8s.io/v1", "VolumeAttachment", 242),
    ("storage.k8s.io/v1", "VolumeAttributesClass", 243),
    ("v1", "Binding", 0),
    ("v1", "ConfigMap", 4),
    ("v1", "DeleteOptions", 173),
    ("v1", "Endpoints", 5),
    ("v1", "Event", 9),
    ("v1", "Namespace", 12),
    ("v1", "Node", 16),
    ("v1", "PersistentVolume", 229),
    ("v1", "PersistentVolumeClaim", 230),
    ("v1", "Pod", 34),
    ("v1", "Secret", 161),
    ("v1", "Service", 163),
    ("v1", "ServiceAccount", 162),
];

/// All messages.
#[rustfmt::skip]
pub(crate) static MESSAGES: &[Message] = &[
    // 0: api.core.v1.Binding
    Message(&[f(1, "metadata", Nested(1)), f(2, "target", Nested(3))]),
    // 1: apimachinery.pkg.apis.meta.v1.ObjectMeta
    Message(&[f(1, "name", Text), f(2, "generateName", Text), f(3, "namespace", Text), f(4, "selfLink", Text), f(5, "uid", Text), f(6, "resourceVersion", Text), f(7, "generation", Int), f(8, "creationTimestamp", Time), f(9, "deletionTimestamp", Time), k(10, "deletionGracePeriodSeconds", Int), f(11, "labels", Map(&Text)), f(12, "annotations", Map(&Text)), f(13, "ownerReferences", List(&Nested(2))), f(14, "finalizers", List(&Text))]),
    // 2: apimachinery.pkg.apis.meta.v1.OwnerReference
    Message(&[f(1, "kind", Text), f(3, "name", Text), f(4, "uid", Text), f(5, "apiVersion", Text), k(6, "controller", Bool), k(7, "blockOwnerDeletion", Bool)]),
    // 3: api.core.v1.ObjectReference
    Message(&[f(1, "kind", Text), f(2, "namespace", Text), f(3, "name", Text), f(4, "uid", Text), f(5, "apiVersion", Text), f(6, "resourceVersion", Text), f(7, "fieldPath", Text)]),
    // 4: api.core.v1.ConfigMap
    Message(&[f(1, "metadata", Nested(1)), f(2, "data", Map(&Text)), f(3, "binaryData", Map(&Bytes)), k(4, "immutable", Bool)]),
    // 5: api.core.v1.Endpoints
    Message(&[f(1, "metadata", Nested(1)), f(2, "subsets", List(&Nested(6)))]),
    // 6: api.core.v1.EndpointSubset
    Message(&[f(1, "addresses", List(&Nested(7))), f(2, "notReadyAddresses", List(&Nested(7))), f(3, "ports", List(&Nested(8)))]),
    // 7: api.core.v1.EndpointAddress
    Message(&[f(1, "ip", Text), f(2, "targetRef", Nested(3)), f(3, "hostname", Text), f(4, "nodeName", Text)]),
    // 8: api.core.v1.EndpointPort
    Message(&[f(1, "name", Text), f(2, "port", Int), f(3, "protocol", Text), f(4, "appProtocol", Text)]),
    // 9: api.core.v1.Event
    Message(&[f(1, "metadata", Nested(1)), f(2, "involvedObject", Nested(3)), f(3, "reason", Text), f(4, "message", Text), f(5, "source", Nested(10)), f(6, "firstTimestamp", Time), f(7, "lastTimestamp", Time), f(8, "count", Int), f(9, "type", Text), f(10, "eventTime", MicroTime), f(11, "series", Nested(11)), f(12, "action", Text), f(13, "related", Nested(3)), f(14, "reportingComponent", Text), f(15, "reportingInstance", Text)]),
    // 10: api.core.v1.EventSource
    Message(&[f(1, "component", Text), f(2, "host", Text)]),
    // 11: api.core.v1.EventSeries
    Message(&[f(1, "count", Int), f(2, "lastObservedTime", MicroTime)]),
    // 12: api.core.v1.Namespace
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(13)), f(3, "status", Nested(14))]),
    // 13: api.core.v1.NamespaceSpec
    Message(&[f(1, "finalizers", List(&Text))]),
    // 14: api.core.v1.NamespaceStatus
    Message(&[f(1, "phase", Text), f(2, "conditions", List(&Nested(15)))]),
    // 15: api.core.v1.NamespaceCondition
    Message(&[f(1, "type", Text), f(2, "status", Text), f(4, "lastTransitionTime", Time), f(5, "reason", Text), f(6, "message", Text)]),
    // 16: api.core.v1.Node
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(17)), f(3, "status", Nested(21))]),
    // 17: api.core.v1.NodeSpec
    Message(&[f(1, "podCIDR", Text), f(2, "externalID", Text), f(3, "providerID", Text), f(4, "unschedulable", Bool), f(5, "taints", List(&Nested(18))), f(6, "configSource", Nested(19)), f(7, "podCIDRs", List(&Text))]),
    // 18: api.core.v1.Taint
    Message(&[f(1, "key", Text), f(2, "value", Text), f(3, "effect", Text), f(4, "timeAdded", Time)]),
    // 19: api.core.v1.NodeConfigSource
    Message(&[f(2, "configMap", Nested(20))]),
    // 20: api.core.v1.ConfigMapNodeConfigSource
    Message(&[f(1, "namespace", Text), f(2, "name", Text), f(3, "uid", Text), f(4, "resourceVersion", Text), f(5, "kubeletConfigKey", Text)]),
    // 21: api.core.v1.NodeStatus
    Message(&[f(1, "capacity", Map(&Quantity)), f(2, "allocatable", Map(&Quantity)), f(3, "phase", Text), f(4, "conditions", List(&Nested(22))), f(5, "addresses", List(&Nested(23))), f(6, "daemonEndpoints", Nested(24)), f(7, "nodeInfo", Nested(26)), f(8, "images", List(&Nested(28))), f(9, "volumesInUse", List(&Text)), f(10, "volumesAttached", List(&Nested(29))), f(11, "config", Nested(30)), f(12, "runtimeHandlers", List(&Nested(31))), f(13, "features", Nested(33)), f(14, "declaredFeatures", List(&Text))]),
    // 22: api.core.v1.NodeCondition
    Message(&[f(1, "type", Text), f(2, "status", Text), f(3, "lastHeartbeatTime", Time), f(4, "lastTransitionTime", Time), f(5, "reason", Text), f(6, "message", Text)]),
    // 23: api.core.v1.NodeAddress
    Message(&[f(1, "type", Text), f(2, "address", Text)]),
    // 24: api.core.v1.NodeDaemonEndpoints
    Message(&[f(1, "kubeletEndpoint", Nested(25))]),
    // 25: api.core.v1.DaemonEndpoint
    Message(&[f(1, "Port", Int)]),
    // 26: api.core.v1.NodeSystemInfo
    Message(&[f(1, "machineID", Text), f(2, "systemUUID", Text), f(3, "bootID", Text), f(4, "kernelVersion", Text), f(5, "osImage", Text), f(6, "containerRuntimeVersion", Text), f(7, "kubeletVersion", Text), f(8, "kubeProxyVersion", Text), f(9, "operatingSystem", Text), f(10, "architecture", Text), f(11, "swap", Nested(27))]),
    // 27: api.core.v1.NodeSwapStatus
    Message(&[f(1, "capacity", Int)]),
    // 28: api.core.v1.ContainerImage
    Message(&[f(1, "names", List(&Text)), f(2, "sizeBytes", Int)]),
    // 29: api.core.v1.AttachedVolume
    Message(&[f(1, "name", Text), f(2, "devicePath", Text)]),
    // 30: api.core.v1.NodeConfigStatus
    Message(&[f(1, "assigned", Nested(19)), f(2, "active", Nested(19)), f(3, "lastKnownGood", Nested(19)), f(4, "error", Text)]),
    // 31: api.core.v1.NodeRuntimeHandler
    Message(&[f(1, "name", Text), f(2, "features", Nested(32))]),
    // 32: api.core.v1.NodeRuntimeHandlerFeatures
    Message(&[f(1, "recursiveReadOnlyMounts", Bool), f(2, "userNamespaces", Bool)]),
    // 33: api.core.v1.NodeFeatures
    Message(&[f(1, "supplementalGroupsPolicy", Bool)]),
    // 34: api.core.v1.Pod
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(35)), f(3, "status", Nested(144))]),
    // 35: api.core.v1.PodSpec
    Message(&[f(1, "volumes", List(&Nested(36))), f(2, "containers", List(&Nested(87))), f(3, "restartPolicy", Text), k(4, "terminationGracePeriodSeconds", Int), k(5, "activeDeadlineSeconds", Int), f(6, "dnsPolicy", Text), f(7, "nodeSelector", Map(&Text)), f(8, "serviceAccountName", Text), f(9, "serviceAccount", Text), f(10, "nodeName", Text), f(11, "hostNetwork", Bool), f(12, "hostPID", Bool), f(13, "hostIPC", Bool), f(14, "securityContext", Nested(122)), f(15, "imagePullSecrets", List(&Nested(47))), f(16, "hostname", Text), f(17, "subdomain", Text), f(18, "affinity", Nested(124)), f(19, "schedulerName", Text), f(20, "initContainers", List(&Nested(87))), k(21, "automountServiceAccountToken", Bool), f(22, "tolerations", List(&Nested(134))), f(23, "hostAliases", List(&Nested(135))), f(24, "priorityClassName", Text), k(25, "priority", Int), f(26, "dnsConfig", Nested(136)), k(27, "shareProcessNamespace", Bool), f(28, "readinessGates", List(&Nested(138))), f(29, "runtimeClassName", Text), k(30, "enableServiceLinks", Bool), f(31, "preemptionPolicy", Text), f(32, "overhead", Map(&Quantity)), f(33, "topologySpreadConstraints", List(&Nested(139))), f(34, "ephemeralContainers", List(&Nested(120))), k(35, "setHostnameAsFQDN", Bool), f(36, "os", Nested(140)), k(37, "hostUsers", Bool), f(38, "schedulingGates", List(&Nested(141))), f(39, "resourceClaims", List(&Nested(142))), f(40, "resources", Nested(97)), f(41, "hostnameOverride", Text)]),
    // 36: api.core.v1.Volume
    Message(&[f(1, "name", Text), f(2, "", Nested(37))]),
    // 37: api.core.v1.VolumeSource
    Message(&[f(1, "hostPath", Nested(38)), f(2, "emptyDir", Nested(39)), f(3, "gcePersistentDisk", Nested(40)), f(4, "awsElasticBlockStore", Nested(41)), f(5, "gitRepo", Nested(42)), f(6, "secret", Nested(43)), f(7, "nfs", Nested(45)), f(8, "iscsi", Nested(46)), f(9, "glusterfs", Nested(48)), f(10, "persistentVolumeClaim", Nested(49)), f(11, "rbd", Nested(50)), f(12, "flexVolume", Nested(51)), f(13, "cinder", Nested(52)), f(14, "cephfs", Nested(53)), f(15, "flocker", Nested(54)), f(16, "downwardApi", Nested(55)), f(17, "fc", Nested(59)), f(18, "azureFile", Nested(60)), f(19, "configMap", Nested(61)), f(20, "vsphereVolume", Nested(62)), f(21, "quobyte", Nested(63)), f(22, "azureDisk", Nested(64)), f(23, "photonPersistentDisk", Nested(65)), f(24, "portworxVolume", Nested(76)), f(25, "scaleIo", Nested(77)), f(26, "projected", Nested(66)), f(27, "storageos", Nested(78)), f(28, "csi", Nested(79)), f(29, "ephemeral", Nested(80)), f(30, "image", Nested(86))]),
    // 38: api.core.v1.HostPathVolumeSource
    Message(&[f(1, "path", Text), f(2, "type", Text)]),
    // 39: api.core.v1.EmptyDirVolumeSource
    Message(&[f(1, "medium", Text), f(2, "sizeLimit", Quantity)]),
    // 40: api.core.v1.GCEPersistentDiskVolumeSource
    Message(&[f(1, "pdName", Text), f(2, "fsType", Text), f(3, "partition", Int), f(4, "readOnly", Bool)]),
    // 41: api.core.v1.AWSElasticBlockStoreVolumeSource
    Message(&[f(1, "volumeID", Text), f(2, "fsType", Text), f(3, "partition", Int), f(4, "readOnly", Bool)]),
    // 42: api.core.v1.GitRepoVolumeSource
    Message(&[f(1, "repository", Text), f(2, "revision", Text), f(3, "directory", Text)]),
    // 43: api.core.v1.SecretVolumeSource
    Message(&[f(1, "secretName", Text), f(2, "items", List(&Nested(44))), k(3, "defaultMode", Int), k(4, "optional", Bool)]),
    // 44: api.core.v1.KeyToPath
    Message(&[f(1, "key", Text), f(2, "path", Text), k(3, "mode", Int)]),
    // 45: api.core.v1.NFSVolumeSource
    Message(&[f(1, "server", Text), f(2, "path", Text), f(3, "readOnly", Bool)]),
    // 46: api.core.v1.ISCSIVolumeSource
    Message(&[f(1, "targetPortal", Text), f(2, "iqn", Text), f(3, "lun", Int), f(4, "iscsiInterface", Text), f(5, "fsType", Text), f(6, "readOnly", Bool), f(7, "portals", List(&Text)), f(8, "chapAuthDiscovery", Bool), f(10, "secretRef", Nested(47)), f(11, "chapAuthSession", Bool), f(12, "initiatorName", Text)]),
    // 47: api.core.v1.LocalObjectReference
    Message(&[f(1, "name", Text)]),
    // 48: api.core.v1.GlusterfsVolumeSource
    Message(&[f(1, "endpoints", Text), f(2, "path", Text), f(3, "readOnly", Bool)]),
    // 49: api.core.v1.PersistentVolumeClaimVolumeSource
    Message(&[f(1, "claimName", Text), f(2, "readOnly", Bool)]),
    // 50: api.core.v1.RBDVolumeSource
    Message(&[f(1, "monitors", List(&Text)), f(2, "image", Text), f(3, "fsType", Text), f(4, "pool", Text), f(5, "user", Text), f(6, "keyring", Text), f(7, "secretRef", Nested(47)), f(8, "readOnly", Bool)]),
    // 51: api.core.v1.FlexVolumeSource
    Message(&[f(1, "driver", Text), f(2, "fsType", Text), f(3, "secretRef", Nested(47)), f(4, "readOnly", Bool), f(5, "options", Map(&Text))]),
    // 52: api.core.v1.CinderVolumeSource
    Message(&[f(1, "volumeID", Text), f(2, "fsType", Text), f(3, "readOnly", Bool), f(4, "secretRef", Nested(47))]),
    // 53: api.core.v1.CephFSVolumeSource
    Message(&[f(1, "monitors", List(&Text)), f(2, "path", Text), f(3, "user", Text), f(4, "secretFile", Text), f(5, "secretRef", Nested(47)), f(6, "readOnly", Bool)]),
    // 54: api.core.v1.FlockerVolumeSource
    Message(&[f(1, "datasetName", Text), f(2, "datasetUUID", Text)]),
    // 55: api.core.v1.DownwardAPIVolumeSource
    Message(&[f(1, "items", List(&Nested(56))), k(2, "defaultMode", Int)]),
    // 56: api.core.v1.DownwardAPIVolumeFile
    Message(&[f(1, "path", Text), f(2, "fieldRef", Nested(57)), f(3, "resourceFieldRef", Nested(58)), k(4, "mode", Int)]),
    // 57: api.core.v1.ObjectFieldSelector
    Message(&[f(1, "apiVersion", Text), f(2, "fieldPath", Text)]),
    // 58: api.core.v1.ResourceFieldSelector
    Message(&[f(1, "containerName", Text), f(2, "resource", Text), f(3, "divisor", Quantity)]),
    // 59: api.core.v1.FCVolumeSource
    Message(&[f(1, "targetWWNs", List(&Text)), f(2, "lun", Int), f(3, "fsType", Text), f(4, "readOnly", Bool), f(5, "wwids", List(&Text))]),
    // 60: api.core.v1.AzureFileVolumeSource
    Message(&[f(1, "secretName", Text), f(2, "shareName", Text), f(3, "readOnly", Bool)]),
    // 61: api.core.v1.ConfigMapVolumeSource
    Message(&[f(1, "", Nested(47)), f(2, "items", List(&Nested(44))), k(3, "defaultMode", Int), k(4, "optional", Bool)]),
    // 62: api.core.v1.VsphereVirtualDiskVolumeSource
    Message(&[f(1, "volumePath", Text), f(2, "fsType", Text), f(3, "storagePolicyName", Text), f(4, "storagePolicyID", Text)]),
    // 63: api.core.v1.QuobyteVolumeSource
    Message(&[f(1, "registry", Text), f(2, "volume", Text), f(3, "readOnly", Bool), f(4, "user", Text), f(5, "group", Text), f(6, "tenant", Text)]),
    // 64: api.core.v1.AzureDiskVolumeSource
    Message(&[f(1, "diskName", Text), f(2, "diskURI", Text), f(3, "cachingMode", Text), f(4, "fsType", Text), f(5, "readOnly", Bool), f(6, "kind", Text)]),
    // 65: api.core.v1.PhotonPersistentDiskVolumeSource
    Message(&[f(1, "pdID", Text), f(2, "fsType", Text)]),
    // 66: api.core.v1.ProjectedVolumeSource
    Message(&[f(1, "sources", List(&Nested(67))), k(2, "defaultMode", Int)]),
    // 67: api.core.v1.VolumeProjection
    Message(&[f(1, "secret", Nested(68)), f(2, "downwardAPI", Nested(69)), f(3, "configMap", Nested(70)), f(4, "serviceAccountToken", Nested(71)), f(5, "clusterTrustBundle", Nested(72)), f(6, "podCertificate", Nested(75))]),
    // 68: api.core.v1.SecretProjection
    Message(&[f(1, "", Nested(47)), f(2, "items", List(&Nested(44))), k(4, "optional", Bool)]),
    // 69: api.core.v1.DownwardAPIProjection
    Message(&[f(1, "items", List(&Nested(56)))]),
    // 70: api.core.v1.ConfigMapProjection
    Message(&[f(1, "", Nested(47)), f(2, "items", List(&Nested(44))), k(4, "optional", Bool)]),
    // 71: api.core.v1.ServiceAccountTokenProjection
    Message(&[f(1, "audience", Text), k(2, "expirationSeconds", Int), f(3, "path", Text)]),
    // 72: api.core.v1.ClusterTrustBundleProjection
    Message(&[f(1, "name", Text), f(2, "signerName", Text), f(3, "labelSelector", Nested(73)), f(4, "path", Text), k(5, "optional", Bool)]),
    // 73: apimachinery.pkg.apis.meta.v1.LabelSelector
    Message(&[f(1, "matchLabels", Map(&Text)), f(2, "matchExpressions", List(&Nested(74)))]),
    // 74: apimachinery.pkg.apis.meta.v1.LabelSelectorRequirement
    Message(&[f(1, "key", Text), f(2, "operator", Text), f(3, "values", List(&Text))]),
    // 75: api.core.v1.PodCertificateProjection
    Message(&[f(1, "signerName", Text), f(2, "keyType", Text), f(3, "maxExpirationSeconds", Int), f(4, "credentialBundlePath", Text), f(5, "keyPath", Text), f(6, "certificateChainPath", Text), f(7, "userAnnotations", Map(&Text))]),
    // 76: api.core.v1.PortworxVolumeSource
    Message(&[f(1, "volumeID", Text), f(2, "fsType", Text), f(3, "readOnly", Bool)]),
    // 77: api.core.v1.ScaleIOVolumeSource
    Message(&[f(1, "gateway", Text), f(2, "system", Text), f(3, "secretRef", Nested(47)), f(4, "sslEnabled", Bool), f(5, "protectionDomain", Text), f(6, "storagePool", Text), f(7, "storageMode", Text), f(8, "volumeName", Text), f(9, "fsType", Text), f(10, "readOnly", Bool)]),
    // 78: api.core.v1.StorageOSVolumeSource
    Message(&[f(1, "volumeName", Text), f(2, "volumeNamespace", Text), f(3, "fsType", Text), f(4, "readOnly", Bool), f(5, "secretRef", Nested(47))]),
    // 79: api.core.v1.CSIVolumeSource
    Message(&[f(1, "driver", Text), f(2, "readOnly", Bool), f(3, "fsType", Text), f(4, "volumeAttributes", Map(&Text)), f(5, "nodePublishSecretRef", Nested(47))]),
    // 80: api.core.v1.EphemeralVolumeSource
    Message(&[f(1, "volumeClaimTemplate", Nested(81))]),
    // 81: api.core.v1.PersistentVolumeClaimTemplate
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(82))]),
    // 82: api.core.v1.PersistentVolumeClaimSpec
    Message(&[f(1, "accessModes", List(&Text)), f(2, "resources", Nested(83)), f(3, "volumeName", Text), f(4, "selector", Nested(73)), f(5, "storageClassName", Text), f(6, "volumeMode", Text), f(7, "dataSource", Nested(84)), f(8, "dataSourceRef", Nested(85)), f(9, "volumeAttributesClassName", Text)]),
    // 83: api.core.v1.VolumeResourceRequirements
    Message(&[f(1, "limits", Map(&Quantity)), f(2, "requests", Map(&Quantity))]),
    // 84: api.core.v1.TypedLocalObjectReference
    Message(&[f(1, "apiGroup", Text), f(2, "kind", Text), f(3, "name", Text)]),
    // 85: api.core.v1.TypedObjectReference
    Message(&[f(1, "apiGroup", Text), f(2, "kind", Text), f(3, "name", Text), f(4, "namespace", Text)]),
    // 86: api.core.v1.ImageVolumeSource
    Message(&[f(1, "reference", Text), f(2, "pullPolicy", Text)]),
    // 87: api.core.v1.Container
    Message(&[f(1, "name", Text), f(2, "image", Text), f(3, "command", List(&Text)), f(4, "args", List(&Text)), f(5, "workingDir", Text), f(6, "ports", List(&Nested(88))), f(7, "env", List(&Nested(92))), f(8, "resources", Nested(97)), f(9, "volumeMounts", List(&Nested(102))), f(10, "livenessProbe", Nested(104)), f(11, "readinessProbe", Nested(104)), f(12, "lifecycle", Nested(111)), f(13, "terminationMessagePath", Text), f(14, "imagePullPolicy", Text), f(15, "securityContext", Nested(114)), f(16, "stdin", Bool), f(17, "stdinOnce", Bool), f(18, "tty", Bool), f(19, "envFrom", List(&Nested(89))), f(20, "terminationMessagePolicy", Text), f(21, "volumeDevices", List(&Nested(103))), f(22, "startupProbe", Nested(104)), f(23, "resizePolicy", List(&Nested(99))), f(24, "restartPolicy", Text), f(25, "restartPolicyRules", List(&Nested(100)))]),
    // 88: api.core.v1.ContainerPort
    Message(&[f(1, "name", Text), f(2, "hostPort", Int), f(3, "containerPort", Int), f(4, "protocol", Text), f(5, "hostIP", Text)]),
    // 89: api.core.v1.EnvFromSource
    Message(&[f(1, "prefix", Text), f(2, "configMapRef", Nested(90)), f(3, "secretRef", Nested(91))]),
    // 90: api.core.v1.ConfigMapEnvSource
    Message(&[f(1, "", Nested(47)), k(2, "optional", Bool)]),
    // 91: api.core.v1.SecretEnvSource
    Message(&[f(1, "", Nested(47)), k(2, "optional", Bool)]),
    // 92: api.core.v1.EnvVar
    Message(&[f(1, "name", Text), f(2, "value", Text), f(3, "valueFrom", Nested(93))]),
    // 93: api.core.v1.EnvVarSource
    Message(&[f(1, "fieldRef", Nested(57)), f(2, "resourceFieldRef", Nested(58)), f(3, "configMapKeyRef", Nested(94)), f(4, "secretKeyRef", Nested(95)), f(5, "fileKeyRef", Nested(96))]),
    // 94: api.core.v1.ConfigMapKeySelector
    Message(&[f(1, "", Nested(47)), f(2, "key", Text), k(3, "optional", Bool)]),
    // 95: api.core.v1.SecretKeySelector
    Message(&[f(1, "", Nested(47)), f(2, "key", Text), k(3, "optional", Bool)]),
    // 96: api.core.v1.FileKeySelector
    Message(&[f(1, "volumeName", Text), f(2, "path", Text), f(3, "key", Text), k(4, "optional", Bool)]),
    // 97: api.core.v1.ResourceRequirements
    Message(&[f(1, "limits", Map(&Quantity)), f(2, "requests", Map(&Quantity)), f(3, "claims", List(&Nested(98)))]),
    // 98: api.core.v1.ResourceClaim
    Message(&[f(1, "name", Text), f(2, "request", Text)]),
    // 99: api.core.v1.ContainerResizePolicy
    Message(&[f(1, "resourceName", Text), f(2, "restartPolicy", Text)]),
    // 100: api.core.v1.ContainerRestartRule
    Message(&[f(1, "action", Text), f(2, "exitCodes", Nested(101))]),
    // 101: api.core.v1.ContainerRestartRuleOnExitCodes
    Message(&[f(1, "operator", Text), f(2, "values", List(&Int))]),
    // 102: api.core.v1.VolumeMount
    Message(&[f(1, "name", Text), f(2, "readOnly", Bool), f(3, "mountPath", Text), f(4, "subPath", Text), f(5, "mountPropagation", Text), f(6, "subPathExpr", Text), f(7, "recursiveReadOnly", Text)]),
    // 103: api.core.v1.VolumeDevice
    Message(&[f(1, "name", Text), f(2, "devicePath", Text)]),
    // 104: api.core.v1.Probe
    Message(&[f(1, "", Nested(105)), f(2, "initialDelaySeconds", Int), f(3, "timeoutSeconds", Int), f(4, "periodSeconds", Int), f(5, "successThreshold", Int), f(6, "failureThreshold", Int), k(7, "terminationGracePeriodSeconds", Int)]),
    // 105: api.core.v1.ProbeHandler
    Message(&[f(1, "exec", Nested(106)), f(2, "httpGet", Nested(107)), f(3, "tcpSocket", Nested(109)), f(4, "grpc", Nested(110))]),
    // 106: api.core.v1.ExecAction
    Message(&[f(1, "command", List(&Text))]),
    // 107: api.core.v1.HTTPGetAction
    Message(&[f(1, "path", Text), f(2, "port", IntOrString), f(3, "host", Text), f(4, "scheme", Text), f(5, "httpHeaders", List(&Nested(108)))]),
    // 108: api.core.v1.HTTPHeader
    Message(&[f(1, "name", Text), f(2, "value", Text)]),
    // 109: api.core.v1.TCPSocketAction
    Message(&[f(1, "port", IntOrString), f(2, "host", Text)]),
    // 110: api.core.v1.GRPCAction
    Message(&[f(1, "port", Int), f(2, "service", Text)]),
    // 111: api.core.v1.Lifecycle
    Message(&[f(1, "postStart", Nested(112)), f(2, "preStop", Nested(112)), f(3, "stopSignal", Text)]),
    // 112: api.core.v1.LifecycleHandler
    Message(&[f(1, "exec", Nested(106)), f(2, "httpGet", Nested(107)), f(3, "tcpSocket", Nested(109)), f(4, "sleep", Nested(113))]),
    // 113: api.core.v1.SleepAction
    Message(&[f(1, "seconds", Int)]),
    // 114: api.core.v1.SecurityContext
    Message(&[f(1, "capabilities", Nested(115)), k(2, "privileged", Bool), f(3, "seLinuxOptions", Nested(116)), k(4, "runAsUser", Int), k(5, "runAsNonRoot", Bool), k(6, "readOnlyRootFilesystem", Bool), k(7, "allowPrivilegeEscalation", Bool), k(8, "runAsGroup", Int), f(9, "procMount", Text), f(10, "windowsOptions", Nested(117)), f(11, "seccompProfile", Nested(118)), f(12, "appArmorProfile", Nested(119))]),
    // 115: api.core.v1.Capabilities
    Message(&[f(1, "add", List(&Text)), f(2, "drop", List(&Text))]),
    // 116: api.core.v1.SELinuxOptions
    Message(&[f(1, "user", Text), f(2, "role", Text), f(3, "type", Text), f(4, "level", Text)]),
    // 117: api.core.v1.WindowsSecurityContextOptions
    Message(&[f(1, "gmsaCredentialSpecName", Text), f(2, "gmsaCredentialSpec", Text), f(3, "runAsUserName", Text), k(4, "hostProcess", Bool)]),
    // 118: api.core.v1.SeccompProfile
    Message(&[f(1, "type", Text), f(2, "localhostProfile", Text)]),
    // 119: api.core.v1.AppArmorProfile
    Message(&[f(1, "type", Text), f(2, "localhostProfile", Text)]),
    // 120: api.core.v1.EphemeralContainer
    Message(&[f(1, "", Nested(121)), f(2, "targetContainerName", Text)]),
    // 121: api.core.v1.EphemeralContainerCommon
    Message(&[f(1, "name", Text), f(2, "image", Text), f(3, "command", List(&Text)), f(4, "args", List(&Text)), f(5, "workingDir", Text), f(6, "ports", List(&Nested(88))), f(7, "env", List(&Nested(92))), f(8, "resources", Nested(97)), f(9, "volumeMounts", List(&Nested(102))), f(10, "livenessProbe", Nested(104)), f(11, "readinessProbe", Nested(104)), f(12, "lifecycle", Nested(111)), f(13, "terminationMessagePath", Text), f(14, "imagePullPolicy", Text), f(15, "securityContext", Nested(114)), f(16, "stdin", Bool), f(17, "stdinOnce", Bool), f(18, "tty", Bool), f(19, "envFrom", List(&Nested(89))), f(20, "terminationMessagePolicy", Text), f(21, "volumeDevices", List(&Nested(103))), f(22, "startupProbe", Nested(104)), f(23, "resizePolicy", List(&Nested(99))), f(24, "restartPolicy", Text), f(25, "restartPolicyRules", List(&Nested(100)))]),
    // 122: api.core.v1.PodSecurityContext
    Message(&[f(1, "seLinuxOptions", Nested(116)), k(2, "runAsUser", Int), k(3, "runAsNonRoot", Bool), f(4, "supplementalGroups", List(&Int)), k(5, "fsGroup", Int), k(6, "runAsGroup", Int), f(7, "sysctls", List(&Nested(123))), f(8, "windowsOptions", Nested(117)), f(9, "fsGroupChangePolicy", Text), f(10, "seccompProfile", Nested(118)), f(11, "appArmorProfile", Nested(119)), f(12, "supplementalGroupsPolicy", Text), f(13, "seLinuxChangePolicy", Text)]),
    // 123: api.core.v1.Sysctl
    Message(&[f(1, "name", Text), f(2, "value", Text)]),
    // 124: api.core.v1.Affinity
    Message(&[f(1, "nodeAffinity", Nested(125)), f(2, "podAffinity", Nested(130)), f(3, "podAntiAffinity", Nested(133))]),
    // 125: api.core.v1.NodeAffinity
    Message(&[f(1, "requiredDuringSchedulingIgnoredDuringExecution", Nested(126)), f(2, "preferredDuringSchedulingIgnoredDuringExecution", List(&Nested(129)))]),
    // 126: api.core.v1.NodeSelector
    Message(&[f(1, "nodeSelectorTerms", List(&Nested(127)))]),
    // 127: api.core.v1.NodeSelectorTerm
    Message(&[f(1, "matchExpressions", List(&Nested(128))), f(2, "matchFields", List(&Nested(128)))]),
    // 128: api.core.v1.NodeSelectorRequirement
    Message(&[f(1, "key", Text), f(2, "operator", Text), f(3, "values", List(&Text))]),
    // 129: api.core.v1.PreferredSchedulingTerm
    Message(&[f(1, "weight", Int), f(2, "preference", Nested(127))]),
    // 130: api.core.v1.PodAffinity
    Message(&[f(1, "requiredDuringSchedulingIgnoredDuringExecution", List(&Nested(131))), f(2, "preferredDuringSchedulingIgnoredDuringExecution", List(&Nested(132)))]),
    // 131: api.core.v1.PodAffinityTerm
    Message(&[f(1, "labelSelector", Nested(73)), f(2, "namespaces", List(&Text)), f(3, "topologyKey", Text), f(4, "namespaceSelector", Nested(73)), f(5, "matchLabelKeys", List(&Text)), f(6, "mismatchLabelKeys", List(&Text))]),
    // 132: api.core.v1.WeightedPodAffinityTerm
    Message(&[f(1, "weight", Int), f(2, "podAffinityTerm", Nested(131))]),
    // 133: api.core.v1.PodAntiAffinity
    Message(&[f(1, "requiredDuringSchedulingIgnoredDuringExecution", List(&Nested(131))), f(2, "preferredDuringSchedulingIgnoredDuringExecution", List(&Nested(132)))]),
    // 134: api.core.v1.Toleration
    Message(&[f(1, "key", Text), f(2, "operator", Text), f(3, "value", Text), f(4, "effect", Text), k(5, "tolerationSeconds", Int)]),
    // 135: api.core.v1.HostAlias
    Message(&[f(1, "ip", Text), f(2, "hostnames", List(&Text))]),
    // 136: api.core.v1.PodDNSConfig
    Message(&[f(1, "nameservers", List(&Text)), f(2, "searches", List(&Text)), f(3, "options", List(&Nested(137)))]),
    // 137: api.core.v1.PodDNSConfigOption
    Message(&[f(1, "name", Text), f(2, "value", Text)]),
    // 138: api.core.v1.PodReadinessGate
    Message(&[f(1, "conditionType", Text)]),
    // 139: api.core.v1.TopologySpreadConstraint
    Message(&[f(1, "maxSkew", Int), f(2, "topologyKey", Text), f(3, "whenUnsatisfiable", Text), f(4, "labelSelector", Nested(73)), f(5, "minDomains", Int), f(6, "nodeAffinityPolicy", Text), f(7, "nodeTaintsPolicy", Text), f(8, "matchLabelKeys", List(&Text))]),
    // 140: api.core.v1.PodOS
    Message(&[f(1, "name", Text)]),
    // 141: api.core.v1.PodSchedulingGate
    Message(&[f(1, "name", Text)]),
    // 142: api.core.v1.PodResourceClaim
    Message(&[f(1, "name", Text), f(3, "resourceClaimName", Text), f(4, "resourceClaimTemplateName", Text)]),
    // 143: api.core.v1.WorkloadReference
    Message(&[f(1, "name", Text), f(2, "podGroup", Text), f(3, "podGroupReplicaKey", Text)]),
    // 144: api.core.v1.PodStatus
    Message(&[f(1, "phase", Text), f(2, "conditions", List(&Nested(145))), f(3, "message", Text), f(4, "reason", Text), f(5, "hostIP", Text), f(6, "podIP", Text), f(7, "startTime", Time), f(8, "containerStatuses", List(&Nested(148))), f(9, "qosClass", Text), f(10, "initContainerStatuses", List(&Nested(148))), f(11, "nominatedNodeName", Text), f(12, "podIPs", List(&Nested(147))), f(13, "ephemeralContainerStatuses", List(&Nested(148))), f(14, "resize", Text), f(15, "resourceClaimStatuses", List(&Nested(158))), f(16, "hostIPs", List(&Nested(146))), f(17, "observedGeneration", Int), f(18, "extendedResourceClaimStatus", Nested(159)), f(19, "allocatedResources", Map(&Quantity)), f(20, "resources", Nested(97))]),
    // 145: api.core.v1.PodCondition
    Message(&[f(1, "type", Text), f(2, "status", Text), f(3, "lastProbeTime", Time), f(4, "lastTransitionTime", Time), f(5, "reason", Text), f(6, "message", Text), f(7, "observedGeneration", Int)]),
    // 146: api.core.v1.HostIP
    Message(&[f(1, "ip", Text)]),
    // 147: api.core.v1.PodIP
    Message(&[f(1, "ip", Text)]),
    // 148: api.core.v1.ContainerStatus
    Message(&[f(1, "name", Text), f(2, "state", Nested(149)), f(3, "lastState", Nested(149)), k(4, "ready", Bool), f(5, "restartCount", Int), f(6, "image", Text), f(7, "imageID", Text), f(8, "containerID", Text), f(9, "started", Bool), f(10, "allocatedResources", Map(&Quantity)), f(11, "resources", Nested(97)), f(12, "volumeMounts", List(&Nested(153))), f(13, "user", Nested(154)), f(14, "allocatedResourcesStatus", List(&Nested(156))), f(15, "stopSignal", Text)]),
    // 149: api.core.v1.ContainerState
    Message(&[f(1, "waiting", Nested(150)), f(2, "running", Nested(151)), f(3, "terminated", Nested(152))]),
    // 150: api.core.v1.ContainerStateWaiting
    Message(&[f(1, "reason", Text), f(2, "message", Text)]),
    // 151: api.core.v1.ContainerStateRunning
    Message(&[f(1, "startedAt", Time)]),
    // 152: api.core.v1.ContainerStateTerminated
    Message(&[f(1, "exitCode", Int), f(2, "signal", Int), f(3, "reason", Text), f(4, "message", Text), f(5, "startedAt", Time), f(6, "finishedAt", Time), f(7, "containerID", Text)]),
    // 153: api.core.v1.VolumeMountStatus
    Message(&[f(1, "name", Text), f(2, "mountPath", Text), f(3, "readOnly", Bool), f(4, "recursiveReadOnly", Text)]),
    // 154: api.core.v1.ContainerUser
    Message(&[f(1, "linux", Nested(155))]),
    // 155: api.core.v1.LinuxContainerUser
    Message(&[f(1, "uid", Int), f(2, "gid", Int), f(3, "supplementalGroups", List(&Int))]),
    // 156: api.core.v1.ResourceStatus
    Message(&[f(1, "name", Text), f(2, "resources", List(&Nested(157)))]),
    // 157: api.core.v1.ResourceHealth
    Message(&[f(1, "resourceID", Text), f(2, "health", Text)]),
    // 158: api.core.v1.PodResourceClaimStatus
    Message(&[f(1, "name", Text), f(2, "resourceClaimName", Text)]),
    // 159: api.core.v1.PodExtendedResourceClaimStatus
    Message(&[f(1, "requestMappings", List(&Nested(160))), f(2, "resourceClaimName", Text)]),
    // 160: api.core.v1.ContainerExtendedResourceRequest
    Message(&[f(1, "containerName", Text), f(2, "resourceName", Text), f(3, "requestName", Text)]),
    // 161: api.core.v1.Secret
    Message(&[f(1, "metadata", Nested(1)), f(2, "data", Map(&Bytes)), f(3, "type", Text), f(4, "stringData", Map(&Text)), k(5, "immutable", Bool)]),
    // 162: api.core.v1.ServiceAccount
    Message(&[f(1, "metadata", Nested(1)), f(2, "secrets", List(&Nested(3))), f(3, "imagePullSecrets", List(&Nested(47))), k(4, "automountServiceAccountToken", Bool)]),
    // 163: api.core.v1.Service
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(164)), f(3, "status", Nested(168))]),
    // 164: api.core.v1.ServiceSpec
    Message(&[f(1, "ports", List(&Nested(165))), f(2, "selector", Map(&Text)), f(3, "clusterIP", Text), f(4, "type", Text), f(5, "externalIPs", List(&Text)), f(7, "sessionAffinity", Text), f(8, "loadBalancerIP", Text), f(9, "loadBalancerSourceRanges", List(&Text)), f(10, "externalName", Text), f(11, "externalTrafficPolicy", Text), f(12, "healthCheckNodePort", Int), f(13, "publishNotReadyAddresses", Bool), f(14, "sessionAffinityConfig", Nested(166)), f(17, "ipFamilyPolicy", Text), f(18, "clusterIPs", List(&Text)), f(19, "ipFamilies", List(&Text)), k(20, "allocateLoadBalancerNodePorts", Bool), f(21, "loadBalancerClass", Text), f(22, "internalTrafficPolicy", Text), f(23, "trafficDistribution", Text)]),
    // 165: api.core.v1.ServicePort
    Message(&[f(1, "name", Text), f(2, "protocol", Text), f(3, "port", Int), f(4, "targetPort", IntOrString), f(5, "nodePort", Int), f(6, "appProtocol", Text)]),
    // 166: api.core.v1.SessionAffinityConfig
    Message(&[f(1, "clientIP", Nested(167))]),
    // 167: api.core.v1.ClientIPConfig
    Message(&[k(1, "timeoutSeconds", Int)]),
    // 168: api.core.v1.ServiceStatus
    Message(&[f(1, "loadBalancer", Nested(169)), f(2, "conditions", List(&Nested(172)))]),
    // 169: api.core.v1.LoadBalancerStatus
    Message(&[f(1, "ingress", List(&Nested(170)))]),
    // 170: api.core.v1.LoadBalancerIngress
    Message(&[f(1, "ip", Text), f(2, "hostname", Text), f(3, "ipMode", Text), f(4, "ports", List(&Nested(171)))]),
    // 171: api.core.v1.PortStatus
    Message(&[f(1, "port", Int), f(2, "protocol", Text), f(3, "error", Text)]),
    // 172: apimachinery.pkg.apis.meta.v1.Condition
    Message(&[f(1, "type", Text), f(2, "status", Text), f(3, "observedGeneration", Int), f(4, "lastTransitionTime", Time), f(5, "reason", Text), f(6, "message", Text)]),
    // 173: apimachinery.pkg.apis.meta.v1.DeleteOptions
    Message(&[k(1, "gracePeriodSeconds", Int), f(2, "preconditions", Nested(174)), k(3, "orphanDependents", Bool), f(4, "propagationPolicy", Text), f(5, "dryRun", List(&Text)), f(6, "ignoreStoreReadErrorWithClusterBreakingPotential", Bool)]),
    // 174: apimachinery.pkg.apis.meta.v1.Preconditions
    Message(&[f(1, "uid", Text), f(2, "resourceVersion", Text)]),
    // 175: api.apps.v1.Deployment
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(176)), f(3, "status", Nested(180))]),
    // 176: api.apps.v1.DeploymentSpec
    Message(&[k(1, "replicas", Int), f(2, "selector", Nested(73)), f(3, "template", Nested(177)), f(4, "strategy", Nested(178)), f(5, "minReadySeconds", Int), k(6, "revisionHistoryLimit", Int), f(7, "paused", Bool), k(9, "progressDeadlineSeconds", Int)]),
    // 177: api.core.v1.PodTemplateSpec
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(35))]),
    // 178: api.apps.v1.DeploymentStrategy
    Message(&[f(1, "type", Text), f(2, "rollingUpdate", Nested(179))]),
    // 179: api.apps.v1.RollingUpdateDeployment
    Message(&[k(1, "maxUnavailable", IntOrString), k(2, "maxSurge", IntOrString)]),
    // 180: api.apps.v1.DeploymentStatus
    Message(&[f(1, "observedGeneration", Int), k(2, "replicas", Int), f(3, "updatedReplicas", Int), f(4, "availableReplicas", Int), f(5, "unavailableReplicas", Int), f(6, "conditions", List(&Nested(181))), f(7, "readyReplicas", Int), f(8, "collisionCount", Int), f(9, "terminatingReplicas", Int)]),
    // 181: api.apps.v1.DeploymentCondition
    Message(&[f(1, "type", Text), f(2, "status", Text), f(4, "reason", Text), f(5, "message", Text), f(6, "lastUpdateTime", Time), f(7, "lastTransitionTime", Time)]),
    // 182: api.apps.v1.ReplicaSet
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(183)), f(3, "status", Nested(184))]),
    // 183: api.apps.v1.ReplicaSetSpec
    Message(&[k(1, "replicas", Int), f(2, "selector", Nested(73)), f(3, "template", Nested(177)), f(4, "minReadySeconds", Int)]),
    // 184: api.apps.v1.ReplicaSetStatus
    Message(&[k(1, "replicas", Int), f(2, "fullyLabeledReplicas", Int), f(3, "observedGeneration", Int), f(4, "readyReplicas", Int), f(5, "availableReplicas", Int), f(6, "conditions", List(&Nested(185))), f(7, "terminatingReplicas", Int)]),
    // 185: api.apps.v1.ReplicaSetCondition
    Message(&[f(1, "type", Text), f(2, "status", Text), f(3, "lastTransitionTime", Time), f(4, "reason", Text), f(5, "message", Text)]),
    // 186: api.autoscaling.v1.Scale
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(187)), f(3, "status", Nested(188))]),
    // 187: api.autoscaling.v1.ScaleSpec
    Message(&[k(1, "replicas", Int)]),
    // 188: api.autoscaling.v1.ScaleStatus
    Message(&[k(1, "replicas", Int), f(2, "selector", Text)]),
    // 189: api.authentication.v1.TokenRequest
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(190)), f(3, "status", Nested(192))]),
    // 190: api.authentication.v1.TokenRequestSpec
    Message(&[f(1, "audiences", List(&Text)), f(3, "boundObjectRef", Nested(191)), k(4, "expirationSeconds", Int)]),
    // 191: api.authentication.v1.BoundObjectReference
    Message(&[f(1, "kind", Text), f(2, "apiVersion", Text), f(3, "name", Text), f(4, "uid", Text)]),
    // 192: api.authentication.v1.TokenRequestStatus
    Message(&[f(1, "token", Text), f(2, "expirationTimestamp", Time)]),
    // 193: api.authentication.v1.TokenReview
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(194)), f(3, "status", Nested(195))]),
    // 194: api.authentication.v1.TokenReviewSpec
    Message(&[f(1, "token", Text), f(2, "audiences", List(&Text))]),
    // 195: api.authentication.v1.TokenReviewStatus
    Message(&[f(1, "authenticated", Bool), f(2, "user", Nested(196)), f(3, "error", Text), f(4, "audiences", List(&Text))]),
    // 196: api.authentication.v1.UserInfo
    Message(&[f(1, "username", Text), f(2, "uid", Text), f(3, "groups", List(&Text)), f(4, "extra", Map(&Nested(197)))]),
    // 197: api.authentication.v1.ExtraValue
    Message(&[f(1, "items", List(&Text))]),
    // 198: api.authentication.v1.SelfSubjectReview
    Message(&[f(1, "metadata", Nested(1)), f(2, "status", Nested(199))]),
    // 199: api.authentication.v1.SelfSubjectReviewStatus
    Message(&[f(1, "userInfo", Nested(196))]),
    // 200: api.authorization.v1.SubjectAccessReview
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(201)), f(3, "status", Nested(208))]),
    // 201: api.authorization.v1.SubjectAccessReviewSpec
    Message(&[f(1, "resourceAttributes", Nested(202)), f(2, "nonResourceAttributes", Nested(206)), f(3, "user", Text), f(4, "groups", List(&Text)), f(5, "extra", Map(&Nested(207))), f(6, "uid", Text)]),
    // 202: api.authorization.v1.ResourceAttributes
    Message(&[f(1, "namespace", Text), f(2, "verb", Text), f(3, "group", Text), f(4, "version", Text), f(5, "resource", Text), f(6, "subresource", Text), f(7, "name", Text), f(8, "fieldSelector", Nested(203)), f(9, "labelSelector", Nested(205))]),
    // 203: api.authorization.v1.FieldSelectorAttributes
    Message(&[f(1, "rawSelector", Text), f(2, "requirements", List(&Nested(204)))]),
    // 204: apimachinery.pkg.apis.meta.v1.FieldSelectorRequirement
    Message(&[f(1, "key", Text), f(2, "operator", Text), f(3, "values", List(&Text))]),
    // 205: api.authorization.v1.LabelSelectorAttributes
    Message(&[f(1, "rawSelector", Text), f(2, "requirements", List(&Nested(74)))]),
    // 206: api.authorization.v1.NonResourceAttributes
    Message(&[f(1, "path", Text), f(2, "verb", Text)]),
    // 207: api.authorization.v1.ExtraValue
    Message(&[f(1, "items", List(&Text))]),
    // 208: api.authorization.v1.SubjectAccessReviewStatus
    Message(&[f(1, "allowed", Bool), f(2, "reason", Text), f(3, "evaluationError", Text), f(4, "denied", Bool)]),
    // 209: api.authorization.v1.LocalSubjectAccessReview
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(201)), f(3, "status", Nested(208))]),
    // 210: api.authorization.v1.SelfSubjectAccessReview
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(211)), f(3, "status", Nested(208))]),
    // 211: api.authorization.v1.SelfSubjectAccessReviewSpec
    Message(&[f(1, "resourceAttributes", Nested(202)), f(2, "nonResourceAttributes", Nested(206))]),
    // 212: api.authorization.v1.SelfSubjectRulesReview
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(213)), f(3, "status", Nested(214))]),
    // 213: api.authorization.v1.SelfSubjectRulesReviewSpec
    Message(&[f(1, "namespace", Text)]),
    // 214: api.authorization.v1.SubjectRulesReviewStatus
    Message(&[f(1, "resourceRules", List(&Nested(215))), f(2, "nonResourceRules", List(&Nested(216))), f(3, "incomplete", Bool), f(4, "evaluationError", Text)]),
    // 215: api.authorization.v1.ResourceRule
    Message(&[f(1, "verbs", List(&Text)), f(2, "apiGroups", List(&Text)), f(3, "resources", List(&Text)), f(4, "resourceNames", List(&Text))]),
    // 216: api.authorization.v1.NonResourceRule
    Message(&[f(1, "verbs", List(&Text)), f(2, "nonResourceUrLs", List(&Text))]),
    // 217: api.coordination.v1.Lease
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(218))]),
    // 218: api.coordination.v1.LeaseSpec
    Message(&[f(1, "holderIdentity", Text), k(2, "leaseDurationSeconds", Int), f(3, "acquireTime", MicroTime), f(4, "renewTime", MicroTime), k(5, "leaseTransitions", Int), f(6, "strategy", Text), f(7, "preferredHolder", Text)]),
    // 219: api.discovery.v1.EndpointSlice
    Message(&[f(1, "metadata", Nested(1)), f(2, "endpoints", List(&Nested(220))), f(3, "ports", List(&Nested(225))), f(4, "addressType", Text)]),
    // 220: api.discovery.v1.Endpoint
    Message(&[f(1, "addresses", List(&Text)), f(2, "conditions", Nested(221)), f(3, "hostname", Text), f(4, "targetRef", Nested(3)), f(5, "deprecatedTopology", Map(&Text)), f(6, "nodeName", Text), f(7, "zone", Text), f(8, "hints", Nested(222))]),
    // 221: api.discovery.v1.EndpointConditions
    Message(&[k(1, "ready", Bool), k(2, "serving", Bool), k(3, "terminating", Bool)]),
    // 222: api.discovery.v1.EndpointHints
    Message(&[f(1, "forZones", List(&Nested(223))), f(2, "forNodes", List(&Nested(224)))]),
    // 223: api.discovery.v1.ForZone
    Message(&[f(1, "name", Text)]),
    // 224: api.discovery.v1.ForNode
    Message(&[f(1, "name", Text)]),
    // 225: api.discovery.v1.EndpointPort
    Message(&[f(1, "name", Text), f(2, "protocol", Text), k(3, "port", Int), f(4, "appProtocol", Text)]),
    // 226: api.events.v1.Event
    Message(&[f(1, "metadata", Nested(1)), f(2, "eventTime", MicroTime), f(3, "series", Nested(227)), f(4, "reportingController", Text), f(5, "reportingInstance", Text), f(6, "action", Text), f(7, "reason", Text), f(8, "regarding", Nested(3)), f(9, "related", Nested(3)), f(10, "note", Text), f(11, "type", Text), f(12, "deprecatedSource", Nested(10)), f(13, "deprecatedFirstTimestamp", Time), f(14, "deprecatedLastTimestamp", Time), f(15, "deprecatedCount", Int)]),
    // 227: api.events.v1.EventSeries
    Message(&[f(1, "count", Int), f(2, "lastObservedTime", MicroTime)]),
    // 228: api.policy.v1.Eviction
    Message(&[f(1, "metadata", Nested(1)), f(2, "deleteOptions", Nested(173))]),
    // 229: api.core.v1.PersistentVolume
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(244)), f(3, "status", Nested(245))]),
    // 230: api.core.v1.PersistentVolumeClaim
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(82)), f(3, "status", Nested(246))]),
    // 231: api.certificates.v1.CertificateSigningRequest
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(247)), f(3, "status", Nested(248))]),
    // 232: api.node.v1.RuntimeClass
    Message(&[f(1, "metadata", Nested(1)), f(2, "handler", Text), f(3, "overhead", Nested(249)), f(4, "scheduling", Nested(250))]),
    // 233: api.resource.v1.DeviceClass
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(251))]),
    // 234: api.resource.v1.ResourceClaim
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(252)), f(3, "status", Nested(253))]),
    // 235: api.resource.v1.ResourceClaimTemplate
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(254))]),
    // 236: api.resource.v1.ResourceSlice
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(255))]),
    // 237: api.scheduling.v1.PriorityClass
    Message(&[f(1, "metadata", Nested(1)), f(2, "value", Int), f(3, "globalDefault", Bool), f(4, "description", Text), f(5, "preemptionPolicy", Text)]),
    // 238: api.storage.v1.CSIDriver
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(256))]),
    // 239: api.storage.v1.CSINode
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(257))]),
    // 240: api.storage.v1.CSIStorageCapacity
    Message(&[f(1, "metadata", Nested(1)), f(2, "nodeTopology", Nested(73)), f(3, "storageClassName", Text), f(4, "capacity", Quantity), f(5, "maximumVolumeSize", Quantity)]),
    // 241: api.storage.v1.StorageClass
    Message(&[f(1, "metadata", Nested(1)), f(2, "provisioner", Text), f(3, "parameters", Map(&Text)), f(4, "reclaimPolicy", Text), f(5, "mountOptions", List(&Text)), k(6, "allowVolumeExpansion", Bool), f(7, "volumeBindingMode", Text), f(8, "allowedTopologies", List(&Nested(258)))]),
    // 242: api.storage.v1.VolumeAttachment
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(259)), f(3, "status", Nested(260))]),
    // 243: api.storage.v1.VolumeAttributesClass
    Message(&[f(1, "metadata", Nested(1)), f(2, "driverName", Text), f(3, "parameters", Map(&Text))]),
    // 244: api.core.v1.PersistentVolumeSpec
    Message(&[f(1, "capacity", Map(&Quantity)), f(2, "", Nested(261)), f(3, "accessModes", List(&Text)), f(4, "claimRef", Nested(3)), f(5, "persistentVolumeReclaimPolicy", Text), f(6, "storageClassName", Text), f(7, "mountOptions", List(&Text)), f(8, "volumeMode", Text), f(9, "nodeAffinity", Nested(262)), f(10, "volumeAttributesClassName", Text)]),
    // 245: api.core.v1.PersistentVolumeStatus
    Message(&[f(1, "phase", Text), f(2, "message", Text), f(3, "reason", Text), f(4, "lastPhaseTransitionTime", Time)]),
    // 246: api.core.v1.PersistentVolumeClaimStatus
    Message(&[f(1, "phase", Text), f(2, "accessModes", List(&Text)), f(3, "capacity", Map(&Quantity)), f(4, "conditions", List(&Nested(263))), f(5, "allocatedResources", Map(&Quantity)), f(7, "allocatedResourceStatuses", Map(&Text)), f(8, "currentVolumeAttributesClassName", Text), f(9, "modifyVolumeStatus", Nested(264))]),
    // 247: api.certificates.v1.CertificateSigningRequestSpec
    Message(&[f(1, "request", Bytes), f(7, "signerName", Text), k(8, "expirationSeconds", Int), f(5, "usages", List(&Text)), f(2, "username", Text), f(3, "uid", Text), f(4, "groups", List(&Text))]),
    // 248: api.certificates.v1.CertificateSigningRequestStatus
    Message(&[f(1, "conditions", List(&Nested(265))), f(2, "certificate", Bytes)]),
    // 249: api.node.v1.Overhead
    Message(&[f(1, "podFixed", Map(&Quantity))]),
    // 250: api.node.v1.Scheduling
    Message(&[f(1, "nodeSelector", Map(&Text)), f(2, "tolerations", List(&Nested(134)))]),
    // 251: api.resource.v1.DeviceClassSpec
    Message(&[f(1, "selectors", List(&Nested(266))), f(2, "config", List(&Nested(267))), f(4, "extendedResourceName", Text)]),
    // 252: api.resource.v1.ResourceClaimSpec
    Message(&[f(1, "devices", Nested(268))]),
    // 253: api.resource.v1.ResourceClaimStatus
    Message(&[f(1, "allocation", Nested(269)), f(2, "reservedFor", List(&Nested(270))), f(4, "devices", List(&Nested(271)))]),
    // 254: api.resource.v1.ResourceClaimTemplateSpec
    Message(&[f(1, "metadata", Nested(1)), f(2, "spec", Nested(252))]),
    // 255: api.resource.v1.ResourceSliceSpec
    Message(&[f(1, "driver", Text), f(2, "pool", Nested(272)), f(3, "nodeName", Text), f(4, "nodeSelector", Nested(126)), k(5, "allNodes", Bool), f(6, "devices", List(&Nested(273))), k(7, "perDeviceNodeSelection", Bool), f(8, "sharedCounters", List(&Nested(274)))]),
    // 256: api.storage.v1.CSIDriverSpec
    Message(&[k(1, "attachRequired", Bool), k(2, "podInfoOnMount", Bool), f(3, "volumeLifecycleModes", List(&Text)), k(4, "storageCapacity", Bool), f(5, "fsGroupPolicy", Text), f(6, "tokenRequests", List(&Nested(275))), k(7, "requiresRepublish", Bool), k(8, "seLinuxMount", Bool), k(9, "nodeAllocatableUpdatePeriodSeconds", Int), f(10, "serviceAccountTokenInSecrets", Bool)]),
    // 257: api.storage.v1.CSINodeSpec
    Message(&[f(1, "drivers", List(&Nested(276)))]),
    // 258: api.core.v1.TopologySelectorTerm
    Message(&[f(1, "matchLabelExpressions", List(&Nested(277)))]),
    // 259: api.storage.v1.VolumeAttachmentSpec
    Message(&[f(1, "attacher", Text), f(2, "source", Nested(278)), f(3, "nodeName", Text)]),
    // 260: api.storage.v1.VolumeAttachmentStatus
    Message(&[f(1, "attached", Bool), f(2, "attachmentMetadata", Map(&Text)), f(3, "attachError", Nested(279)), f(4, "detachError", Nested(279))]),
    // 261: api.core.v1.PersistentVolumeSource
    Message(&[f(1, "gcePersistentDisk", Nested(40)), f(2, "awsElasticBlockStore", Nested(41)), f(3, "hostPath", Nested(38)), f(4, "glusterfs", Nested(280)), f(5, "nfs", Nested(45)), f(6, "rbd", Nested(281)), f(7, "iscsi", Nested(282)), f(8, "cinder", Nested(283)), f(9, "cephfs", Nested(284)), f(10, "fc", Nested(59)), f(11, "flocker", Nested(54)), f(12, "flexVolume", Nested(285)), f(13, "azureFile", Nested(286)), f(14, "vsphereVolume", Nested(62)), f(15, "quobyte", Nested(63)), f(16, "azureDisk", Nested(64)), f(17, "photonPersistentDisk", Nested(65)), f(18, "portworxVolume", Nested(76)), f(19, "scaleIO", Nested(287)), f(20, "local", Nested(288)), f(21, "storageos", Nested(289)), f(22, "csi", Nested(290))]),
    // 262: api.core.v1.VolumeNodeAffinity
    Message(&[f(1, "required", Nested(126))]),
    // 263: api.core.v1.PersistentVolumeClaimCondition
    Message(&[f(1, "type", Text), f(2, "status", Text), f(3, "lastProbeTime", Time), f(4, "lastTransitionTime", Time), f(5, "reason", Text), f(6, "message", Text)]),
    // 264: api.core.v1.ModifyVolumeStatus
    Message(&[f(1, "targetVolumeAttributesClassName", Text), f(2, "status", Text)]),
    // 265: api.certificates.v1.CertificateSigningRequestCondition
    Message(&[f(1, "type", Text), f(6, "status", Text), f(2, "reason", Text), f(3, "message", Text), f(4, "lastUpdateTime", Time), f(5, "lastTransitionTime", Time)]),
    // 266: api.resource.v1.DeviceSelector
    Message(&[f(1, "cel", Nested(291))]),
    // 267: api.resource.v1.DeviceClassConfiguration
    Message(&[f(1, "", Nested(292))]),
    // 268: api.resource.v1.DeviceClaim
    Message(&[f(1, "requests", List(&Nested(293))), f(2, "constraints", List(&Nested(294))), f(3, "config", List(&Nested(295)))]),
    // 269: api.resource.v1.AllocationResult
    Message(&[f(1, "devices", Nested(296)), f(3, "nodeSelector", Nested(126)), f(5, "allocationTimestamp", Time)]),
    // 270: api.resource.v1.ResourceClaimConsumerReference
    Message(&[f(1, "apiGroup", Text), f(3, "resource", Text), f(4, "name", Text), f(5, "uid", Text)]),
    // 271: api.resource.v1.AllocatedDeviceStatus
    Message(&[f(1, "driver", Text), f(2, "pool", Text), f(3, "device", Text), f(7, "shareID", Text), f(4, "conditions", List(&Nested(172))), f(5, "data", Raw), f(6, "networkData", Nested(297))]),
    // 272: api.resource.v1.ResourcePool
    Message(&[f(1, "name", Text), f(2, "generation", Int), f(3, "resourceSliceCount", Int)]),
    // 273: api.resource.v1.Device
    Message(&[f(1, "name", Text), f(2, "attributes", Map(&Nested(298))), f(3, "capacity", Map(&Nested(299))), f(4, "consumesCounters", List(&Nested(300))), f(5, "nodeName", Text), f(6, "nodeSelector", Nested(126)), k(7, "allNodes", Bool), f(8, "taints", List(&Nested(301))), k(9, "bindsToNode", Bool), f(10, "bindingConditions", List(&Text)), f(11, "bindingFailureConditions", List(&Text)), k(12, "allowMultipleAllocations", Bool)]),
    // 274: api.resource.v1.CounterSet
    Message(&[f(1, "name", Text), f(2, "counters", Map(&Nested(302)))]),
    // 275: api.storage.v1.TokenRequest
    Message(&[f(1, "audience", Text), k(2, "expirationSeconds", Int)]),
    // 276: api.storage.v1.CSINodeDriver
    Message(&[f(1, "name", Text), f(2, "nodeID", Text), f(3, "topologyKeys", List(&Text)), f(4, "allocatable", Nested(303))]),
    // 277: api.core.v1.TopologySelectorLabelRequirement
    Message(&[f(1, "key", Text), f(2, "values", List(&Text))]),
    // 278: api.storage.v1.VolumeAttachmentSource
    Message(&[f(1, "persistentVolumeName", Text), f(2, "inlineVolumeSpec", Nested(244))]),
    // 279: api.storage.v1.VolumeError
    Message(&[f(1, "time", Time), f(2, "message", Text), k(3, "errorCode", Int)]),
    // 280: api.core.v1.GlusterfsPersistentVolumeSource
    Message(&[f(1, "endpoints", Text), f(2, "path", Text), f(3, "readOnly", Bool), f(4, "endpointsNamespace", Text)]),
    // 281: api.core.v1.RBDPersistentVolumeSource
    Message(&[f(1, "monitors", List(&Text)), f(2, "image", Text), f(3, "fsType", Text), f(4, "pool", Text), f(5, "user", Text), f(6, "keyring", Text), f(7, "secretRef", Nested(304)), f(8, "readOnly", Bool)]),
    // 282: api.core.v1.ISCSIPersistentVolumeSource
    Message(&[f(1, "targetPortal", Text), f(2, "iqn", Text), f(3, "lun", Int), f(4, "iscsiInterface", Text), f(5, "fsType", Text), f(6, "readOnly", Bool), f(7, "portals", List(&Text)), f(8, "chapAuthDiscovery", Bool), f(11, "chapAuthSession", Bool), f(10, "secretRef", Nested(304)), f(12, "initiatorName", Text)]),
    // 283: api.core.v1.CinderPersistentVolumeSource
    Message(&[f(1, "volumeID", Text), f(2, "fsType", Text), f(3, "readOnly", Bool), f(4, "secretRef", Nested(304))]),
    // 284: api.core.v1.CephFSPersistentVolumeSource
    Message(&[f(1, "monitors", List(&Text)), f(2, "path", Text), f(3, "user", Text), f(4, "secretFile", Text), f(5, "secretRef", Nested(304)), f(6, "readOnly", Bool)]),
    // 285: api.core.v1.FlexPersistentVolumeSource
    Message(&[f(1, "driver", Text), f(2, "fsType", Text), f(3, "secretRef", Nested(304)), f(4, "readOnly", Bool), f(5, "options", Map(&Text))]),
    // 286: api.core.v1.AzureFilePersistentVolumeSource
    Message(&[f(1, "secretName", Text), f(2, "shareName", Text), f(3, "readOnly", Bool), f(4, "secretNamespace", Text)]),
    // 287: api.core.v1.ScaleIOPersistentVolumeSource
    Message(&[f(1, "gateway", Text), f(2, "system", Text), f(3, "secretRef", Nested(304)), f(4, "sslEnabled", Bool), f(5, "protectionDomain", Text), f(6, "storagePool", Text), f(7, "storageMode", Text), f(8, "volumeName", Text), f(9, "fsType", Text), f(10, "readOnly", Bool)]),
    // 288: api.core.v1.LocalVolumeSource
    Message(&[f(1, "path", Text), f(2, "fsType", Text)]),
    // 289: api.core.v1.StorageOSPersistentVolumeSource
    Message(&[f(1, "volumeName", Text), f(2, "volumeNamespace", Text), f(3, "fsType", Text), f(4, "readOnly", Bool), f(5, "secretRef", Nested(3))]),
    // 290: api.core.v1.CSIPersistentVolumeSource
    Message(&[f(1, "driver", Text), f(2, "volumeHandle", Text), f(3, "readOnly", Bool), f(4, "fsType", Text), f(5, "volumeAttributes", Map(&Text)), f(6, "controllerPublishSecretRef", Nested(304)), f(7, "nodeStageSecretRef", Nested(304)), f(8, "nodePublishSecretRef", Nested(304)), f(9, "controllerExpandSecretRef", Nested(304)), f(10, "nodeExpandSecretRef", Nested(304))]),
    // 291: api.resource.v1.CELDeviceSelector
    Message(&[f(1, "expression", Text)]),
    // 292: api.resource.v1.DeviceConfiguration
    Message(&[f(1, "opaque", Nested(305))]),
    // 293: api.resource.v1.DeviceRequest
    Message(&[f(1, "name", Text), f(2, "exactly", Nested(306)), f(3, "firstAvailable", List(&Nested(307)))]),
    // 294: api.resource.v1.DeviceConstraint
    Message(&[f(1, "requests", List(&Text)), f(2, "matchAttribute", Text), f(3, "distinctAttribute", Text)]),
    // 295: api.resource.v1.DeviceClaimConfiguration
    Message(&[f(1, "requests", List(&Text)), f(2, "", Nested(292))]),
    // 296: api.resource.v1.DeviceAllocationResult
    Message(&[f(1, "results", List(&Nested(308))), f(2, "config", List(&Nested(309)))]),
    // 297: api.resource.v1.NetworkDeviceData
    Message(&[f(1, "interfaceName", Text), f(2, "ips", List(&Text)), f(3, "hardwareAddress", Text)]),
    // 298: api.resource.v1.DeviceAttribute
    Message(&[k(2, "int", Int), k(3, "bool", Bool), k(4, "string", Text), k(5, "version", Text)]),
    // 299: api.resource.v1.DeviceCapacity
    Message(&[f(1, "value", Quantity), f(2, "requestPolicy", Nested(310))]),
    // 300: api.resource.v1.DeviceCounterConsumption
    Message(&[f(1, "counterSet", Text), f(2, "counters", Map(&Nested(302)))]),
    // 301: api.resource.v1.DeviceTaint
    Message(&[f(1, "key", Text), f(2, "value", Text), f(3, "effect", Text), f(4, "timeAdded", Time)]),
    // 302: api.resource.v1.Counter
    Message(&[f(1, "value", Quantity)]),
    // 303: api.storage.v1.VolumeNodeResources
    Message(&[k(1, "count", Int)]),
    // 304: api.core.v1.SecretReference
    Message(&[f(1, "name", Text), f(2, "namespace", Text)]),
    // 305: api.resource.v1.OpaqueDeviceConfiguration
    Message(&[f(1, "driver", Text), f(2, "parameters", Raw)]),
    // 306: api.resource.v1.ExactDeviceRequest
    Message(&[f(1, "deviceClassName", Text), f(2, "selectors", List(&Nested(266))), f(3, "allocationMode", Text), f(4, "count", Int), k(5, "adminAccess", Bool), f(6, "tolerations", List(&Nested(311))), f(7, "capacity", Nested(312))]),
    // 307: api.resource.v1.DeviceSubRequest
    Message(&[f(1, "name", Text), f(2, "deviceClassName", Text), f(3, "selectors", List(&Nested(266))), f(4, "allocationMode", Text), f(5, "count", Int), f(6, "tolerations", List(&Nested(311))), f(7, "capacity", Nested(312))]),
    // 308: api.resource.v1.DeviceRequestAllocationResult
    Message(&[f(1, "request", Text), f(2, "driver", Text), f(3, "pool", Text), f(4, "device", Text), k(5, "adminAccess", Bool), f(6, "tolerations", List(&Nested(311))), f(7, "bindingConditions", List(&Text)), f(8, "bindingFailureConditions", List(&Text)), f(9, "shareID", Text), f(10, "consumedCapacity", Map(&Quantity))]),
    // 309: api.resource.v1.DeviceAllocationConfiguration
    Message(&[f(1, "source", Text), f(2, "requests", List(&Text)), f(3, "", Nested(292))]),
    // 310: api.resource.v1.CapacityRequestPolicy
    Message(&[f(1, "default", Quantity), f(3, "validValues", List(&Quantity)), f(4, "validRange", Nested(313))]),
    // 311: api.resource.v1.DeviceToleration
    Message(&[f(1, "key", Text), f(2, "operator", Text), f(3, "value", Text), f(4, "effect", Text), k(5, "tolerationSeconds", Int)]),
    // 312: api.resource.v1.CapacityRequirements
    Message(&[f(1, "requests", Map(&Quantity))]),
    // 313: api.resource.v1.CapacityRequestPolicyRange
    Message(&[f(1, "min", Quantity), f(2, "max", Quantity), f(3, "step", Quantity)]),
];

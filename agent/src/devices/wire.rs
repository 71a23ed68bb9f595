//! Messages of the device plugin API v1beta1 and the pod-resources API v1.
//!
//! Facts: k8s.io/kubelet `pkg/apis/deviceplugin/v1beta1` and `pkg/apis/podresources/v1`. Field numbers are the contract.

use std::collections::HashMap;

use prost::Message;

pub(super) use crate::plugins::socket::{channel, stream, unary};

/// Version that plugins must speak.
pub(super) const VERSION: &str = "v1beta1";
/// A device that can be given away.
pub(super) const HEALTHY: &str = "Healthy";

pub(super) const REGISTER: &str = "/v1beta1.Registration/Register";
pub(super) const LIST_AND_WATCH: &str = "/v1beta1.DevicePlugin/ListAndWatch";
pub(super) const PREFERRED: &str = "/v1beta1.DevicePlugin/GetPreferredAllocation";
pub(super) const ALLOCATE: &str = "/v1beta1.DevicePlugin/Allocate";
pub(super) const PRE_START: &str = "/v1beta1.DevicePlugin/PreStartContainer";
pub(super) const LIST: &str = "/v1.PodResourcesLister/List";
pub(super) const GET: &str = "/v1.PodResourcesLister/Get";
pub(super) const ALLOCATABLE: &str = "/v1.PodResourcesLister/GetAllocatableResources";

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Empty {}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Options {
    #[prost(bool, tag = "1")]
    pub(super) pre_start_required: bool,
    #[prost(bool, tag = "2")]
    pub(super) get_preferred_allocation_available: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct RegisterRequest {
    #[prost(string, tag = "1")]
    pub(super) version: String,
    #[prost(string, tag = "2")]
    pub(super) endpoint: String,
    #[prost(string, tag = "3")]
    pub(super) resource_name: String,
    #[prost(message, optional, tag = "4")]
    pub(super) options: Option<Options>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct DeviceList {
    #[prost(message, repeated, tag = "1")]
    pub(super) devices: Vec<PluginDevice>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct PluginDevice {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) health: String,
    #[prost(message, optional, tag = "3")]
    pub(super) topology: Option<Topology>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Topology {
    #[prost(message, repeated, tag = "1")]
    pub(super) nodes: Vec<NumaNode>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct NumaNode {
    #[prost(int64, tag = "1")]
    pub(super) id: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct PreferredRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) containers: Vec<PreferredContainer>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct PreferredContainer {
    #[prost(string, repeated, tag = "1")]
    pub(super) available: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub(super) must_include: Vec<String>,
    #[prost(int32, tag = "3")]
    pub(super) size: i32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct PreferredResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) containers: Vec<DeviceIds>,
}

/// Devices by id: of a container in an Allocate, a PreStartContainer, or a preference.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct DeviceIds {
    #[prost(string, repeated, tag = "1")]
    pub(super) ids: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct AllocateRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) containers: Vec<DeviceIds>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct AllocateResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) containers: Vec<ContainerAnswer>,
}

/// What a container needs for its devices.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ContainerAnswer {
    #[prost(map = "string, string", tag = "1")]
    pub(super) envs: HashMap<String, String>,
    #[prost(message, repeated, tag = "2")]
    pub(super) mounts: Vec<Mount>,
    #[prost(message, repeated, tag = "3")]
    pub(super) devices: Vec<DeviceNode>,
    #[prost(map = "string, string", tag = "4")]
    pub(super) annotations: HashMap<String, String>,
    #[prost(message, repeated, tag = "5")]
    pub(super) cdi_devices: Vec<CdiDevice>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Mount {
    #[prost(string, tag = "1")]
    pub(super) container_path: String,
    #[prost(string, tag = "2")]
    pub(super) host_path: String,
    #[prost(bool, tag = "3")]
    pub(super) read_only: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct DeviceNode {
    #[prost(string, tag = "1")]
    pub(super) container_path: String,
    #[prost(string, tag = "2")]
    pub(super) host_path: String,
    #[prost(string, tag = "3")]
    pub(super) permissions: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct CdiDevice {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct PodResourcesList {
    #[prost(message, repeated, tag = "1")]
    pub(super) pods: Vec<PodResources>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct PodResources {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) namespace: String,
    #[prost(message, repeated, tag = "3")]
    pub(super) containers: Vec<ContainerResources>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ContainerResources {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(message, repeated, tag = "2")]
    pub(super) devices: Vec<ContainerDevices>,
    #[prost(int64, repeated, tag = "3")]
    pub(super) cpu_ids: Vec<i64>,
    #[prost(message, repeated, tag = "4")]
    pub(super) memory: Vec<ContainerMemory>,
    #[prost(message, repeated, tag = "5")]
    pub(super) dynamic_resources: Vec<DynamicResource>,
}

/// What a container has of one ResourceClaim.
#[allow(clippy::struct_field_names, reason = "as the API has them")]
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct DynamicResource {
    #[prost(string, tag = "2")]
    pub(super) claim_name: String,
    #[prost(string, tag = "3")]
    pub(super) claim_namespace: String,
    #[prost(message, repeated, tag = "4")]
    pub(super) claim_resources: Vec<ClaimResource>,
}

/// One device of it.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ClaimResource {
    #[prost(message, repeated, tag = "1")]
    pub(super) cdi_devices: Vec<CdiDevice>,
    #[prost(string, tag = "2")]
    pub(super) driver_name: String,
    #[prost(string, tag = "3")]
    pub(super) pool_name: String,
    #[prost(string, tag = "4")]
    pub(super) device_name: String,
    #[prost(string, optional, tag = "5")]
    pub(super) share_id: Option<String>,
}

/// Memory of one kind, on one or more NUMA nodes.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ContainerMemory {
    #[prost(string, tag = "1")]
    pub(super) memory_type: String,
    #[prost(uint64, tag = "2")]
    pub(super) size: u64,
    #[prost(message, optional, tag = "3")]
    pub(super) topology: Option<Topology>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ContainerDevices {
    #[prost(string, tag = "1")]
    pub(super) resource_name: String,
    #[prost(string, repeated, tag = "2")]
    pub(super) device_ids: Vec<String>,
    #[prost(message, optional, tag = "3")]
    pub(super) topology: Option<Topology>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct GetRequest {
    #[prost(string, tag = "1")]
    pub(super) pod_name: String,
    #[prost(string, tag = "2")]
    pub(super) pod_namespace: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct GetResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) pod: Option<PodResources>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct AllocatableResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) devices: Vec<ContainerDevices>,
    #[prost(int64, repeated, tag = "2")]
    pub(super) cpu_ids: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    pub(super) memory: Vec<ContainerMemory>,
}

//! Messages of the Container Storage Interface, version 1: its Identity and Node services, as far as they are used.
//!
//! Facts: the specification's `csi.proto` (package `csi.v1`). Field numbers are the contract; fields that are not listed are
//! skipped by whoever reads them.

use std::collections::BTreeMap;
use std::time::Duration;

use prost::Message;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::plugins::socket::unary;

/// Name of the service of a node.
pub const NODE: &str = "csi.v1.Node";
/// Methods of it.
pub const STAGE: &str = "/csi.v1.Node/NodeStageVolume";
/// Undoes [`STAGE`].
pub const UNSTAGE: &str = "/csi.v1.Node/NodeUnstageVolume";
/// Makes a volume visible at a path.
pub const PUBLISH: &str = "/csi.v1.Node/NodePublishVolume";
/// Undoes [`PUBLISH`].
pub const UNPUBLISH: &str = "/csi.v1.Node/NodeUnpublishVolume";
/// Use of a volume, and whether it is well.
pub const STATS: &str = "/csi.v1.Node/NodeGetVolumeStats";
/// Lets a file system take the volume's new size.
pub const EXPAND: &str = "/csi.v1.Node/NodeExpandVolume";
/// What the driver can do on a node.
pub const CAPABILITIES: &str = "/csi.v1.Node/NodeGetCapabilities";
/// How the driver calls this node.
pub const INFO: &str = "/csi.v1.Node/NodeGetInfo";

/// A message without fields: `NodeGetInfoRequest` and most answers.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// `VolumeCapability`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct VolumeCapability {
    /// As a device. Exactly one of this and `mount` is there.
    #[prost(message, optional, tag = "1")]
    pub block: Option<Empty>,
    /// As a file system.
    #[prost(message, optional, tag = "2")]
    pub mount: Option<MountVolume>,
    /// By whom.
    #[prost(message, optional, tag = "3")]
    pub access_mode: Option<AccessMode>,
}

/// `VolumeCapability.MountVolume`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct MountVolume {
    /// File system.
    #[prost(string, tag = "1")]
    pub fs_type: String,
    /// Mount options.
    #[prost(string, repeated, tag = "2")]
    pub mount_flags: Vec<String>,
    /// Group that owns the files, for drivers with [`NodeCapability::VolumeMountGroup`].
    #[prost(string, tag = "3")]
    pub volume_mount_group: String,
}

/// `VolumeCapability.AccessMode`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct AccessMode {
    /// `VolumeCapability.AccessMode.Mode`.
    #[prost(enumeration = "Mode", tag = "1")]
    pub mode: i32,
}

/// `VolumeCapability.AccessMode.Mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Mode {
    /// Not said.
    Unknown = 0,
    /// Read and written on one node.
    SingleNodeWriter = 1,
    /// Read on one node.
    SingleNodeReaderOnly = 2,
    /// Read on many nodes.
    MultiNodeReaderOnly = 3,
    /// Read on many nodes, written on one.
    MultiNodeSingleWriter = 4,
    /// Read and written on many nodes.
    MultiNodeMultiWriter = 5,
    /// Read and written by one pod.
    SingleNodeSingleWriter = 6,
    /// Read and written by the pods of one node.
    SingleNodeMultiWriter = 7,
}

/// `NodeStageVolumeRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StageRequest {
    /// The volume.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// What attaching it gave.
    #[prost(btree_map = "string, string", tag = "2")]
    pub publish_context: BTreeMap<String, String>,
    /// Where to stage it.
    #[prost(string, tag = "3")]
    pub staging_target_path: String,
    /// What for.
    #[prost(message, optional, tag = "4")]
    pub volume_capability: Option<VolumeCapability>,
    /// Secrets.
    #[prost(btree_map = "string, string", tag = "5")]
    pub secrets: BTreeMap<String, String>,
    /// The volume's attributes.
    #[prost(btree_map = "string, string", tag = "6")]
    pub volume_context: BTreeMap<String, String>,
}

/// `NodeUnstageVolumeRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct UnstageRequest {
    /// The volume.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Where it was staged.
    #[prost(string, tag = "2")]
    pub staging_target_path: String,
}

/// `NodePublishVolumeRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PublishRequest {
    /// The volume.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// What attaching it gave.
    #[prost(btree_map = "string, string", tag = "2")]
    pub publish_context: BTreeMap<String, String>,
    /// Where it was staged; empty where the driver does not stage.
    #[prost(string, tag = "3")]
    pub staging_target_path: String,
    /// Where it is to be seen.
    #[prost(string, tag = "4")]
    pub target_path: String,
    /// What for.
    #[prost(message, optional, tag = "5")]
    pub volume_capability: Option<VolumeCapability>,
    /// Not to be written.
    #[prost(bool, tag = "6")]
    pub readonly: bool,
    /// Secrets.
    #[prost(btree_map = "string, string", tag = "7")]
    pub secrets: BTreeMap<String, String>,
    /// The volume's attributes, and what the driver wants to know of the pod.
    #[prost(btree_map = "string, string", tag = "8")]
    pub volume_context: BTreeMap<String, String>,
}

/// `NodeUnpublishVolumeRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct UnpublishRequest {
    /// The volume.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Where it was seen.
    #[prost(string, tag = "2")]
    pub target_path: String,
}

/// `NodeGetVolumeStatsRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StatsRequest {
    /// The volume.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Where it is seen.
    #[prost(string, tag = "2")]
    pub volume_path: String,
    /// Where it was staged; empty where the driver does not stage.
    #[prost(string, tag = "3")]
    pub staging_target_path: String,
}

/// `NodeGetVolumeStatsResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StatsResponse {
    /// At most one for each unit.
    #[prost(message, repeated, tag = "1")]
    pub usage: Vec<Usage>,
    /// For drivers with [`NodeCapability::VolumeCondition`].
    #[prost(message, optional, tag = "2")]
    pub condition: Option<VolumeCondition>,
}

/// `VolumeUsage`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Usage {
    /// Left.
    #[prost(int64, tag = "1")]
    pub available: i64,
    /// In all.
    #[prost(int64, tag = "2")]
    pub total: i64,
    /// In use.
    #[prost(int64, tag = "3")]
    pub used: i64,
    /// Of what.
    #[prost(enumeration = "Unit", tag = "4")]
    pub unit: i32,
}

/// `VolumeUsage.Unit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Unit {
    /// Not said.
    Unknown = 0,
    /// Bytes.
    Bytes = 1,
    /// Inodes.
    Inodes = 2,
}

/// `VolumeCondition`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct VolumeCondition {
    /// Something is wrong with it.
    #[prost(bool, tag = "1")]
    pub abnormal: bool,
    /// What.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `NodeExpandVolumeRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ExpandRequest {
    /// The volume.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Where it is seen.
    #[prost(string, tag = "2")]
    pub volume_path: String,
    /// The size to have.
    #[prost(message, optional, tag = "3")]
    pub capacity_range: Option<CapacityRange>,
    /// Where it was staged; empty where the driver does not stage.
    #[prost(string, tag = "4")]
    pub staging_target_path: String,
    /// What it is used for.
    #[prost(message, optional, tag = "5")]
    pub volume_capability: Option<VolumeCapability>,
    /// Secrets.
    #[prost(btree_map = "string, string", tag = "6")]
    pub secrets: BTreeMap<String, String>,
}

/// `CapacityRange`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct CapacityRange {
    /// At least.
    #[prost(int64, tag = "1")]
    pub required_bytes: i64,
    /// At most; 0: not said.
    #[prost(int64, tag = "2")]
    pub limit_bytes: i64,
}

/// `NodeExpandVolumeResponse`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct ExpandResponse {
    /// The size now; 0: not said.
    #[prost(int64, tag = "1")]
    pub capacity_bytes: i64,
}

/// `NodeGetCapabilitiesResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CapabilitiesResponse {
    /// Each once.
    #[prost(message, repeated, tag = "1")]
    pub capabilities: Vec<Capability>,
}

/// `NodeServiceCapability`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Capability {
    /// Its only kind.
    #[prost(message, optional, tag = "1")]
    pub rpc: Option<CapabilityRpc>,
}

/// `NodeServiceCapability.RPC`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct CapabilityRpc {
    /// `NodeServiceCapability.RPC.Type`.
    #[prost(enumeration = "NodeCapability", tag = "1")]
    pub kind: i32,
}

/// `NodeServiceCapability.RPC.Type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum NodeCapability {
    /// Not said.
    Unknown = 0,
    /// Volumes are staged before they are published.
    StageUnstageVolume = 1,
    /// It tells the use of volumes.
    GetVolumeStats = 2,
    /// It makes file systems larger.
    ExpandVolume = 3,
    /// It tells whether volumes are well.
    VolumeCondition = 4,
    /// It knows the modes of single nodes with one and with many writers.
    SingleNodeMultiWriter = 5,
    /// It gives files to a group by itself.
    VolumeMountGroup = 6,
}

/// `NodeGetInfoResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct InfoResponse {
    /// How the driver calls this node.
    #[prost(string, tag = "1")]
    pub node_id: String,
    /// Volumes that can be attached to it; 0: as many as you like.
    #[prost(int64, tag = "2")]
    pub max_volumes_per_node: i64,
    /// Where the node is.
    #[prost(message, optional, tag = "3")]
    pub accessible_topology: Option<Topology>,
}

/// `Topology`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Topology {
    /// Segments by key.
    #[prost(btree_map = "string, string", tag = "1")]
    pub segments: BTreeMap<String, String>,
}

/// A driver said no, or said nothing.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("rpc error: code = {} desc = {message}", name(*code))]
pub struct CallError {
    /// The status.
    pub code: Code,
    /// Its text.
    pub message: String,
}

impl CallError {
    /// Whether the driver has ended what it was asked for, without success: nothing of it is left to undo. After any other
    /// error it may still be at it.
    pub fn is_final(&self) -> bool {
        !matches!(
            self.code,
            Code::Cancelled
                | Code::DeadlineExceeded
                | Code::Unavailable
                | Code::ResourceExhausted
                | Code::Aborted
        )
    }
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        Self { code: status.code(), message: status.message().to_owned() }
    }
}

/// The names that upstream's texts have.
fn name(code: Code) -> String {
    match code {
        Code::Cancelled => "Canceled".to_owned(),
        code => format!("{code:?}"),
    }
}

/// One call with a deadline.
pub(super) async fn call<Q, A>(
    channel: &Channel,
    path: &'static str,
    request: Q,
    deadline: Duration,
) -> Result<A, CallError>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    unary(channel, path, request, deadline).await.map_err(CallError::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as another implementation of the protocol writes them.
    #[test]
    fn fields_have_the_numbers_of_the_specification() {
        let capability = VolumeCapability {
            block: None,
            mount: Some(MountVolume {
                fs_type: "x".to_owned(),
                mount_flags: vec!["y".to_owned()],
                volume_mount_group: "1".to_owned(),
            }),
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter as i32 }),
        };
        assert_eq!(
            capability.encode_to_vec(),
            [0x12, 9, 0x0a, 1, b'x', 0x12, 1, b'y', 0x1a, 1, b'1', 0x1a, 2, 8, 1]
        );
        let publish = PublishRequest {
            volume_id: "v".to_owned(),
            staging_target_path: "s".to_owned(),
            target_path: "t".to_owned(),
            readonly: true,
            volume_context: BTreeMap::from([("k".to_owned(), "w".to_owned())]),
            ..PublishRequest::default()
        };
        assert_eq!(
            publish.encode_to_vec(),
            [0x0a, 1, b'v', 0x1a, 1, b's', 0x22, 1, b't', 0x30, 1, 0x42, 6, 0x0a, 1, b'k', 0x12, 1, b'w']
        );
        let expand = ExpandRequest {
            capacity_range: Some(CapacityRange { required_bytes: 5, limit_bytes: 6 }),
            staging_target_path: "s".to_owned(),
            ..ExpandRequest::default()
        };
        assert_eq!(expand.encode_to_vec(), [0x1a, 4, 8, 5, 0x10, 6, 0x22, 1, b's']);
        let capabilities = [0x0a, 4, 0x0a, 2, 8, 6];
        let decoded = CapabilitiesResponse::decode(capabilities.as_slice()).unwrap();
        assert_eq!(decoded.capabilities[0].rpc.unwrap().kind(), NodeCapability::VolumeMountGroup);
        let info = [0x0a, 1, b'n', 0x10, 7, 0x1a, 8, 0x0a, 6, 0x0a, 1, b'z', 0x12, 1, b'1'];
        let info = InfoResponse::decode(info.as_slice()).unwrap();
        assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("n", 7));
        assert_eq!(info.accessible_topology.unwrap().segments["z"], "1");
        let stats = [0x0a, 8, 8, 1, 0x10, 2, 0x18, 3, 0x20, 2, 0x12, 2, 8, 1];
        let stats = StatsResponse::decode(stats.as_slice()).unwrap();
        assert_eq!((stats.usage[0].used, stats.usage[0].unit()), (3, Unit::Inodes));
        assert!(stats.condition.unwrap().abnormal);
    }

    #[test]
    fn errors_read_as_upstreams() {
        let error = CallError { code: Code::InvalidArgument, message: "no such thing".to_owned() };
        assert_eq!(error.to_string(), "rpc error: code = InvalidArgument desc = no such thing");
        assert!(error.is_final());
        assert!(!CallError { code: Code::DeadlineExceeded, ..error }.is_final());
    }
}

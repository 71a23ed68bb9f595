//! The options message of the runc shim.
//!
//! Names, numbers and types of `containerd.runc.v1.Options` (containerd 1.6 to 2.x, `runtime/v2/runc/options/oci.proto`),
//! which the client crate does not carry; only the fields we set.

/// How the shim calls runc.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RuncOptions {
    /// The runc executable; empty for `runc` in PATH.
    #[prost(string, tag = "6")]
    pub binary_name: String,
    /// runc's own state directory.
    #[prost(string, tag = "7")]
    pub root: String,
    /// Whether cgroup paths are systemd's (`slice:prefix:name`).
    #[prost(bool, tag = "9")]
    pub systemd_cgroup: bool,
}

/// How the runc shim makes a checkpoint.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckpointOptions {
    /// Open connections are kept.
    #[prost(bool, tag = "2")]
    pub open_tcp: bool,
    /// Unix sockets that lead outside are allowed.
    #[prost(bool, tag = "3")]
    pub external_unix_sockets: bool,
    /// File locks are kept.
    #[prost(bool, tag = "5")]
    pub file_locks: bool,
    /// Directory for CRIU's images.
    #[prost(string, tag = "8")]
    pub image_path: String,
    /// Directory for CRIU's log.
    #[prost(string, tag = "9")]
    pub work_path: String,
}

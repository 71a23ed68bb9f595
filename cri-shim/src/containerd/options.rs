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

//! CNI 1.1 vocabulary: network configuration, results, errors, version conversion, and address
//! allocation as a pure step.
//!
//! Modules in reading order: [`version`], [`ipnet`], [`error`], [`result`], [`config`], [`ipam`], [`overlay`].
//!
//! This crate does no IO, reads no clock and no environment; it maps bytes to values and back and
//! decides which address is next. Specification: containernetworking/cni SPEC.md, version 1.1.0.

pub mod config;
pub mod error;
pub mod ipam;
pub mod ipnet;
pub mod overlay;
pub mod result;
pub mod version;

pub use config::{NetworkConfigList, PluginConfig};
pub use error::{CniError, ErrorCode};
pub use ipnet::IpNet;
pub use result::{CniResult, Dns, Interface, IpConfig, Route};
pub use version::Version;

//! Measurements of the service data plane, on one machine, without a cluster, beside other ways to forward.
//!
//! [`connections`] tells what a connection through a ClusterIP costs, [`programming`] how long many services and one
//! change take, [`memory`] what they occupy, [`packets`] what a packet from outside costs, [`rates`] how many of them a NodePort forwards, [`shortcut`]
//! what pods of one node gain, [`soak`] whether anything fails while the agent is killed and exchanged.
//! All ground is made here and removed again: network namespaces, cgroups, pins. The reports are plain values; drawing
//! them is up to the caller.

pub mod client;
pub mod connections;
pub mod far;
mod lanes;
pub mod live;
pub mod memory;
pub mod namespaces;
pub mod packets;
pub mod peers;
pub mod programming;
pub mod rates;
pub mod scene;
pub mod shortcut;
pub mod soak;
mod statistics;

pub use statistics::{Figure, Interval};

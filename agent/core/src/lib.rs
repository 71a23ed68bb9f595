//! Pod decisions as pure functions: desired pods, observed pods and now in; actions and status out.
//!
//! How it fits: the agent's worker of a pod feeds a [`pod_loop::PodLoop`] with the [`model::DesiredPod`] of the API, the
//! [`model::ObservedPod`] of the CRI and the ends of its own steps. The loop asks [`plan::plan`] what to do, which the worker
//! carries out, and [`status::derive`] for what the API is told ([`patch`] makes the smallest patch). No IO, no clock, no
//! randomness, no ordering left to chance.
//!
//! Reading order: [`model`] → [`fate`] → [`plan`] → [`status`] → [`probe`] → [`pod_loop`]; then the helpers. [`overlay`] stands apart: what leads to
//! other nodes' pods.

pub mod admission;
pub mod backoff;
pub mod certificates;
pub mod cgroup_tree;
pub mod claims;
pub mod cpus;
pub mod devices;
pub mod env;
pub mod eviction;
pub mod fate;
pub mod hash;
pub mod health;
pub mod huge_pages;
pub mod identity;
pub mod images;
pub mod logs;
pub mod memory;
pub mod memory_rules;
pub mod model;
pub mod numa;
pub mod overlay;
pub mod pace;
pub mod patch;
pub mod plan;
pub mod pod_loop;
pub mod probe;
pub mod pulls;
pub mod qos;
pub mod resize;
pub mod resources;
pub mod shutdown;
pub mod status;

//! Pod decisions as pure functions: desired pods, observed pods and now in; actions and status out.
//!
//! How it fits: the agent's pod loop builds a [`model::DesiredPod`] from the API and a [`model::ObservedPod`] from the
//! CRI and its own steps, calls [`plan::plan`], carries the actions out, and calls [`status::derive`] for what the API
//! is told ([`patch`] makes the smallest patch). No IO, no clock, no randomness, no ordering left to chance.
//!
//! Reading order: [`model`] → [`plan`] → [`status`] → [`probe`]; then the helpers. [`overlay`] stands apart: what leads to
//! other nodes' pods.

pub mod admission;
pub mod backoff;
pub mod certificates;
pub mod claims;
pub mod cpus;
pub mod devices;
pub mod env;
pub mod eviction;
pub mod hash;
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
pub mod probe;
pub mod qos;
pub mod resize;
pub mod resources;
pub mod shutdown;
pub mod status;

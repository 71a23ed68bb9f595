//! The decisions of Keelson's controllers and scheduler, as pure functions.
//!
//! Every module answers one question: given what is wanted (specs), what is known (a snapshot of the
//! informer caches) and the time, what must be written next? Inputs are borrowed Kubernetes objects,
//! outputs are plans that hold every name, number and order, so that the executor in `control-manager`
//! has no choice left to make.
//!
//! This crate does no IO, reads no clock, draws no random numbers, starts no task, and iterates ordered
//! maps only: the same input always gives the same plan.
//!
//! Reading order: [`object`] (what every controller asks of an object), [`deployment`] → [`replicaset`] →
//! [`scheduler`] (a rollout's way down to a node), [`endpoints`] (a Service's way to its pods), then the
//! housekeepers: [`garbage`], [`node_ipam`], [`node_lifecycle`], [`taint_eviction`], [`pod_gc`],
//! [`namespace`], [`certificates`], [`volumes`], [`attachments`], [`resource_claims`].

pub mod adoption;
pub mod attachments;
pub mod certificates;
pub mod cidr;
pub mod deployment;
pub mod endpoints;
pub mod garbage;
pub mod namespace;
pub mod node_ipam;
pub mod node_lifecycle;
pub mod object;
pub mod pod_gc;
pub mod quantity;
pub mod replicaset;
pub mod resource_claims;
pub mod scheduler;
pub mod selector;
pub mod taint_eviction;
pub mod volumes;

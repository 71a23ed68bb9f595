//! The controllers and the scheduler against a real API server, with a node that only pretends to run pods.

mod attach_detach;
mod certificates;
mod harness;
mod lifecycle;
mod resource_claims;
mod rollout;
mod scheduling;
mod volumes;

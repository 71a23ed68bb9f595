//! The controllers and the scheduler against a real API server, with a node that only pretends to run pods.

mod certificates;
mod harness;
mod lifecycle;
mod rollout;
mod scheduling;
mod volumes;

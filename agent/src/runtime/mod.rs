//! The CRI side: a client with deadlines, observation, events, health, images, and the configs it is given.
//!
//! Inputs: plans' actions as plain calls. Outputs: observed pods and outcomes. Works with any CRI v1 runtime over its
//! unix socket; knows nothing of the API server.

pub mod auth;
pub mod container_config;
pub mod cri;
pub mod events;
pub mod health;
pub mod images;
pub mod labels;
pub mod observe;
pub mod pulls;
pub mod sandbox_config;
pub mod security;

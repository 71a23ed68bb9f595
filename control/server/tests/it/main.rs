//! The whole API server in-process: real store file, real TLS, spoken to over HTTP.
#![allow(clippy::unwrap_used, reason = "test helpers panic on purpose")]

mod auth;
mod harness;
mod negotiation;
mod objects;
mod pods;
mod relay;
mod services;
mod watches;

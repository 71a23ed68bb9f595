//! Scratch: compiles helper G's modules until the agent is a library. Deleted before the end.
#![allow(dead_code, unused_imports, missing_docs, clippy::all, clippy::pedantic, unused, unreachable_pub)]
#[path = "../src/config/mod.rs"]
mod config;
#[path = "../src/contracts.rs"]
mod contracts;
#[path = "../src/events/mod.rs"]
mod events;
#[path = "../src/host/mod.rs"]
mod host;
#[path = "../src/server/mod.rs"]
mod server;
#[path = "../src/node/mod.rs"]
mod node;

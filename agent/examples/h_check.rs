//! scratch
#![allow(dead_code, unused_imports, missing_docs, clippy::all, unreachable_pub)]
#[path="../src/config/mod.rs"] mod config;
#[path="../src/events/mod.rs"] mod events;
#[path="../src/proxy/mod.rs"] mod proxy;

fn main() {}

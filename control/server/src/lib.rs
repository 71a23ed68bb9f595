//! Kubernetes API server: HTTP, TLS, authentication, authorization, admission, watch cache, discovery, OpenAPI.
//!
//! How the parts connect: [`serve`] accepts connections and hands each request to `pipeline` (authenticate, authorize, limit), which calls a
//! handler of `api` (resources), `subresource`, `documents` (discovery, health) or `relay` (streams to a kubelet). Writes go through
//! `admission` into one store transaction; the store's events flow through one feed into the `cache`, from which all reads and watches are
//! served. `bootstrap` makes the built-in objects, `housekeeping` compacts history, and [`pki`] makes every key and certificate.
//!
//! Reading order: [`config`], [`serve`], `pipeline`, `http`, `auth`, `api`, `subresource`, `admission`, `cache`, `codec`.
//!
//! This crate never decides what objects should look like over time (controllers do) and never touches a node.

mod admission;
mod api;
mod auth;
mod bootstrap;
mod cache;
mod codec;
pub mod config;
mod documents;
#[path = "gen/mod.rs"]
mod generated;
mod housekeeping;
mod http;
mod metrics;
mod pipeline;
pub mod pki;
mod port_holder;
mod protobuf;
mod random;
mod relay;
pub mod serve;
mod subresource;

pub use admission::allocator::Ipv4Range;
pub use config::{Credentials, ServerConfig};
pub use serve::{ServeError, Server};

//! `keelson-cri`: CRI v1 on containerd. The executable is `main.rs`; everything it does is here, so that tests reach it too.
//!
//! In reading order: [`config`]; [`runtime`] (what every operation works with) over [`state`], [`journal`], [`keyed`], [`steps`] and
//! [`containerd`]; [`sandbox`] and [`container`] (the operations), [`exits`] and [`recovery`] (what happens by itself),
//! [`handlers`], [`network`], [`logs`], [`stats`], [`host`]; [`images`], [`exec`] with [`attach`]; [`service`], [`status`], [`info`] and [`checkpoint`] (gRPC), [`telemetry`]
//! (what can be seen of it), [`serve`].
//!
//! Tasks: one supervises containerd's connection and event stream, one follows the CNI configuration, one waits for each
//! running process, one reads each running container's output; a request is one task of the gRPC server.
//! It knows no Pod, Service or API server: only what CRI requests say.

pub mod attach;
pub mod authority;
pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod container;
pub mod containerd;
pub mod error;
pub mod events;
pub mod exec;
pub mod exits;
pub mod facts;
pub mod flight;
pub mod handlers;
pub mod host;
pub mod images;
pub mod info;
pub mod journal;
pub mod keyed;
pub mod logs;
pub mod network;
pub mod recovery;
pub mod runtime;
pub mod sandbox;
pub mod serve;
pub mod service;
pub mod state;
pub mod stats;
pub mod status;
pub mod steps;
pub mod telemetry;

//! The walk of the README on a real cluster: `up`, kubectl, curl, kill -9, bad input, `down`.
//!
//! Run by `cargo xtask test e2e` with one thread. Modules run in the order of their names: first what must refuse to
//! start, then everything on one shared cluster, each test in a namespace of its own, and last `down`.
#![allow(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod a_refusals;
mod b_walk;
mod c_recovery;
mod d_bad_input;
mod e_workloads;
mod f_network;
mod f_node;
mod g_conformance;
mod support;
mod z_down;
mod zz_nodes;

//! Kit for tests and benches of the data plane on a real kernel.
//!
//! An [`Arena`](arena::Arena) is a network namespace, a cgroup and a pin directory of its own, so that nothing of the
//! machine is touched and tests can run beside a live cluster. [`places`] are clients and pods around it; [`servers`]
//! answer in it; [`tables`] writes service tables briefly; [`agent`] runs a real agent with only its proxy beside a
//! pretended API server, [`api`]; [`frames`] are packets one by one; [`bench`] measures.

pub mod agent;
pub mod api;
pub mod arena;
pub mod bench;
pub mod frames;
pub mod places;
pub mod servers;
pub mod tables;

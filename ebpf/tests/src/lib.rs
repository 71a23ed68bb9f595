//! Kit for tests and benches of the data plane on a real kernel.
//!
//! An [`Arena`](arena::Arena) is a network namespace, a cgroup and a pin directory of its own, so that nothing of the
//! machine is touched and tests can run beside a live cluster. [`servers`] answer in it; [`tables`] writes service
//! tables briefly; [`bench`] measures.

pub mod arena;
pub mod bench;
pub mod servers;
pub mod tables;

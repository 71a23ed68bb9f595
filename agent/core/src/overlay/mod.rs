//! The network between nodes as pure steps: Node objects in, kernel entries and their order out.
//!
//! [`range`]: address ranges and hardware addresses. [`node`]: what a Node object says about its network, and what
//! this node says about its own. [`entries`]: the entries that lead to every peer. [`plan`]: from the entries that the
//! kernel has to those, in an order in which no packet is sent where nobody takes it. [`mtu`]: what fits.
//!
//! No IO and no clock; nothing here knows netlink.

pub mod entries;
pub mod mtu;
pub mod node;
pub mod plan;
pub mod range;

pub use entries::{Entries, Hop, Host, KeyHolder, Place, Problem, Tunnel, desired};
pub use node::{Mode, Peer, pod_ranges};
pub use plan::{Action, plan};
pub use range::{Mac, Range};

//! Load-balancing decisions of the data plane, pure and `no_std`.
//!
//! The programs give these functions their maps ([`Tables`]) and their caller ([`Caller`]); host tests give them
//! ordinary collections. So the decision that runs in the kernel is the one the unit tests prove. Nothing here
//! touches a context, a map or a socket.
#![no_std]
#![allow(
    clippy::inline_always,
    reason = "BPF programs have no calls worth keeping: the verifier checks one function best"
)]

#[cfg(test)]
extern crate std;

mod external;
mod far;
mod parse;
mod peers;
mod resolve;

pub use external::{Action, Count, Flows, Hop, Way, egress, ingress, loopback, new_flow};
pub use far::{FarTables, from_far_pod, to_far_pod};
pub use parse::{
    Difference, ETHERNET, ETHERTYPE_V4, ETHERTYPE_V6, Fix, Headers, Packet, Part, adjusted, parse,
};
pub use peers::{find_by_backend, find_by_frontend, remember};
pub use resolve::{Caller, Destination, Tables, Target, Verdict, Why, is_reserved, resolve};

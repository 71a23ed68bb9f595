//! Effects of CNI plugins and of the runtimes that call them.
//!
//! - [`netns`]: make, enter and remove network namespaces.
//! - [`netlink`]: links, addresses, routes, queueing disciplines, in this or another namespace.
//! - [`nft`]: masquerade and host ports by nftables.
//! - [`sysctl`]: kernel parameters of this or another namespace.
//! - [`arp`]: gratuitous ARP.
//! - [`file`]: regular files, opened without waiting.
//! - [`lock`]: file locks with a deadline.
//! - [`detach`]: work that goes on after the plugin has answered.
//! - [`overlay`]: the state of the network between nodes, from the agent to the plugins.
//! - [`undo`]: what to take back when a later step fails.
//! - [`invoke`]: runs plugin chains as executables, with deadline, rollback and result cache.
//!
//! Nothing here decides what a pod gets; that is with the plugins and [`cni_plugins_types`].
//! This is a host crate: `unsafe` is allowed in [`netns`], [`netlink`], [`arp`], [`lock`] and [`detach`]
//! only. What plugins use blocks; only the runtimes' side, [`invoke`], is asynchronous.

pub mod arp;
pub mod detach;
pub mod file;
pub mod invoke;
pub mod lock;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod overlay;
pub mod sysctl;
pub mod undo;

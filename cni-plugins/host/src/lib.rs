//! Effects of CNI plugins and of the runtimes that call them.
//!
//! - [`netns`]: make, enter and remove network namespaces.
//! - [`netlink`]: links, addresses and routes, in this or another namespace.
//! - [`unlink`]: deletes a link without waiting for what follows its end.
//! - [`sysctl`]: kernel parameters of this or another namespace.
//! - [`arp`]: gratuitous ARP.
//! - [`undo`]: what to take back when a later step fails.
//! - [`invoke`]: runs plugin chains as executables, with deadline, rollback and result cache.
//!
//! Nothing here decides what a pod gets; that is with the plugins and [`cni_plugins_types`].
//! This is a host crate: `unsafe` is allowed in [`netns`], [`netlink`], [`unlink`] and [`arp`] only.

pub mod arp;
pub mod invoke;
pub mod netlink;
pub mod netns;
pub mod sysctl;
pub mod undo;
pub mod unlink;

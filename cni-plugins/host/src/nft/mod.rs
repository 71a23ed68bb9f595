//! nftables over netlink: masquerade for pods and host ports, without any `nft` or `iptables` program.
//!
//! Everything is in one table, `inet keelson_cni`, of the calling thread's network namespace. Its chains and rules are
//! fixed ([`layout`]); what changes with a pod are elements of sets and maps, so that a change costs the same with ten
//! pods as with a thousand. Each change is one transaction of the kernel: it happens wholly or not at all, also when the
//! process is killed. All functions block, for well below a millisecond, with a deadline on every answer.
//!
//! In reading order: [`wire`] (messages and socket), `expression` (what rules are made of), `comment`, [`layout`],
//! [`masquerade`], [`ports`], [`conntrack`], [`route`], [`Watch`]. [`untracked`] has a table of its own, of the node's agent.

mod attributes;
mod comment;
pub mod conntrack;
mod expression;
mod layout;
pub mod masquerade;
pub mod ports;
pub mod route;
pub mod untracked;
mod watch;
mod wire;

use std::io;

use nix::errno::Errno;

use self::{
    attributes::find,
    wire::{Message, Socket, kind},
};

pub use self::watch::Watch;

/// Name of the table.
pub const TABLE: &str = "keelson_cni";

/// A failed step.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct NftError {
    /// What was tried.
    pub step: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl NftError {
    fn new(step: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { step: step.into(), source: source.into() }
    }

    /// Whether the kernel answered with `errno`.
    pub fn is(&self, errno: Errno) -> bool {
        self.source.raw_os_error() == Some(errno as i32)
    }
}

/// Whether there are tables that see frames on their way through a bridge, or as they arrive at a device: of families
/// `bridge` and `netdev`; where bridges show their packets to netfilter, of `ip`, `ip6` and `inet`, too. Our own look at none
/// between pods.
pub fn filters_frames(bridges_show_packets: bool) -> Result<bool, NftError> {
    /// `NFPROTO_NETDEV` and `NFPROTO_BRIDGE`, then `NFPROTO_INET`, `NFPROTO_IPV4` and `NFPROTO_IPV6`.
    const FAMILIES: [u8; 5] = [5, 7, 1, 2, 10];
    let failed = |source: io::Error| NftError::new("list the tables of bridges and devices", source);
    let ours = |table: &Vec<u8>| {
        let name = find(table, 1).unwrap_or_default();
        [TABLE, untracked::TABLE].iter().any(|own| name.strip_suffix(&[0]) == Some(own.as_bytes()))
    };
    let mut socket = Socket::open()?;
    for family in FAMILIES.into_iter().take(if bridges_show_packets { FAMILIES.len() } else { 2 }) {
        match socket.dump(&Message::nft_of(family, kind::GET_TABLE, 0)) {
            Ok(tables) if tables.iter().all(ours) => {}
            Ok(_) => return Ok(true),
            // The kernel has no nftables, so nobody has tables.
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(false)
}

/// Whose element it is: an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner<'a> {
    /// Name of the network.
    pub network: &'a str,
    /// Container id.
    pub container_id: &'a str,
    /// Interface in the container.
    pub ifname: &'a str,
}

/// Longest part of a comment; longer names are told by a hash of theirs.
const MAX_PART: usize = 72;

impl Owner<'_> {
    /// The comment that its elements carry; no two attachments have the same.
    fn comment(&self) -> String {
        format!("{}/{}/{}", part(self.network), part(self.container_id), self.ifname)
    }
}

/// The beginning of the comments of a network's elements.
fn network_prefix(network: &str) -> String {
    format!("{}/", part(network))
}

fn part(text: &str) -> String {
    if text.len() <= MAX_PART {
        return text.to_owned();
    }
    // A name that long keeps its beginning for people, and its hash for uniqueness.
    let head: String = text.chars().take(MAX_PART - 17).collect();
    format!("{head}~{:016x}", fnv1a(text.as_bytes()))
}

/// FNV-1a: the same in every build, since what it names outlives an upgrade.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Whether the kernel has nf_tables, and this process may use it.
pub fn available() -> Result<(), NftError> {
    match Socket::open()?.table_exists() {
        Ok(_) => Ok(()),
        Err(source) => Err(NftError::new("reach nf_tables", source)),
    }
}

/// Deletes the table with everything in it, and what goes with it; tells whether there was one.
pub fn flush_all() -> Result<bool, NftError> {
    route::release(layout::STAND_IN)?;
    let mut socket = Socket::open()?;
    match socket.commit(&[layout::delete_table()]) {
        Ok(()) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(source) => Err(NftError::new(format!("delete the table inet {TABLE}"), source)),
    }
}

/// Whether the kernel's answer says that table, set, chain or element is not there.
fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ENOENT as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_tell_attachments_apart_and_fit() {
        let owner = |network, container_id| Owner { network, container_id, ifname: "eth0" };
        assert_eq!(owner("net", "c1").comment(), "net/c1/eth0");
        let long = "n".repeat(200);
        let other = format!("{long}x");
        assert_ne!(owner(&long, "c").comment(), owner(&other, "c").comment());
        assert!(owner(&long, &other).comment().len() < 250);
        assert!(owner(&long, "c").comment().starts_with(&network_prefix(&long)));
    }
}

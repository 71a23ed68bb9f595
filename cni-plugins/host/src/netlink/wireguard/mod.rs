//! WireGuard devices: keys, peers and what they may send, by generic netlink.
//!
//! Input: what a device should be ([`Wanted`]). Output: what it is ([`Device`]), and from both the changes ([`plan`]), which
//! interrupt no peer that stays. In reading order: [`key`], `wire` (messages), [`plan`], here the socket, and [`tunnel`] (link
//! and device together, as a keeper of a tunnel needs them).
//!
//! The kernel tells nobody of changes of peers; who wants to know looks ([`WireGuard::device`]).

pub mod key;
mod plan;
pub mod tunnel;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
};

pub use cni_plugins_types::IpNet;
use nix::{errno::Errno, sys::socket::SockProtocol};

pub use self::{
    key::Key,
    plan::{Change, PeerChange, plan},
};
use super::{
    codec::Message,
    socket::{Socket, errno_of},
};

/// Kind of the link.
pub const KIND: &str = "wireguard";
/// The kernel's module and family, as it is told to whoever has none.
const NO_WIREGUARD: &str = "this kernel has no WireGuard (CONFIG_WIREGUARD, since Linux 5.6)";

/// A peer: who has its key may send from these addresses, and what goes to them is sent to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// Where it is; without it the peer must send first.
    pub endpoint: Option<SocketAddr>,
    /// Its addresses.
    pub allowed: BTreeSet<IpNet>,
    /// A second, symmetric key that both know.
    pub preshared: Option<Key>,
    /// Seconds between packets that keep a translation of addresses on the way alive; 0 for none.
    pub keepalive: u16,
}

/// What a device should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its own key.
    pub private_key: Key,
    /// UDP port.
    pub port: u16,
    /// Its peers by public key; no others.
    pub peers: BTreeMap<Key, Peer>,
}

/// What a device is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// Index of the link.
    pub index: u32,
    /// Its own key.
    pub private_key: Option<Key>,
    /// The public half, by which its peers know it.
    pub public_key: Option<Key>,
    /// UDP port.
    pub port: u16,
    /// Its peers by public key.
    pub peers: BTreeMap<Key, Peer>,
}

/// A failed step on a device.
#[derive(Debug, thiserror::Error)]
pub enum WireGuardError {
    /// The kernel has none.
    #[error("{NO_WIREGUARD}")]
    Unsupported,
    /// The link went while it was worked on.
    #[error("{0} vanished")]
    Vanished(String),
    /// The kernel refused.
    #[error("cannot {step}")]
    Request {
        /// What was tried.
        step: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl WireGuardError {
    /// The kernel's errno.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            WireGuardError::Request { source, .. } => errno_of(source),
            WireGuardError::Unsupported | WireGuardError::Vanished(_) => None,
        }
    }
}

/// A connection to the WireGuard of one network namespace.
#[derive(Debug)]
pub struct WireGuard {
    socket: Socket,
    family: u16,
}

impl WireGuard {
    /// Connects to the calling thread's namespace; loads the module where that is possible.
    pub fn open() -> Result<Self, WireGuardError> {
        let failed = |source| request("find WireGuard in the kernel", source);
        let mut socket = Socket::open(SockProtocol::NetlinkGeneric).map_err(failed)?;
        let answer = match socket.request(&wire::find_family()) {
            Err(error) if errno_of(&error) == Some(Errno::ENOENT) => return Err(WireGuardError::Unsupported),
            answer => answer.map_err(failed)?,
        };
        let family = answer.iter().find_map(|body| wire::read_family(body));
        Ok(Self { socket, family: family.ok_or(WireGuardError::Unsupported)? })
    }

    /// The device of a link; nothing when there is no such link, or it is none of WireGuard's.
    pub fn device(&mut self, index: u32) -> Result<Option<Device>, WireGuardError> {
        let mut device = Device { index, ..Device::default() };
        let dumped = self.socket.dump(&wire::get(self.family, index), |body| wire::read(&mut device, body));
        match dumped {
            Ok(()) => Ok(Some(device)),
            Err(error) if matches!(errno_of(&error), Some(Errno::ENODEV | Errno::EOPNOTSUPP)) => Ok(None),
            Err(source) => Err(request(format!("look at WireGuard device {index}"), source)),
        }
    }

    /// Carries changes out, in their order.
    pub fn apply(&mut self, index: u32, changes: &[Change]) -> Result<(), WireGuardError> {
        for message in wire::set(self.family, index, changes) {
            self.send(index, &message)?;
        }
        Ok(())
    }

    fn send(&mut self, index: u32, message: &Message) -> Result<(), WireGuardError> {
        let sent = self.socket.request(message);
        sent.map(|_| ()).map_err(|source| request(format!("configure WireGuard device {index}"), source))
    }
}

fn request(step: impl Into<String>, source: io::Error) -> WireGuardError {
    WireGuardError::Request { step: step.into(), source }
}

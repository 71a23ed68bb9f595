//! The tunnel's link: made when it is missing, adjusted where it differs, with a key that outlives it.
//!
//! A device that is right is taken over as it is, so that whoever keeps it may be started anew without a packet lost.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use nix::errno::Errno;

use super::{Change, Device, IpNet, KIND, Key, Wanted, WireGuard, WireGuardError, plan};
use crate::netlink::{Link, LinkChange, LinkRef, Netlink, NetlinkError, Step};

/// What the tunnel must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnel {
    /// Name of the link.
    pub name: String,
    /// UDP port.
    pub port: u16,
    /// Largest packet that goes in.
    pub mtu: u32,
    /// Its addresses, each alone in its range.
    pub addresses: Vec<IpAddr>,
    /// Where its private key is kept.
    pub key_file: PathBuf,
}

/// A tunnel that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Up {
    /// Index of the link.
    pub index: u32,
    /// What its peers must know it by.
    pub public_key: Key,
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The name is taken.
    #[error("an interface called {0} exists and is no WireGuard device")]
    NotOurs(String),
    /// The port is taken.
    #[error("UDP port {0} is used by another program or WireGuard device")]
    Port(u16),
    /// The private key could not be read or kept.
    #[error("cannot use the private key")]
    Key(#[source] io::Error),
    /// The kernel refused a change of the link.
    #[error(transparent)]
    Link(#[from] NetlinkError),
    /// The kernel refused a change of the device.
    #[error(transparent)]
    Device(#[from] WireGuardError),
}

impl Tunnel {
    /// Makes it so. Peers stay as they are.
    pub fn ensure(&self) -> Result<Up, TunnelError> {
        let private_key = Key::load_or_create(&self.key_file).map_err(TunnelError::Key)?;
        let netlink = Netlink::open()?;
        let link = self.link(&netlink)?;
        let mut wireguard = WireGuard::open()?;
        let device = find(&mut wireguard, &link)?;
        let wanted = Wanted { private_key, port: self.port, peers: device.peers.clone() };
        let changes = plan(&wanted, &device, None);
        self.tell_port(wireguard.apply(link.index, &changes), WireGuardError::errno)?;
        let change = LinkChange {
            mtu: (link.mtu != self.mtu).then_some(self.mtu),
            up: (!link.up).then_some(true),
            ..LinkChange::default()
        };
        if change.is_some() {
            // The port is taken when the link goes up.
            let done = netlink.run(vec![Step::set_link(LinkRef::Index(link.index), &change)]);
            self.tell_port(done, NetlinkError::errno)?;
        }
        self.set_addresses(&netlink, link.index)?;
        let public_key = match device.public_key.filter(|_| changes.is_empty()) {
            Some(key) => key,
            None => find(&mut wireguard, &link)?.public_key.unwrap_or(Key::NONE),
        };
        Ok(Up { index: link.index, public_key })
    }

    fn link(&self, netlink: &Netlink) -> Result<Link, TunnelError> {
        let vanished = || WireGuardError::Vanished(self.name.clone());
        if netlink.link(&self.name)?.is_none() {
            let made = netlink.run_one(Step::create_link(&self.name, KIND).tolerating(Errno::EEXIST));
            match made {
                Err(error) if error.is(Errno::EOPNOTSUPP) => return Err(WireGuardError::Unsupported.into()),
                made => drop(made?),
            }
        }
        let link = netlink.link(&self.name)?.ok_or_else(vanished)?;
        if link.kind.as_deref() == Some(KIND) {
            Ok(link)
        } else {
            Err(TunnelError::NotOurs(self.name.clone()))
        }
    }

    /// Exactly these addresses; link-local ones are others'.
    fn set_addresses(&self, netlink: &Netlink, index: u32) -> Result<(), TunnelError> {
        let alone = |address: &IpAddr| IpNet::new(*address, if address.is_ipv4() { 32 } else { 128 });
        let wanted: Vec<IpNet> = self.addresses.iter().filter_map(alone).collect();
        let has = netlink.addresses(index)?;
        let is_link_local = |net: &IpNet| matches!(net.addr(), IpAddr::V6(v6) if v6.is_unicast_link_local());
        let gone = has.iter().filter(|net| !wanted.contains(net) && !is_link_local(net));
        let missing = wanted.iter().filter(|net| !has.contains(net));
        let steps = gone
            .map(|net| Step::delete_address(index, *net))
            .chain(missing.map(|net| Step::add_address(index, *net, false)));
        netlink.run(steps.collect())?;
        Ok(())
    }

    fn tell_port<T, E: Into<TunnelError>>(
        &self,
        done: Result<T, E>,
        errno: impl Fn(&E) -> Option<Errno>,
    ) -> Result<T, TunnelError> {
        match done {
            Err(error) if errno(&error) == Some(Errno::EADDRINUSE) => Err(TunnelError::Port(self.port)),
            done => done.map_err(Into::into),
        }
    }
}

/// Removes the link, if it is one of WireGuard's; tells whether it was. The key stays.
pub fn remove(name: &str) -> Result<bool, TunnelError> {
    let netlink = Netlink::open()?;
    match netlink.link(name)? {
        Some(link) if link.kind.as_deref() == Some(KIND) => Ok(netlink.delete_link(name)?),
        _ => Ok(false),
    }
}

/// Makes these the peers of a device; returns how many changes it took. `last`: what they were to be when this was asked
/// before, where that is known.
pub fn set_peers(
    index: u32,
    peers: &std::collections::BTreeMap<Key, super::Peer>,
    last: Option<&std::collections::BTreeMap<Key, super::Peer>>,
) -> Result<usize, TunnelError> {
    let mut wireguard = WireGuard::open()?;
    let device = wireguard.device(index)?.ok_or_else(|| WireGuardError::Vanished(format!("link {index}")))?;
    let own = Wanted {
        private_key: device.private_key.unwrap_or(Key::NONE),
        port: device.port,
        peers: peers.clone(),
    };
    let changes: Vec<Change> = plan(&own, &device, last)
        .into_iter()
        .filter(|change| matches!(change, Change::Remove(_) | Change::Peer(..)))
        .collect();
    wireguard.apply(index, &changes)?;
    Ok(changes.len())
}

/// Whether a device is gone, or has another key, port or other peers than these, which it was given before.
pub fn is_changed(
    index: u32,
    port: u16,
    public_key: Key,
    peers: &std::collections::BTreeMap<Key, super::Peer>,
) -> Result<bool, TunnelError> {
    let Some(device) = WireGuard::open()?.device(index)? else { return Ok(true) };
    let wanted = Wanted { private_key: device.private_key.unwrap_or(Key::NONE), port, peers: peers.clone() };
    // A peer that roams is where it should be.
    Ok(device.public_key != Some(public_key) || !plan(&wanted, &device, Some(peers)).is_empty())
}

/// Removes the key that [`Tunnel::ensure`] made; absence is success. For when a node is taken down for good.
pub fn forget_key(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn find(wireguard: &mut WireGuard, link: &Link) -> Result<Device, WireGuardError> {
    wireguard.device(link.index)?.ok_or_else(|| WireGuardError::Vanished(link.name.clone()))
}

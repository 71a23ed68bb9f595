//! The encrypted tunnel: link, key and peers, by the blocking calls of [`cni_plugins_host::netlink::wireguard`], each on a
//! thread that may wait.
//!
//! The kernel tells nobody when a peer is removed by hand, so the peers are looked at ([`is_changed`]).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use agent_core::overlay::KeyHolder;
use anyhow::{Context, Result};
use cni_plugins_host::netlink::wireguard::tunnel;
pub use cni_plugins_host::netlink::wireguard::{
    IpNet, Key, Peer, WireGuard,
    tunnel::{Tunnel, Up},
};

/// Peers by public key.
pub type Peers = BTreeMap<Key, Peer>;

/// The peers that hold these keys, all at one port. A key that is none is left out: its holder is told to be unreachable by
/// the absence of answers, which is all that can be done about it here.
pub(super) fn peers_of(holders: &BTreeMap<String, KeyHolder>, port: u16, preshared: Option<Key>) -> Peers {
    let peer = |holder: &KeyHolder| Peer {
        endpoint: Some(SocketAddr::new(holder.address, port)),
        allowed: holder
            .ranges
            .iter()
            .filter_map(|range| IpNet::new(range.network(), range.prefix()))
            .collect(),
        preshared,
        ..Peer::default()
    };
    holders.iter().filter_map(|(key, holder)| Some((key.parse().ok()?, peer(holder)))).collect()
}

/// Makes link, key, port, MTU and addresses as they should be; peers stay as they are.
pub async fn ensure(wanted: Tunnel) -> Result<Up> {
    blocking(move || wanted.ensure()).await.context("the encrypted tunnel")
}

/// The second key of all peers, where a file has one; read at every pass, so that it may be exchanged.
pub(super) async fn preshared(file: Option<PathBuf>) -> Result<Option<Key>> {
    let Some(file) = file else { return Ok(None) };
    let loaded = tokio::task::spawn_blocking(move || Key::load(&file)).await?;
    loaded.map(Some).context("keelson.network.presharedKeyFile")
}

/// Makes these the peers; returns the number of changes. `last`: what was wanted by this process before, so that a peer
/// behind a translation of addresses is left where the kernel heard it.
pub async fn set_peers(index: u32, peers: Arc<Peers>, last: Option<Arc<Peers>>) -> Result<usize> {
    blocking(move || tunnel::set_peers(index, &peers, last.as_deref()))
        .await
        .context("peers of the encrypted tunnel")
}

/// Whether key, port or peers are other than the last pass left them.
pub(super) async fn is_changed(index: u32, port: u16, own: String, peers: Arc<Peers>) -> Result<bool> {
    let own: Key = own.parse()?;
    blocking(move || tunnel::is_changed(index, port, own, &peers))
        .await
        .context("look at the encrypted tunnel")
}

/// Whether the kernel has it.
pub(super) async fn available() -> Result<()> {
    blocking(|| Ok(WireGuard::open().map(drop)?)).await
}

/// Removes a WireGuard link that an earlier mode left; tells whether there was one. The key stays.
pub async fn remove(name: String) -> Result<bool> {
    blocking(move || tunnel::remove(&name)).await.context("remove the encrypted tunnel")
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, tunnel::TunnelError> + Send + 'static,
) -> Result<T> {
    Ok(tokio::task::spawn_blocking(work).await??)
}

//! What the way to a peer carries, where that is less than the underlay's interface says.
//!
//! Known from two sources: routes of the host that state an MTU, and the routers on the way. To hear of these a packet of the
//! interface's full size, which may not be split, goes to every peer behind a router: when the peer, the route to it or the
//! interface changes, and then each minute, since the kernel forgets what it was told after ten. A router whose next link carries less says so,
//! and whoever asks the kernel for the route to that peer is told. The peer drops the packet: it is none of the tunnel's.
//! Peers in a subnet of the interface are not asked; no router is on the way to them. A router that does not answer is not
//! found out.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use agent_core::overlay::{Entries, Hop, Mode, Place, Range, mtu};
use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::route::RouteAttribute;
use nix::errno::Errno;
use rtnetlink::RouteMessageBuilder;
use tokio::net::UdpSocket;
use tokio::sync::watch;

use super::Peers;
use super::kernel::{self, Kernel};

/// Pause between two looks at the same peers.
const AGAIN: Duration = Duration::from_secs(60);
/// Longest wait for a router's answer; mostly none is to come.
const ANSWER: Duration = Duration::from_secs(1);
/// Links on the way, each narrower than the one before, that are found in one look.
const NARROWER: usize = 4;
/// Peers that are asked at the same time.
const AT_ONCE: usize = 128;

/// Path MTUs by a peer's address; only of those that were told one.
pub(super) type Learned = BTreeMap<IpAddr, u32>;

/// Whom to ask.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Targets {
    /// Addresses of peers behind a router, with the route there.
    peers: BTreeMap<IpAddr, Option<Hop>>,
    /// UDP port of the tunnel there.
    port: u16,
    /// What the interface carries.
    mtu: u32,
}

impl Targets {
    /// The peers that are reached through a router.
    pub(super) fn of(place: &Place, peers: &Peers, routes: &[kernel::Route], port: u16, mtu: u32) -> Self {
        let addresses = peers.values().filter(|peer| peer.name != place.node);
        let far = addresses
            .filter_map(|peer| peer.address_like(place.address))
            .filter(|address| !place.subnets.iter().any(|subnet| subnet.contains(*address)));
        let peers = far.map(|peer| (peer, kernel::leading(routes, peer).map(|route| route.hop)));
        Self { peers: peers.collect(), port, mtu }
    }

    /// Whether a route to this range may lead to one of them.
    pub(super) fn are_in(&self, range: &Range) -> bool {
        self.peers.keys().any(|peer| range.contains(*peer))
    }
}

/// Asks for ever; `learned` changes when an answer does.
pub(super) async fn keep(
    kernel: Kernel,
    mut targets: watch::Receiver<Targets>,
    learned: watch::Sender<Learned>,
) {
    loop {
        let now = targets.borrow_and_update().clone();
        let found = ask(&kernel, &now).await;
        learned.send_if_modified(|current| {
            let differs = *current != found;
            *current = found;
            differs
        });
        // Cancel-safe: the watch keeps what was not seen.
        tokio::select! {
            changed = targets.changed() => if changed.is_err() {
                // The role is ending.
                return std::future::pending().await;
            },
            () = tokio::time::sleep(AGAIN), if !now.peers.is_empty() => {}
        }
    }
}

async fn ask(kernel: &Kernel, targets: &Targets) -> Learned {
    let (port, mtu) = (targets.port, targets.mtu);
    let peers: Vec<IpAddr> = targets.peers.keys().copied().collect();
    let asked = peers.into_iter().map(|peer| {
        let kernel = kernel.clone();
        async move { (peer, ask_one(kernel, peer, port, mtu).await) }
    });
    let told: Vec<(IpAddr, Option<u32>)> =
        futures::stream::iter(asked).buffer_unordered(AT_ONCE).collect().await;
    told.into_iter().filter_map(|(peer, told)| Some((peer, told?))).collect()
}

/// What the way to one peer carries, if somebody has said so.
async fn ask_one(kernel: Kernel, peer: IpAddr, port: u16, mtu: u32) -> Option<u32> {
    let mut known = told(&kernel, peer).await;
    for _ in 0..NARROWER {
        let size = known.unwrap_or(mtu).min(mtu);
        if !is_answered(peer, port, size).await {
            break;
        }
        let now = told(&kernel, peer).await;
        if now == known {
            break;
        }
        known = now;
    }
    known.filter(|known| *known < mtu)
}

/// Sends a packet of this size, and waits whether anybody calls it too large; once more, as either may get lost.
async fn is_answered(peer: IpAddr, port: u16, size: u32) -> bool {
    let headers = if peer.is_ipv4() { 28 } else { 48 };
    let payload = vec![0; usize::try_from(size.saturating_sub(headers)).unwrap_or_default()];
    for _ in 0..2 {
        if let Ok(Err(error)) = tokio::time::timeout(ANSWER, send(peer, port, &payload)).await {
            return error.raw_os_error() == Some(Errno::EMSGSIZE as i32);
        }
    }
    false
}

/// Sends a packet and waits for what comes back, which is an error.
async fn send(peer: IpAddr, port: u16, payload: &[u8]) -> io::Result<()> {
    let any: IpAddr = if peer.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    // Linux forbids splitting what it does not know to be too large.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect((peer, port)).await?;
    socket.send(payload).await?;
    socket.recv(&mut [0]).await.map(drop)
}

/// The MTU of the way to an address as the kernel knows it; nothing where it is the interface's.
async fn told(kernel: &Kernel, peer: IpAddr) -> Option<u32> {
    let bits = if peer.is_ipv4() { 32 } else { 128 };
    let query = RouteMessageBuilder::<IpAddr>::new().destination_prefix(peer, bits).ok()?.build();
    let answer = kernel.handle.route().get(query).execute().try_next().await.ok()??;
    answer.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(kernel::mtu),
        _ => None,
    })
}

/// Routes to peers behind a way that is narrower than the device say so.
pub(super) fn narrow(
    place: &Place,
    wanted: &mut Entries,
    routes: &[kernel::Route],
    learned: &Learned,
    peers: &Peers,
) {
    let addresses = peers.values().flat_map(|peer| peer.addresses.iter().copied());
    let mut paths = kernel::path_mtus(routes, addresses);
    for (peer, told) in learned {
        paths.entry(*peer).and_modify(|path| *path = (*path).min(*told)).or_insert(*told);
    }
    for hop in wanted.routes.values_mut() {
        hop.mtu = 0;
    }
    for peer in peers.values() {
        let Some(path) = peer.address_like(place.address).and_then(|address| paths.get(&address)) else {
            continue;
        };
        for range in &peer.ranges {
            if let Some(hop) = wanted.routes.get_mut(range) {
                let tunnel = place.tunnel.filter(|tunnel| tunnel.index == hop.device);
                let mode = if tunnel.is_some() { place.mode } else { Mode::HostGw };
                let fits = mtu::for_pods(mode, place.address, *path, []);
                let limit = tunnel.map_or(u32::MAX, |tunnel| tunnel.mtu);
                hop.mtu = if fits < limit { fits } else { 0 };
            }
        }
    }
}

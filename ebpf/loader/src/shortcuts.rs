//! Pods of one bridge that hand their packets straight to each other: a program on the host's side of each pod's link
//! (TCX), and a hash of the pods' link addresses. For pods of other nodes another one on the tunnel's device, and a hash of the
//! pods' addresses: between pod and tunnel packets are routed without bridge and stack.
//!
//! A pod is in both or in neither. Whoever's programs stand on its link besides want to see its packets: then the bridge
//! carries them. The hash holds true for a while after it was last looked at ([`TRUST`]), so that nothing is sent to pods
//! that came and went while nobody was there to follow them.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
    programs::SchedClassifier,
};
use ebpf_common::{FarPod, FarPodEntry, LinkAddress, NetAddr, PodLink, PodRouter};

use crate::{
    devices::{self, TCX_EGRESS, TCX_INGRESS, update},
    maps::Maps,
    pins::PinDir,
    plane::DataPlane,
    sys,
};

/// The hash of pods.
pub(crate) type ShortcutMap = HashMap<MapData, LinkAddress, PodLink>;

/// The hash of pods' addresses.
pub(crate) type FarPodMap = HashMap<MapData, NetAddr, FarPodEntry>;

/// How long what was written holds true without being written again.
const TRUST: Duration = Duration::from_secs(90);
const PROGRAM: &str = "kl_pod";
const PIN: &str = "pod-";
const FAR_PROGRAM: &str = "kl_far";
const FAR_PIN: &str = "far-";

/// The host's side of a pod's link, a port of the pods' bridge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodPort {
    /// The kernel's number.
    pub index: u32,
    /// The address that the pod's side has.
    pub address: [u8; 6],
}

/// The tunnel to other nodes, and the bridge whose pods' packets are routed there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The kernel's number of the tunnel's device.
    pub index: u32,
    /// The bridge's own link address.
    pub bridge: [u8; 6],
    /// Bytes that a packet for its pods may have.
    pub mtu: u32,
    /// The pods' addresses, each with the host's side of the link of its pod.
    pub pods: BTreeMap<IpAddr, u32>,
}

impl DataPlane {
    /// Has these pods, and no others, hand their packets straight to each other, for as long as this is called again
    /// within a minute; how many do. One that the kernel or a foreign program on its link is in the way of has its packets
    /// carried by the bridge, as all have later.
    pub fn shortcut_pods(&mut self, ports: &[PodPort]) -> usize {
        let until = sys::monotonic() + TRUST;
        let until = if ports.is_empty() { 0 } else { u64::try_from(until.as_nanos()).unwrap_or(u64::MAX) };
        self.shortcut_pods_until(ports, until)
    }

    /// Has those of them that have an address here exchange packets with the tunnel to other nodes without bridge and stack, for
    /// as long as the former holds; with no tunnel none. How many addresses that are.
    pub fn route_pods(&mut self, tunnel: Option<&Tunnel>) -> usize {
        route(&mut self.object, &self.pins, &mut self.maps, &mut self.routed, tunnel);
        self.routed.count()
    }

    /// The addresses that were told last are fresh: those that pods had contradicted before are right again.
    pub fn believe_pods(&mut self) {
        self.routed.believe();
    }

    /// The same until a moment of `CLOCK_MONOTONIC`, in nanoseconds: for tests.
    #[doc(hidden)]
    pub fn shortcut_pods_until(&mut self, ports: &[PodPort], until_ns: u64) -> usize {
        let served = serve(&mut self.object, &self.pins, &mut self.maps.shortcuts, ports);
        if let Err(error) = self.maps.trust_shortcuts(until_ns) {
            tracing::warn!(%error, "pods' packets take the bridge");
        }
        self.shortcuts = served;
        served
    }
}

/// Loads the programs. A kernel that does not take them has a bridge.
pub(crate) fn load(object: &mut Ebpf) {
    for name in [PROGRAM, FAR_PROGRAM] {
        if let Some(Err(error)) = program(object, name).map(SchedClassifier::load) {
            tracing::info!(error = &error as &dyn std::error::Error, "pods' packets take the bridge");
        }
    }
}

fn program<'o>(object: &'o mut Ebpf, name: &str) -> Option<&'o mut SchedClassifier> {
    object.program_mut(name)?.try_into().ok()
}

/// The addresses that are routed.
#[derive(Debug, Default)]
pub(crate) struct Routed {
    written: BTreeMap<NetAddr, FarPodEntry>,
    /// What pods contradict by what they send; they are believed more than what was told before.
    doubted: BTreeMap<NetAddr, FarPodEntry>,
}

impl Routed {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.written.len()
    }

    /// What is told from now on is fresh.
    pub(crate) fn believe(&mut self) {
        self.doubted.clear();
    }
}

/// Routes packets between the tunnel and its pods, as far as these hand their packets to each other, or with no tunnel none.
fn route(object: &mut Ebpf, pins: &PinDir, maps: &mut Maps, routed: &mut Routed, tunnel: Option<&Tunnel>) {
    let program = program(object, FAR_PROGRAM).and_then(|program| program.fd().ok());
    let tunnel = tunnel.filter(|tunnel| match &program {
        Some(program) => attach_far(program.as_fd(), pins, tunnel.index).unwrap_or_else(|error| {
            tracing::debug!(index = tunnel.index, %error, "packets from other nodes' pods take the bridge");
            false
        }),
        None => false,
    });
    for (pin, index) in numbered_pins(&pins.links(), FAR_PIN) {
        if tunnel.is_none_or(|tunnel| tunnel.index != index)
            && let Err(error) = release(&pin)
        {
            tracing::warn!(index, %error, "cannot take the packet program off a tunnel");
        }
    }
    let of_link: BTreeMap<u32, [u8; 6]> = maps
        .shortcuts
        .iter()
        .filter_map(Result::ok)
        .filter_map(|(address, link)| Some((link.index_for(&address)?, address.bytes)))
        .collect();
    let pods = tunnel.into_iter().flat_map(|tunnel| &tunnel.pods);
    let present: BTreeMap<NetAddr, FarPodEntry> = maps.far_pods.iter().filter_map(Result::ok).collect();
    let lost =
        std::mem::take(&mut routed.written).into_iter().filter(|(address, _)| !present.contains_key(address));
    routed.doubted.extend(lost);
    let wanted: BTreeMap<NetAddr, FarPodEntry> = pods
        .filter_map(|(ip, link)| {
            let address = NetAddr::from(*ip);
            let pod = FarPod { link: *link, mac: *of_link.get(link)? };
            Some((address, FarPodEntry::new(&address, &pod)))
        })
        .filter(|(address, entry)| routed.doubted.get(address) != Some(entry))
        .collect();
    let router = tunnel.filter(|_| !wanted.is_empty()).map_or_else(PodRouter::default, |tunnel| PodRouter {
        tunnel: tunnel.index,
        mtu: tunnel.mtu,
        mac: tunnel.bridge,
        padding: [0; 2],
    });
    // What is gone or has moved first: nothing is to be sent there.
    for (address, _) in present.iter().filter(|(address, entry)| wanted.get(address) != Some(entry)) {
        if let Err(error) = maps.far_pods.remove(address) {
            // A pod that contradicts it may have been faster.
            tracing::debug!(?address, %error, "a pod's address was forgotten already");
        }
    }
    if let Err(error) = maps.route_pods(router) {
        tracing::warn!(%error, "packets for other nodes' pods take the bridge");
        return;
    }
    let kept = wanted.into_iter().filter(|(address, entry)| {
        present.get(address) == Some(entry) || maps.far_pods.insert(*address, *entry, 0).is_ok()
    });
    routed.written = kept.collect();
}

/// Whether the program is on the tunnel's device now, and nobody's but ours are.
fn attach_far(program: BorrowedFd<'_>, pins: &PinDir, index: u32) -> io::Result<bool> {
    let pin = pins.link(&format!("{FAR_PIN}{index}-in"));
    let mut own = devices::own_links(pins, index)?;
    if let Ok(link) = sys::get_pinned(&pin) {
        own.push(sys::link_info(link.as_fd())?.id);
    }
    // A filter's number is 0.
    if sys::links_on_device(index, TCX_INGRESS)?.iter().any(|id| *id == 0 || !own.contains(id)) {
        return Ok(false);
    }
    put(program, &pin, index)?;
    Ok(true)
}

/// Makes exactly these pods hand their packets to each other; how many of them do.
fn serve(object: &mut Ebpf, pins: &PinDir, map: &mut ShortcutMap, ports: &[PodPort]) -> usize {
    let program = program(object, PROGRAM).and_then(|program| program.fd().ok());
    let wanted = match &program {
        Some(program) => attached(program.as_fd(), pins, ports),
        None => BTreeMap::new(),
    };
    // What is gone or has moved first: nothing is to be sent there.
    for (address, link) in map.iter().filter_map(Result::ok).collect::<Vec<_>>() {
        if wanted.get(&address).copied() != link.index_for(&address)
            && let Err(error) = map.remove(&address)
        {
            tracing::warn!(?address, %error, "packets may be handed to a pod that is gone");
        }
    }
    for (pin, index) in numbered_pins(&pins.links(), PIN) {
        if !wanted.values().any(|other| *other == index)
            && let Err(error) = release(&pin)
        {
            tracing::warn!(index, %error, "cannot take the packet program off a pod's link");
        }
    }
    let written = wanted.iter().filter(|(address, index)| {
        let link = PodLink::new(address, **index);
        map.get(address, 0).is_ok_and(|present| present == link) || map.insert(*address, link, 0).is_ok()
    });
    written.count()
}

/// Puts the program on the pods' links; those where it is alone, each with its address.
fn attached(program: BorrowedFd<'_>, pins: &PinDir, ports: &[PodPort]) -> BTreeMap<LinkAddress, u32> {
    let mut wanted: BTreeMap<LinkAddress, Option<u32>> = BTreeMap::new();
    for port in ports {
        // Of two with one address the bridge knows which one spoke last.
        wanted
            .entry(LinkAddress::new(port.address))
            .and_modify(|taken| *taken = None)
            .or_insert(Some(port.index));
    }
    let served = wanted.into_iter().filter_map(|(address, index)| {
        let index = index?;
        match attach(program, &pins.link(&format!("{PIN}{index}-in")), index) {
            Ok(true) => Some((address, index)),
            Ok(false) => None,
            Err(error) => {
                tracing::debug!(index, %error, "a pod's packets take the bridge");
                None
            }
        }
    });
    served.collect()
}

/// Whether the program is on the link now, and nobody else's is.
fn attach(program: BorrowedFd<'_>, pin: &Path, index: u32) -> io::Result<bool> {
    let own = match sys::get_pinned(pin) {
        Ok(link) => sys::link_info(link.as_fd())?.id,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let foreign = |id: &u32| *id == 0 || *id != own;
    if sys::links_on_device(index, TCX_INGRESS)?.iter().any(foreign)
        || !sys::links_on_device(index, TCX_EGRESS)?.is_empty()
    {
        return Ok(false);
    }
    put(program, pin, index)?;
    Ok(true)
}

/// Puts a program, or another version of it, before what arrives at a device.
fn put(program: BorrowedFd<'_>, pin: &Path, index: u32) -> io::Result<()> {
    if update(pin, program, index, TCX_INGRESS)? {
        return Ok(());
    }
    let link = sys::link_create_on_device(program, index, TCX_INGRESS, 0)?;
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::pin(link.as_fd(), pin)
}

fn release(pin: &Path) -> io::Result<()> {
    if let Ok(link) = sys::get_pinned(pin)
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        tracing::debug!(pin = %pin.display(), %error, "the pod had gone already");
    }
    fs::remove_file(pin)
}

/// The pins of links whose names begin so, with the device's index of each.
fn numbered_pins(links: &Path, start: &str) -> Vec<(PathBuf, u32)> {
    let entries = fs::read_dir(links).into_iter().flatten().flatten();
    let pins = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let (index, _) = name.strip_prefix(start)?.split_once('-')?;
        Some((entry.path(), index.parse().ok()?))
    });
    pins.collect()
}

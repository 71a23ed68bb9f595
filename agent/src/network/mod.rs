//! The network between nodes: packets of this node's pods reach the pods of every other node by their own addresses.
//!
//! ```text
//! Node objects ─ peers ─▶ desired entries (pure) ─ plan (pure) ─▶ netlink
//! this machine ─ underlay, device ──────┘               ▲
//! netlink events ───────────────────────────────────────┘
//! ```
//! One task owns it: the tunnel device, one route and neighbour per pod range and one FDB entry per peer, or plain routes.
//! It acts when a Node object or the kernel says that something changed; an entry that somebody removed is back at once.
//! Everything stays when the agent ends, and the next one takes it over. Nothing is removed before all nodes are listed.
//! What the node's peers must know goes to its annotations ([`publish`]); pods get the right MTU through [`State`].

mod device;
mod kernel;
mod path;
mod peers;
mod pod_links;
mod publish;
mod state;
mod underlay;
pub mod wireguard;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_core::overlay::{
    Entries, Mac, Mode, Place, Problem, Range, Tunnel, desired, mtu, node as names, plan, pod_ranges,
};
use anyhow::{Context, Result, ensure};
use cni_plugins_host::overlay;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::{AgentConfig, NetworkSection};
use crate::events::{EventRecorder, EventType};
use kernel::{Change, Kernel};
pub use peers::Peers;
pub use publish::Annotations;
use underlay::{Choice, Underlay};

/// Pauses after a failure, doubled up to the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// A look without a reason, in case that the kernel's message of a change was lost.
const AUDIT: Duration = Duration::from_secs(60);
/// What a peer may not have published yet is no problem before.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two looks at the encrypted tunnel's peers; two of them, and a pass, are within a second.
const LOOK: Duration = Duration::from_millis(400);
/// One pass over the kernel's tables at most.
const DEADLINE: Duration = Duration::from_secs(30);

/// Names and ports of the tunnel where nothing is said.
const VXLAN_DEVICE: &str = "kl-vxlan";
const WIREGUARD_DEVICE: &str = "kl-wg";
const VXLAN_PORT: u16 = 8472;
const WIREGUARD_PORT: u16 = 51820;
/// Where the plugins' records are where nothing is said.
const STATE_DIR: &str = "/run/keelson/cni";

/// What other parts need to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// MTU for pods.
    pub mtu: u32,
}

/// The settings, checked.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    node: String,
    node_ip: IpAddr,
    mode: Mode,
    direct_routing: bool,
    choice: Choice,
    ipv6: bool,
    device: String,
    vni: u32,
    port: u16,
    mtu: u32,
    bridge: Option<String>,
    namespaces: Option<PathBuf>,
    key_file: PathBuf,
    preshared_key_file: Option<PathBuf>,
    state_file: PathBuf,
    /// Ranges that pods do not leave the cluster by.
    cluster: Vec<wireguard::IpNet>,
}

impl NetworkConfig {
    /// From the agent's configuration; names the field that makes no sense.
    pub fn new(section: &NetworkSection, config: &AgentConfig) -> Result<Self> {
        let keelson = &config.keelson;
        ensure!(
            !section.device.is_empty() && section.device.len() < 16,
            "keelson.network.device: {:?} is no interface name (1 to 15 characters)",
            section.device
        );
        ensure!(
            (1..1 << 24).contains(&section.vni),
            "keelson.network.vni: {} is not within 1 and 16777215",
            section.vni
        );
        ensure!(section.port != 0, "keelson.network.port: must not be 0");
        ensure!(
            section.mtu == 0 || section.mtu >= mtu::SMALLEST,
            "keelson.network.mtu: {} is less than {}; 0 derives it from the underlay",
            section.mtu,
            mtu::SMALLEST
        );
        let choice = match (&section.underlay.interface, section.underlay.route) {
            (Some(_), Some(_)) => {
                anyhow::bail!("keelson.network.underlay: either interface or route, not both")
            }
            (Some(name), None) => Choice::Interface(name.clone()),
            (None, Some(to)) => Choice::Route(to),
            (None, None) => Choice::NodeAddress,
        };
        ensure!(
            !(section.mode == Mode::Wireguard && section.direct_routing),
            "keelson.network.directRouting: not with mode wireguard, as packets would travel in the clear"
        );
        ensure!(
            section.mode == Mode::Wireguard || section.preshared_key_file.is_none(),
            "keelson.network.presharedKeyFile: only with mode wireguard, as nothing else encrypts"
        );
        // What is not said is as VXLAN has it; this mode has a name and a port of its own.
        let encrypted = section.mode == Mode::Wireguard;
        let device = if encrypted && section.device == VXLAN_DEVICE {
            WIREGUARD_DEVICE
        } else {
            section.device.as_str()
        };
        let port = if encrypted && section.port == VXLAN_PORT { WIREGUARD_PORT } else { section.port };
        let cni = keelson.cni.as_ref();
        let state_dir =
            cni.and_then(|cni| cni.state_dir.as_deref()).unwrap_or(std::path::Path::new(STATE_DIR));
        let masquerade = cni.and_then(|cni| cni.masquerade.as_ref());
        let except = masquerade.map(|masquerade| masquerade.except.as_slice()).unwrap_or_default();
        Ok(Self {
            node: keelson.node_name.clone(),
            node_ip: keelson.node_ip,
            mode: section.mode,
            direct_routing: section.direct_routing,
            choice,
            ipv6: section.underlay.ipv6.unwrap_or(keelson.node_ip.is_ipv6()),
            device: device.to_owned(),
            vni: section.vni,
            port,
            mtu: section.mtu,
            bridge: keelson.cni.as_ref().map(|cni| cni.bridge.clone()),
            namespaces: keelson.cni.as_ref().and_then(|cni| cni.netns_dir.clone()),
            key_file: keelson.root_dir.join("wireguard.key"),
            preshared_key_file: section.preshared_key_file.clone(),
            state_file: state_dir.join(overlay::FILE_NAME),
            cluster: except.iter().filter_map(|range| range.parse().ok()).collect(),
        })
    }
}

impl NetworkConfig {
    fn pod_mtu(&self, underlay: &Underlay) -> u32 {
        if self.mtu != 0 {
            return self.mtu;
        }
        mtu::for_pods(self.mode, underlay.addresses[0], underlay.mtu, [])
    }
}

/// Whether this machine can carry the network that is configured: in words how it would, or why not. Changes nothing.
pub async fn look(section: &NetworkSection, config: &AgentConfig) -> Result<String> {
    let config = NetworkConfig::new(section, config)?;
    let underlay = Underlay::find(&Kernel::open()?, &config.choice, config.node_ip, config.ipv6).await?;
    if config.mode == Mode::Wireguard {
        wireguard::available().await?;
        wireguard::preshared(config.preshared_key_file.clone()).await?;
    }
    let (mode, mtu, address) = (config.mode, config.pod_mtu(&underlay), underlay.addresses[0]);
    Ok(format!("{mode} over {} ({address}, MTU {}); MTU of pods {mtu}", underlay.name, underlay.mtu))
}

/// What comes in and goes out beside the kernel.
pub struct Wires {
    /// This node's object.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    /// All nodes; `None` until they are listed.
    pub peers: watch::Receiver<Option<Arc<Peers>>>,
    /// What this node's object must say.
    pub annotations: watch::Sender<Option<Annotations>>,
    /// What pods need.
    pub state: watch::Sender<Option<State>>,
    /// Events on the node.
    pub events: EventRecorder,
}

/// Runs the overlay against the API server until `cancel`; packets flow on afterwards.
pub async fn run(
    client: Client,
    config: NetworkConfig,
    node: watch::Receiver<Option<Arc<Node>>>,
    state: watch::Sender<Option<State>>,
    events: EventRecorder,
    cancel: CancellationToken,
) -> Result<()> {
    let (peers_sender, peers) = watch::channel(None);
    let (annotations, published) = watch::channel(None);
    let name = config.node.clone();
    let wires = Wires { node: node.clone(), peers, annotations, state, events };
    tokio::select! {
        // In this order, since the end of all makes the watches of the others end, too. Each only ends by being dropped,
        // at a point where nothing is half done.
        biased;
        () = cancel.cancelled() => Ok(()),
        () = peers::follow(client.clone(), peers_sender) => anyhow::bail!("the watch of the nodes ended"),
        () = publish::run(client, name, node, published) => Ok(()),
        outcome = serve(config, wires) => outcome,
    }
}

/// Keeps the kernel's tables right for ever.
pub async fn serve(config: NetworkConfig, wires: Wires) -> Result<()> {
    let kernel = Kernel::open()?;
    let (targets, wanted) = watch::channel(path::Targets::default());
    let (learned, paths) = watch::channel(path::Learned::new());
    let overlay = Overlay::new(config, kernel.clone(), targets, paths.clone());
    tokio::select! {
        outcome = converge_for_ever(overlay, wires, paths) => outcome,
        () = path::keep(kernel, wanted, learned) => anyhow::bail!("the looks at the ways to the peers ended"),
    }
}

async fn converge_for_ever(
    mut overlay: Overlay,
    mut wires: Wires,
    mut paths: watch::Receiver<path::Learned>,
) -> Result<()> {
    let mut changes = kernel::changes()?;
    let mut pause = RETRY.0;
    let mut next = Instant::now();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // All arms are cancel-safe: watches keep what was not seen, and a burst of changes is taken whole or not at all.
        tokio::select! {
            changed = wires.node.changed() => changed.context("the node's watch ended")?,
            changed = wires.peers.changed() => changed.context("the nodes' watch ended")?,
            burst = changes.next() => {
                let burst = burst.context("the netlink socket closed")?;
                if !burst.iter().any(|change| overlay.concerns(*change)) {
                    continue;
                }
            }
            changed = paths.changed() => changed.context("the looks at the ways to the peers ended")?,
            _ = looks.tick(), if overlay.keys.is_some() => {
                if !overlay.is_tunnel_changed().await {
                    continue;
                }
            }
            () = tokio::time::sleep_until(next) => {}
        }
        let pass = tokio::time::timeout(DEADLINE, overlay.pass(&mut wires)).await;
        match pass.unwrap_or_else(|_elapsed| Err(anyhow::anyhow!("the kernel did not answer in time"))) {
            Ok(()) => {
                pause = RETRY.0;
                next = overlay.unsure_until().unwrap_or_else(|| Instant::now() + AUDIT);
                overlay.told_failure.clear();
            }
            Err(error) => {
                overlay.failed(&wires, &error);
                next = Instant::now() + pause;
                pause = (pause * 2).min(RETRY.1);
            }
        }
    }
}

/// The task's state.
struct Overlay {
    config: NetworkConfig,
    kernel: Kernel,
    /// As of the last pass; `None` before the first that worked.
    place: Option<Place>,
    entries: Entries,
    /// Pod ranges of peers to which somebody else has a route.
    refused: BTreeSet<Range>,
    /// What the peers of the encrypted tunnel were to be in the last pass.
    keys: Option<Arc<wireguard::Peers>>,
    /// What the underlay's interface carries, as of the last pass.
    underlay_mtu: u32,
    /// Peers whose way is to be looked at, and what it carries.
    targets: watch::Sender<path::Targets>,
    paths: watch::Receiver<path::Learned>,
    /// Whether the other mode's device is known to be gone.
    alone: bool,
    /// What is wrong with peers, since when, and whether it was told.
    problems: BTreeMap<Problem, (Instant, bool)>,
    told_failure: String,
}

impl Overlay {
    fn new(
        config: NetworkConfig,
        kernel: Kernel,
        targets: watch::Sender<path::Targets>,
        paths: watch::Receiver<path::Learned>,
    ) -> Self {
        Self {
            config,
            kernel,
            underlay_mtu: 0,
            targets,
            paths,
            place: None,
            entries: Entries::default(),
            refused: BTreeSet::new(),
            keys: None,
            alone: false,
            problems: BTreeMap::new(),
            told_failure: String::new(),
        }
    }

    /// Whether a change of the kernel can make an entry wrong. What pods' links do is most of what there is to hear.
    fn concerns(&self, change: Change) -> bool {
        let Some(place) = &self.place else { return true };
        let ours =
            |index| index == place.underlay || place.tunnel.is_some_and(|tunnel| tunnel.index == index);
        match change {
            Change::Link(index) | Change::Address(index) => ours(index),
            Change::Neighbour(index) => place.tunnel.is_some_and(|tunnel| tunnel.index == index),
            Change::Route { ours: true, .. } | Change::Anything => true,
            Change::Route { destination, ours: false } => destination.is_some_and(|range| {
                range.prefix() == 0
                    || self.entries.routes.contains_key(&range)
                    || self.refused.contains(&range)
                    || place.subnets.contains(&range)
                    || self.entries.forwards.values().any(|peer| range.contains(*peer))
                    || self.targets.borrow().are_in(&range)
            }),
        }
    }

    /// Whether somebody has changed the encrypted tunnel or its peers: the one thing of which the kernel tells nobody.
    async fn is_tunnel_changed(&self) -> bool {
        let (Some(place), Some(keys)) = (&self.place, &self.keys) else { return false };
        let (Some(tunnel), Some(own)) = (place.tunnel, &place.public_key) else { return false };
        let looked =
            wireguard::is_changed(tunnel.index, self.config.port, own.clone(), Arc::clone(keys)).await;
        // What makes a look impossible, the next pass tells.
        looked.unwrap_or(false)
    }

    /// Looks at everything and changes what is wrong.
    async fn pass(&mut self, wires: &mut Wires) -> Result<()> {
        let node = wires.node.borrow_and_update().clone();
        let peers = wires.peers.borrow_and_update().clone();
        let ranges = node.as_deref().map(pod_ranges).unwrap_or_default();
        if ranges.is_empty() {
            // The controller gives them soon, and the object's change is heard.
            return Ok(());
        }
        let mac = Mac::of_name(&self.config.node);
        let (underlay, place) = match self.stand(&ranges, mac).await {
            Ok(found) => found,
            Err(error) => {
                // Pods that are there stay; new ones wait.
                let reason = format!("{error:#}");
                state::leave(&self.config, state::not_ready(&self.config, reason)).await?;
                return Err(error);
            }
        };
        let config = &self.config;
        wires.annotations.send_if_modified(|current| {
            let vtep = place.tunnel.filter(|_| config.mode == Mode::Vxlan).map(|_| mac);
            let wanted =
                publish::annotations(config.mode, &underlay.addresses, vtep, place.public_key.as_deref());
            let differs = current.as_ref() != Some(&wanted);
            *current = Some(wanted);
            differs
        });
        let pods = self.config.pod_mtu(&underlay);
        // Before anybody is told that pods may come: their plugin reads it.
        state::leave(config, state::ready(config, &ranges, place.tunnel.is_some(), pods)).await?;
        wires.state.send_if_modified(|current| {
            let wanted = Some(State { mtu: pods });
            let differs = *current != wanted;
            *current = wanted;
            differs
        });
        self.place = Some(place);
        self.underlay_mtu = underlay.mtu;
        if let Some(peers) = peers {
            self.converge(wires, node.as_deref(), &peers).await?;
        }
        match &self.config.bridge {
            Some(bridge) => {
                pod_links::keep_mtu(&self.kernel, bridge, self.config.namespaces.as_deref(), pods).await
            }
            None => Ok(()),
        }
    }

    /// Where this node is, with the tunnel in place.
    async fn stand(&mut self, ranges: &[Range], mac: Mac) -> Result<(Underlay, Place)> {
        let config = &self.config;
        let underlay = Underlay::find(&self.kernel, &config.choice, config.node_ip, config.ipv6).await?;
        if !self.alone {
            self.leave_other_modes().await?;
            self.alone = true;
        }
        let place = self.place(ranges, &underlay, mac).await?;
        Ok((underlay, place))
    }

    /// Removes the devices that another mode of an earlier run has left.
    async fn leave_other_modes(&self) -> Result<()> {
        let config = &self.config;
        for name in BTreeSet::from([config.device.as_str(), VXLAN_DEVICE, WIREGUARD_DEVICE]) {
            if config.mode != Mode::Vxlan {
                device::remove(&self.kernel, name).await?;
            }
            if config.mode != Mode::Wireguard && wireguard::remove(name.to_owned()).await? {
                info!(device = %name, "the encrypted tunnel is not needed in this mode: removed");
            }
        }
        Ok(())
    }

    async fn place(&self, ranges: &[Range], underlay: &Underlay, mac: Mac) -> Result<Place> {
        let config = &self.config;
        let mut public_key = None;
        let tunnel = match config.mode {
            Mode::Vxlan => {
                let wanted = device::Vxlan {
                    name: config.device.clone(),
                    vni: config.vni,
                    port: config.port,
                    local: underlay.addresses[0],
                    underlay: underlay.index,
                    mac,
                    mtu: config.pod_mtu(underlay),
                    addresses: ranges.iter().map(Range::network).collect(),
                };
                Some(Tunnel { index: device::ensure(&self.kernel, &wanted).await?, mtu: wanted.mtu })
            }
            Mode::Wireguard => {
                let wanted = wireguard::Tunnel {
                    name: config.device.clone(),
                    port: config.port,
                    mtu: config.pod_mtu(underlay),
                    addresses: ranges.iter().map(Range::network).collect(),
                    key_file: config.key_file.clone(),
                };
                let mtu = wanted.mtu;
                let up = wireguard::ensure(wanted).await?;
                public_key = Some(up.public_key.to_string());
                Some(Tunnel { index: up.index, mtu })
            }
            Mode::HostGw => None,
        };
        Ok(Place {
            node: config.node.clone(),
            ranges: ranges.to_vec(),
            mode: config.mode,
            direct_routing: config.direct_routing,
            underlay: underlay.index,
            address: underlay.addresses[0],
            subnets: underlay.subnets.clone(),
            tunnel,
            public_key,
        })
    }

    /// Makes the entries what they should be; an entry that the kernel refuses holds up no other.
    async fn converge(&mut self, wires: &Wires, node: Option<&Node>, peers: &Peers) -> Result<()> {
        let Some(place) = &self.place else { return Ok(()) };
        let routes = self.kernel.routes().await?;
        // A route that was ours comes back, also where somebody has led it elsewhere.
        let host = kernel::others(&routes, place.underlay, &self.entries);
        let (mut wanted, problems) = desired(place, &host, peers.values());
        path::narrow(place, &mut wanted, &routes, &self.paths.borrow(), peers);
        let targets = path::Targets::of(place, peers, &routes, self.config.port, self.underlay_mtu);
        self.targets.send_if_modified(|current| {
            let differs = *current != targets;
            *current = targets;
            differs
        });
        let tunnel = place.tunnel.map(|tunnel| tunnel.index);
        if let Some(index) = tunnel.filter(|_| place.mode == Mode::Wireguard) {
            // Before the routes: none leads into the tunnel where nobody takes the packets.
            let preshared = wireguard::preshared(self.config.preshared_key_file.clone()).await?;
            let keys = Arc::new(wireguard::peers_of(&wanted.keys, self.config.port, preshared));
            let changes = wireguard::set_peers(index, Arc::clone(&keys), self.keys.take()).await?;
            if changes > 0 {
                info!(changes, peers = keys.len(), "peers of the encrypted tunnel brought up to date");
            }
            self.keys = Some(keys);
        }
        let observed = self.kernel.entries(&routes, tunnel).await?;
        let mut failure = None;
        for stray in &observed.strays {
            failure = self.kernel.remove_stray(stray).await.err().or(failure);
        }
        let actions = plan(&wanted, &observed.entries);
        for action in &actions {
            if let Err(error) = self.kernel.apply(action, tunnel).await {
                warn!(error = format!("{error:#}"), "an entry of the overlay was refused");
                failure = Some(error);
            }
        }
        if !actions.is_empty() {
            info!(changes = actions.len(), routes = wanted.routes.len(), "overlay brought up to date");
        }
        self.entries = wanted;
        self.refused = problems
            .iter()
            .filter_map(|problem| match problem {
                Problem::OtherRoute { range, .. } => Some(*range),
                _ => None,
            })
            .collect();
        self.tell(wires, node, problems.into_iter().collect());
        failure.map_or(Ok(()), Err)
    }

    /// What is wrong with peers becomes Events, once each; what may only not have been published yet, a while later.
    fn tell(&mut self, wires: &Wires, node: Option<&Node>, problems: BTreeSet<Problem>) {
        self.problems.retain(|problem, _| problems.contains(problem));
        for problem in problems {
            let may_come = matches!(problem, Problem::Unpublished { .. });
            let text = problem.to_string();
            let (since, told) = self.problems.entry(problem).or_insert((Instant::now(), false));
            if *told || may_come && since.elapsed() < PATIENCE {
                continue;
            }
            *told = true;
            warn!(problem = %text, "something is wrong with a peer");
            if let Some(node) = node {
                wires.events.node(node, EventType::Warning, "OverlayPeer", text);
            }
        }
    }

    /// When the first of the problems that were not told yet is one.
    fn unsure_until(&self) -> Option<Instant> {
        let untold = self.problems.values().filter(|(_, told)| !told);
        untold.map(|(since, _)| *since + PATIENCE).min()
    }

    fn failed(&mut self, wires: &Wires, error: &anyhow::Error) {
        let text = format!("{error:#}");
        warn!(error = %text, "the overlay is not complete; trying again");
        if text != self.told_failure
            && let Some(node) = wires.node.borrow().as_deref()
        {
            wires.events.node(node, EventType::Warning, "OverlayFailed", text.clone());
        }
        self.told_failure = text;
    }
}

/// Removes the tunnel device and every route of the overlay. For when a node is taken down; works whether or not an
/// agent ran, or died.
pub async fn cleanup(device: &str) -> Result<()> {
    let kernel = Kernel::open()?;
    let routes = kernel.routes().await?;
    let observed = kernel.entries(&routes, None).await?;
    for stray in &observed.strays {
        kernel.remove_stray(stray).await?;
    }
    for action in plan(&Entries::default(), &observed.entries) {
        kernel.apply(&action, None).await?;
    }
    for name in BTreeSet::from([device, VXLAN_DEVICE, WIREGUARD_DEVICE]) {
        device::remove(&kernel, name).await?;
        wireguard::remove(name.to_owned()).await?;
    }
    Ok(())
}

/// The names under which a node publishes, for whoever reads them.
pub use names::{ADDRESSES, MODE, PUBLIC_KEY, VTEP_MAC};

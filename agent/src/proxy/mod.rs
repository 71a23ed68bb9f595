//! The service proxy: Services and EndpointSlices in, BPF maps out.
//!
//! ```text
//! watches ─ facts ─▶ catalog (pure) ─ changes ─▶ ebpf-loader ─▶ maps
//! netlink addresses ─────────────────────────▶ node-address map
//! netlink links, routes ─ devices (pure) ────▶ packet programs on devices, rules that let their packets pass
//! netlink links ─ shortcuts (pure) ──────────▶ programs on pods' links
//! host ports ────────────────────────────────▶ frontends like a Service's
//! Nodes ─ nodes ─────────────────────────────▶ addresses on which NodePorts are answered directly
//! ```
//! One task owns everything. The data plane keeps working while the agent is away; at start it is taken over, and
//! nothing is removed from it before both watches have listed everything. What cannot be programmed becomes an Event
//! on its Service, and everything else goes on.

mod catalog;
mod choices;
mod cidr;
mod devices;
mod facts;
mod firewall;
mod health;
mod host_ports;
mod metrics;
mod network;
mod node_ports;
mod nodes;
mod reports;
mod routes;
mod rules;
mod shortcuts;
pub mod show;
mod task;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use ebpf_loader::{Capacity, Config, DataPlane, OpenError, PinError, ServiceTable};
use futures::{Stream, StreamExt};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource,
    runtime::{watcher, watcher::Event},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{ForwardingMode, ProxySection, ShortcutMode, XdpMode},
    events::EventRecorder,
    host_ports::Request,
};
use catalog::{Catalog, Seen};
use cidr::Cidr;
use reports::Reports;
use task::Proxy;

/// How long a former agent may take to let go of the data plane.
const HANDOVER: Duration = Duration::from_secs(10);

/// What the proxy needs to know.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// Name of this node: endpoints on it are local.
    node_name: String,
    /// Processes below this cgroup2 directory are served.
    cgroup_root: PathBuf,
    /// Where maps and links are pinned.
    pin_dir: PathBuf,
    service_ranges: Vec<Cidr>,
    node_port_ranges: Vec<Cidr>,
    /// kube-proxy's health server; port 0: none.
    healthz: SocketAddr,
    /// Metrics; port 0: none.
    metrics: SocketAddr,
    /// This node's address in the cluster.
    node_ip: IpAddr,
    /// Devices that lead to pods, by name.
    pod_devices: BTreeSet<String>,
    /// Whether clients outside the node are served.
    serve_outside: bool,
    xdp: XdpMode,
    shortcut: ShortcutMode,
    /// Whether Services that ask for direct answers have them on NodePorts too.
    direct_node_ports: bool,
}

impl ProxyConfig {
    /// From the agent's configuration; names the field that makes no sense.
    pub fn new(section: &ProxySection, node_name: &str, node_ip: IpAddr) -> Result<Self> {
        let own = format!("{node_ip}/{}", if node_ip.is_ipv4() { 32 } else { 128 });
        let node_ports = section.node_port_addresses.iter().map(String::as_str);
        let node_ports = node_ports.map(|text| if text == "primary" { own.as_str() } else { text });
        Ok(Self {
            node_name: node_name.to_owned(),
            cgroup_root: section.cgroup_root.clone(),
            pin_dir: section.pin_dir.clone(),
            service_ranges: service_ranges(&section.service_cidr).context("keelson.proxy.serviceCIDR")?,
            node_port_ranges: parse_ranges(node_ports).context("keelson.proxy.nodePortAddresses")?,
            healthz: SocketAddr::new(section.healthz_bind_address, section.healthz_port),
            metrics: SocketAddr::new(section.metrics_bind_address, section.metrics_port),
            node_ip,
            pod_devices: BTreeSet::new(),
            serve_outside: section.serve_outside,
            xdp: section.xdp,
            shortcut: section.pod_shortcut,
            direct_node_ports: section.node_port_forwarding == ForwardingMode::Dsr,
        })
    }

    /// Says which devices lead to pods, of this node or of others.
    #[must_use]
    pub fn with_pod_devices(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.pod_devices.extend(names);
        self
    }

    /// What is known of services, which is nothing yet.
    fn catalog(&self) -> Catalog {
        Catalog::new(self.service_ranges.clone(), self.direct_node_ports)
    }

    /// Whether NodePorts answer on every address of the node.
    fn serves_every_address(&self) -> bool {
        self.node_port_ranges.is_empty()
    }
}

/// One range, or one per family with a comma between.
fn service_ranges(text: &str) -> Result<Vec<Cidr>> {
    parse_ranges(text.split(',').filter(|part| !part.trim().is_empty()))
}

fn parse_ranges<'t>(texts: impl Iterator<Item = &'t str>) -> Result<Vec<Cidr>> {
    texts.map(str::parse).collect()
}

/// Runs until `cancel`; leaves the data plane working then. Returns early only where the data plane cannot be opened
/// or attached, for a reason that waiting does not change.
pub async fn run(
    client: Client,
    config: ProxyConfig,
    node: watch::Receiver<Option<Arc<Node>>>,
    events: EventRecorder,
    host_ports: mpsc::Receiver<Request>,
    cancel: CancellationToken,
) -> Result<()> {
    let mut reports = Reports::new(events, &config.node_name);
    let plane = match open(&config).await {
        Ok(plane) => plane,
        Err(error) => {
            reports.unavailable(&error);
            return Err(error);
        }
    };
    guard_ranges(&config, &mut reports).await;
    let node_name = config.node_name.clone();
    let services = watch(Api::<Service>::all(client.clone()), facts::service);
    let slices =
        watch(Api::<EndpointSlice>::all(client.clone()), move |slice| facts::slice(slice, &node_name));
    let nodes = nodes::addresses(config.direct_node_ports.then_some(client));
    let proxy = Proxy::new(plane, config, reports, node, cancel);
    // Boxed: the data plane's handles make the future large.
    Box::pin(proxy.serve(services, slices, nodes, host_ports)).await
}

/// Removes the data plane of an instance and the routes of its service ranges. For when the node is taken down; works
/// whether or not an agent ran, or died.
pub async fn cleanup(pin_dir: &Path, service_cidr: &str) -> Result<()> {
    for range in service_ranges(service_cidr)? {
        network::unguard_range(&range).await?;
    }
    firewall::cleanup();
    let pin_dir = pin_dir.to_owned();
    tokio::task::spawn_blocking(move || ebpf_loader::unload(&pin_dir))
        .await?
        .context("remove the data plane")?;
    Ok(())
}

/// Loads the programs; takes a few hundred milliseconds of the verifier's time. A former agent that is still ending
/// is waited for.
async fn open(config: &ProxyConfig) -> Result<DataPlane> {
    let until = Instant::now() + HANDOVER;
    loop {
        match open_once(config).await {
            Err(error) if is_busy(&error) && Instant::now() < until => {
                tokio::time::sleep(HANDOVER / 50).await;
            }
            outcome => return outcome,
        }
    }
}

fn is_busy(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(OpenError::Pins(PinError::Busy { .. })))
}

async fn open_once(config: &ProxyConfig) -> Result<DataPlane> {
    let config = Config {
        pin_dir: config.pin_dir.clone(),
        cgroup_dir: config.cgroup_root.clone(),
        capacity: Capacity::default(),
    };
    let plane = tokio::task::spawn_blocking(move || DataPlane::open(config)).await??;
    tracing::info!(adopted = plane.adopted(), "service data plane loaded");
    Ok(plane)
}

/// A route is a safety net: without it services still work.
async fn guard_ranges(config: &ProxyConfig, reports: &mut Reports) {
    for range in &config.service_ranges {
        match network::guard_range(range).await {
            Ok(clashes) => reports.clashing_routes(&range.to_string(), &clashes),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "cannot guard the service range"),
        }
    }
}

/// A watch as steps for the catalog; errors are logged and retried with back-off below.
fn watch<K, F>(api: Api<K>, reduce: impl Fn(&K) -> Option<F>) -> impl Stream<Item = Seen<F>>
where
    K: Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    crate::sources::follow(api, watcher::Config::default()).filter_map(move |event| {
        let seen = match event {
            Ok(Event::Init) => Some(Seen::Restart),
            Ok(Event::InitApply(object)) => Some(Seen::Listed(facts::object_name(&object), reduce(&object))),
            Ok(Event::InitDone) => Some(Seen::Complete),
            Ok(Event::Apply(object)) => Some(Seen::Changed(facts::object_name(&object), reduce(&object))),
            Ok(Event::Delete(object)) => Some(Seen::Gone(facts::object_name(&object))),
            Err(error) => {
                let error = format!("{:#}", anyhow!(error));
                tracing::warn!(kind = %K::kind(&()), error, "watch interrupted, trying again");
                None
            }
        };
        std::future::ready(seen)
    })
}

/// What the data plane shall hold for these objects.
fn wanted(
    config: &ProxyConfig,
    zone: Option<String>,
    services: &[Service],
    slices: &[EndpointSlice],
) -> ServiceTable {
    let mut catalog = config.catalog();
    catalog.set_zone(zone);
    for object in services {
        catalog.service(Seen::Changed(facts::object_name(object), facts::service(object)));
    }
    for object in slices {
        catalog.slice(Seen::Changed(facts::object_name(object), facts::slice(object, &config.node_name)));
    }
    catalog.table()
}

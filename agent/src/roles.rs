//! Builds the parts of the agent and joins them: the only place that knows how they fit.
//!
//! A role that ends with an error ends the agent, so that its supervisor restarts it as a whole; pods go on meanwhile.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use agent_core::eviction::Pressure;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::certificates::Credentials;
use crate::config::{AgentConfig, EvictionConfig, ImageGcConfig, LogRotationConfig};
use crate::contracts::{NodeFacts, ObjectSource, PodLookup, RuntimeHealth};
use crate::csi::{Csi, CsiSettings};
use crate::devices::Devices;
use crate::dra::{Dra, DraSettings};
use crate::events::{self, EventRecorder, EventType};
use crate::host::kernel_memory::KernelMemory;
use crate::numa::Numa;
use crate::observability::{self, Observed};
use crate::pace::Pace;
use crate::plugins::Handlers;
use crate::pods::clock::WallClock;
use crate::pods::context::{PodContext, STATUS_WRITES};
use crate::pods::directory::PodDirectory;
use crate::pods::manager::{self, Eviction, Inbox};
use crate::probes::Prober;
use crate::probes::counters::ProbeCounters;
use crate::runtime::images::Images;
use crate::runtime::{cri, health};
use crate::server::{self, DriverVolumes, ServerConfig};
use crate::shutdown::{self, Shutdown};
use crate::sources::mirrors::{self, Mirrors};
use crate::sources::objects::Objects;
use crate::sources::pods::{PodEvent, StaticSource};
use crate::sources::services::services;
use crate::sources::{offline, static_pods, static_url};
use crate::upkeep::eviction::{self, Evictor};
use crate::upkeep::images::ImageGc;
use crate::upkeep::limits::{self, Limits};
use crate::upkeep::{self, logs};
use crate::users::UserRanges;
use crate::{certificates, host, host_ports, network, node, plugins, pods, proxy, runtime, sources};

/// Pod events between watch and manager; a full queue holds the watch back.
const POD_EVENTS: usize = 256;
/// Evictions that wait for the pods' manager; there is one at a time.
const EVICTIONS: usize = 4;

/// Runs every role until `cancel`, or until one fails.
pub async fn run(config: AgentConfig, cancel: CancellationToken) -> anyhow::Result<()> {
    let config = Arc::new(config);
    if !config.keelson.kubelet {
        return run_beside_a_kubelet(&config, cancel).await;
    }
    let node_name = config.keelson.node_name.clone();
    certificates::join(&config, &cancel).await?;
    let credentials = credentials(&config).await?;
    let client = client_of(credentials.as_ref());
    let cri = cri::connect(config.runtime_socket(), config.image_socket(), config.runtime_request_timeout.0);
    let (recorder, facts) = EventRecorder::new();
    let (node_sender, node) = watch::channel(None);
    let (health_sender, health) = watch::channel(RuntimeHealth::default());
    let objects = Objects::new(client.clone());
    let (services, follow_services) = services(client.clone(), cancel.clone());
    let (counters, directory) = (Arc::new(ProbeCounters::default()), PodDirectory::default());
    let memory_capacity = memory_capacity().await;
    let source: Arc<dyn ObjectSource> = Arc::new(objects.clone());
    let csi = csi(&config, &source, &client, &node);
    let claims = claims(&config, &source, &client);
    let host = host::assemble(&config, source, client.clone(), csi.clone(), memory_capacity);
    host.cgroups.ensure_root().await.context("cgroups for pods cannot be made")?;
    let (pressure_sender, pressures) = watch::channel(BTreeSet::new());
    let (going_down_sender, going_down) = watch::channel(false);
    let devices = Devices::load(&config.keelson.root_dir, cancel.child_token());
    let context = Arc::new(PodContext {
        numa: Numa::load(&config, memory_capacity, devices.clone())?,
        users: UserRanges::load(&config)?,
        devices,
        claims,
        cri: cri.clone(),
        images: Images::of(&config, cri.clone()),
        host,
        objects,
        services,
        events: recorder.clone(),
        client: client.clone(),
        config: Arc::clone(&config),
        node: node.clone(),
        health: health.clone(),
        prober: prober(&cri, &recorder, &counters),
        status_slots: Arc::new(Semaphore::new(STATUS_WRITES)),
        memory_capacity,
        kernel_memory: KernelMemory::read(),
        pressures,
        going_down,
        clock: Arc::new(WallClock),
    });

    let (mut roles, recheck) = (Roles::new(cancel.clone()), Arc::new(Notify::new()));
    let observed =
        Observed { health: health.clone(), pods: Arc::new(directory.clone()), probes: Arc::clone(&counters) };
    start_healthz(&mut roles, &config, observed).await?;
    let follow_health = health::run(cri.clone(), health_sender, Arc::clone(&recheck), cancel.clone());
    roles.endless("runtime health", follow_health);
    let lookup: Arc<dyn PodLookup> = Arc::new(directory.clone());
    start_kubelet_api(&mut roles, &context, &lookup, counters)?;
    start_credentials(&mut roles, &config, credentials);
    start_allocators(&mut roles, &context, &lookup);
    start_pods(&mut roles, &context, &directory, (pressure_sender, going_down_sender))?;
    if config.is_standalone() {
        roles.endless("events", events::log(facts, cancel.clone()));
        // Nobody else serves host ports here: they are left to nftables.
        start_host_ports(&mut roles, &config)?.close();
        roles.start("node", node::run_alone(Arc::clone(&config), (health, recheck), node_sender, cancel));
        info!(node = %node_name, "agent started; keelson.kubeconfig is not given: its pods are the static ones");
        return roles.join().await;
    }
    start_events(&mut roles, &config, &client, facts);
    roles.endless("services", follow_services);
    roles.endless("node watch", sources::node::run(client.clone(), node_name, node_sender, cancel.clone()));
    let csi = csi.context("a node with an API server has volumes of drivers")?;
    start_node(&mut roles, &context, (lookup, &csi), recheck, &cancel)?;
    start_plugins(&mut roles, &context, csi);
    let requests = start_host_ports(&mut roles, &config)?;
    start_proxy(&mut roles, &config, &client, (node, requests), &recorder)?;
    info!(node = %config.keelson.node_name, cri = %config.container_runtime_endpoint, "agent started");
    roles.join().await
}

fn prober(cri: &cri::Cri, events: &EventRecorder, counters: &Arc<ProbeCounters>) -> Prober {
    Prober {
        cri: cri.clone(),
        events: events.clone(),
        counters: Arc::clone(counters),
        agent_started: jiff::Timestamp::now(),
    }
}

/// Writes what is recorded to the API server.
fn start_events(
    roles: &mut Roles,
    config: &AgentConfig,
    client: &Client,
    facts: mpsc::Receiver<events::Fact>,
) {
    let (name, pace) = (config.keelson.node_name.clone(), config.event_rate().map(Pace::new));
    roles.endless("events", events::run(client.clone(), name, facts, pace, roles.cancel.clone()));
}

/// Looks after the processors and devices that containers have for themselves.
fn start_allocators(roles: &mut Roles, context: &PodContext, pods: &Arc<dyn PodLookup>) {
    let (config, cancel) = (&context.config, roles.cancel.clone());
    let period = config.cpu_manager_reconcile_period.0;
    roles.endless("memory", host::memory::keep_small(cancel.clone()));
    roles.endless("processors", context.numa.clone().run(context.cri.clone(), period, cancel.clone()));
    let root_dir = config.keelson.root_dir.clone();
    let also_told = (context.numa.clone(), context.claims.clone());
    let devices = context.devices.clone().run(root_dir, Arc::clone(pods), also_told, cancel);
    roles.optional("device plugins", devices);
}

/// Volumes of drivers; there are none without an API server.
fn csi(
    config: &AgentConfig,
    objects: &Arc<dyn ObjectSource>,
    client: &Client,
    node: &watch::Receiver<Option<Arc<Node>>>,
) -> Option<Csi> {
    let settings = CsiSettings::new(&config.keelson.root_dir, &config.keelson.node_name);
    let settings = CsiSettings { node: Some(node.clone()), ..settings };
    (!config.is_standalone()).then(|| Csi::new(settings, Arc::clone(objects), client.clone()))
}

/// Devices of drivers, with what an earlier agent knew of them.
fn claims(config: &AgentConfig, objects: &Arc<dyn ObjectSource>, client: &Client) -> Dra {
    let settings = DraSettings::new(&config.keelson.root_dir, &config.keelson.node_name);
    Dra::load(settings, Arc::clone(objects), client.clone())
}

/// Takes plugins in that register by a socket.
fn start_plugins(roles: &mut Roles, context: &PodContext, csi: Csi) {
    let (cancel, claims) = (roles.cancel.clone(), context.claims.clone());
    let handlers: Handlers = Arc::new(vec![Arc::new(csi.clone()), Arc::new(claims.clone())]);
    roles.endless("CSI node", csi.announce(cancel.clone()));
    roles.endless("ResourceSlices", claims.tidy_slices(cancel.clone()));
    let directory = plugins::directory(&context.config.keelson.root_dir);
    roles.endless("plugins", plugins::run(directory, handlers, cancel));
}

/// The network between nodes and the Node object.
fn start_node(
    roles: &mut Roles,
    context: &PodContext,
    (pods, csi): (Arc<dyn PodLookup>, &Csi),
    recheck: Arc<Notify>,
    cancel: &CancellationToken,
) -> anyhow::Result<()> {
    let (config, client) = (&context.config, &context.client);
    let facts = NodeFacts {
        cri: context.cri.clients(),
        health: context.health.clone(),
        recheck,
        node: context.node.clone(),
        pods,
        events: context.events.clone(),
        node_ip: config.keelson.node_ip,
        pressures: context.pressures.clone(),
        going_down: context.going_down.clone(),
        devices: context.devices.counts(),
        volumes_in_use: csi.in_use(),
        overlay: start_network(roles, config, client, context.node.clone(), context.events.clone())?,
    };
    roles.start("node", node::run(client.clone(), Arc::clone(config), facts, cancel.clone()));
    Ok(())
}

/// The roles that another kubelet on this node leaves to the agent: the service proxy and the network between nodes.
async fn run_beside_a_kubelet(config: &AgentConfig, cancel: CancellationToken) -> anyhow::Result<()> {
    let node_name = config.keelson.node_name.clone();
    let credentials = credentials(config).await?;
    let client = client_of(credentials.as_ref());
    let (recorder, facts) = EventRecorder::new();
    let (node_sender, node) = watch::channel(None);
    let mut roles = Roles::new(cancel.clone());
    // Who runs the pods sees to the certificates; here they are read again when they change.
    if let Some(credentials) = credentials {
        roles.endless("credentials", credentials.follow(cancel.clone()));
    }
    start_events(&mut roles, config, &client, facts);
    let node_watch = sources::node::run(client.clone(), node_name.clone(), node_sender, cancel);
    roles.endless("node watch", node_watch);
    // Who runs the pods sees to their host ports.
    let (_, requests) = host_ports::queue();
    start_proxy(&mut roles, config, &client, (node.clone(), requests), &recorder)?;
    let _state = start_network(&mut roles, config, &client, node, recorder)?;
    info!(node = %node_name, "agent started beside another kubelet");
    roles.join().await
}

/// Serves healthz and metrics, unless their port is 0.
async fn start_healthz(roles: &mut Roles, config: &AgentConfig, observed: Observed) -> anyhow::Result<()> {
    if config.healthz_port != 0 {
        let address = SocketAddr::new(config.healthz_bind_address, config.healthz_port);
        let listener = observability::bind(address).await?;
        roles.start("healthz", observability::serve(listener, observed, roles.cancel.clone()));
    }
    Ok(())
}

/// Serves the kubelet API, and follows its certificate.
fn start_kubelet_api(
    roles: &mut Roles,
    context: &PodContext,
    lookup: &Arc<dyn PodLookup>,
    probes: Arc<ProbeCounters>,
) -> anyhow::Result<()> {
    let (config, clients) = (&context.config, context.cri.clients());
    let serving = certificates::serving(config, &context.client, &roles.cancel)?;
    roles.endless("serving certificate", serving.follow);
    let server = ServerConfig {
        images: Some(clients.images),
        volumes: DriverVolumes::new(Arc::clone(&context.host.volumes)),
        pulls: context.images.counters(),
        ..ServerConfig::new(config, serving.certificate, probes)
    };
    let api = server::serve(server, Arc::clone(lookup), clients.runtime, roles.cancel.clone());
    roles.start("kubelet API", api);
    Ok(())
}

/// Starts the service proxy, where it is wanted.
fn start_proxy(
    roles: &mut Roles,
    config: &AgentConfig,
    client: &Client,
    (node, mut requests): (watch::Receiver<Option<Arc<Node>>>, mpsc::Receiver<host_ports::Request>),
    events: &EventRecorder,
) -> anyhow::Result<()> {
    if let Some(section) = config.keelson.proxy.as_ref().filter(|section| section.enabled) {
        let proxy = proxy::ProxyConfig::new(section, &config.keelson.node_name, config.keelson.node_ip)?
            .with_pod_devices(pod_devices(config));
        if !section.serve_outside {
            // Host ports are for clients outside as well: the seam leaves them to nftables.
            requests.close();
        }
        let (recorder, object) = (events.clone(), node.clone());
        let run = proxy::run(client.clone(), proxy, node, events.clone(), requests, roles.cancel.clone());
        let tell = move |problem| tell_node(recorder, object, "ServiceProxyFailed", problem);
        roles.optional_told("service proxy", run, tell);
    }
    Ok(())
}

/// Starts the pods' sources, their manager, and what keeps the node tidy around them.
fn start_pods(
    roles: &mut Roles,
    context: &Arc<PodContext>,
    directory: &PodDirectory,
    (pressures, going_down): (watch::Sender<BTreeSet<Pressure>>, watch::Sender<bool>),
) -> anyhow::Result<()> {
    let (client, node, cancel) = (context.client.clone(), context.node.clone(), roles.cancel.clone());
    let (pod_events, pod_event_queue) = mpsc::channel(POD_EVENTS);
    start_static_pods(roles, &context.config, &pod_events);
    let expects_static = context.config.static_sources();
    let (mirror_sender, mirrors) = watch::channel(Mirrors::default());
    if context.config.is_standalone() {
        // All that the API server will ever say.
        pod_events.try_send(PodEvent::Synced(Vec::new())).context("the queue of pod events is full")?;
    } else {
        let node_name = context.config.keelson.node_name.clone();
        roles.endless("pod watch", sources::pods::run(client.clone(), node_name, pod_events, cancel.clone()));
        roles.endless("mirror pods", mirrors::run(client, mirrors, node, cancel.clone()));
    }
    let (evictions, eviction_queue) = mpsc::channel(EVICTIONS);
    let inbox =
        Inbox { events: pod_event_queue, evictions: eviction_queue, expects_static, mirrors: mirror_sender };
    start_shutdown(roles, &context.config, directory, (evictions.clone(), going_down));
    start_upkeep(roles, context, directory, (evictions, pressures))?;
    let audit = context.config.clients.sync_frequency.0;
    let follow = runtime::events::follow(context.cri.clone(), directory.clone(), audit, cancel.clone());
    roles.endless("CRI events", follow);
    let wake = pods::device_health::run(Arc::clone(context), directory.clone(), cancel.clone());
    roles.endless("device health", wake);
    roles.endless("pods", manager::run(Arc::clone(context), directory.clone(), inbox, cancel));
    Ok(())
}

/// Reads static pods where the configuration names places for them.
fn start_static_pods(roles: &mut Roles, config: &AgentConfig, events: &mpsc::Sender<PodEvent>) {
    let name = config.keelson.node_name.clone();
    for source in config.static_sources() {
        let (name, events, cancel) = (name.clone(), events.clone(), roles.cancel.clone());
        match source {
            StaticSource::File => {
                let (path, frequency) = (config.static_pod_path.clone(), config.file_check_frequency.0);
                roles.endless("static pods", static_pods::run(path, name, frequency, events, cancel));
            }
            StaticSource::Url => {
                let target = (config.static_pod_url.clone(), config.static_pod_url_header.clone());
                let frequency = config.http_check_frequency.0;
                roles.endless(
                    "static pods of a URL",
                    static_url::run(target, name, frequency, events, cancel),
                );
            }
        }
    }
}

/// Holds a shutdown of the node back for its pods, where that is configured.
fn start_shutdown(
    roles: &mut Roles,
    config: &AgentConfig,
    pods: &PodDirectory,
    (evictions, going_down): (mpsc::Sender<Eviction>, watch::Sender<bool>),
) {
    let groups = config.shutdown_groups();
    if groups.is_empty() {
        return;
    }
    let role = Shutdown {
        groups,
        pods: pods.clone(),
        evictions,
        going_down,
        bus: shutdown::SYSTEM_BUS.into(),
        logind_settings: shutdown::LOGIND_SETTINGS.into(),
    };
    roles.endless("node shutdown", shutdown::run(role, roles.cancel.clone()));
}

/// Starts what keeps the node tidy: log rotation, removal of images, eviction.
fn start_upkeep(
    roles: &mut Roles,
    context: &Arc<PodContext>,
    pods: &PodDirectory,
    (evictions, pressures): (mpsc::Sender<Eviction>, watch::Sender<BTreeSet<Pressure>>),
) -> anyhow::Result<()> {
    let (config, cri, cancel) = (&context.config, context.cri.clone(), roles.cancel.clone());
    let settings = |problems: Vec<String>| anyhow::anyhow!("configuration: {}", problems.join("; "));
    let rotation = LogRotationConfig::of(config).map_err(settings)?;
    roles.endless("log rotation", logs::run(cri.clone(), pods.clone(), rotation, cancel.clone()));
    let policy = ImageGcConfig::of(config).map_err(settings)?.policy;
    let gc = Arc::new(ImageGc::new(cri.clone(), context.images.clone(), pods.clone(), policy));
    let (events, node) = (context.events.clone(), context.node.clone());
    roles.endless(
        "image garbage collection",
        upkeep::images::run(Arc::clone(&gc), events.clone(), node.clone(), cancel.clone()),
    );
    let limits = Limits {
        cri: cri.clone(),
        pods: pods.clone(),
        evictions: evictions.clone(),
        root_dir: config.keelson.root_dir.clone(),
        pod_logs_dir: config.pod_logs_dir.clone(),
    };
    if config.machine.local_storage_capacity_isolation {
        roles.endless("disk limits", limits::run(limits, cancel.clone()));
    }
    let evictor = Evictor {
        config: EvictionConfig::of(config).map_err(settings)?,
        cri,
        pods: pods.clone(),
        images: gc,
        evictions,
        pressures,
        events,
        node,
        root_dir: config.keelson.root_dir.clone(),
        pod_logs_dir: config.pod_logs_dir.clone(),
        pods_cgroup: config.pods_cgroup(),
        pods_memory: Some(context.memory_capacity.saturating_sub(config.reserved("memory"))),
    };
    roles.endless("eviction", eviction::run(evictor, cancel));
    Ok(())
}

/// Starts the network between nodes, where there is one; what pods need of it.
fn start_network(
    roles: &mut Roles,
    config: &AgentConfig,
    client: &Client,
    node: watch::Receiver<Option<Arc<Node>>>,
    events: EventRecorder,
) -> anyhow::Result<Option<watch::Receiver<Option<network::State>>>> {
    let Some(section) = config.keelson.network.as_ref().filter(|section| section.enabled) else {
        return Ok(None);
    };
    let settings = network::NetworkConfig::new(section, config)?;
    let (sender, state) = watch::channel(None);
    let role = network::run(client.clone(), settings, node, sender, events, roles.cancel.clone());
    roles.start("network", role);
    Ok(Some(state))
}

/// Names of the devices that lead to pods, of this node and of others.
fn pod_devices(config: &AgentConfig) -> Vec<String> {
    let bridge = config.keelson.cni.as_ref().map(|cni| cni.bridge.clone());
    let tunnel = config.keelson.network.as_ref().filter(|network| network.enabled);
    bridge.into_iter().chain(tunnel.map(|network| network.device.clone())).collect()
}

/// Starts the seam for host ports, where this agent writes the CNI configuration; what it asks of the proxy. Without a data
/// plane for them, it sees to it that an earlier agent's are in nftables.
fn start_host_ports(
    roles: &mut Roles,
    config: &AgentConfig,
) -> anyhow::Result<mpsc::Receiver<host_ports::Request>> {
    let (asks, requests) = host_ports::queue();
    if config.keelson.cni.as_ref().is_some_and(|cni| cni.host_ports) {
        let dir = host_ports::directory(config)?;
        roles.optional("host ports", host_ports::run(dir, asks, roles.cancel.clone()));
    }
    Ok(requests)
}

/// What differs between the service maps and the API server, for `keelson-agent service verify`.
pub async fn verify_services(config: &AgentConfig, pin_dir: &std::path::Path) -> anyhow::Result<Vec<String>> {
    let section = config.keelson.proxy.as_ref().context("the configuration has no keelson.proxy section")?;
    let client = client(config).await?;
    let name = &config.keelson.node_name;
    let node = kube::Api::<k8s_openapi::api::core::v1::Node>::all(client.clone()).get_opt(name).await?;
    let labels = node.and_then(|node| node.metadata.labels).unwrap_or_default();
    let zone = labels.get("topology.kubernetes.io/zone").cloned();
    let proxy = proxy::ProxyConfig::new(section, name, config.keelson.node_ip)?;
    proxy::show::verify(pin_dir, client, &proxy, zone).await
}

/// An Event on the node, as soon as it has registered: people look there before they look into the log.
async fn tell_node(
    events: EventRecorder,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    reason: &'static str,
    problem: String,
) {
    if let Ok(node) = node.wait_for(Option::is_some).await
        && let Some(node) = node.as_deref()
    {
        events.node(node, EventType::Warning, reason, problem);
    }
}

/// The tasks of the agent.
struct Roles {
    tasks: JoinSet<(&'static str, anyhow::Result<()>)>,
    cancel: CancellationToken,
}

impl Roles {
    fn new(cancel: CancellationToken) -> Self {
        Self { tasks: JoinSet::new(), cancel }
    }

    fn start(&mut self, name: &'static str, role: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        self.tasks.spawn(async move { (name, role.await) });
    }

    fn endless(&mut self, name: &'static str, role: impl Future<Output = ()> + Send + 'static) {
        self.start(name, async move {
            role.await;
            Ok(())
        });
    }

    /// A role whose failure is told and leaves the node working: its cause does not go away by a restart.
    fn optional(
        &mut self,
        name: &'static str,
        role: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.optional_told(name, role, |_problem| std::future::pending());
    }

    /// The same, and `tell` says it elsewhere too.
    fn optional_told<T: Future<Output = ()> + Send>(
        &mut self,
        name: &'static str,
        role: impl Future<Output = anyhow::Result<()>> + Send + 'static,
        tell: impl FnOnce(String) -> T + Send + 'static,
    ) {
        let cancel = self.cancel.clone();
        self.endless(name, async move {
            if let Err(problem) = role.await {
                error!("{name} is off: {problem:#}");
                // Cancel-safe: what is not told by then nobody waits for.
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tell(format!("{name} is off: {problem:#}")) => {}
                }
                cancel.cancelled().await;
            }
        });
    }

    /// Waits for all; the first failure (or early end) cancels the others.
    async fn join(mut self) -> anyhow::Result<()> {
        let mut result = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            let cancelled = self.cancel.is_cancelled();
            let failure = match ended {
                Ok((_, Ok(()))) if cancelled => None,
                Ok((name, Ok(()))) => Some(anyhow::anyhow!("role {name} ended by itself")),
                Ok((name, Err(error))) => Some(error.context(format!("role {name} failed"))),
                Err(error) => Some(anyhow::Error::new(error).context("a role ended unexpectedly")),
            };
            if let Some(failure) = failure.filter(|_| result.is_ok()) {
                result = Err(failure);
            }
            self.cancel.cancel();
        }
        result
    }
}

/// A client of the API server with the agent's credentials.
pub(crate) async fn client(config: &AgentConfig) -> anyhow::Result<Client> {
    Ok(client_of(credentials(config).await?.as_ref()))
}

/// How the agent proves to the API server who it is; `None` where there is none.
async fn credentials(config: &AgentConfig) -> anyhow::Result<Option<Credentials>> {
    if config.is_standalone() {
        return Ok(None);
    }
    Credentials::load(config).await.map(Some)
}

fn client_of(credentials: Option<&Credentials>) -> Client {
    credentials.map_or_else(offline::client, Credentials::client)
}

/// Follows the files of the agent's credentials, and renews its certificate where it is to.
fn start_credentials(roles: &mut Roles, config: &Arc<AgentConfig>, credentials: Option<Credentials>) {
    let Some(credentials) = credentials else { return };
    if config.rotate_certificates {
        let renewal =
            certificates::renew_client(Arc::clone(config), credentials.clone(), roles.cancel.clone());
        roles.endless("client certificate", renewal);
    }
    roles.endless("credentials", credentials.follow(roles.cancel.clone()));
}

/// Node memory in bytes, from /proc/meminfo; 0 when it cannot be read makes all oom scores the highest.
async fn memory_capacity() -> u64 {
    let text = tokio::fs::read_to_string("/proc/meminfo").await.unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

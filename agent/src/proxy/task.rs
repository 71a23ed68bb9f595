//! The task that owns the data plane: takes watch steps, addresses, the node's labels and questions in, and keeps maps,
//! health ports and Events up to date.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use ebpf_loader::{Change, DataPlane, Device, Refused, ServiceKey, ServiceTable, SyncReport};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Node;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

use super::{
    ProxyConfig,
    catalog::{Catalog, Seen},
    cidr::Cidr,
    devices::{self, NodeFacts},
    facts::{ObjectName, ServiceFacts, SliceFacts},
    firewall::Firewall,
    health::{self, HealthChecks, ProxyHealth},
    host_ports,
    metrics::{self, Metrics, Question},
    network::{self, Kernel, Machine},
    reports::{Reports, node_ports_of},
    shortcuts,
};
use crate::{
    config::{ShortcutMode, XdpMode},
    host_ports::{HostPorts, Request},
};

/// Watch events that are taken in before the data plane is written, at most.
const BATCH: usize = 1024;
/// Questions that wait for the task.
const QUESTIONS: usize = 16;
/// How long after an endpoint went sockets are looked for once more: a program may just have been connecting.
const SECOND_LOOK: Duration = Duration::from_secs(2);
/// How long what an earlier agent left, and the API server does not name, goes on answering: the server or its
/// controllers may be behind.
const SETTLE: Duration = Duration::from_secs(20);
/// How long what follows the first programming may take: devices, rules, servers.
const REST: Duration = Duration::from_secs(1);
/// How often it is looked whether somebody took programs, settings or rules away, of which the kernel tells nobody.
const AUDIT: Duration = Duration::from_secs(30);
/// How long sockets of an endpoint that is gone are looked for while their service has no other.
const GIVE_UP: Duration = Duration::from_mins(10);
const ZONE: &str = "topology.kubernetes.io/zone";
/// The cluster autoscaler is about to delete the node.
const LEAVING: &str = "ToBeDeletedByClusterAutoscaler";

/// The task's state.
pub(super) struct Proxy {
    plane: DataPlane,
    config: ProxyConfig,
    reports: Reports,
    catalog: Catalog,
    node: watch::Receiver<Option<Arc<Node>>>,
    health: watch::Sender<ProxyHealth>,
    checks: HealthChecks,
    metrics: Metrics,
    /// Endpoints to which datagram sockets may still be connected, and since when they are gone.
    gone: BTreeMap<SocketAddr, Instant>,
    /// When to look for such sockets again.
    look_at: Option<Instant>,
    /// Whether the data plane holds everything, and runs our programs.
    filled: bool,
    /// When what an earlier agent left, and nobody has named since, is removed.
    settle_at: Option<Instant>,
    /// When the start is over, and what it needed of the program is let go.
    rest_at: Option<Instant>,
    machine: Machine,
    node_facts: NodeFacts,
    /// Why pods' packets take the longer way, as it was told last.
    told_obstacle: Option<&'static str>,
    /// The devices that clients outside are served through; `None` before the first time.
    devices: Option<Vec<Device>>,
    firewall: Firewall,
    audit_at: Instant,
    host_ports: HostPorts,
    host_port_table: ServiceTable,
    /// Host ports are waited for before anything is removed, as long as somebody may name them.
    host_ports_known: bool,
    cancel: CancellationToken,
}

impl Proxy {
    /// Nothing known yet.
    pub(super) fn new(
        plane: DataPlane,
        config: ProxyConfig,
        reports: Reports,
        node: watch::Receiver<Option<Arc<Node>>>,
        cancel: CancellationToken,
    ) -> Self {
        let node_facts = NodeFacts {
            address: Some(config.node_ip),
            pod_ranges: Vec::new(),
            pod_devices: config.pod_devices.clone(),
            xdp: config.xdp,
        };
        let health = watch::Sender::new(ProxyHealth { last_updated: None, node_eligible: true });
        Self {
            plane,
            catalog: config.catalog(),
            checks: HealthChecks::new(config.healthz.ip()),
            config,
            reports,
            node,
            health,
            metrics: Metrics::default(),
            gone: BTreeMap::new(),
            look_at: None,
            filled: false,
            settle_at: None,
            rest_at: None,
            machine: Machine::default(),
            node_facts,
            told_obstacle: None,
            devices: None,
            firewall: Firewall::default(),
            audit_at: Instant::now() + AUDIT,
            host_ports: HostPorts::new(),
            host_port_table: ServiceTable::new(),
            host_ports_known: false,
            cancel,
        }
    }

    /// Runs until cancelled.
    #[allow(clippy::too_many_lines, reason = "one loop with an arm for each thing that can happen")]
    pub(super) async fn serve(
        mut self,
        services: impl Stream<Item = Seen<ServiceFacts>>,
        slices: impl Stream<Item = Seen<SliceFacts>>,
        nodes: impl Stream<Item = BTreeSet<IpAddr>>,
        mut host_ports: mpsc::Receiver<Request>,
    ) -> Result<()> {
        let mut services = std::pin::pin!(services.ready_chunks(BATCH));
        let mut slices = std::pin::pin!(slices.ready_chunks(BATCH));
        let mut nodes = std::pin::pin!(nodes);
        let drivers = match self.config.xdp {
            XdpMode::Off => false,
            XdpMode::Auto => network::has_drivers(),
            XdpMode::Always => true,
        };
        let (kernel, mut kernel_changes) = Kernel::watch(self.config.serve_outside && drivers)?;
        let (mut asking, mut answers) = (true, Vec::new());
        let (asker, mut questions) = mpsc::channel(QUESTIONS);
        self.start_servers(asker).await;
        self.refresh_node();
        self.refresh_machine(&kernel).await;
        let flow_signals = crate::host::on_readable(self.plane.flow_signals()?)
            .context("wait for signals of the packet programs")?;
        let cancel = self.cancel.clone();
        loop {
            let later = Instant::now() + GIVE_UP;
            let (look, settle) = (self.look_at.unwrap_or(later), self.settle_at.unwrap_or(later));
            let rest = self.rest_at.unwrap_or(later);
            let audit = self.audit_at;
            // All arms are cancel-safe: a token, channels, times, a descriptor, and four streams, whose items are lost in no
            // await.
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                batch = services.next() => {
                    for seen in batch.context("the Service watch ended")? {
                        self.catalog.service(seen);
                    }
                }
                batch = slices.next() => {
                    for seen in batch.context("the EndpointSlice watch ended")? {
                        self.catalog.slice(seen);
                    }
                }
                Some(nodes) = nodes.next() => {
                    if let Err(error) = self.plane.share_node_ports(nodes) {
                        let error = format!("{:#}", anyhow!(error));
                        tracing::warn!(error, "NodePorts may not be answered directly");
                    }
                    continue;
                }
                change = kernel_changes.next() => {
                    change.context("the netlink socket closed")?;
                    self.refresh_machine(&kernel).await;
                    continue;
                }
                Ok(()) = self.node.changed() => {
                    self.refresh_node();
                    self.serve_outside();
                }
                request = host_ports.recv(), if asking => {
                    self.host_ports_known = true;
                    asking = request.is_some();
                    if let Some(request) = request {
                        self.host_ports.clone_from(&request.wanted);
                        answers.push(request);
                    }
                }
                Some(question) = questions.recv() => {
                    self.answer(question);
                    continue;
                }
                signal = flow_signals.readable() => {
                    // First, so that what comes now is not missed.
                    signal.context("wait for signals of the packet programs")?.clear_ready();
                    if self.plane.take_flow_signals() {
                        self.tidy_flows();
                    }
                    continue;
                }
                () = tokio::time::sleep_until(look.into()) => {
                    self.reconnect_datagrams().await;
                    continue;
                }
                () = tokio::time::sleep_until(settle.into()) => {
                    self.settle().await?;
                    continue;
                }
                () = tokio::time::sleep_until(rest.into()) => {
                    self.rest_at = None;
                    crate::host::memory::trim();
                    continue;
                }
                () = tokio::time::sleep_until(audit.into()) => {
                    self.audit_at = Instant::now() + AUDIT;
                    kernel.forget_peers();
                    self.refresh_machine(&kernel).await;
                    self.plane.believe_pods();
                    self.audit();
                    continue;
                }
            }
            if self.catalog.take_unbelieved() {
                self.reports.empty_listing();
            }
            if self.filled {
                self.update().await?;
            } else if self.catalog.synced() && self.host_ports_known {
                self = self.fill().await?;
            }
            if self.filled {
                answers.drain(..).for_each(|request| self.answer_host_ports(request));
            }
        }
    }

    /// The health and metrics servers; a port that is taken is told and left out.
    async fn start_servers(&mut self, asker: mpsc::Sender<Question>) {
        if self.config.healthz.port() != 0 {
            match TcpListener::bind(self.config.healthz).await {
                Ok(listener) => {
                    let server =
                        health::serve_proxy(listener, self.health.subscribe(), self.cancel.child_token());
                    drop(tokio::spawn(server));
                }
                Err(error) => {
                    self.reports.port_taken("keelson.proxy.healthzPort", self.config.healthz, &error);
                }
            }
        }
        if self.config.metrics.port() != 0 {
            match TcpListener::bind(self.config.metrics).await {
                Ok(listener) => {
                    drop(tokio::spawn(metrics::serve(listener, asker, self.cancel.child_token())));
                }
                Err(error) => {
                    self.reports.port_taken("keelson.proxy.metricsPort", self.config.metrics, &error);
                }
            }
        }
    }

    fn refresh_node(&mut self) {
        let node = self.node.borrow_and_update().clone();
        let labels = node.as_ref().and_then(|node| node.metadata.labels.as_ref());
        self.catalog.set_zone(labels.and_then(|labels| labels.get(ZONE)).cloned());
        let eligible = node.as_ref().is_none_or(|node| {
            let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
            node.metadata.deletion_timestamp.is_none()
                && !taints.into_iter().any(|taint| taint.key == LEAVING)
        });
        self.health.send_modify(|health| health.node_eligible = eligible);
        let spec = node.as_ref().and_then(|node| node.spec.as_ref());
        let ranges = spec.map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
        self.node_facts.pod_ranges =
            ranges.into_iter().flatten().filter_map(|range| range.parse::<Cidr>().ok()).collect();
    }

    /// The first time: makes the maps hold everything, then runs our programs on them.
    async fn fill(mut self) -> Result<Self> {
        let started = Instant::now();
        self.host_port_table = host_ports::table(&self.host_ports, self.config.serves_every_address());
        self.catalog.take_triggers();
        // Asked for only where an earlier agent left something.
        let unsure = if self.plane.unclaimed() > 0 { self.catalog.without_slices() } else { BTreeSet::new() };
        let (mut this, node_ports, report, attached, took) = tokio::task::spawn_blocking(move || {
            let mut node_ports = Vec::new();
            // One service after the other: all of them at once would take more memory than they do afterwards.
            let all = self.catalog.each().chain(self.host_port_table.clone());
            let all =
                all.inspect(|(key, desired)| node_ports.extend(node_ports_of([(key, desired)].into_iter())));
            let report = self.plane.add_all(all, &unsure);
            let attached = self.plane.attach();
            (self, node_ports, report, attached, started.elapsed())
        })
        .await?;
        let attached = match attached {
            Ok(attached) => attached,
            Err(error) => {
                let error = anyhow!(error);
                this.reports.unavailable(&error);
                return Err(error);
            }
        };
        tracing::info!(
            services = this.plane.usage().services,
            written = report.written,
            removed = report.removed,
            seconds = took.as_secs_f64(),
            links_created = attached.created,
            links_updated = attached.updated,
            "services programmed"
        );
        this.filled = true;
        this.serve_outside();
        this.shortcut_pods();
        if this.plane.unclaimed() > 0 {
            tracing::info!(
                services = this.plane.unclaimed(),
                "kept until the API server has had time to name them"
            );
            this.settle_at = Some(Instant::now() + SETTLE);
        }
        let report = this.grow_if_full(report)?;
        this.metrics.synced(started.elapsed(), &[]);
        this.reports.updated(&this.catalog, std::iter::empty(), &report.refused);
        this.reports.taken_node_ports(&this.catalog, node_ports).await;
        let noteworthy = this.catalog.noteworthy();
        this.finish(&noteworthy, report).await;
        // Listings of thousands of objects were read, and forgotten but for the few fields that count.
        crate::host::memory::trim();
        this.rest_at = Some(Instant::now() + REST);
        Ok(this)
    }

    /// Lets go of what an earlier agent left and the API server has not named since.
    async fn settle(&mut self) -> Result<()> {
        self.settle_at = None;
        // Those that the server names without endpoints are taken over before the rest goes.
        self.catalog.touch_without_slices();
        self.update().await?;
        let report = self.plane.remove_unclaimed();
        if report.removed > 0 {
            tracing::info!(removed = report.removed, "removed services that the API server does not know");
        }
        self.finish(&[], report).await;
        Ok(())
    }

    /// Afterwards: writes what changed.
    async fn update(&mut self) -> Result<()> {
        let wanted = host_ports::table(&self.host_ports, self.config.serves_every_address());
        if !self.catalog.is_touched() && wanted == self.host_port_table {
            return Ok(());
        }
        let started = Instant::now();
        let touched = self.catalog.touched();
        let mut changes = self.catalog.changes();
        changes.extend(host_ports::changes(&self.host_port_table, &wanted));
        self.host_port_table = wanted;
        let report = self.plane.apply(&changes);
        let report = self.grow_if_full(report)?;
        let triggers = self.catalog.take_triggers();
        self.metrics.synced(started.elapsed(), &triggers);
        tracing::debug!(written = report.written, removed = report.removed, "services updated");
        let mut upserts = Vec::new();
        for change in &changes {
            match change {
                Change::Remove(key) => self.reports.removed(key),
                Change::Upsert(key, desired) => upserts.push((key, desired)),
            }
        }
        self.reports.updated(&self.catalog, upserts.iter().map(|(key, _)| *key), &report.refused);
        self.reports.taken_node_ports(&self.catalog, node_ports_of(upserts.into_iter())).await;
        self.finish(&touched, report).await;
        Ok(())
    }

    /// What follows every write: health ports, complaints, and sockets of endpoints that are gone.
    async fn finish(&mut self, touched: &[ObjectName], report: SyncReport) {
        if let Err(error) = self.plane.make_room_for_affinity() {
            let error = format!("{:#}", anyhow!(error));
            tracing::warn!(error, "few clients stay with their endpoint: no room for session affinity");
        }
        for name in touched {
            let port = self.catalog.health_check_port(name);
            let mut problems = self.catalog.problems(name);
            let endpoints = if port.is_some() { self.catalog.local_ready(name) } else { 0 };
            if let Err(problem) = self.checks.set(name, port, endpoints).await {
                problems.push(problem);
            }
            self.reports.problems(&self.catalog, name, &problems);
        }
        let now = Instant::now();
        let fresh = !report.retired_datagram.is_empty();
        self.gone.extend(report.retired_datagram.into_iter().map(|address| (address, now)));
        if fresh || !self.gone.is_empty() {
            self.reconnect_datagrams().await;
            if fresh {
                self.look_at = Some(Instant::now() + SECOND_LOOK);
            }
        }
        self.health.send_modify(|health| health.last_updated = Some(jiff::Timestamp::now()));
    }

    /// Connects datagram sockets of endpoints that are gone to live ones.
    async fn reconnect_datagrams(&mut self) {
        self.look_at = None;
        self.gone.retain(|_, since| since.elapsed() < GIVE_UP);
        if self.gone.is_empty() {
            return;
        }
        let addresses: BTreeSet<SocketAddr> = self.gone.keys().copied().collect();
        let search = tokio::task::spawn_blocking(move || ebpf_loader::reconnect_datagrams(&addresses)).await;
        let Ok(outcome) = search else {
            return;
        };
        self.metrics.healed += outcome.healed as u64;
        if outcome.healed + outcome.waiting + outcome.failed > 0 {
            tracing::info!(
                healed = outcome.healed,
                waiting = outcome.waiting,
                failed = outcome.failed,
                "datagram sockets of endpoints that are gone"
            );
        } else {
            // Nobody is connected to them, and nobody new will be, except who just did when they went.
            self.gone.retain(|_, since| since.elapsed() < SECOND_LOOK);
        }
    }

    /// Where a map is full, moves everything to larger ones and writes what was refused.
    fn grow_if_full(&mut self, report: SyncReport) -> Result<SyncReport> {
        if !report.refused.iter().any(|(_, why)| matches!(why, Refused::Full { .. })) {
            return Ok(report);
        }
        let whole = || self.catalog.all().chain(self.host_port_table.clone());
        let (mut services, mut frontends, mut backends, mut words) = (0, 0, 0, 0);
        for (_, desired) in whole() {
            services += 1;
            frontends += desired.frontends.len();
            backends += desired.backends.len();
            words += desired.table_words();
        }
        let usage = self.plane.usage();
        let grown = usage.capacity.grown_for(frontends, services, backends);
        let Some(grown) = grown.map(|grown| grown.with_words(words)).filter(|grown| *grown != usage.capacity)
        else {
            return Ok(report);
        };
        tracing::info!(?grown, "the service maps are full: moving to larger ones");
        let Some(mut moved) = self.plane.grow(grown, whole())? else {
            return Ok(report);
        };
        moved.retired_datagram.extend(report.retired_datagram);
        Ok(moved)
    }

    fn answer(&self, question: Question) {
        let names: Vec<ServiceKey> =
            self.catalog.keys().chain(self.host_port_table.keys().cloned()).collect();
        // A scraper that has gone away needs no answer.
        drop(question.send(self.metrics.render(&self.plane, &names)));
    }

    /// Tells which owners of host ports are served.
    fn answer_host_ports(&self, request: Request) {
        let refused = self.plane.refused().cloned().collect();
        let served = host_ports::answered(&request.wanted, self.config.serves_every_address(), &refused);
        // Who asked may be gone by now.
        drop(request.done.send(served));
    }

    /// Takes links, addresses and routes in.
    async fn refresh_machine(&mut self, kernel: &Kernel) {
        let machine = match kernel.look().await {
            Ok(machine) => machine,
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "NodePorts may not answer on every address of the node");
                return;
            }
        };
        if self.machine == machine {
            return;
        }
        let own = machine.reachable();
        let node_ports = network::node_port_addresses(&own, &self.config.node_port_ranges);
        self.machine = machine;
        if let Err(error) = self.plane.set_node_addresses(&own, &node_ports) {
            let error = format!("{:#}", anyhow!(error));
            tracing::warn!(error, "NodePorts may not answer on every address of the node");
        }
        if self.config.serve_outside
            && let Err(error) = self.plane.set_ways(&devices::ways(&self.machine))
        {
            let error = format!("{:#}", anyhow!(error));
            tracing::warn!(error, "clients outside may be hidden behind another address of the node");
        }
        self.serve_outside();
        self.shortcut_pods();
    }

    /// Has pods of this node hand their packets straight to each other and to the tunnel, where nothing wants to see them on
    /// their way.
    fn shortcut_pods(&mut self) {
        if self.filled {
            let auto = self.config.shortcut == ShortcutMode::Auto;
            // Without clients outside the programs know no routes.
            let wanted = shortcuts::wanted(&self.machine, &self.node_facts, auto, self.config.serve_outside);
            shortcuts::apply(&mut self.plane, &wanted, &mut self.told_obstacle);
        }
    }

    /// Runs our programs on the devices that clients outside come by, once there is something to serve.
    fn serve_outside(&mut self) {
        if !self.filled {
            return;
        }
        let wanted = if self.config.serve_outside {
            devices::choose(&self.machine, &self.node_facts)
        } else {
            Vec::new()
        };
        if self.devices.as_ref() == Some(&wanted) {
            return;
        }
        self.serve_through(wanted);
    }

    /// Puts back what others took away since it was made.
    fn audit(&mut self) {
        self.shortcut_pods();
        let Some(devices) = self.devices.clone().filter(|devices| !devices.is_empty()) else {
            return;
        };
        self.serve_through(devices);
        self.tidy_flows();
    }

    /// Forgets connections from outside that are over, and makes room for more where many are open.
    fn tidy_flows(&mut self) {
        let before = self.plane.usage().flows.capacity;
        match self.plane.tidy_flows(ebpf_loader::monotonic()) {
            Ok(stock) if stock.capacity != before => {
                tracing::info!(connections = stock.capacity / 2, "room for more connections from outside");
            }
            Ok(_) => {}
            Err(error) => {
                let error = format!("{:#}", anyhow!(error));
                tracing::warn!(error, "connections from outside may be forgotten while they are open");
            }
        }
    }

    fn serve_through(&mut self, wanted: Vec<Device>) {
        let changed = self.devices.as_ref() != Some(&wanted);
        let (v4, v6) = devices::default_sources(&self.machine, &self.node_facts);
        if let Err(error) = self.plane.hide_clients(v4, v6) {
            let error = format!("{:#}", anyhow!(error));
            tracing::warn!(error, "endpoints may not answer clients outside");
        }
        let failed = self.plane.serve_devices(wanted.clone());
        self.reports.unserved_devices(&failed);
        self.firewall.pass(!wanted.is_empty());
        if changed {
            tracing::info!(devices = wanted.len(), failed = failed.len(), "clients outside are served");
        }
        self.devices = Some(wanted);
    }
}

//! The pod loop against a CRI and an API server made of memory: over a real gRPC socket and the real client.
//!
//! What is asserted is what a user or the runtime would notice: calls in their order, and what the API was told.

mod claims;
mod fake_api;
mod fake_cri;
mod lapse;
mod of_the_node;
mod restored;
mod trouble;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_core::eviction::Pressure;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Node, Pod};
use serde_json::{Value, json};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use super::context::PodContext;
use super::directory::PodDirectory;
use super::manager::{self, Eviction, Inbox};
use crate::config::AgentConfig;
use crate::contracts::{
    CgroupError, CgroupManager, FoundPodCgroup, Host, HostPath, LogLink, LogLinks, MountedVolumes,
    PodLookup as _, RuntimeHealth, VolumeContext, VolumeError, VolumeManager, VolumeStep,
};
use crate::devices::Devices;
use crate::dra::{Dra, DraSettings};
use crate::events::EventRecorder;
use crate::numa::Numa;
use crate::probes::Prober;
use crate::runtime::cri;
use crate::runtime::events::follow;
use crate::runtime::images::Images;
use crate::sources::mirrors::{self, Mirrors};
use crate::sources::objects::Objects;
use crate::sources::offline;
use crate::sources::pods::{PodEvent, StaticSource};
use crate::sources::services::Services;
use crate::users::UserRanges;

use fake_api::FakeApi;
use fake_cri::FakeCri;
use lapse::Lapse;

const DEADLINE: Duration = Duration::from_secs(20);

/// What happened, in order, told by every fake.
#[derive(Clone, Default)]
struct Journal(Arc<Mutex<Vec<String>>>, Arc<Trap>);

/// Springs with a line of the journal.
#[derive(Default)]
struct Trap {
    /// Lines until then; none when it is not set.
    lines: AtomicUsize,
    sprung: Notify,
}

impl Journal {
    fn add(&self, line: impl Into<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line.into());
        let one_less = |left: usize| left.checked_sub(1);
        if self.1.lines.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) == Ok(1) {
            self.1.sprung.notify_one();
        }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until a line contains `part`; panics with all lines at the deadline.
    async fn wait_for(&self, part: &str) {
        let begin = Instant::now();
        while !self.lines().iter().any(|line| line.contains(part)) {
            assert!(begin.elapsed() < DEADLINE, "no {part:?} in {:#?}", self.lines());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[track_caller]
    fn assert_order(&self, parts: &[&str]) {
        let lines = self.lines();
        let mut from = 0;
        for part in parts {
            let found = lines.iter().skip(from).position(|line| line.contains(part));
            assert!(found.is_some(), "{part:?} is missing or too early in {lines:#?}");
            from += found.unwrap_or_default() + 1;
        }
    }
}

/// A host that only takes notes.
struct FakeHost(Journal, tempfile::TempDir, AtomicBool);

impl VolumeManager for FakeHost {
    fn mount_all<'a>(
        &'a self,
        _pod: &'a Pod,
        _context: &'a VolumeContext,
    ) -> BoxFuture<'a, Result<MountedVolumes, VolumeError>> {
        let full = self.2.load(Ordering::SeqCst);
        let error = || VolumeError {
            volume: "v".to_owned(),
            step: VolumeStep::SetUp,
            message: "no space left on device".to_owned(),
            waits: false,
        };
        if full {
            self.0.add("host: no space");
        }
        async move { if full { Err(error()) } else { Ok(MountedVolumes::default()) } }.boxed()
    }

    fn sub_path<'a>(
        &'a self,
        volume: &'a HostPath,
        _sub_path: &'a str,
    ) -> BoxFuture<'a, Result<std::path::PathBuf, VolumeError>> {
        async { Ok(volume.path.clone()) }.boxed()
    }

    fn teardown<'a>(&'a self, _pod_uid: &'a str) -> BoxFuture<'a, Result<(), VolumeError>> {
        self.0.add("host: teardown");
        async { Ok(()) }.boxed()
    }

    fn on_disk(&self) -> BoxFuture<'_, Result<Vec<String>, VolumeError>> {
        async { Ok(Vec::new()) }.boxed()
    }
}

impl CgroupManager for FakeHost {
    fn ensure_root(&self) -> BoxFuture<'_, Result<(), CgroupError>> {
        async { Ok(()) }.boxed()
    }

    fn ensure_pod<'a>(
        &'a self,
        _cgroup: &'a agent_core::qos::PodCgroup,
    ) -> BoxFuture<'a, Result<(), CgroupError>> {
        async { Ok(()) }.boxed()
    }

    fn remove_pod<'a>(&'a self, _path: &'a str) -> BoxFuture<'a, Result<(), CgroupError>> {
        self.0.add("host: remove cgroup");
        async { Ok(()) }.boxed()
    }

    fn list_pods(&self) -> BoxFuture<'_, Result<Vec<FoundPodCgroup>, CgroupError>> {
        async { Ok(Vec::new()) }.boxed()
    }
}

impl LogLinks for FakeHost {
    fn link(&self, _link: LogLink) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }

    fn remove_dangling(&self) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }
}

/// A node: its CRI, its API server, and the agent's pod loop between them.
struct Scene {
    journal: Journal,
    api: FakeApi,
    cri: FakeCri,
    host: Arc<FakeHost>,
    pressures: watch::Sender<BTreeSet<Pressure>>,
    going_down: watch::Sender<bool>,
    /// There is no API server.
    offline: bool,
    exclusive_cpus: bool,
    expects_static: BTreeSet<StaticSource>,
    /// Events are in the journal, too.
    tells_events: bool,
    clock: Arc<Lapse>,
    /// Of calls to the runtime that change something.
    deadline: Duration,
    agent: Option<Agent>,
}

struct Agent {
    claims: Dra,
    events: mpsc::Sender<PodEvent>,
    evictions: mpsc::Sender<Eviction>,
    directory: PodDirectory,
    cancel: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    feed: JoinHandle<()>,
}

impl Scene {
    async fn new() -> Self {
        let journal = Journal::default();
        let host = Arc::new(FakeHost(
            journal.clone(),
            tempfile::tempdir().expect("a directory"),
            AtomicBool::new(false),
        ));
        let mut scene = Self {
            api: FakeApi::new(journal.clone()),
            cri: FakeCri::new(journal.clone(), host.1.path().join("cri.sock")),
            journal,
            host,
            pressures: watch::Sender::new(BTreeSet::new()),
            going_down: watch::Sender::new(false),
            offline: false,
            exclusive_cpus: false,
            expects_static: BTreeSet::new(),
            tells_events: false,
            clock: Arc::new(Lapse::new(1)),
            deadline: Duration::from_secs(10),
            agent: None,
        };
        scene.cri.serve();
        scene.start_agent().await;
        scene
    }

    fn context(&self) -> Arc<PodContext> {
        let root = self.host.1.path();
        let yaml = format!(
            "{{apiVersion: kubelet.config.k8s.io/v1beta1, kind: KubeletConfiguration, tlsCertFile: /c, \
             tlsPrivateKeyFile: /k, cpuManagerPolicy: {policy}, reservedSystemCPUs: \"0\", podLogsDir: {root}/logs, keelson: {{nodeName: n, nodeIP: 10.0.0.1, kubeconfig: /x, \
             rootDir: {root}/kubelet}}}}",
            root = root.display(),
            policy = if self.exclusive_cpus { "static" } else { "none" },
        );
        let config =
            Arc::new(AgentConfig::parse(std::path::Path::new("test"), &yaml).expect("a configuration"));
        std::fs::create_dir_all(root.join("kubelet/pods/u")).expect("a pod directory");
        let socket = self.cri.socket().to_owned();
        let cri = cri::connect(socket.clone(), socket, self.deadline);
        let (events, facts) = EventRecorder::new();
        let client = if self.offline { offline::client() } else { self.api.client() };
        if self.tells_events {
            let forever = CancellationToken::new();
            tokio::spawn(crate::events::run(client.clone(), "n".to_owned(), facts, None, forever));
        }
        let (store, _writer) = kube::runtime::reflector::store();
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "n", "uid": "node-uid"}})).expect("a node");
        let host: Arc<FakeHost> = Arc::clone(&self.host);
        let devices = Devices::load(&root.join("kubelet"), CancellationToken::new());
        let objects = Objects::new(client.clone());
        let dra = DraSettings::new(&root.join("kubelet"), "n");
        Arc::new(PodContext {
            images: Images::new(cri.clone(), 2),
            host: Host {
                volumes: Arc::clone(&host) as Arc<dyn VolumeManager>,
                cgroups: Arc::clone(&host) as Arc<dyn CgroupManager>,
                log_links: host as Arc<dyn LogLinks>,
            },
            claims: Dra::load(dra, Arc::new(objects.clone()), client.clone()),
            objects,
            services: Services { store, synced: watch::channel(!self.offline).1 },
            events: events.clone(),
            numa: Numa::load(&config, 1 << 30, devices.clone()).expect("this machine has a processor 0"),
            users: UserRanges::load(&config).expect("no subordinate ids"),
            devices,
            client,
            config,
            node: watch::channel(Some(Arc::new(node))).1,
            health: watch::channel(RuntimeHealth::default()).1,
            prober: Prober {
                cri: cri.clone(),
                events,
                counters: Arc::default(),
                agent_started: jiff::Timestamp::now(),
            },
            status_slots: Arc::new(Semaphore::new(4)),
            memory_capacity: 1 << 30,
            kernel_memory: crate::host::kernel_memory::KernelMemory::default(),
            pressures: self.pressures.subscribe(),
            going_down: self.going_down.subscribe(),
            clock: Arc::clone(&self.clock) as Arc<dyn Clock>,
            cri,
        })
    }

    async fn start_agent(&mut self) {
        let cancel = CancellationToken::new();
        let directory = PodDirectory::default();
        let (events, queue) = mpsc::channel(16);
        let context = self.context();
        let claims = context.claims.clone();
        let follower = tokio::spawn(follow(
            context.cri.clone(),
            directory.clone(),
            Duration::from_secs(30),
            cancel.clone(),
        ));
        let (evictions, eviction_queue) = mpsc::channel(4);
        let inbox = Inbox {
            events: queue,
            evictions: eviction_queue,
            expects_static: self.expects_static.clone(),
            mirrors: watch::Sender::new(Mirrors::default()),
        };
        let mirrors = inbox.mirrors.subscribe();
        let mirrors = mirrors::run(context.client.clone(), mirrors, context.node.clone(), cancel.clone());
        let mirrors = tokio::spawn(mirrors);
        let pods = tokio::spawn(manager::run(context, directory.clone(), inbox, cancel.clone()));
        events.send(PodEvent::Synced(self.api.pods())).await.expect("the manager listens");
        let feed = tokio::spawn(self.api.clone().feed(events.clone()));
        self.agent = Some(Agent {
            claims,
            events,
            evictions,
            directory,
            cancel,
            tasks: vec![follower, mirrors, pods],
            feed,
        });
    }

    async fn stop_agent(&mut self) {
        let agent = self.agent.take().expect("it runs");
        agent.feed.abort();
        agent.cancel.cancel();
        for task in agent.tasks {
            task.await.expect("it ends cleanly");
        }
    }

    async fn create(&self, spec: Value) {
        let pod =
            self.api.create(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "spec": spec}));
        let agent = self.agent.as_ref().expect("it runs");
        agent.events.send(PodEvent::Apply(pod)).await.expect("the manager listens");
    }
}

fn simple() -> Value {
    json!({"containers": [{"name": "a", "image": "i", "imagePullPolicy": "IfNotPresent"}]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_starts_and_its_exit_is_told_and_healed() {
    let mut scene = Scene::new().await;
    scene.create(simple()).await;
    scene.journal.wait_for("api: Running Ready=True").await;
    scene.journal.assert_order(&[
        "cri: run sandbox 0",
        "cri: create a 0",
        "cri: start a",
        "api: Running Ready=True",
    ]);
    scene.journal.take();
    let died = Instant::now();
    scene.cri.exit("a", 1);
    scene.journal.wait_for("cri: create a 1").await;
    scene.journal.wait_for("restarts=1").await;
    assert!(died.elapsed() < Duration::from_secs(2), "events are slow: {:?}", died.elapsed());
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_restart_touches_nothing() {
    let mut scene = Scene::new().await;
    let mut spec = simple();
    spec["containers"][0]["readinessProbe"] = json!({"exec": {"command": ["true"]}, "periodSeconds": 1});
    scene.create(spec).await;
    scene.journal.wait_for("Ready=True").await;
    scene.stop_agent().await;
    scene.journal.take();
    scene.start_agent().await;
    let seen = scene.agent.as_ref().expect("it runs").directory.clone();
    let begin = Instant::now();
    while seen.container("ns", "p", None, "a").is_err() {
        assert!(begin.elapsed() < DEADLINE, "the pod is not picked up");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    scene.journal.wait_for("cri: exec a").await;
    let changes: Vec<String> = scene
        .journal
        .lines()
        .into_iter()
        .filter(|line| !line.contains("exec") && !line.contains("list"))
        .collect();
    assert!(changes.is_empty(), "{changes:#?}");
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_restart_is_waited_for() {
    let mut scene = Scene::new().await;
    scene.create(simple()).await;
    scene.journal.wait_for("Ready=True").await;
    scene.cri.stop().await;
    scene.journal.take();
    scene.cri.exit("a", 1);
    scene.cri.serve();
    scene.journal.wait_for("cri: create a 1").await;
    assert!(
        scene.journal.lines().iter().all(|line| !line.contains("run sandbox")),
        "{:#?}",
        scene.journal.lines()
    );
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_pod_ends_in_order() {
    let mut scene = Scene::new().await;
    scene.create(simple()).await;
    scene.journal.wait_for("Ready=True").await;
    scene.journal.take();
    let agent = scene.agent.as_ref().expect("it runs");
    agent.events.send(PodEvent::Apply(scene.api.delete(5))).await.expect("the manager listens");
    scene.journal.wait_for("api: delete").await;
    scene.journal.assert_order(&["cri: stop a 5", "cri: stop sandbox", "api: Failed", "host: teardown"]);
    scene.journal.assert_order(&["host: teardown", "cri: remove sandbox", "api: delete"]);
    scene.journal.assert_order(&["host: remove cgroup", "cri: remove sandbox"]);
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_the_api_does_not_have_are_ended() {
    let mut scene = Scene::new().await;
    scene.create(simple()).await;
    scene.journal.wait_for("Ready=True").await;
    scene.stop_agent().await;
    scene.api.forget();
    scene.journal.take();
    scene.start_agent().await;
    scene.journal.wait_for("cri: remove sandbox").await;
    scene.journal.assert_order(&[
        "cri: stop a",
        "cri: stop sandbox",
        "host: teardown",
        "cri: remove sandbox",
    ]);
    assert!(
        scene.journal.lines().iter().all(|line| !line.starts_with("api")),
        "{:#?}",
        scene.journal.lines()
    );
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_nowhere_is_told() {
    let mut scene = Scene::new().await;
    scene
        .create(json!({"containers": [{"name": "a", "image": "missing", "imagePullPolicy": "IfNotPresent"}]}))
        .await;
    scene.journal.wait_for("ErrImagePull").await;
    scene.journal.wait_for("ImagePullBackOff").await;
    scene.stop_agent().await;
}

/// The labels of a pod's objects, for the fake CRI's filters.
fn selected(labels: &BTreeMap<String, String>, selector: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

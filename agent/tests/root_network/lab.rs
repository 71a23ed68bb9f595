//! Nodes, pods and the fabric between them as network namespaces; a pretended API server joins the nodes' roles.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_core::overlay::Peer;
use cni_plugins_host::netlink::wireguard::{Device, WireGuard, tunnel};
use k8s_openapi::api::core::v1::Node as NodeObject;
use keelson_agent::config::AgentConfig;
use keelson_agent::events::EventRecorder;
use keelson_agent::network::{self, NetworkConfig, Peers, State, Wires};
use nix::sched::{CloneFlags, setns};
use serde_json::json;
use tokio::sync::{oneshot, watch};

/// Generous: eight suites may share the machine.
const DEADLINE: Duration = Duration::from_secs(60);
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// Nodes by name, as an API server has them; every change is seen by all.
pub(crate) struct Api {
    nodes: Mutex<BTreeMap<String, NodeObject>>,
    peers: watch::Sender<Option<Arc<Peers>>>,
    objects: watch::Sender<BTreeMap<String, Arc<NodeObject>>>,
}

impl Api {
    fn new() -> Self {
        Self {
            nodes: Mutex::default(),
            peers: watch::Sender::new(None),
            objects: watch::Sender::new(BTreeMap::new()),
        }
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, NodeObject>)) {
        let mut nodes = self.nodes.lock().unwrap();
        change(&mut nodes);
        let peers: Peers = nodes.values().map(Peer::of).map(|peer| (peer.name.clone(), peer)).collect();
        let objects = nodes.iter().map(|(name, node)| (name.clone(), Arc::new(node.clone()))).collect();
        self.peers.send_replace(Some(Arc::new(peers)));
        self.objects.send_replace(objects);
    }

    fn register(&self, name: &str, ranges: &[String], address: IpAddr) {
        let node = json!({
            "metadata": {"name": name, "uid": name},
            "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
            "status": {"addresses": [{"type": "InternalIP", "address": address.to_string()}]},
        });
        let node = serde_json::from_value(node).unwrap();
        self.change(|nodes| drop(nodes.insert(name.to_owned(), node)));
    }

    /// A node whose agent says nothing.
    pub(crate) fn add_silent_node(&self, name: &str, range: &str, address: IpAddr) {
        self.register(name, &[range.to_owned()], address);
    }

    /// What a node's agent would publish of its tunnel.
    pub(crate) fn publish_tunnel(&self, name: &str, address: IpAddr, mac: &str) {
        let published = [
            (network::MODE, "vxlan".to_owned()),
            (network::ADDRESSES, address.to_string()),
            (network::VTEP_MAC, mac.to_owned()),
        ];
        self.annotate(name, published.into_iter().map(|(name, value)| (name, Some(value))).collect());
    }

    /// A node is deleted.
    pub(crate) fn remove_node(&self, name: &str) {
        self.change(|nodes| drop(nodes.remove(name)));
    }

    fn annotate(&self, name: &str, annotations: network::Annotations) {
        self.change(|nodes| {
            // A node that was deleted is not made anew by its agent's last words.
            let Some(node) = nodes.get_mut(name) else { return };
            let current = node.metadata.annotations.get_or_insert_default();
            for (name, value) in annotations {
                match value {
                    Some(value) => drop(current.insert(name.to_owned(), value)),
                    None => drop(current.remove(name)),
                }
            }
        });
    }
}

/// One node with one pod that the runtime knows, and one that it does not.
pub(crate) struct Node {
    pub(crate) number: u8,
    pub(crate) netns: String,
    pub(crate) pod: String,
    pub(crate) stray_pod: String,
    /// The fabric's end of its link.
    pub(crate) port: String,
    pub(crate) pod_addresses: Vec<IpAddr>,
    role: Option<(oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
    state: watch::Receiver<Option<State>>,
    events: Arc<Mutex<String>>,
}

/// The place of one test; everything goes with it.
pub(crate) struct Lab {
    pub(crate) fabric: String,
    pub(crate) nodes: Vec<Node>,
    pub(crate) api: Arc<Api>,
    /// `keelson.network` as YAML.
    pub(crate) settings: String,
    prefix: String,
    home: tempfile::TempDir,
}

impl Lab {
    /// Nodes 192.0.2.N and 2001:db8::N on one fabric, with pods 10.244.N.2 and fd00:244:N::2, and their roles running.
    pub(crate) fn new(count: u8, settings: &str, bare: bool) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: network namespaces");
        let prefix = format!("kln{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let mut lab = Self {
            fabric: format!("{prefix}-fabric"),
            nodes: Vec::new(),
            api: Arc::new(Api::new()),
            settings: settings.to_owned(),
            prefix,
            home: tempfile::tempdir().unwrap(),
        };
        add_netns(&lab.fabric);
        ip(&lab.fabric, &["link", "add", "br0", "type", "bridge", "mcast_snooping", "0"]);
        ip(&lab.fabric, &["link", "set", "br0", "up"]);
        for number in 1..=count {
            lab.add_node(number, bare);
        }
        for number in 1..=count {
            lab.start(number);
        }
        lab
    }

    fn add_node(&mut self, number: u8, bare: bool) {
        let (netns, port) = (format!("{}-n{number}", self.prefix), format!("port{number}"));
        add_netns(&netns);
        ip(&self.fabric, &["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &netns]);
        ip(&self.fabric, &["link", "set", &port, "master", "br0", "up"]);
        ip(&netns, &["address", "add", &format!("192.0.2.{number}/24"), "dev", "eth0"]);
        ip(&netns, &["address", "add", &format!("2001:db8::{number}/64"), "dev", "eth0", "nodad"]);
        ip(&netns, &["link", "set", "eth0", "up"]);
        for setting in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            inside(&netns, || std::fs::write(Path::new("/proc/sys").join(setting), "1").unwrap());
        }
        ip(&netns, &["link", "add", "pods", "type", "bridge"]);
        ip(&netns, &["address", "add", &format!("10.244.{number}.1/24"), "dev", "pods"]);
        ip(&netns, &["address", "add", &format!("fd00:244:{number}::1/64"), "dev", "pods", "nodad"]);
        ip(&netns, &["link", "set", "pods", "up"]);
        let (pod, stray_pod) = (format!("{netns}-pod"), format!("{netns}-stray"));
        for (host, pod) in [(2, &pod), (3, &stray_pod)] {
            add_pod(&netns, pod, number, host);
        }
        let runtime = self.home.path().join(format!("netns-{number}"));
        std::fs::create_dir(&runtime).unwrap();
        std::os::unix::fs::symlink(format!("/run/netns/{pod}"), runtime.join("pod")).unwrap();
        if bare {
            ip(&netns, &["link", "del", "pods"]);
        }
        let pod_addresses: Vec<IpAddr> =
            vec![[10, 244, number, 2].into(), format!("fd00:244:{number}::2").parse().unwrap()];
        let ranges = [format!("10.244.{number}.0/24"), format!("fd00:244:{number}::/64")];
        self.api.register(&format!("node-{number}"), &ranges, [192, 0, 2, number].into());
        self.nodes.push(Node {
            number,
            netns,
            pod,
            stray_pod,
            port,
            pod_addresses,
            role: None,
            state: watch::channel(None).1,
            events: Arc::default(),
        });
    }

    /// Starts a node's role, as its agent would.
    pub(crate) fn start(&mut self, number: u8) {
        let config = self.config(number);
        let api = Arc::clone(&self.api);
        let node = &mut self.nodes[usize::from(number - 1)];
        let (stop, stopped) = oneshot::channel();
        let (state_sender, state) = watch::channel(None);
        let (netns, events) = (node.netns.clone(), Arc::clone(&node.events));
        let name = format!("node-{number}");
        let thread = std::thread::spawn(move || {
            enter(&netns);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    outcome = role(config, api, name, state_sender, events) => panic!("the role ended: {outcome:?}"),
                    _ = stopped => {}
                }
            });
        });
        node.role = Some((stop, thread));
        node.state = state;
    }

    fn config(&self, number: u8) -> NetworkConfig {
        let home = self.home.path();
        let text = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ntlsCertFile: /x\n\
             tlsPrivateKeyFile: /x\nkeelson:\n  nodeName: node-{number}\n  nodeIP: 192.0.2.{number}\n  \
             kubeconfig: /x\n  rootDir: {}\n  \
             cni: {{confDir: /x, bridge: pods, dataDir: /x, netnsDir: {}, stateDir: {}}}\n  network:\n    {}\n",
            home.join(format!("root-{number}")).display(),
            home.join(format!("netns-{number}")).display(),
            home.join(format!("state-{number}")).display(),
            self.settings
        );
        let config = AgentConfig::parse(Path::new("agent.yaml"), &text).unwrap();
        NetworkConfig::new(config.keelson.network.as_ref().unwrap(), &config).unwrap()
    }

    /// What a node's role has left for keelson-vxlan; null before it has left anything.
    pub(crate) fn left(&self, number: u8) -> serde_json::Value {
        let path = self.home.path().join(format!("state-{number}/overlay.json"));
        std::fs::read(path).map_or(serde_json::Value::Null, |text| serde_json::from_slice(&text).unwrap())
    }

    /// A node's encrypted tunnel as the kernel has it.
    pub(crate) fn wireguard(&self, number: u8) -> Device {
        inside(&self.nodes[usize::from(number - 1)].netns, || {
            let index = nix::net::if_::if_nametoindex("kl-wg").unwrap();
            WireGuard::open().unwrap().device(index).unwrap().unwrap()
        })
    }

    /// Takes the tunnel's peers away, as `wg set kl-wg peer … remove` does.
    pub(crate) fn forget_wireguard_peers(&self, number: u8) {
        inside(&self.nodes[usize::from(number - 1)].netns, || {
            let index = nix::net::if_::if_nametoindex("kl-wg").unwrap();
            tunnel::set_peers(index, &BTreeMap::new(), None).unwrap();
        });
    }

    /// Ends a node's role at once, wherever it is.
    pub(crate) fn stop(&mut self, number: u8) {
        if let Some((stop, thread)) = self.nodes[usize::from(number - 1)].role.take() {
            stop.send(()).ok();
            thread.join().unwrap();
        }
    }

    /// The MTU that a node's pods are told; 0 before there is one.
    pub(crate) fn mtu(&self, number: u8) -> u32 {
        self.nodes[usize::from(number - 1)].state.borrow().map_or(0, |state| state.mtu)
    }

    /// Events on a node so far.
    pub(crate) fn events(&self, number: u8) -> String {
        self.nodes[usize::from(number - 1)].events.lock().unwrap().clone()
    }

    /// No role has ended.
    pub(crate) fn check_alive(&self) {
        for node in &self.nodes {
            let ended = node.role.as_ref().is_some_and(|(_, thread)| thread.is_finished());
            assert!(!ended, "the role of node {} ended", node.number);
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some((stop, thread)) = node.role.take() {
                stop.send(()).ok();
                thread.join().ok();
            }
        }
        let list = Command::new("ip").args(["netns", "list"]).output().unwrap();
        for line in String::from_utf8_lossy(&list.stdout).lines() {
            let name = line.split_whitespace().next().unwrap_or_default();
            if name.starts_with(&format!("{}-", self.prefix)) {
                Command::new("ip").args(["netns", "del", name]).status().ok();
            }
        }
    }
}

/// The role between the pretended API server's watches.
async fn role(
    config: NetworkConfig,
    api: Arc<Api>,
    name: String,
    state: watch::Sender<Option<State>>,
    log: Arc<Mutex<String>>,
) -> anyhow::Result<()> {
    let (node_sender, node) = watch::channel(None);
    let (annotations, mut published) = watch::channel(None);
    let (events, mut facts) = EventRecorder::new();
    let mut objects = api.objects.subscribe();
    let wires = Wires { node, peers: api.peers.subscribe(), annotations, state, events };
    let follow = async {
        loop {
            let object = objects.borrow_and_update().get(&name).cloned();
            node_sender.send_replace(object);
            objects.changed().await.unwrap();
        }
    };
    let publish = async {
        loop {
            let wanted = published.borrow_and_update().clone();
            if let Some(wanted) = wanted {
                api.annotate(&name, wanted);
            }
            published.changed().await.unwrap();
        }
    };
    let record = async {
        while let Some(fact) = facts.recv().await {
            log.lock().unwrap().extend([format!("{fact:?}\n")]);
        }
    };
    tokio::select! {
        outcome = network::serve(config, wires) => outcome,
        () = follow => Ok(()),
        () = publish => Ok(()),
        () = record => Ok(()),
    }
}

fn add_netns(name: &str) {
    assert!(Command::new("ip").args(["netns", "add", name]).status().unwrap().success(), "netns {name}");
    ip(name, &["link", "set", "lo", "up"]);
}

fn add_pod(node: &str, pod: &str, number: u8, host: u8) {
    add_netns(pod);
    let link = format!("pod{host}");
    ip(node, &["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", pod]);
    ip(node, &["link", "set", &link, "master", "pods", "up"]);
    ip(pod, &["address", "add", &format!("10.244.{number}.{host}/24"), "dev", "eth0"]);
    ip(pod, &["address", "add", &format!("fd00:244:{number}::{host}/64"), "dev", "eth0", "nodad"]);
    ip(pod, &["link", "set", "eth0", "up"]);
    ip(pod, &["route", "add", "default", "via", &format!("10.244.{number}.1")]);
    ip(pod, &["-6", "route", "add", "default", "via", &format!("fd00:244:{number}::1")]);
}

/// `ip` in a namespace, which must succeed.
#[track_caller]
pub(crate) fn ip(netns: &str, args: &[&str]) -> String {
    run(netns, "ip", args).unwrap()
}

/// A program in a namespace.
pub(crate) fn run(netns: &str, program: &str, args: &[&str]) -> Result<String, String> {
    let path = format!("--net=/run/netns/{netns}");
    let output = Command::new("nsenter").arg(path).arg(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    Err(format!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr)))
}

fn enter(netns: &str) {
    let file = std::fs::File::open(format!("/run/netns/{netns}")).unwrap();
    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
}

/// Runs something in a namespace, in a thread of its own.
fn inside<T: Send>(netns: &str, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                enter(netns);
                work()
            })
            .join()
            .unwrap()
    })
}

/// A TCP connection between namespaces that carries more than one packet; the client's address as the server sees it.
pub(crate) fn talk(from: &str, to: &str, address: IpAddr) -> Result<IpAddr, String> {
    const AMOUNT: usize = 64 << 10;
    let listener =
        inside(to, || TcpListener::bind((address, 0))).map_err(|error| format!("bind: {error}"))?;
    let target = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().map_err(|error| error.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(|error| error.to_string())?;
        let mut received = vec![0; AMOUNT];
        stream.read_exact(&mut received).map_err(|error| format!("read: {error}"))?;
        Ok(peer.ip())
    });
    let sent = inside(from, || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2))?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(&vec![7; AMOUNT])
    });
    if let Err(error) = sent {
        // Lets the server go.
        inside(to, || TcpStream::connect(target)).ok();
        server.join().ok();
        return Err(format!("{target}: {error}"));
    }
    server.join().unwrap()
}

/// The path's MTU as a pod knows it after it has sent UDP packets of this size, which must not be split.
pub(crate) fn path_mtu(from: &str, to: IpAddr, size: usize) -> i32 {
    inside(from, || {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.connect(SocketAddr::new(to, 9)).unwrap();
        let payload = vec![0; size - if to.is_ipv4() { 28 } else { 48 }];
        // The answers to the first arrive as errors of later calls.
        for _ in 0..3 {
            socket.send(&payload).ok();
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let route = ip(from, &["route", "get", &to.to_string()]);
    let learned = route.split_whitespace().skip_while(|word| *word != "mtu").nth(1);
    learned.map_or(0, |mtu| mtu.parse().unwrap())
}

/// Asks until it is so; the panic tells what was seen last.
#[track_caller]
pub(crate) fn eventually(what: &str, mut look: impl FnMut() -> Result<(), String>) {
    let end = Instant::now() + DEADLINE;
    while let Err(last) = look() {
        assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}; last seen: {last}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The text holds a part.
pub(crate) fn expect(text: &str, part: &str) -> Result<(), String> {
    if text.contains(part) { Ok(()) } else { Err(format!("no {part:?} in {text}")) }
}

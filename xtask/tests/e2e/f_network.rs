//! What the CNI chain does for pods on one node: masquerade towards the outside, host ports, bandwidth.
//!
//! The outside is a network namespace of its own that the host has a link to.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use crate::b_walk::table_of_plugins;
use crate::support::{Namespace, get, kubectl, namespace_with, node_address, said, served_by, wait_for};

const LIMIT: Duration = Duration::from_secs(60);
/// The host's address on the link to the outside, and that of the machine there.
const HOST: &str = "198.51.100.1";
const OUTSIDE: &str = "198.51.100.2";
/// An address of the machine outside that is in the pods' range, which is not masqueraded.
const EXCEPTED: &str = "10.244.250.7";
const HOST_PORT: u16 = 18_085;

/// A machine beyond the host.
struct Outside {
    netns: String,
    link: String,
}

impl Outside {
    fn new() -> Self {
        let pid = std::process::id();
        let this = Self { netns: format!("kl-e2e-{pid}"), link: format!("kle2e{pid}") };
        let (netns, link) = (this.netns.as_str(), this.link.as_str());
        ip(&["netns", "add", netns]);
        ip(&["link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", netns]);
        ip(&["address", "add", &format!("{HOST}/24"), "dev", link]);
        ip(&["link", "set", link, "up"]);
        for address in [format!("{OUTSIDE}/24"), format!("{EXCEPTED}/32")] {
            ip(&["-n", netns, "address", "add", &address, "dev", "eth0"]);
        }
        ip(&["-n", netns, "link", "set", "lo", "up"]);
        ip(&["-n", netns, "link", "set", "eth0", "up"]);
        ip(&["-n", netns, "route", "add", "default", "via", HOST]);
        ip(&["route", "add", &format!("{EXCEPTED}/32"), "via", OUTSIDE, "dev", link]);
        this
    }

    fn run(&self, command: &[&str]) -> Output {
        Command::new("ip").args(["netns", "exec", &self.netns]).args(command).output().unwrap()
    }

    /// Whom a server out there sees when `dial` connects to the address that it is given.
    #[track_caller]
    fn sees(&self, address: &str, dial: impl Fn(SocketAddr) -> Output) -> IpAddr {
        let file = File::open(format!("/run/netns/{}", self.netns)).unwrap();
        let to = SocketAddr::new(address.parse().unwrap(), 0);
        let listener = std::thread::spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
            TcpListener::bind(to).unwrap()
        });
        let listener = listener.join().unwrap();
        listener.set_nonblocking(true).unwrap();
        let target = listener.local_addr().unwrap();
        wait_for(&format!("a connection to {target}"), LIMIT, || {
            let told = dial(target);
            listener.accept().map(|(_, peer)| peer.ip()).map_err(|_none| said(&told))
        })
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // The link goes with the namespace; both may be missing when making them failed.
        Command::new("ip").args(["link", "del", &self.link]).status().ok();
        Command::new("ip").args(["netns", "del", &self.netns]).status().ok();
    }
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "ip {}: {}", args.join(" "), said(&output));
}

fn address_of(ns: &Namespace, pod: &str) -> String {
    ns.kubectl(&["get", "pod", pod, "-o", "jsonpath={.status.podIP}"])
}

fn netns_of(ns: &Namespace, pod: &str) -> PathBuf {
    namespace_with("/run/keelson/up/netns", &address_of(ns, pod))
}

#[test]
fn a_pods_reach_the_outside_with_the_nodes_address_and_excepted_ranges_with_their_own() {
    let ns = Namespace::new("outside");
    ns.kubectl(&["run", "client", "--image=busybox", "--restart=Never", "--", "sleep", "3600"]);
    ns.kubectl(&["wait", "--for=condition=Ready", "pod/client", "--timeout=60s"]);
    let pod: IpAddr = address_of(&ns, "client").parse().unwrap();
    let outside = Outside::new();
    let netns = format!("--net={}", netns_of(&ns, "client").display());
    let dial = |target: SocketAddr| {
        // Nobody answers: what counts is that the connection comes.
        let url = format!("http://{target}/");
        Command::new("nsenter").args([&netns, "curl", "-sS", "-m", "2", &url]).output().unwrap()
    };
    assert_eq!(outside.sees(OUTSIDE, dial).to_string(), HOST);
    assert_eq!(outside.sees(EXCEPTED, dial), pod);
    // With the pod its masquerade goes.
    assert!(table_of_plugins().contains(&pod.to_string()), "{}", table_of_plugins());
    ns.kubectl(&["delete", "pod", "client", "--grace-period=1"]);
    wait_for("nothing of the pod in the packet filter", LIMIT, || {
        let table = table_of_plugins();
        if table.contains(&pod.to_string()) { Err(table) } else { Ok(()) }
    });
}

#[test]
fn b_a_host_port_answers_on_every_address_of_the_node_and_goes_with_the_pod() {
    let ns = Namespace::new("host-port");
    ns.apply(&format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: nginx, image: 'nginx:1.17.9', ports: [{{containerPort: 80, hostPort: {HOST_PORT}}}]}}
"
    ));
    ns.kubectl(&["run", "client", "--image=busybox", "--restart=Never", "--", "sleep", "3600"]);
    ns.kubectl(&["wait", "--for=condition=Ready", "pod/web", "pod/client", "--timeout=60s"]);
    let outside = Outside::new();
    let addresses = ["127.0.0.1".to_owned(), node_address(), HOST.to_owned()];
    for address in &addresses {
        let answer = wait_for(&format!("the host port on {address}"), LIMIT, || {
            get(&format!("{address}:{HOST_PORT}"))
        });
        assert_eq!(served_by(&answer), Some("web"), "{answer}");
    }
    // Another pod, the pod itself, and a machine outside, whose own address the pod sees.
    for pod in ["client", "web"] {
        let url = format!("http://{}:{HOST_PORT}/", node_address());
        let netns = format!("--net={}", netns_of(&ns, pod).display());
        let command =
            || Command::new("nsenter").args([&netns, "curl", "-sSi", "-m", "3", &url]).output().unwrap();
        wait_for(&format!("from pod {pod}"), LIMIT, || served(&command()));
    }
    let url = format!("http://{HOST}:{HOST_PORT}/");
    wait_for("from outside", LIMIT, || served(&outside.run(&["curl", "-sSi", "-m", "3", &url])));
    ns.wait("the outside client's own address", &["logs", "web"], |log| {
        log.lines().any(|line| line.starts_with(&format!("{OUTSIDE} ")))
    });
    ns.kubectl(&["delete", "pod", "web", "--grace-period=1"]);
    for address in &addresses {
        wait_for(&format!("{address} refuses"), LIMIT, || match get(&format!("{address}:{HOST_PORT}")) {
            Err(error) if error.contains("refused") => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
}

fn served(output: &Output) -> Result<(), String> {
    let text = said(output);
    if output.status.success() && served_by(&text) == Some("web") { Ok(()) } else { Err(text) }
}

#[test]
fn c_the_annotations_limit_what_a_pod_sends_and_receives() {
    // Bytes per second; Kubernetes states no burst, so that the first 2^31-1 bits pass at once.
    const RATE: u64 = 10_000_000;
    const BURST: u64 = (1 << 31) / 8;
    const AMOUNT: u64 = BURST + RATE;
    let ns = Namespace::new("bandwidth");
    ns.apply(
        "
apiVersion: v1
kind: Pod
metadata:
  name: slow
  annotations: {kubernetes.io/ingress-bandwidth: 80M, kubernetes.io/egress-bandwidth: 40M}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: sink, image: busybox, command: ['sh', '-c', 'while true; do nc -l -p 7000 >/dev/null; done']}
",
    );
    ns.kubectl(&["wait", "--for=condition=Ready", "pod/slow", "--timeout=60s"]);
    let (address, netns) = (address_of(&ns, "slow"), netns_of(&ns, "slow"));
    let inside = Command::new("nsenter")
        .arg(format!("--net={}", netns.display()))
        .args(["tc", "qdisc", "show", "dev", "eth0"])
        .output()
        .unwrap();
    assert!(said(&inside).contains("rate 40Mbit"), "egress: {}", said(&inside));
    let mut sink = wait_for("the sink", LIMIT, || {
        std::net::TcpStream::connect(format!("{address}:7000")).map_err(|error| error.to_string())
    });
    let began = Instant::now();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(7), AMOUNT), &mut sink).unwrap();
    sink.shutdown(std::net::Shutdown::Write).unwrap();
    // Until the other side has read everything and closes.
    sink.set_read_timeout(Some(LIMIT)).unwrap();
    std::io::Read::read(&mut sink, &mut [0]).unwrap();
    let took = began.elapsed().as_secs_f64();
    // No clock runs fast enough to break it: what went beyond the burst took its time.
    assert!(took > 0.9, "{AMOUNT} bytes within {took:.2} s at 80 Mbit/s");
    kubectl(&["-n", &ns.0, "delete", "pod", "slow", "--grace-period=1"]);
}

#[test]
fn d_a_bandwidth_that_is_none_is_told() {
    let ns = Namespace::new("bad-bandwidth");
    ns.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: wrong, annotations: {kubernetes.io/ingress-bandwidth: fast}}
spec: {containers: [{name: main, image: busybox, command: [sleep, '3600']}]}
",
    );
    ns.wait("an Event that names the annotation", &["get", "events"], |table| {
        table.contains("kubernetes.io/ingress-bandwidth")
    });
}

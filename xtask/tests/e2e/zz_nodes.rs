//! A cluster of three nodes: the pod network between them, what kubectl reaches on each, failing links, a node that
//! leaves, and `down`. After all others, since there is one cluster on a machine at a time.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use crate::support::{
    kubectl, kubectl_command, namespace_with, pid_of, repo, said, served_by, wait_for, wait_kubectl, xtask,
};

const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];
const LIMIT: Duration = Duration::from_secs(60);

/// One pod on every node, and a Service in front of them.
const MANIFEST: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: everywhere, labels: {app: everywhere}}
spec:
  replicas: 6
  selector: {matchLabels: {app: everywhere}}
  template:
    metadata: {labels: {app: everywhere}}
    spec: {containers: [{name: nginx, image: 'nginx:1.17.9'}]}
---
apiVersion: v1
kind: Service
metadata: {name: everywhere}
spec: {selector: {app: everywhere}, ports: [{port: 80}]}
";

/// A pod with a host port on the second node.
const HOST_PORT: &str = "
apiVersion: v1
kind: Pod
metadata: {name: host-port}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 1
  containers: [{name: nginx, image: 'nginx:1.17.9', ports: [{containerPort: 80, hostPort: 18086}]}]
";

#[derive(Clone, Debug)]
struct Pod {
    name: String,
    node: String,
    address: String,
    /// Its IPv6 address.
    second: String,
}

/// Brings the nodes and pods up once.
fn pods() -> &'static [Pod] {
    static PODS: OnceLock<Vec<Pod>> = OnceLock::new();
    PODS.get_or_init(|| {
        let output = xtask(&["up", "--detach", "--no-build", "--nodes", "3", "--dual-stack"]);
        assert!(output.status.success(), "up failed: {}", said(&output));
        crate::support::apply(MANIFEST, &[]);
        let list = "jsonpath={range .items[*]}{.metadata.name} {.spec.nodeName} {.status.podIPs[0].ip} {.status.podIPs[1].ip} {.status.conditions[?(@.type=='Ready')].status}{'\\n'}{end}";
        let text = wait_kubectl("six pods", &["get", "pods", "-l", "app=everywhere", "-o", list], |text| {
            text.matches(" True").count() == 6
        });
        text.lines().filter_map(|line| {
            let mut words = line.split_whitespace().map(str::to_owned);
            Some(Pod { name: words.next()?, node: words.next()?, address: words.next()?, second: words.next()? })
        }).collect()
    })
}

fn pod_on(node: &str) -> &'static Pod {
    pods().iter().find(|pod| pod.node == node).unwrap_or_else(|| panic!("no pod on {node}: {:?}", pods()))
}

/// A command inside a node, with its output.
fn inside(node: &str, command: &[&str]) -> Output {
    xtask(&[&["node", node, "--"], command].concat())
}

#[track_caller]
fn inside_ok(node: &str, command: &[&str]) -> String {
    let output = inside(node, command);
    assert!(output.status.success(), "{node}: {}: {}", command.join(" "), said(&output));
    said(&output)
}

/// GET from inside a node.
fn curl(node: &str, address: &str) -> Result<String, String> {
    let output = inside(node, &["curl", "-sSi", "--max-time", "3", &format!("http://{address}/")]);
    let text = said(&output);
    if output.status.success() && text.starts_with("HTTP/1.1 200") { Ok(text) } else { Err(text) }
}

/// A program of the host inside a pod's network namespace.
fn in_pod(pod: &Pod, command: &[&str]) -> Output {
    let netns = pod_netns(pod);
    Command::new("nsenter").arg(format!("--net={}", netns.display())).args(command).output().unwrap()
}

/// The namespace that has the pod's address.
fn pod_netns(pod: &Pod) -> PathBuf {
    namespace_with(Path::new("/run/keelson/up/nodes").join(&pod.node).join("netns"), &pod.address)
}

#[test]
fn a_pods_are_spread_and_reach_each_other_by_their_own_addresses() {
    for node in NODES {
        assert_eq!(pods().iter().filter(|pod| pod.node == node).count(), 2, "spread: {:?}", pods());
    }
    for (from, to) in NODES.iter().flat_map(|from| NODES.iter().map(move |to| (*from, *to))) {
        let client = pod_on(from);
        let server = pods().iter().rfind(|pod| pod.node == to).unwrap();
        wait_for(&format!("pod on {from} → pod on {to}"), LIMIT, || {
            let url = format!("http://{}/", server.address);
            let answer = in_pod(client, &["curl", "-sSi", "--max-time", "3", &url]);
            if said(&answer).starts_with("HTTP/1.1 200") { Ok(()) } else { Err(said(&answer)) }
        });
        // The server's log shows whom it has seen.
        wait_kubectl("the client's own address", &["logs", &server.name], |log| {
            log.lines().any(|line| line.starts_with(&format!("{} ", client.address)))
        });
    }
}

#[test]
fn aa_pods_have_ipv6_and_reach_each_other_over_it() {
    let (from, to) = (pod_on("node-1"), pod_on("node-2"));
    assert!(
        from.second.starts_with("fd00:10:244:") && to.second.starts_with("fd00:10:244:"),
        "{from:?} {to:?}"
    );
    wait_for("over IPv6 between nodes", LIMIT, || {
        let seen = seen_by_server_in(to, &to.second, |target| {
            in_pod(from, &["curl", "-sS", "-m", "3", &format!("http://{target}/")])
        })?;
        if seen.to_string() == from.second {
            Ok(())
        } else {
            Err(format!("seen as {seen}, not {}", from.second))
        }
    });
}

#[test]
fn ab_pods_reach_the_outside_masqueraded() {
    // The host is beyond the nodes: it has no route to pods.
    let pod = pod_on("node-1");
    for (host, node) in [("10.250.0.1", "10.250.0.11"), ("fd00:250::1", "fd00:250::11")] {
        let listener = TcpListener::bind(SocketAddr::new(host.parse().unwrap(), 0)).unwrap();
        let seen = wait_for(&format!("a connection to {host}"), LIMIT, || {
            seen_by(&listener, |target| {
                in_pod(pod, &["curl", "-sS", "-m", "3", &format!("http://{target}/")])
            })
        });
        assert_eq!(seen.to_string(), node);
    }
}

#[test]
fn ab_rules_that_somebody_flushes_come_back() {
    let pod = pod_on("node-1");
    let table = || inside("node-1", &["nft", "list", "table", "inet", "keelson_cni"]);
    assert!(said(&table()).contains(&pod.address), "{}", said(&table()));
    inside_ok("node-1", &["nft", "flush", "ruleset"]);
    wait_for("the pod's masquerade", LIMIT, || {
        let shown = said(&table());
        if shown.contains(&pod.address) { Ok(()) } else { Err(shown) }
    });
    ab_pods_reach_the_outside_masqueraded();
}

#[test]
fn ac_a_host_port_answers_on_its_node_for_everybody() {
    pods();
    crate::support::apply(HOST_PORT, &[]);
    kubectl(&["wait", "--for=condition=Ready", "pod/host-port", "--timeout=60s"]);
    let served = |answer: Result<String, String>| {
        let answer = answer?;
        if served_by(&answer) == Some("host-port") { Ok(()) } else { Err(answer) }
    };
    wait_for("from the host", LIMIT, || served(crate::support::get("10.250.0.12:18086")));
    for node in NODES {
        wait_for(&format!("from {node}"), LIMIT, || served(curl(node, "10.250.0.12:18086")));
        wait_for(&format!("from a pod on {node}"), LIMIT, || {
            let url = "http://10.250.0.12:18086/";
            served(Ok(said(&in_pod(pod_on(node), &["curl", "-sSi", "-m", "3", url]))))
        });
    }
    wait_for("on the node's loopback", LIMIT, || served(curl("node-2", "127.0.0.1:18086")));
    kubectl(&["delete", "pod", "host-port"]);
    wait_for("gone", LIMIT, || match crate::support::get("10.250.0.12:18086") {
        Err(error) if error.contains("refused") => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

/// The client's address as a server inside a pod's network sees it.
fn seen_by_server_in(
    pod: &Pod,
    address: &str,
    dial: impl FnOnce(SocketAddr) -> Output,
) -> Result<IpAddr, String> {
    let file = std::fs::File::open(pod_netns(pod)).unwrap();
    let to = SocketAddr::new(address.parse().unwrap(), 0);
    let listener = std::thread::spawn(move || {
        setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
        TcpListener::bind(to).unwrap()
    });
    seen_by(&listener.join().unwrap(), dial)
}

/// The client's address as a listener sees it.
fn seen_by(listener: &TcpListener, dial: impl FnOnce(SocketAddr) -> Output) -> Result<IpAddr, String> {
    listener.set_nonblocking(true).unwrap();
    let told = dial(listener.local_addr().unwrap());
    listener.accept().map(|(_, peer)| peer.ip()).map_err(|_none| said(&told))
}

#[test]
fn b_nodes_reach_pods_and_the_service_from_everywhere() {
    pods();
    let service = kubectl(&["get", "service", "everywhere", "-o", "jsonpath={.spec.clusterIP}"]);
    for node in NODES {
        for pod in pods() {
            wait_for(&format!("{node} → {pod:?}"), LIMIT, || curl(node, &pod.address).map(drop));
        }
        let mut missing: Vec<&str> = pods().iter().map(|pod| pod.name.as_str()).collect();
        wait_for(&format!("{node} reaches all pods through the Service"), LIMIT, || {
            let answer = curl(node, &format!("{}:80", service.trim()))?;
            let by = served_by(&answer).ok_or("no name")?;
            missing.retain(|name| *name != by);
            if missing.is_empty() { Ok(()) } else { Err(format!("silent: {missing:?}")) }
        });
    }
}

#[test]
fn b_pods_packets_take_the_short_way_to_other_nodes() {
    pods();
    for node in NODES {
        wait_for(&format!("{node} routes its pods' packets"), LIMIT, || {
            let told = inside_ok(node, &["curl", "-sS", "--max-time", "5", "http://127.0.0.1:10249/metrics"]);
            let line = told.lines().find(|line| line.starts_with("keelson_service_routed_pod_addresses"));
            let count = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
            if count.is_some_and(|count| count >= 1.0) { Ok(()) } else { Err(format!("{line:?}")) }
        });
    }
}

#[test]
fn c_kubectl_reaches_pods_on_every_node() {
    for node in NODES {
        let pod = pod_on(node);
        let said = kubectl(&["exec", &pod.name, "--", "hostname"]);
        assert_eq!(said.trim(), pod.name);
        kubectl(&["logs", &pod.name]);
        let mut forward = kubectl_command(&["port-forward", &pod.name, ":80"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        // Kept open: kubectl prints one more line, and ends when nobody can read it.
        let output = forward.stdout.as_mut().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).unwrap();
        let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
        let answer = crate::support::get(&format!("127.0.0.1:{port}"));
        forward.kill().unwrap();
        forward.wait().unwrap();
        assert_eq!(served_by(&answer.unwrap()), Some(pod.name.as_str()), "port-forward to {node}");
    }
}

#[test]
fn d_links_are_cut_slowed_and_restored() {
    let (near, far) = (pod_on("node-1"), pod_on("node-2"));
    let reach = || {
        let url = format!("http://{}/", far.address);
        let answer = in_pod(near, &["curl", "-sSi", "--max-time", "2", &url]);
        if said(&answer).starts_with("HTTP/1.1 200") { Ok(()) } else { Err(said(&answer)) }
    };
    wait_for("before", LIMIT, reach);
    let ip = |args: &[&str]| assert!(Command::new("ip").args(args).status().unwrap().success(), "{args:?}");
    ip(&["link", "set", "kl-upn2", "down"]);
    wait_for("the cut is felt", LIMIT, || if reach().is_err() { Ok(()) } else { Err("answered".to_owned()) });
    ip(&["link", "set", "kl-upn2", "up"]);
    wait_for("after the cut", LIMIT, reach);
    let tc = |args: &[&str]| assert!(Command::new("tc").args(args).status().unwrap().success(), "{args:?}");
    tc(&[
        "qdisc", "add", "dev", "kl-upn2", "root", "tbf", "rate", "512kbit", "burst", "4k", "latency", "400ms",
    ]);
    wait_for("over a slow link", LIMIT, reach);
    tc(&["qdisc", "del", "dev", "kl-upn2", "root"]);
    // The node's own end goes down, and with it every route over it; the role puts its own back.
    inside_ok("node-2", &["ip", "link", "set", "eth0", "down"]);
    inside_ok("node-2", &["ip", "link", "set", "eth0", "up"]);
    inside_ok("node-2", &["ip", "route", "replace", "default", "via", "10.250.0.1"]);
    wait_for("after the node's end was down", LIMIT, reach);
    wait_kubectl("node-2 is Ready", &["get", "node", "node-2"], |text| text.contains(" Ready"));
}

#[test]
fn e_entries_removed_by_hand_come_back() {
    pods();
    let shown = || inside_ok("node-1", &["ip", "route", "show", "proto", "76"]);
    let before = shown();
    assert_eq!(before.lines().count(), 2, "{before}");
    inside_ok("node-1", &["ip", "link", "del", "kl-vxlan"]);
    wait_for("the device and its routes", LIMIT, || if shown() == before { Ok(()) } else { Err(shown()) });
    wait_for("traffic", LIMIT, || curl("node-1", &pod_on("node-3").address).map(drop));
}

#[test]
fn f_traffic_outlives_the_agent() {
    let pod = pod_on("node-3");
    wait_for("before", LIMIT, || curl("node-1", &pod.address).map(drop));
    let pid = pid_of("agent@node-1").expect("it runs");
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    curl("node-1", &pod.address).expect("without the agent");
    wait_for("the agent runs again", LIMIT, || match pid_of("agent@node-1") {
        Some(new) if new != pid => Ok(()),
        other => Err(format!("{other:?}")),
    });
    curl("node-1", &pod.address).expect("with the next");
}

#[test]
fn g_a_node_that_leaves_for_good_leaves_no_entries() {
    pods();
    let range = kubectl(&["get", "node", "node-3", "-o", "jsonpath={.spec.podCIDR}"]);
    let network = range.split('/').next().unwrap().to_owned();
    let agent = pid_of("agent@node-3").expect("it runs").to_string();
    // A stopped machine: its agent must not register it again.
    assert!(Command::new("kill").args(["-STOP", &agent]).status().unwrap().success());
    kubectl(&["delete", "node", "node-3"]);
    for node in ["node-1", "node-2"] {
        wait_for(&format!("nothing of node-3 on {node}"), LIMIT, || {
            let routes = inside_ok(node, &["ip", "route"]);
            let neighbours = inside_ok(node, &["ip", "neigh", "show", "dev", "kl-vxlan"]);
            let forwards = inside_ok(node, &["bridge", "fdb", "show", "dev", "kl-vxlan"]);
            let all = format!("{routes}{neighbours}{forwards}");
            if all.contains(&network) || all.contains("10.250.0.13 ") { Err(all) } else { Ok(()) }
        });
    }
    assert!(Command::new("kill").args(["-CONT", &agent]).status().unwrap().success());
}

#[test]
fn z_down_leaves_nothing() {
    pods();
    let output = xtask(&["down"]);
    assert!(output.status.success(), "{}", said(&output));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let target = repo().join("target/up/").display().to_string();
    let left: Vec<&str> =
        mounts.lines().filter(|line| line.contains("/run/keelson/up/") || line.contains(&target)).collect();
    assert!(left.is_empty(), "mounts: {left:#?}");
    assert!(!Path::new("/run/keelson/up").exists(), "the run directory");
    assert!(!Path::new("/sys/fs/bpf/keelson/up").exists(), "BPF pins");
    let links = said(&Command::new("ip").args(["-o", "link"]).output().unwrap());
    assert!(!links.contains("kl-up"), "links: {links}");
    for hierarchy in ["cpu", "memory", "pids", "unified", "systemd", ""] {
        let dir = Path::new("/sys/fs/cgroup").join(hierarchy).join("keelson/up");
        assert!(!dir.exists(), "cgroup {}", dir.display());
    }
    let processes = said(&Command::new("ps").args(["-eo", "args"]).output().unwrap());
    assert!(!processes.contains("/run/keelson/up"), "processes: {processes}");
}

//! The plugins as executables, against a real kernel, in a network namespace that plays the host.
//!
//! Needs root. Every namespace is made below a temporary directory and removed with it, also when a
//! test fails; the machine's own namespace is not touched.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

use std::{
    collections::BTreeSet,
    fs,
    future::Future,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use cni_plugins_host::{
    invoke::{InvokeError, Invoker, RuntimeArgs},
    netlink::{Link, Netlink},
    netns,
};
use cni_plugins_types::{CniResult, NetworkConfigList};
use tokio::task::JoinSet;

const BRIDGE: &str = "kltest0";
const EXECUTABLE: &str = env!("CARGO_BIN_EXE_keelson-cni");

/// A namespace that plays the host, pods' namespaces, and the plugins installed beside them.
struct Lab {
    dir: tempfile::TempDir,
    host: PathBuf,
    invoker: Invoker,
    next_pod: AtomicU32,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = netns::create_named(&dir.path().join("netns"), "host").expect("needs root");
        let bin = dir.path().join("bin");
        let installed = Command::new(EXECUTABLE).arg("install").arg(&bin).status().unwrap();
        assert!(installed.success());
        let invoker = Invoker {
            bin_dirs: vec![bin],
            cache_dir: dir.path().join("cache"),
            deadline: Duration::from_secs(120),
        };
        Self { dir, host, invoker, next_pod: AtomicU32::new(0) }
    }

    fn list(&self) -> NetworkConfigList {
        self.list_with(r#"[{"subnet":"10.99.0.0/24"}],[{"subnet":"fd99::/64"}]"#)
    }

    fn list_with(&self, ranges: &str) -> NetworkConfigList {
        let data = self.dir.path().join("ipam");
        NetworkConfigList::parse(&format!(
            r#"{{"cniVersion":"1.1.0","name":"testnet","plugins":[{{"type":"keelson-bridge","bridge":"{BRIDGE}",
            "isGateway":true,"isDefaultGateway":true,"hairpinMode":true,"mtu":1400,
            "ipam":{{"type":"keelson-ipam","dataDir":"{}","ranges":[{ranges}],
            "routes":[{{"dst":"0.0.0.0/0"}}]}}}}]}}"#,
            data.display()
        ))
        .unwrap()
    }

    /// A pod's namespace and the arguments to attach it.
    fn pod(&self) -> RuntimeArgs {
        let number = self.next_pod.fetch_add(1, Ordering::Relaxed);
        let netns = netns::create_named(&self.dir.path().join("netns"), &format!("pod{number}")).unwrap();
        RuntimeArgs {
            container_id: format!("container{number}"),
            netns,
            ifname: "eth0".to_owned(),
            ..RuntimeArgs::default()
        }
    }

    /// Runs a future, and the plugins it starts, inside the host's namespace.
    fn on_host<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        netns::run_in(&self.host, || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
        })
        .unwrap()
    }

    fn add(&self, rt: &RuntimeArgs) -> Result<CniResult, InvokeError> {
        self.on_host(self.invoker.add(&self.list(), rt))
    }

    fn del(&self, rt: &RuntimeArgs) {
        self.on_host(self.invoker.del(&self.list(), rt)).unwrap();
    }

    fn ports(&self) -> Vec<Link> {
        self.on_host(async {
            let netlink = Netlink::open().unwrap();
            match netlink.link(BRIDGE).await.unwrap() {
                Some(bridge) => netlink.ports(bridge.index).await.unwrap(),
                None => Vec::new(),
            }
        })
    }

    fn held_addresses(&self) -> Vec<String> {
        let dir = self.dir.path().join("ipam/testnet");
        let names = fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.to_string_lossy().into_owned()).filter(|name| is_allocation(name)).collect()
    }

    #[track_caller]
    fn assert_nothing_left(&self) {
        assert_eq!(self.ports(), Vec::new());
        assert_eq!(self.held_addresses(), Vec::<String>::new());
        let results = fs::read_dir(self.invoker.cache_dir.join("results")).into_iter().flatten();
        assert_eq!(results.count(), 0);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.dir.path().join("netns")).into_iter().flatten().flatten() {
            netns::remove(&entry.path()).unwrap();
        }
    }
}

fn is_allocation(name: &str) -> bool {
    name.parse::<IpAddr>().is_ok() || name.starts_with("own.")
}

fn first_address(result: &CniResult) -> IpAddr {
    result.ips[0].address.addr()
}

/// Sends a line from one namespace to a listener in another.
#[track_caller]
fn assert_reachable(from: &Path, to: &Path, addr: IpAddr) {
    let listener = netns::run_in(to, || TcpListener::bind(SocketAddr::new(addr, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let mut line = String::new();
        listener.accept().unwrap().0.read_to_string(&mut line).unwrap();
        line
    });
    netns::run_in(from, || {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5)).unwrap();
        stream.write_all(b"hello").unwrap();
    })
    .unwrap();
    assert_eq!(server.join().unwrap(), "hello");
}

#[test]
fn parallel_adds_give_working_distinct_pods_and_del_leaves_nothing() {
    let lab = Lab::new();
    let pods: Vec<RuntimeArgs> = (0..30).map(|_| lab.pod()).collect();
    let list = lab.list();
    let started = Instant::now();
    let results: Vec<CniResult> = lab.on_host(async {
        let mut calls = JoinSet::new();
        for (index, pod) in pods.iter().cloned().enumerate() {
            let (invoker, list) = (lab.invoker.clone(), list.clone());
            calls.spawn(async move { (index, invoker.add(&list, &pod).await.unwrap()) });
        }
        let mut results = calls.join_all().await;
        results.sort_by_key(|(index, _)| *index);
        results.into_iter().map(|(_, result)| result).collect()
    });
    eprintln!("30 parallel ADDs: {:?}", started.elapsed());
    let addresses: BTreeSet<IpAddr> = results.iter().flat_map(CniResult::addresses_in_sandbox).collect();
    assert_eq!(addresses.len(), 60);
    assert_eq!(lab.ports().len(), 30);
    assert!(
        lab.ports().iter().all(|port| port.up && port.mtu == 1400 && port.alias.starts_with("cni:testnet:"))
    );

    let (first, second) = (&pods[0], &pods[1]);
    assert_reachable(&first.netns, &second.netns, first_address(&results[1]));
    assert_reachable(&first.netns, &second.netns, results[1].ips[1].address.addr());
    assert_reachable(&first.netns, &first.netns, first_address(&results[0]));
    assert_reachable(&lab.host, &first.netns, first_address(&results[0]));
    assert_reachable(&first.netns, &lab.host, "10.99.0.1".parse().unwrap());

    lab.on_host(lab.invoker.check(&list, first)).unwrap();
    lab.on_host(lab.invoker.status(&list)).unwrap();
    for pod in &pods {
        lab.del(pod);
    }
    lab.assert_nothing_left();
    lab.del(first);
}

#[test]
fn del_works_without_namespace_and_check_sees_the_damage() {
    let lab = Lab::new();
    let pod = lab.pod();
    lab.add(&pod).unwrap();
    let port = lab.ports().remove(0).name;
    lab.on_host(async { Netlink::open().unwrap().delete_link(&port).await.unwrap() });
    let error = lab.on_host(lab.invoker.check(&lab.list(), &pod)).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("is missing, down or not a port of"), "{source}");
    netns::remove(&pod.netns).unwrap();
    lab.del(&pod);
    lab.del(&pod);
    lab.assert_nothing_left();
}

#[test]
fn a_second_add_fails_and_leaves_the_first_intact() {
    let lab = Lab::new();
    let pod = lab.pod();
    let result = lab.add(&pod).unwrap();
    let output = call_plugin(&lab, "ADD", &pod).wait_with_output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("eth0 exists already"), "{text}");
    let other = lab.pod();
    lab.add(&other).unwrap();
    assert_reachable(&other.netns, &pod.netns, first_address(&result));
    assert_eq!(lab.held_addresses().len(), 8);
}

#[test]
fn exhaustion_is_told_and_rolled_back() {
    let lab = Lab::new();
    let list = lab.list_with(r#"[{"subnet":"10.99.0.0/30"}]"#);
    let (pod, other) = (lab.pod(), lab.pod());
    lab.on_host(lab.invoker.add(&list, &pod)).unwrap();
    let error = lab.on_host(lab.invoker.add(&list, &other)).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("no IP addresses available in range 10.99.0.1-10.99.0.2"), "{source}");
    assert_eq!(lab.ports().len(), 1);
    lab.del(&pod);
    lab.on_host(lab.invoker.add(&list, &other)).unwrap();
    lab.del(&other);
    lab.assert_nothing_left();
}

#[test]
fn a_call_killed_anywhere_leaves_nothing_after_del_or_gc() {
    let lab = Lab::new();
    let survivor = lab.pod();
    let result = lab.add(&survivor).unwrap();
    for round in 0..24_u32 {
        let pod = lab.pod();
        let mut child = call_plugin(&lab, "ADD", &pod);
        let kill_at = Instant::now() + Duration::from_micros(250) * round;
        while Instant::now() < kill_at {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if round % 2 == 0 {
            lab.del(&pod);
        } else {
            let valid = [(survivor.container_id.clone(), survivor.ifname.clone())];
            lab.on_host(lab.invoker.gc(&lab.list(), &valid)).unwrap();
        }
        assert_eq!(lab.ports().len(), 1, "round {round}");
        assert_eq!(lab.held_addresses().len(), 4, "round {round}");
        // The same container can be attached afterwards.
        if round % 8 == 0 {
            lab.add(&pod).unwrap();
            lab.del(&pod);
        }
    }
    assert_reachable(&lab.host, &survivor.netns, first_address(&result));
}

/// Starts the plugin itself, as a runtime would, so that the test can kill it.
fn call_plugin(lab: &Lab, command: &str, pod: &RuntimeArgs) -> std::process::Child {
    let list = lab.list();
    let input = list.plugin_input(&list.plugins[0], &pod.capability_args, None);
    netns::run_in(&lab.host, || {
        let mut child = Command::new(lab.invoker.bin_dirs[0].join("keelson-bridge"))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &pod.container_id)
            .env("CNI_NETNS", &pod.netns)
            .env("CNI_IFNAME", &pod.ifname)
            .env("CNI_PATH", &lab.invoker.bin_dirs[0])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(serde_json::to_string(&input).unwrap().as_bytes()).unwrap();
        child
    })
    .unwrap()
}

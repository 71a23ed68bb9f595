//! A network namespace that plays the host, pods' namespaces, and the plugins installed beside them.
//!
//! Needs root. Everything is below a temporary directory and removed with it, also when a test fails; the
//! machine's own namespace is not touched.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    fs,
    future::Future,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
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
use serde_json::{Value, json};

/// The bridge of the usual configuration.
pub(crate) const BRIDGE: &str = "kltest0";
/// Name of the usual network.
pub(crate) const NETWORK: &str = "testnet";
/// Debian's containernetworking-plugins.
pub(crate) const REFERENCE: &str = "/usr/lib/cni";
const EXECUTABLE: &str = env!("CARGO_BIN_EXE_keelson-cni");
/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// See the module.
pub(crate) struct Lab {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) host: PathBuf,
    pub(crate) invoker: Invoker,
    next_pod: AtomicU32,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = netns::create_named(&dir.path().join("netns"), "host").expect("needs root");
        let bin = dir.path().join("bin");
        let installed = Command::new(EXECUTABLE).arg("install").arg(&bin).status().unwrap();
        assert!(installed.success());
        let invoker = Invoker {
            bin_dirs: vec![bin, REFERENCE.into()],
            cache_dir: dir.path().join("cache"),
            deadline: Duration::from_secs(120),
        };
        Self { dir, host, invoker, next_pod: AtomicU32::new(0) }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// `keelson-bridge` as a gateway of both families.
    pub(crate) fn list(&self) -> NetworkConfigList {
        self.list_of(&[self.bridge(&json!([[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]]))])
    }

    /// The usual bridge with other ranges.
    pub(crate) fn bridge(&self, ranges: &Value) -> Value {
        json!({
            "type": "keelson-bridge", "bridge": BRIDGE, "isGateway": true, "isDefaultGateway": true,
            "hairpinMode": true, "mtu": 1400, "ipam": self.ipam(ranges),
        })
    }

    pub(crate) fn ipam(&self, ranges: &Value) -> Value {
        json!({
            "type": "keelson-ipam", "dataDir": self.path("ipam"), "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}],
        })
    }

    pub(crate) fn list_of(&self, plugins: &[Value]) -> NetworkConfigList {
        self.list_of_version("1.1.0", plugins)
    }

    pub(crate) fn list_of_version(&self, version: &str, plugins: &[Value]) -> NetworkConfigList {
        self.list_named(NETWORK, version, plugins)
    }

    pub(crate) fn list_named(&self, name: &str, version: &str, plugins: &[Value]) -> NetworkConfigList {
        let plugins: Vec<Value> = plugins.iter().map(|plugin| self.own_files(plugin)).collect();
        let list = json!({"cniVersion": version, "name": name, "plugins": plugins});
        NetworkConfigList::parse(&list.to_string()).unwrap()
    }

    /// The plugin's object with the test's own log and records.
    fn own_files(&self, plugin: &Value) -> Value {
        let mut plugin = plugin.clone();
        plugin["logFile"] = self.path("cni.log").into();
        plugin["stateDir"] = self.path("state").into();
        plugin
    }

    /// A pod's namespace and the arguments to attach it.
    pub(crate) fn pod(&self) -> RuntimeArgs {
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
    pub(crate) fn on_host<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        netns::run_in(&self.host, || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
        })
        .unwrap()
    }

    pub(crate) fn add(&self, rt: &RuntimeArgs) -> Result<CniResult, InvokeError> {
        self.add_to(&self.list(), rt)
    }

    pub(crate) fn add_to(
        &self,
        list: &NetworkConfigList,
        rt: &RuntimeArgs,
    ) -> Result<CniResult, InvokeError> {
        self.on_host(self.invoker.add(list, rt))
    }

    pub(crate) fn check(&self, list: &NetworkConfigList, rt: &RuntimeArgs) -> Result<(), String> {
        self.on_host(self.invoker.check(list, rt)).map_err(|error| reason(&error))
    }

    pub(crate) fn status(&self, list: &NetworkConfigList) -> Result<(), String> {
        self.on_host(self.invoker.status(list)).map_err(|error| reason(&error))
    }

    pub(crate) fn del(&self, rt: &RuntimeArgs) {
        self.del_from(&self.list(), rt);
    }

    pub(crate) fn del_from(&self, list: &NetworkConfigList, rt: &RuntimeArgs) {
        self.on_host(self.invoker.del(list, rt)).unwrap();
    }

    pub(crate) fn gc(&self, list: &NetworkConfigList, valid: &[&RuntimeArgs]) {
        let valid: Vec<_> = valid.iter().map(|rt| (rt.container_id.clone(), rt.ifname.clone())).collect();
        self.on_host(self.invoker.gc(list, &valid)).unwrap();
    }

    /// The host's links, but `lo`.
    pub(crate) fn links(&self) -> Vec<Link> {
        links_in(&self.host)
    }

    pub(crate) fn ports(&self) -> Vec<Link> {
        let links = self.links();
        let bridge = links.iter().find(|link| link.name == BRIDGE).map(|bridge| bridge.index);
        links.into_iter().filter(|link| bridge.is_some() && link.controller == bridge).collect()
    }

    /// `address` of each lease, as the executable lists them.
    pub(crate) fn held_addresses(&self) -> Vec<String> {
        let output = Command::new(EXECUTABLE)
            .args(["leases", "--conf-dir", "/nonexistent", "--data-dir", &self.path("ipam")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let lines = String::from_utf8(output.stdout).unwrap();
        let mut held = Vec::new();
        for line in lines.lines() {
            let lease: Value = serde_json::from_str(line).unwrap();
            // The default directory is the machine's.
            if lease["network"] == NETWORK {
                held.extend(
                    lease["addresses"].as_array().unwrap().iter().map(|a| a.as_str().unwrap().to_owned()),
                );
            }
        }
        held
    }

    /// Waits until as many ports are left: DEL answers before the kernel has deleted them.
    #[track_caller]
    pub(crate) fn wait_for_ports(&self, count: usize) {
        wait_for(&format!("{count} ports"), || {
            let ports = self.ports();
            if ports.len() == count { Ok(()) } else { Err(format!("{ports:?}")) }
        });
    }

    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        self.wait_for_ports(0);
        assert_eq!(self.held_addresses(), Vec::<String>::new());
        let results = fs::read_dir(self.invoker.cache_dir.join("results")).into_iter().flatten();
        assert_eq!(results.count(), 0);
        for plugin in ["tuning", "bandwidth"] {
            let dirs = fs::read_dir(self.dir.path().join("state").join(plugin)).into_iter().flatten();
            let records = dirs.flat_map(|dir| fs::read_dir(dir.unwrap().path()).unwrap());
            assert_eq!(records.count(), 0, "{plugin}");
        }
    }

    /// Calls a plugin itself, as a runtime would, with `input` on its standard input.
    pub(crate) fn call(&self, plugin: &str, environment: &[(&str, &str)], input: &[u8]) -> Child {
        netns::run_in(&self.host, || {
            let mut child = Command::new(self.invoker.bin_dirs[0].join(plugin))
                .env_clear()
                .env("CNI_PATH", &self.invoker.bin_dirs[0])
                .envs(environment.iter().copied())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // A plugin that refuses its environment does not read.
            drop(child.stdin.take().unwrap().write_all(input));
            child
        })
        .unwrap()
    }

    /// Calls the first plugin of the usual list for a pod.
    pub(crate) fn call_for(&self, command: &str, pod: &RuntimeArgs) -> Child {
        let list = self.list();
        let input = list.plugin_input(&list.plugins[0], &pod.capability_args, None);
        let netns = pod.netns.display().to_string();
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", &pod.container_id),
            ("CNI_NETNS", &netns),
            ("CNI_IFNAME", &pod.ifname),
        ];
        self.call("keelson-bridge", &environment, &serde_json::to_vec(&input).unwrap())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.dir.path().join("netns")).into_iter().flatten().flatten() {
            netns::remove(&entry.path()).unwrap();
        }
    }
}

/// The links of a namespace, but `lo`.
pub(crate) fn links_in(netns: &Path) -> Vec<Link> {
    let links = Netlink::open_in(netns).unwrap().links().unwrap();
    links.into_iter().filter(|link| link.name != "lo").collect()
}

/// The plugin's own words.
pub(crate) fn reason(error: &InvokeError) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

pub(crate) fn address(result: &CniResult, index: usize) -> IpAddr {
    result.ips[index].address.addr()
}

#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) if Instant::now() > end => panic!("no {what}; last seen: {seen}"),
            Err(_) => thread::yield_now(),
        }
    }
}

/// Sends a line from one namespace to a listener in another.
#[track_caller]
pub(crate) fn assert_reachable(from: &Path, to: &Path, addr: IpAddr) {
    // A neighbour that remembers who had the address before asks again after eight seconds, and the connection is tried again
    // seven later: plugins of others announce nothing.
    let heard = send_line(from, to, addr, Duration::from_secs(40));
    assert_eq!(heard.as_deref(), Ok("hello"), "{addr}");
}

/// The other way round; waits a little for what must not come.
#[track_caller]
pub(crate) fn assert_unreachable(from: &Path, to: &Path, addr: IpAddr) {
    let heard = send_line(from, to, addr, Duration::from_millis(300));
    assert!(heard.is_err(), "{addr} answers");
}

fn send_line(from: &Path, to: &Path, addr: IpAddr, patience: Duration) -> Result<String, String> {
    // On any address: the one in question may just have gone.
    let any: IpAddr = if addr.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let listener = netns::run_in(to, || TcpListener::bind(SocketAddr::new(any, 0)).unwrap()).unwrap();
    let target = SocketAddr::new(addr, listener.local_addr().unwrap().port());
    netns::run_in(from, || {
        let mut stream = TcpStream::connect_timeout(&target, patience).map_err(|error| error.to_string())?;
        stream.write_all(b"hello").map_err(|error| error.to_string())
    })
    .unwrap()?;
    let mut line = String::new();
    listener.accept().unwrap().0.read_to_string(&mut line).map_err(|error| error.to_string())?;
    Ok(line)
}

/// Output of a child that failed, as an error object.
pub(crate) fn error_object(child: Child) -> Value {
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

//! Plugins run one by one as a runtime runs a chain, in a network namespace that plays the host; looks by `ip` and `nft`.
//!
//! Everything is below a temporary directory and goes with it, also when a test fails.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]
#![allow(clippy::unused_self, reason = "a test reads as what it does with its ground")]

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use cni_plugins_host::netns;
use serde_json::{Value, json};

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_keelson-cni");
/// Longest wait for something that must come about.
const PATIENCE: Duration = Duration::from_secs(30);

/// The host and the plugins.
pub(crate) struct Ground {
    dir: tempfile::TempDir,
    /// The namespace that plays the host.
    pub(crate) host: PathBuf,
}

/// A pod.
#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) netns: PathBuf,
}

impl Ground {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = netns::create_named(&dir.path().join("netns"), "host").expect("needs root");
        let bin = dir.path().join("bin");
        assert!(Command::new(EXECUTABLE).arg("install").arg(&bin).status().unwrap().success());
        Self { dir, host }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Another host: what a boot leaves of the old one is its disk.
    pub(crate) fn reboot(&mut self, number: u32) {
        for entry in fs::read_dir(self.dir.path().join("netns")).unwrap().flatten() {
            netns::remove(&entry.path()).unwrap();
        }
        self.host = netns::create_named(&self.dir.path().join("netns"), &format!("host{number}")).unwrap();
    }

    pub(crate) fn namespace(&self, name: &str) -> PathBuf {
        netns::create_named(&self.dir.path().join("netns"), name).unwrap()
    }

    pub(crate) fn pod(&self, id: &str) -> Pod {
        Pod { id: id.to_owned(), netns: self.namespace(id) }
    }

    /// A call in the making.
    pub(crate) fn command(&self, plugin: &str, verb: &str, pod: Option<&Pod>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.host.display()))
            .arg(self.dir.path().join("bin").join(plugin))
            .env("CNI_COMMAND", verb)
            .env("CNI_PATH", self.dir.path().join("bin"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(pod) = pod {
            command.env("CNI_CONTAINERID", &pod.id).env("CNI_NETNS", &pod.netns).env("CNI_IFNAME", "eth0");
        }
        command
    }

    /// Starts a call.
    pub(crate) fn start(&self, config: &Value, verb: &str, pod: Option<&Pod>) -> Child {
        let plugin = config["type"].as_str().unwrap();
        let mut child = self.command(plugin, verb, pod).spawn().unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        child
    }

    /// A call that may fail.
    pub(crate) fn ask(&self, config: &Value, verb: &str, pod: Option<&Pod>) -> Result<Value, Value> {
        let output = self.start(config, verb, pod).wait_with_output().unwrap();
        answer(&output)
    }

    /// ADD through a chain; the last result.
    #[track_caller]
    pub(crate) fn add(&self, chain: &[Value], pod: &Pod) -> Value {
        let mut result = Value::Null;
        for plugin in chain {
            result = self.ask(&with_result(plugin, &result), "ADD", Some(pod)).unwrap();
        }
        result
    }

    /// DEL through a chain, backwards, without any result.
    #[track_caller]
    pub(crate) fn del(&self, chain: &[Value], pod: &Pod) {
        for plugin in chain.iter().rev() {
            self.ask(plugin, "DEL", Some(pod)).unwrap();
        }
    }

    /// GC of every plugin of a chain.
    #[track_caller]
    pub(crate) fn gc(&self, chain: &[Value], valid: &[&Pod]) {
        let list: Vec<Value> =
            valid.iter().map(|pod| json!({"containerID": pod.id, "ifname": "eth0"})).collect();
        for plugin in chain {
            let mut config = plugin.clone();
            config["cni.dev/valid-attachments"] = list.clone().into();
            self.ask(&config, "GC", None).unwrap();
        }
    }

    /// `keelson-bridge` with five addresses of each family.
    pub(crate) fn bridge(&self) -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "net", "type": "keelson-bridge", "bridge": "kgr0",
            "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
            "stateDir": self.dir.path().join("run"), "logFile": self.dir.path().join("cni.log"),
            "ipam": {
                "type": "keelson-ipam", "dataDir": self.dir.path().join("ipam"),
                "ranges": [[{"subnet": "10.88.0.0/29"}], [{"subnet": "fd88::/125"}]],
            },
        })
    }

    /// Another plugin of the same network.
    pub(crate) fn plugin(&self, kind: &str, more: &Value) -> Value {
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "net", "type": kind,
            "stateDir": self.dir.path().join("run"), "logFile": self.dir.path().join("cni.log"),
        });
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Runs a program in a namespace; its output.
    #[track_caller]
    pub(crate) fn inside(&self, namespace: &Path, line: &str) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net={}", namespace.display()))
            .args(line.split_whitespace())
            .output()
            .unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A node beside the host, 192.0.2.2 and 2001:db8::2 on a link to 192.0.2.1 and 2001:db8::1.
    pub(crate) fn outside(&self) -> PathBuf {
        let node = self.namespace("outside");
        let host = &self.host;
        self.inside(host, &format!("ip link add up0 type veth peer name eth0 netns {}", node.display()));
        self.inside(host, "ip addr add 192.0.2.1/24 dev up0");
        self.inside(host, "ip addr add 2001:db8::1/64 dev up0 nodad");
        self.inside(host, "ip link set up0 up");
        self.inside(&node, "ip addr add 192.0.2.2/24 dev eth0");
        self.inside(&node, "ip addr add 2001:db8::2/64 dev eth0 nodad");
        self.inside(&node, "ip link set eth0 up");
        node
    }

    /// Elements of each set and map of our table; empty where there is no table.
    pub(crate) fn elements(&self) -> BTreeMap<String, usize> {
        let output = Command::new("nsenter")
            .arg(format!("--net={}", self.host.display()))
            .args(["nft", "-j", "list", "table", "inet", "keelson_cni"])
            .output()
            .unwrap();
        let object: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let all = object["nftables"].as_array().cloned().unwrap_or_default();
        all.iter()
            .filter_map(|one| one.get("set").or_else(|| one.get("map")))
            .map(|set| {
                let count = set["elem"].as_array().map_or(0, Vec::len);
                (set["name"].as_str().unwrap_or_default().to_owned(), count)
            })
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// Ends of pods' pairs on the host.
    pub(crate) fn pairs(&self) -> Vec<String> {
        let text = self.inside(&self.host, "ip -o link show type veth");
        let names = text.lines().filter_map(|line| line.split(": ").nth(1));
        names.map(|name| name.split('@').next().unwrap().to_owned()).filter(|name| name != "up0").collect()
    }

    /// Lines of `keelson-cni leases`.
    pub(crate) fn leases(&self) -> Vec<String> {
        let output = Command::new(EXECUTABLE)
            .args(["leases", "--data-dir"])
            .arg(self.dir.path().join("ipam"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    /// Files of plugins' records.
    pub(crate) fn records(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut open = vec![self.dir.path().join("run")];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    open.push(path);
                } else if path.extension().is_some_and(|extension| extension == "json" || extension == "tmp")
                {
                    found.push(path.display().to_string());
                }
            }
        }
        found
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.dir.path().join("netns")).into_iter().flatten().flatten() {
            drop(netns::remove(&entry.path()));
        }
    }
}

fn answer(output: &Output) -> Result<Value, Value> {
    let value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    if output.status.success() { Ok(value) } else { Err(value) }
}

/// A plugin's input with the result of the one before it.
pub(crate) fn with_result(plugin: &Value, result: &Value) -> Value {
    let mut config = plugin.clone();
    if !result.is_null() {
        config["prevResult"] = result.clone();
    }
    config
}

/// The n-th address of a result.
#[track_caller]
pub(crate) fn address(result: &Value, index: usize) -> IpAddr {
    result["ips"][index]["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap()
}

/// Waits for a fact.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "not within {} s: {what}", PATIENCE.as_secs());
        thread::yield_now();
    }
}

/// The client's address that a server in `to` sees when somebody in `from` connects to `target`; the server listens on
/// `port` of every address.
#[track_caller]
pub(crate) fn seen(from: &Path, to: &Path, port: u16, target: SocketAddr) -> IpAddr {
    let any: IpAddr = if target.is_ipv4() { "0.0.0.0".parse().unwrap() } else { "::".parse().unwrap() };
    let listener = netns::run_in(to, || TcpListener::bind(SocketAddr::new(any, port)).unwrap()).unwrap();
    let server = thread::spawn(move || {
        let (mut stream, client) = listener.accept().unwrap();
        let mut word = [0; 5];
        stream.read_exact(&mut word).unwrap();
        client.ip()
    });
    netns::run_in(from, || {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(20)).unwrap();
        stream.write_all(b"hello").unwrap();
    })
    .unwrap();
    server.join().unwrap()
}

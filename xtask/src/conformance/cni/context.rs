//! What a case works with: a network namespace that plays the host, pods, calls of the plugin, and looks at the kernel
//! by iproute2, so that no code of ours judges our plugins. Everything ends with the case.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cni_plugins_host::netns;
use serde_json::{Value, json};

use super::super::runner::World;
use super::answer::Answer;
use super::subject::{BRIDGE, Kind, NETWORK, OVERLAY, Subject};
use crate::cmd::Cmd;

/// Seconds after which a call that hangs is killed.
const CALL_LIMIT: &str = "60";
/// Versions that the suite asks for.
pub(crate) const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// One plugin and where its cases work.
pub(crate) struct Suite {
    /// The plugin.
    pub(crate) subject: Subject,
    /// The versions it says to support.
    pub(crate) versions: Vec<String>,
    /// Everything on disk is below.
    pub(crate) dir: PathBuf,
    /// How long one case may take.
    pub(crate) deadline: Duration,
    counter: AtomicU64,
}

impl Suite {
    /// Asks the plugin for its versions.
    pub(crate) fn new(subject: Subject, dir: PathBuf, deadline: Duration) -> Result<Self> {
        let mut suite = Self { subject, versions: Vec::new(), dir, deadline, counter: AtomicU64::new(0) };
        let mut command = Command::new(&suite.subject.file);
        command.env_clear().env("CNI_COMMAND", "VERSION");
        let answer = finish(command, br#"{"cniVersion":"1.0.0"}"#, "VERSION".to_owned())?;
        let object = answer.ok().context("the plugin does not answer VERSION")?;
        let all = object["supportedVersions"].as_array().cloned().unwrap_or_default();
        suite.versions = all.iter().filter_map(|version| version.as_str().map(str::to_owned)).collect();
        Ok(suite)
    }
}

impl World for Suite {
    type Context = T;

    fn context(self: &Arc<Self>) -> Result<T> {
        T::new(self)
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn clean_up(context: T) -> Result<()> {
        tokio::task::spawn_blocking(move || context.clean_up()).await?
    }
}

/// One run of one case.
#[derive(Clone)]
pub(crate) struct T {
    inner: Arc<Inner>,
}

struct Inner {
    suite: Arc<Suite>,
    dir: PathBuf,
    host: PathBuf,
    namespaces: Mutex<Vec<PathBuf>>,
    next: AtomicU64,
}

/// A pod to attach.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    /// Container id.
    pub(crate) id: String,
    /// Its network namespace.
    pub(crate) netns: PathBuf,
}

/// A call in the making: the variables, and what is on standard input.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// The executable.
    pub(crate) file: PathBuf,
    /// The `CNI_*` variables.
    pub(crate) env: Vec<(&'static str, String)>,
    /// Standard input.
    pub(crate) input: Vec<u8>,
}

impl Call {
    /// Sets a variable.
    pub(crate) fn set(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.env.retain(|(other, _)| *other != name);
        self.env.push((name, value.into()));
        self
    }

    /// Takes a variable away.
    pub(crate) fn unset(mut self, name: &str) -> Self {
        self.env.retain(|(other, _)| *other != name);
        self
    }

    /// Other bytes on standard input.
    pub(crate) fn raw(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }
}

impl T {
    fn new(suite: &Arc<Suite>) -> Result<Self> {
        let number = suite.counter.fetch_add(1, Ordering::Relaxed);
        let dir = suite.dir.join(format!("case-{number}"));
        std::fs::create_dir_all(dir.join("bin"))?;
        if suite.subject.kind == Kind::Vxlan {
            std::fs::write(dir.join(OVERLAY), Subject::overlay().to_string())?;
        }
        let host = netns::create_named(&dir.join("netns"), "host").context("a namespace for the host")?;
        let inner = Inner {
            suite: Arc::clone(suite),
            namespaces: Mutex::new(vec![host.clone()]),
            host,
            dir,
            next: AtomicU64::new(1),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Removes every namespace, with what is in it, and the files.
    fn clean_up(&self) -> Result<()> {
        let all = std::mem::take(&mut *self.inner.namespaces.lock().unwrap_or_else(PoisonError::into_inner));
        for path in all.iter().rev() {
            netns::remove(path)?;
        }
        std::fs::remove_dir_all(&self.inner.dir).context("removing the case's files")
    }

    /// The plugin under test.
    pub(crate) fn subject(&self) -> &Subject {
        &self.inner.suite.subject
    }

    /// Files of this case.
    pub(crate) fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// The namespace that plays the host.
    pub(crate) fn host(&self) -> &Path {
        &self.inner.host
    }

    /// Whether the plugin says to support a version.
    pub(crate) fn supports(&self, version: &str) -> bool {
        self.inner.suite.versions.iter().any(|known| known == version)
    }

    /// The newest version of the suite that the plugin says to support.
    pub(crate) fn newest(&self) -> &'static str {
        VERSIONS.into_iter().rev().find(|version| self.supports(version)).unwrap_or("1.0.0")
    }

    /// A namespace of the case.
    pub(crate) fn namespace(&self, name: &str) -> Result<PathBuf> {
        let path = netns::create_named(&self.inner.dir.join("netns"), name)?;
        self.inner.namespaces.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        Ok(path)
    }

    /// A pod's namespace and id.
    pub(crate) fn pod(&self) -> Result<Pod> {
        let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let netns = self.namespace(&format!("pod{number}"))?;
        Ok(Pod { id: format!("container-{number}"), netns })
    }

    /// A configuration that works, of the newest version.
    pub(crate) fn config(&self) -> Value {
        self.config_of(self.newest())
    }

    /// A configuration that works, of a version.
    pub(crate) fn config_of(&self, version: &str) -> Value {
        self.subject().config(version, &self.inner.dir)
    }

    /// A call as a runtime makes it.
    pub(crate) fn call(&self, verb: &str, pod: &Pod, config: &Value) -> Call {
        let path = format!("{}:{}", self.inner.dir.join("bin").display(), self.subject().dir.display());
        let mut env = vec![("CNI_COMMAND", verb.to_owned()), ("CNI_PATH", path)];
        if !matches!(verb, "GC" | "STATUS" | "VERSION") {
            env.push(("CNI_CONTAINERID", pod.id.clone()));
            env.push(("CNI_NETNS", pod.netns.display().to_string()));
            let ifname = if self.subject().kind == Kind::Loopback { "lo" } else { "eth0" };
            env.push(("CNI_IFNAME", ifname.to_owned()));
        }
        Call { file: self.subject().file.clone(), env, input: config.to_string().into_bytes() }
    }

    /// Makes the call in the host's namespace.
    pub(crate) fn run(&self, call: &Call) -> Result<Answer> {
        let mut command = Command::new("timeout");
        command
            .args(["-s", "KILL", CALL_LIMIT, "nsenter"])
            .arg(format!("--net={}", self.inner.host.display()))
            .arg(&call.file)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs(call.env.iter().map(|(name, value)| (*name, value)));
        let verb = call.env.iter().find(|(name, _)| *name == "CNI_COMMAND").map(|(_, verb)| verb.clone());
        finish(command, &call.input, verb.unwrap_or_else(|| "a call without verb".to_owned()))
    }

    /// A call as a runtime makes it.
    pub(crate) fn ask(&self, verb: &str, pod: &Pod, config: &Value) -> Result<Answer> {
        self.run(&self.call(verb, pod, config))
    }

    /// ADD that must succeed.
    pub(crate) fn add(&self, pod: &Pod, config: &Value) -> Result<Value> {
        self.ask("ADD", pod, config)?.ok()
    }

    /// DEL that must succeed and print nothing.
    pub(crate) fn del(&self, pod: &Pod, config: &Value) -> Result<()> {
        self.ask("DEL", pod, config)?.ok_silent()
    }

    /// CHECK with the result of ADD.
    pub(crate) fn check(&self, pod: &Pod, config: &Value, result: &Value) -> Result<Answer> {
        self.ask("CHECK", pod, &with(config, "prevResult", result.clone()))
    }

    /// GC that keeps these.
    pub(crate) fn gc(&self, config: &Value, valid: &[&Pod]) -> Result<Answer> {
        let list: Vec<Value> =
            valid.iter().map(|pod| json!({"containerID": pod.id, "ifname": "eth0"})).collect();
        let nobody = Pod { id: String::new(), netns: PathBuf::new() };
        self.ask("GC", &nobody, &with(config, "cni.dev/valid-attachments", list.into()))
    }

    /// Runs a program in a namespace.
    pub(crate) fn inside(&self, netns: &Path, program: &str, args: &[&str]) -> Result<String> {
        Cmd::new("nsenter").args([format!("--net={}", netns.display())]).args([program]).args(args).output()
    }

    /// Runs `ip` in a namespace.
    pub(crate) fn ip(&self, netns: &Path, line: &str) -> Result<String> {
        self.inside(netns, "ip", &line.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs `ip -json` in a namespace.
    pub(crate) fn ip_json(&self, netns: &Path, line: &str) -> Result<Vec<Value>> {
        let text = self.ip(netns, &format!("-json -details {line}"))?;
        if text.trim().is_empty() {
            return Ok(Vec::new());
        }
        serde_json::from_str(&text).with_context(|| format!("ip {line}: {text}"))
    }

    /// A link of a namespace.
    pub(crate) fn link(&self, netns: &Path, name: &str) -> Result<Option<Value>> {
        let links = self.ip_json(netns, "link show")?;
        Ok(links.into_iter().find(|link| link["ifname"] == name))
    }

    /// A link of a namespace that must be there.
    pub(crate) fn need_link(&self, netns: &Path, name: &str) -> Result<Value> {
        self.link(netns, name)?.with_context(|| format!("there is no link {name} in {}", netns.display()))
    }

    /// Addresses of a link with their prefix, without link-local ones of IPv6.
    pub(crate) fn addresses(&self, netns: &Path, link: &str) -> Result<Vec<String>> {
        let all = self.ip_json(netns, &format!("addr show dev {link}"))?;
        let infos = all.iter().flat_map(|one| one["addr_info"].as_array().cloned().unwrap_or_default());
        Ok(infos
            .filter(|info| info["scope"] != "link")
            .map(|info| format!("{}/{}", info["local"].as_str().unwrap_or_default(), info["prefixlen"]))
            .collect())
    }

    /// Ends of pairs on the host: what an attachment leaves there.
    pub(crate) fn pairs(&self) -> Result<Vec<String>> {
        let links = self.ip_json(self.host(), "link show")?;
        let pairs = links.iter().filter(|link| link["linkinfo"]["info_kind"] == "veth");
        let names = pairs.filter_map(|link| link["ifname"].as_str().map(str::to_owned));
        Ok(names.filter(|name| name != "up0").collect())
    }

    /// Fails unless no pair is left on the host and every address can be had again.
    pub(crate) fn nothing_left(&self) -> Result<()> {
        self.gone(|| Ok(self.pairs()?.is_empty()), "an attachment's pair is left on the host")?;
        self.addresses_free()
    }

    /// Fails unless all five addresses of the range can be had from the IPAM plugin.
    pub(crate) fn addresses_free(&self) -> Result<()> {
        let subject = self.subject();
        let name = if subject.kind == Kind::Ipam { &subject.name } else { &subject.ipam };
        let mut ipam = subject.ipam_section(&self.inner.dir);
        ipam["type"] = name.clone().into();
        let config = json!({
            "cniVersion": "1.0.0", "name": NETWORK, "type": name, "ipam": ipam,
            "logFile": self.inner.dir.join("cni.log"),
        });
        let probes: Vec<Pod> = (0..5)
            .map(|number| Pod { id: format!("probe-{number}"), netns: self.inner.host.clone() })
            .collect();
        let ask = |verb: &str, pod: &Pod| {
            let mut call = self.call(verb, pod, &config);
            call.file = subject.dir.join(name);
            self.run(&call)
        };
        for (number, probe) in probes.iter().enumerate() {
            let answer = ask("ADD", probe)?.ok();
            answer.with_context(|| format!("an address is leaked: only {number} of 5 can be had"))?;
        }
        probes.iter().try_for_each(|probe| ask("DEL", probe)?.ok().map(drop))
    }

    /// Waits until a fact holds: the kernel and plugins may finish a removal after they returned.
    pub(crate) fn gone(&self, is_gone: impl Fn() -> Result<bool>, what: &str) -> Result<()> {
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while !is_gone()? {
            ensure!(std::time::Instant::now() < end, "{what}");
            std::thread::yield_now();
        }
        Ok(())
    }

    /// A pod wired by hand, for plugins that come later in a chain: bridge, pair, addresses, default routes; with the
    /// result that a main plugin of this version would have given.
    pub(crate) fn wired(&self, version: &str) -> Result<(Pod, Value)> {
        let pod = self.pod()?;
        let number = pod.id.rsplit('-').next().unwrap_or("1").parse::<u32>().unwrap_or(1) + 1;
        let host_end = format!("pair{number}");
        if self.link(self.host(), BRIDGE)?.is_none() {
            for line in [
                format!("link add {BRIDGE} type bridge"),
                format!("link set {BRIDGE} up"),
                format!("addr add 10.91.0.1/24 dev {BRIDGE}"),
                format!("addr add fd91::1/64 dev {BRIDGE} nodad"),
            ] {
                self.ip(self.host(), &line)?;
            }
            let forward = "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1";
            self.inside(self.host(), "sh", &["-c", forward])?;
        }
        let target = pod.netns.display();
        self.ip(
            self.host(),
            &format!("link add {host_end} master {BRIDGE} type veth peer name eth0 netns {target}"),
        )?;
        self.ip(self.host(), &format!("link set {host_end} up type bridge_slave hairpin on"))?;
        for line in [
            "link set eth0 up".to_owned(),
            format!("addr add 10.91.0.{number}/24 dev eth0"),
            format!("addr add fd91::{number}/64 dev eth0 nodad"),
            "route add default via 10.91.0.1".to_owned(),
            "-6 route add default via fd91::1".to_owned(),
        ] {
            self.ip(&pod.netns, &line)?;
        }
        let mac = self.need_link(&pod.netns, "eth0")?["address"].clone();
        let family = |address: String, gateway: &str, family: &str| {
            let mut ip = json!({"address": address, "gateway": gateway, "interface": 2});
            if version < "1.0.0" {
                ip["version"] = family.into();
            }
            ip
        };
        let result = json!({
            "cniVersion": version,
            "interfaces": [
                {"name": BRIDGE, "mac": self.need_link(self.host(), BRIDGE)?["address"]},
                {"name": host_end, "mac": self.need_link(self.host(), &host_end)?["address"]},
                {"name": "eth0", "mac": mac, "sandbox": pod.netns.display().to_string()},
            ],
            "ips": [
                family(format!("10.91.0.{number}/24"), "10.91.0.1", "4"),
                family(format!("fd91::{number}/64"), "fd91::1", "6"),
            ],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            "dns": {"nameservers": ["192.0.2.53"]},
        });
        Ok((pod, result))
    }
}

/// An object with one more key.
pub(crate) fn with(config: &Value, key: &str, value: Value) -> Value {
    let mut config = config.clone();
    config[key] = value;
    config
}

/// An object without a key.
pub(crate) fn without(config: &Value, key: &str) -> Value {
    let mut config = config.clone();
    if let Some(object) = config.as_object_mut() {
        object.remove(key);
    }
    config
}

fn finish(mut command: Command, input: &[u8], call: String) -> Result<Answer> {
    let shown = command.get_program().display().to_string();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    let input = input.to_vec();
    // A plugin that refuses early does not read its input; its answer tells what is wrong.
    let writer = std::thread::spawn(move || stdin.write_all(&input).is_ok());
    let output = child.wait_with_output()?;
    writer.join().ok();
    Ok(Answer {
        call,
        status: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

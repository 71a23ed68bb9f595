//! One set of plugins in a namespace that plays its host, and timed calls of it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cni_plugins_host::netns;
use serde_json::{Value, json};

/// Longest wait for a link to go.
const PATIENCE: Duration = Duration::from_secs(60);
/// The bridge of either side.
pub(super) const BRIDGE: &str = "bench0";

/// A set of plugins.
pub(super) struct Side {
    name: &'static str,
    bin: PathBuf,
    main: &'static str,
    ipam: &'static str,
    dir: PathBuf,
    host: PathBuf,
    next: AtomicU32,
}

/// A pod to attach.
pub(super) struct Pod {
    id: String,
    netns: PathBuf,
}

impl Pod {
    /// Its namespace.
    pub(super) fn netns(&self) -> &Path {
        &self.netns
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A namespace that stays is removed with the side.
        netns::remove(&self.netns).ok();
    }
}

/// An attached pod: how long it took, and its link on the host.
pub(super) struct Added {
    pub(super) took: Duration,
    pub(super) link: String,
}

impl Side {
    /// Makes the namespace.
    pub(super) fn new(
        name: &'static str,
        bin: &Path,
        main: &'static str,
        ipam: &'static str,
        dir: &Path,
    ) -> Result<Self> {
        let host = netns::create_named(&dir.join("netns"), "host")?;
        Ok(Self { name, bin: bin.to_owned(), main, ipam, dir: dir.to_owned(), host, next: AtomicU32::new(0) })
    }

    /// Removes the namespaces of a side in `dir`.
    pub(super) fn remove_namespaces(dir: &Path) {
        for entry in std::fs::read_dir(dir.join("netns")).into_iter().flatten().flatten() {
            // The directory is removed next, which tells what stays.
            netns::remove(&entry.path()).ok();
        }
    }

    /// A pod's namespace.
    pub(super) fn pod(&self) -> Result<Pod> {
        let id = format!("bench-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let netns = netns::create_named(&self.dir.join("netns"), &id)?;
        Ok(Pod { id, netns })
    }

    /// Runs `work` in the host's namespace, with every program that it starts.
    pub(super) fn on_host<V: Send>(&self, work: impl FnOnce() -> Result<V> + Send) -> Result<V> {
        netns::run_in(&self.host, work)?
    }

    /// The configuration, of the newest version that both sides speak.
    fn config(&self) -> Value {
        json!({
            "cniVersion": "1.0.0", "name": "bench", "type": self.main, "bridge": BRIDGE,
            "isGateway": true, "isDefaultGateway": true, "hairpinMode": true, "logFile": "", "stateDir": self.dir.join("state"),
            "ipam": {"type": self.ipam, "dataDir": self.dir.join("ipam"), "ranges": [[{"subnet": "10.96.0.0/16"}]]},
        })
    }

    /// Starts a call; must be called inside [`Side::on_host`].
    pub(super) fn start(&self, verb: &str, pod: &Pod) -> Result<Running> {
        self.begin(self.main, verb, &pod.id, &pod.netns, &self.config())
    }

    fn begin(&self, program: &str, verb: &str, id: &str, netns: &Path, config: &Value) -> Result<Running> {
        crate::bench::interrupt::check()?;
        let begun = Instant::now();
        let mut child = Command::new(self.bin.join(program))
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.bin)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {program} of {}", self.name))?;
        // Some hundred bytes: they fit the pipe, so this waits for nobody.
        child.stdin.take().context("a pipe")?.write_all(config.to_string().as_bytes())?;
        Ok(Running { child, begun, what: format!("{verb} of {}", self.name) })
    }

    /// ADD; must be called inside [`Side::on_host`].
    pub(super) fn add(&self, pod: &Pod) -> Result<Added> {
        self.start("ADD", pod)?.added()
    }

    /// DEL until it returns; must be called inside [`Side::on_host`].
    pub(super) fn del(&self, pod: &Pod) -> Result<Duration> {
        Ok(self.start("DEL", pod)?.end()?.0)
    }

    /// VERSION, which does nothing but start.
    pub(super) fn version(&self) -> Result<Duration> {
        Ok(self.begin(self.main, "VERSION", "", Path::new(""), &self.config())?.end()?.0)
    }

    /// Waits until a link of the host is gone; must be called inside [`Side::on_host`].
    pub(super) fn wait_gone(&self, link: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while nix::net::if_::if_nametoindex(link).is_ok() {
            ensure!(Instant::now() < end, "{link} of {} is still there", self.name);
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Records an address for a container that never was.
    pub(super) fn record(&self, id: &str) -> Result<()> {
        self.begin(self.ipam, "ADD", id, &self.host, &self.config())?.end().map(drop)
    }

    /// GC that keeps nothing.
    pub(super) fn gc(&self) -> Result<Duration> {
        let mut config = self.config();
        config["cniVersion"] = json!("1.1.0");
        config["cni.dev/valid-attachments"] = json!([]);
        Ok(self.begin(self.main, "GC", "", Path::new(""), &config)?.end()?.0)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        Self::remove_namespaces(&self.dir);
    }
}

/// A call under way.
pub(super) struct Running {
    child: Child,
    begun: Instant,
    what: String,
}

impl Running {
    /// Waits for its end; how long it took, and what it printed.
    pub(super) fn end(self) -> Result<(Duration, Value)> {
        let output = self.child.wait_with_output()?;
        let took = self.begun.elapsed();
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("{} failed: {text} {}", self.what, String::from_utf8_lossy(&output.stderr));
        }
        let value = if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text)? };
        Ok((took, value))
    }

    /// The same of an ADD.
    pub(super) fn added(self) -> Result<Added> {
        let (took, result) = self.end()?;
        let interfaces = result["interfaces"].as_array().cloned().unwrap_or_default();
        let mut on_host = interfaces
            .iter()
            .filter(|one| one["sandbox"].as_str().is_none_or(str::is_empty))
            .filter_map(|one| one["name"].as_str());
        let link = on_host.find(|name| *name != BRIDGE).context("ADD tells no link of the host")?;
        Ok(Added { took, link: link.to_owned() })
    }

    /// Waits for its end; the largest resident memory that was seen of it, in KiB.
    pub(super) fn peak_kib(mut self) -> Result<u64> {
        let status = format!("/proc/{}/status", self.child.id());
        let mut peak = 0;
        while self.child.try_wait()?.is_none() {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
            // Before it has become the plugin it is a copy of this program.
            let own = text.lines().next().is_some_and(|name| name.ends_with("xtask"));
            if !own {
                peak = peak.max(kib.unwrap_or(0));
            }
        }
        Ok(peak)
    }
}

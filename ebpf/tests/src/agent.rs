//! A real keelson-agent with only its service proxy, beside a pretended or real API server.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::arena::{Arena, end_with_us};

/// How long a start may take: the verifier's work, and a listing of many objects, on a busy machine.
const START: Duration = Duration::from_mins(3);
/// kube-proxy's ports; every agent here has a network namespace of its own.
const METRICS: u16 = 10249;
const HEALTHZ: u16 = 10256;

/// Where it lives and how it is started. The process is ended when this is dropped.
pub struct Agent {
    binary: PathBuf,
    dir: PathBuf,
    child: Option<Child>,
}

impl Agent {
    /// Writes its configuration below a directory of its own; starts nothing yet.
    pub fn new(binary: &Path, arena: &Arena, kubeconfig: &str) -> Result<Self> {
        Self::with_pins(binary, arena, kubeconfig, &arena.pin_dir)
    }

    /// The same with a data plane of its own in the same arena, beside that of another agent. The directory's name is
    /// its own, too.
    pub fn with_pins(binary: &Path, arena: &Arena, kubeconfig: &str, pin_dir: &Path) -> Result<Self> {
        ensure!(binary.is_file(), "{} is not there: build it first", binary.display());
        let name = pin_dir.file_name().context("a pin directory has a name")?;
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir)?;
        let agent = Self { binary: binary.to_owned(), dir, child: None };
        fs::write(agent.dir.join("kubeconfig"), kubeconfig)?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "keelson": {
                "nodeName": "bench", "nodeIP": "192.0.2.1", "kubelet": false,
                "kubeconfig": agent.dir.join("kubeconfig"),
                "proxy": {
                    "cgroupRoot": arena.cgroup, "pinDir": pin_dir, "serviceCIDR": "10.96.0.0/12",
                    "metricsPort": METRICS, "healthzPort": HEALTHZ,
                },
            },
        });
        // JSON is YAML, too.
        fs::write(agent.config(), format!("{config:#}\n"))?;
        Ok(agent)
    }

    fn config(&self) -> PathBuf {
        self.dir.join("agent.yaml")
    }

    /// What it has written to its log so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Starts another program in its place from the next start on, as an upgrade does.
    pub fn replace_binary(&mut self, binary: &Path) {
        binary.clone_into(&mut self.binary);
    }

    /// Starts the process, in the calling thread's network namespace.
    pub fn start(&mut self) -> Result<()> {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log"))?;
        let child = end_with_us(&mut Command::new(&self.binary))
            .arg("--config")
            .arg(self.config())
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.binary.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Kills it without a warning.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Its process.
    pub fn pid(&self) -> Result<u32> {
        self.child.as_ref().map(Child::id).context("the agent is not running")
    }

    /// Waits until it has written the maps so often since it started.
    pub fn wait_for_syncs(&mut self, count: u64) -> Result<()> {
        let until = Instant::now() + START;
        loop {
            if let Ok(metrics) = self.metrics()
                && sync_count(&metrics) >= count
            {
                return Ok(());
            }
            self.still_runs()?;
            ensure!(
                Instant::now() < until,
                "the agent has not written the maps {count} times\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// An error with its log where it has ended.
    pub fn still_runs(&mut self) -> Result<()> {
        if let Some(child) = &mut self.child
            && let Some(status) = child.try_wait()?
        {
            bail!("the agent ended: {status}\n{}", self.log());
        }
        Ok(())
    }

    /// Its metrics as text.
    pub fn metrics(&self) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", METRICS))?;
        stream.set_read_timeout(Some(START))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("metrics without a head")?;
        ensure!(head.contains(" 200 "), "metrics are refused: {head}");
        Ok(body.to_owned())
    }

    /// Runs `keelson-agent service …` beside it.
    pub fn service(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.binary);
        command.arg("--config").arg(self.config()).arg("service").args(arguments);
        command.stdin(Stdio::null()).output().context("run keelson-agent service")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.kill());
        drop(fs::remove_dir_all(&self.dir));
    }
}

/// A figure of the metrics; 0 where it is not told.
#[must_use]
pub fn figure(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

/// How often the maps were written.
#[must_use]
pub fn sync_count(metrics: &str) -> u64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small count")]
    let count = figure(metrics, "kubeproxy_sync_proxy_rules_duration_seconds_count") as u64;
    count
}

/// Seconds that writing took in all, from the events read to the last write.
#[must_use]
pub fn sync_seconds(metrics: &str) -> f64 {
    figure(metrics, "kubeproxy_sync_proxy_rules_duration_seconds_sum")
}

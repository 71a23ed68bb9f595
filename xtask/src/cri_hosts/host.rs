//! One server under test: its processes from start to end, and clients for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cri_shim_api::v1;
use cri_shim_api::v1::image_service_client::ImageServiceClient;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use super::{Ground, bridge, config};
use crate::host as traces;
use crate::process::ProcessId;

/// How long a server may take to be ready on a busy machine.
const START: Duration = Duration::from_secs(60);
/// Servers that one ground holds.
pub(super) const SLOTS: u8 = 4;

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// keelson-cri on a containerd whose own plugin is off.
    Keelson,
    /// containerd's own CRI plugin.
    Containerd,
}

/// Which CNI plugins attach the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Plugins {
    /// keelson-bridge and keelson-ipam.
    #[default]
    Keelson,
    /// bridge and host-local of Debian's containernetworking-plugins.
    Reference,
}

/// What a server is started with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    /// Plugins of the pod network.
    pub(crate) plugins: Plugins,
    /// Whether systemd makes the pods' cgroups.
    pub(crate) systemd_cgroup: bool,
    /// Environment of the daemons, beside the caller's own.
    pub(crate) env: BTreeMap<String, String>,
    /// More fields of keelson-cri's configuration.
    pub(crate) cri_settings: BTreeMap<String, Value>,
}

/// Where everything of one server is.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) repo: PathBuf,
    pub(super) run: PathBuf,
    pub(super) data: PathBuf,
    pub(super) certs: PathBuf,
    pub(super) bridge: String,
    pub(super) subnet: String,
    cgroup: String,
}

impl Place {
    fn of(ground: &Ground, slot: u8) -> Self {
        let pid = std::process::id();
        let name = letter(slot).to_string();
        // Several grounds can be on one machine: their processes' ids make it unlikely that they meet.
        let second = 64 + pid % 128;
        let third = (pid / 128 % 4) * 64 + u32::from(slot) * 16;
        Self {
            repo: ground.repo().to_owned(),
            run: ground.run().join(&name),
            data: ground.data().join(&name),
            certs: ground.certs(),
            bridge: bridge(&pid.to_string(), slot),
            subnet: format!("10.{second}.{third}.0/20"),
            cgroup: ground.cgroup(slot),
        }
    }

    pub(super) fn containerd_socket(&self) -> PathBuf {
        self.run.join("containerd.sock")
    }

    pub(super) fn endpoint_socket(&self, kind: Kind) -> PathBuf {
        match kind {
            Kind::Keelson => self.run.join("cri.sock"),
            Kind::Containerd => self.containerd_socket(),
        }
    }
}

/// A letter for a slot, used in paths and names.
pub(super) fn letter(slot: u8) -> char {
    char::from(b'a' + slot)
}

/// A running server.
pub(crate) struct CriHost {
    kind: Kind,
    place: Place,
    daemons: Vec<Child>,
    channel: Channel,
}

impl CriHost {
    pub(super) async fn start(ground: &Ground, slot: u8, kind: Kind, options: &Options) -> Result<Self> {
        anyhow::ensure!(slot < SLOTS, "a ground has {SLOTS} slots");
        let place = Place::of(ground, slot);
        config::write(&place, kind, options)?;
        let endpoint = format!("unix://{}", place.endpoint_socket(kind).display());
        let channel = Endpoint::from_shared(endpoint)?.connect_lazy();
        let mut this = Self { kind, place, daemons: Vec::new(), channel };
        this.spawn_all(options).await.with_context(|| this.logs())?;
        Ok(this)
    }

    async fn spawn_all(&mut self, options: &Options) -> Result<()> {
        let (run, repo) = (self.place.run.clone(), self.place.repo.clone());
        self.spawn("containerd", Path::new("containerd"), &run.join("containerd.toml"), options)?;
        let socket = self.place.containerd_socket();
        wait_for("containerd", || async { Ok(tokio::net::UnixStream::connect(&socket).await?) }).await?;
        if self.kind == Kind::Keelson {
            self.spawn("cri", &repo.join("target/release/keelson-cri"), &run.join("cri.yaml"), options)?;
        }
        wait_for("the CRI server", || Box::pin(self.ready())).await
    }

    fn spawn(&mut self, name: &str, program: &Path, config: &Path, options: &Options) -> Result<()> {
        let log = fs::File::create(self.log(name)).context("creating a log file")?;
        // Our own shim and the plugins are found beside our own binaries.
        let mut path = self.place.repo.join("target/release").into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let child = Command::new(program)
            .arg("--config")
            .arg(config)
            .env("PATH", path)
            .env_remove("NOTIFY_SOCKET")
            .envs(&options.env)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let pid = child.id();
        self.daemons.push(child);
        // Everything it starts stays below this cgroup, so that it can be found, counted and ended.
        let dir = accounting_root().join(self.place.cgroup.trim_start_matches('/')).join("daemons");
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        fs::write(dir.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("moving {name} into {}", dir.display()))
    }

    async fn ready(&self) -> Result<()> {
        let status = self.runtime().status(v1::StatusRequest::default()).await?.into_inner().status;
        let conditions = status.context("no status")?.conditions;
        match conditions.iter().find(|condition| !condition.status) {
            Some(condition) => bail!("{}: {} {}", condition.r#type, condition.reason, condition.message),
            None => Ok(()),
        }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.place.data.join(format!("{name}.log"))
    }

    /// The end of each daemon's log, for an error message.
    pub(crate) fn logs(&self) -> String {
        let tail = |name: &str| {
            let text = fs::read_to_string(self.log(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(12)..].join("\n")
        };
        match self.kind {
            Kind::Keelson => {
                format!("keelson-cri said:\n{}\ncontainerd said:\n{}", tail("cri"), tail("containerd"))
            }
            Kind::Containerd => format!("containerd said:\n{}", tail("containerd")),
        }
    }

    /// Which server this is.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The endpoint as the kubelet and crictl are given it.
    pub(crate) fn endpoint(&self) -> String {
        format!("unix://{}", self.place.endpoint_socket(self.kind).display())
    }

    /// A client of the runtime service; all share one connection, as a kubelet's do.
    pub(crate) fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    /// A client of the image service.
    pub(crate) fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// Process ids of the daemons: containerd, then keelson-cri where there is one.
    pub(crate) fn daemons(&self) -> Vec<i32> {
        self.daemons.iter().map(|child| child.id().cast_signed()).collect()
    }

    /// Directory that pods' log directories are made in.
    pub(crate) fn pod_logs(&self) -> PathBuf {
        self.place.data.join("pods")
    }

    /// Cgroup parent of the pods.
    pub(crate) fn pod_cgroup(&self) -> String {
        format!("{}/pods", self.place.cgroup)
    }

    /// The cgroup directory, in the hierarchy used for accounting, that the daemons and their shims are in.
    pub(crate) fn daemon_cgroup(&self) -> PathBuf {
        accounting_root().join(self.place.cgroup.trim_start_matches('/')).join("daemons")
    }

    /// Every process of the server and its pods.
    pub(crate) fn processes(&self) -> Vec<ProcessId> {
        traces::processes_below(&traces::cgroups_named(&self.place.cgroup))
    }

    /// Ends the server and all its pods, and removes its files, so that the slot can be started anew.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.end();
        traces::unmount_below(&self.place.run)?;
        traces::unmount_below(&self.place.data)?;
        for dir in [&self.place.run, &self.place.data] {
            fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        Ok(())
    }

    fn end(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            let id = ProcessId::of(daemon.id().cast_signed());
            if let Some(id) = id {
                id.signal(rustix::process::Signal::TERM);
                let end = Instant::now() + Duration::from_secs(10);
                while Instant::now() < end && daemon.try_wait().is_ok_and(|status| status.is_none()) {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            daemon.kill().ok();
            daemon.wait().ok();
        }
        self.daemons.clear();
        for _ in 0..5 {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            traces::kill_all(&processes);
        }
        for path in super::shim_sockets(self.place.run.parent().unwrap_or(&self.place.run)) {
            if std::os::unix::net::UnixStream::connect(&path).is_err() {
                fs::remove_file(path).ok();
            }
        }
    }
}

impl Drop for CriHost {
    fn drop(&mut self) {
        self.end();
    }
}

/// The hierarchy whose membership every child inherits and no runtime changes: cgroup2, or else the one for pids.
fn accounting_root() -> &'static Path {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids"]
        .into_iter()
        .map(Path::new)
        .find(|dir| dir.is_dir())
        .unwrap_or(Path::new("/sys/fs/cgroup"))
}

/// Asks again until there is an answer; the last problem is told at the deadline.
pub(super) async fn wait_for<T, F: Future<Output = Result<T>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let end = Instant::now() + START;
    loop {
        match look().await {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() > end => {
                return Err(error.context(format!("{what} was not ready after {} s", START.as_secs())));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

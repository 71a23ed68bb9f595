//! CRI servers on private grounds: keelson-cri, or containerd with its own CRI plugin, each with a containerd,
//! directories, cgroups, CNI configuration and bridge of its own, for benches and conformance runs.
//!
//! Everything of one run is found by its name or place (run directory, data directory, cgroup, bridges), never by
//! memory of what was done: [`Ground`] cleans at its end, and the next run cleans what a killed one left.

mod config;
mod host;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub(crate) use host::{CriHost, Kind, Options, Plugins};

use crate::cmd::Cmd;
use crate::host as traces;
use crate::images::{Store, idle};
use crate::paths::Layout;
use crate::process::ProcessId;

/// The workload image: a process that only waits for SIGTERM, with busybox beside it.
pub(crate) const IDLE_IMAGE: &str = "docker.io/library/idle:latest";
/// Network interfaces have at most 15 characters, so that the pid is all that fits.
const BRIDGE_PREFIX: &str = "kh";

/// The place of one run, with the image registry that its servers pull from.
pub(crate) struct Ground {
    layout: Layout,
    registry: tokio::task::JoinHandle<()>,
    settings: BTreeMap<PathBuf, String>,
}

impl Ground {
    /// Makes the directories, images and registry of a run called `name`; cleans what killed runs of this name left.
    pub(crate) async fn prepare(layout: &Layout, name: &str) -> Result<Self> {
        crate::preflight::require_root()?;
        clean_stale(&layout.repo, name);
        let ground = place(&layout.repo, &format!("{name}-{}", std::process::id()));
        let images = idle::ensure(&layout.repo, &layout.repo.join("target/cri-images"))?;
        for dir in [&ground.data, &ground.run] {
            fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        let settings = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"]
            .into_iter()
            .filter_map(|path| Some((PathBuf::from(path), fs::read_to_string(path).ok()?)))
            .collect();
        let port = ground.run.join("registry.port");
        let registry = spawn_registry(images, &ground.run.join("certs.d"), &port);
        let this = Self { layout: ground, registry, settings };
        host::wait_for("the image registry", || async {
            port.is_file().then_some(()).context("no port yet")
        })
        .await?;
        Ok(this)
    }

    /// Starts a server; `slot` tells the servers of one ground apart.
    pub(crate) async fn start(&self, slot: u8, kind: Kind, options: &Options) -> Result<CriHost> {
        CriHost::start(self, slot, kind, options).await
    }

    /// Persistent files of the run.
    pub(crate) fn data(&self) -> &Path {
        &self.layout.data
    }

    /// Volatile files of the run.
    pub(crate) fn run(&self) -> &Path {
        &self.layout.run
    }

    /// Root of the source checkout.
    pub(crate) fn repo(&self) -> &Path {
        &self.layout.repo
    }

    /// Registry configuration in containerd's `certs.d` layout, read by the servers at every pull.
    pub(crate) fn certs(&self) -> PathBuf {
        self.layout.run.join("certs.d")
    }

    /// Cgroup path of one server's daemons and pods, without the hierarchy.
    pub(crate) fn cgroup(&self, slot: u8) -> String {
        format!("{}/{}", self.layout.cgroup(), host::letter(slot))
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        self.registry.abort();
        if let Err(error) = clean(&self.layout) {
            eprintln!("cleaning up: {error:#}");
        }
        for (path, value) in &self.settings {
            if fs::read_to_string(path).is_ok_and(|now| now != *value) {
                // Only a lost right to write it can fail here, and then it could not have been changed either.
                fs::write(path, value).ok();
            }
        }
    }
}

fn place(repo: &Path, instance: &str) -> Layout {
    Layout {
        repo: repo.to_owned(),
        instance: instance.to_owned(),
        data: repo.join("target").join(instance),
        run: Path::new("/run/keelson").join(instance),
    }
}

fn spawn_registry(images: Store, certs: &Path, port: &Path) -> tokio::task::JoinHandle<()> {
    let (certs, port) = (certs.to_owned(), port.to_owned());
    tokio::spawn(async move {
        if let Err(error) = crate::registry::serve(images, &certs, &port).await {
            eprintln!("the image registry: {error:#}");
        }
    })
}

/// Name of a server's bridge.
fn bridge(pid: &str, slot: u8) -> String {
    format!("{BRIDGE_PREFIX}{pid}{}", host::letter(slot))
}

/// Removes what runs of this name left whose process is gone.
fn clean_stale(repo: &Path, name: &str) {
    let prefix = format!("{name}-");
    for entry in fs::read_dir("/run/keelson").into_iter().flatten().flatten() {
        let instance = entry.file_name().to_string_lossy().into_owned();
        let pid = instance.strip_prefix(&prefix).and_then(|pid| pid.parse().ok());
        if pid.is_some_and(|pid| ProcessId::of(pid).is_none())
            && let Err(error) = clean(&place(repo, &instance))
        {
            eprintln!("cleaning up after {instance}: {error:#}");
        }
    }
}

/// Removes every trace of a run: processes, mounts, cgroups, links, sockets, files.
fn clean(layout: &Layout) -> Result<()> {
    let sockets = shim_sockets(&layout.run);
    kill(layout);
    traces::unmount_below(&layout.run)?;
    traces::unmount_below(&layout.data)?;
    traces::remove_sockets(&sockets)?;
    traces::remove_cgroups(layout)?;
    let pid = layout.instance.rsplit('-').next().unwrap_or_default();
    for slot in 0..host::SLOTS {
        let link = bridge(pid, slot);
        if Path::new("/sys/class/net").join(&link).exists() {
            Cmd::new("ip").args(["link", "del", &link]).output()?;
        }
    }
    for dir in [&layout.run, &layout.data] {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(anyhow::Error::new(error).context(format!("removing {}", dir.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Ends everything in the run's cgroups; a second look finds what was being started during the first.
fn kill(layout: &Layout) {
    for _ in 0..5 {
        let processes = traces::cgroup_processes(layout);
        if processes.is_empty() {
            return;
        }
        traces::kill_all(&processes);
    }
}

/// Sockets of the shims of every containerd below `run`; containerd 1.6 keeps them in a folder of its own.
fn shim_sockets(run: &Path) -> Vec<PathBuf> {
    let below = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    below(run.to_owned())
        .flat_map(|host| below(host.join("containerd/io.containerd.runtime.v2.task")))
        .flat_map(below)
        .filter_map(|bundle| fs::read_to_string(bundle.join("address")).ok())
        .filter_map(|address| address.trim().strip_prefix("unix://").map(PathBuf::from))
        .collect()
}

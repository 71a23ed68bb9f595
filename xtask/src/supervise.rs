//! The supervisor of `up`: starts the components, restarts what dies, adopts what an earlier supervisor left running.
//!
//! Its own death stops nothing: the components live in their own sessions, and their records under the run
//! directory let the next supervisor, `status` and `down` find them.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::watch;

use crate::images::Store;
use crate::paths::Layout;
use crate::process::{ProcessId, Record};

/// One supervised program.
#[derive(Debug, Clone)]
pub(crate) struct Component {
    /// Name in records, logs and `status`; `<component>@<node>` where there are several nodes.
    pub(crate) name: String,
    /// Executable.
    pub(crate) program: PathBuf,
    /// Arguments.
    pub(crate) args: Vec<String>,
    /// Files that must exist before the first start.
    pub(crate) needs: Vec<PathBuf>,
    /// Time to end after SIGTERM.
    pub(crate) grace: Duration,
    /// The node in whose namespace and cgroup it runs, where there are several.
    pub(crate) node: Option<Layout>,
}

/// A log that is longer at a start is moved aside.
const LOG_LIMIT: u64 = 64 << 20;
/// Waits between restarts double from the first to the last.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Running for this long resets the back-off.
const STEADY: Duration = Duration::from_secs(30);

/// The components, in the order in which they are started (stopped in reverse).
pub(crate) fn components(layout: &Layout) -> Vec<Component> {
    let control = Component {
        name: "control".to_owned(),
        program: layout.binary("keelson-control"),
        args: vec!["serve".into(), "--config".into(), layout.data.join("control.yaml").display().to_string()],
        needs: vec![],
        grace: Duration::from_secs(10),
        node: None,
    };
    let nodes = layout.nodes();
    let of_nodes: Vec<Component> = if nodes.is_empty() {
        node_components(layout, None)
    } else {
        nodes.iter().flat_map(|node| node_components(node, Some(node))).collect()
    };
    [control].into_iter().chain(of_nodes).collect()
}

/// The components of one node; `inside`: the place that it has of its own.
fn node_components(layout: &Layout, inside: Option<&Layout>) -> Vec<Component> {
    let config = |name: &str| layout.data.join(name).display().to_string();
    let containerd = crate::cmd::which("containerd").unwrap_or_else(|| PathBuf::from("containerd"));
    let identity = layout.data.join("node");
    let name = |component: &str| match inside {
        Some(node) => format!("{component}@{}", node.name()),
        None => component.to_owned(),
    };
    vec![
        Component {
            name: name("containerd"),
            program: containerd,
            args: vec!["--config".into(), layout.run.join("containerd/config.toml").display().to_string()],
            needs: vec![],
            grace: Duration::from_secs(10),
            node: inside.cloned(),
        },
        Component {
            name: name("cri"),
            program: layout.binary("keelson-cri"),
            args: vec!["--config".into(), config("cri.yaml")],
            needs: vec![layout.containerd_socket()],
            grace: Duration::from_secs(10),
            node: inside.cloned(),
        },
        Component {
            name: name("agent"),
            program: layout.binary("keelson-agent"),
            args: vec!["--config".into(), config("agent.yaml")],
            needs: vec![identity.join("agent.kubeconfig"), identity.join("kubelet.crt"), layout.cri_socket()],
            grace: Duration::from_secs(10),
            node: inside.cloned(),
        },
    ]
}

/// Runs until SIGTERM or SIGINT, then stops the components in reverse order.
pub(crate) fn run(layout: &Layout) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(supervise(layout))
}

async fn supervise(layout: &Layout) -> Result<()> {
    let own = Record { name: "supervisor".to_owned(), process: ProcessId::own(), restarts: 0 };
    own.save(&layout.procs())?;
    let (stop, stopped) = watch::channel(false);
    let mut keepers = Vec::new();
    for component in components(layout) {
        let (layout, stopped) = (layout.clone(), stopped.clone());
        keepers.push(tokio::spawn(async move { keep(&layout, component, stopped).await }));
    }
    let registry = {
        let (images, config, port) =
            (Store::at(&layout.images()), layout.registry_config(), layout.run.join("registry.port"));
        let address = registry_address(layout);
        tokio::spawn(async move {
            if let Err(error) = crate::registry::serve_at(address, images, &config, &port).await {
                eprintln!("registry: {error:#}");
            }
        })
    };
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    // Both are cancel-safe: a signal that came is kept by the stream.
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    stop.send_replace(true);
    for keeper in keepers.into_iter().rev() {
        keeper.await.ok();
    }
    registry.abort();
    Ok(())
}

/// Where all nodes reach the image registry.
pub(crate) fn registry_address(layout: &Layout) -> std::net::Ipv4Addr {
    if layout.nodes().is_empty() { std::net::Ipv4Addr::LOCALHOST } else { crate::fabric::HOST }
}

/// Keeps one component running until told to stop.
async fn keep(layout: &Layout, component: Component, mut stopped: watch::Receiver<bool>) {
    let mut restarts = 0;
    let mut wait = BACKOFF.0;
    let mut known = adoptable(layout, &component);
    while !*stopped.borrow() {
        if known.is_none() {
            present(&component, &mut stopped).await;
            if *stopped.borrow() {
                return;
            }
        }
        let process = match known.take().map_or_else(|| start(layout, &component, restarts), Ok) {
            Ok(process) => process,
            Err(error) => {
                eprintln!("{}: {error:#}", component.name);
                pause(&mut stopped, wait).await;
                wait = (wait * 2).min(BACKOFF.1);
                continue;
            }
        };
        let began = Instant::now();
        // Cancel-safe: `ended` only waits, and the wish to stop is a level, not an event.
        tokio::select! {
            () = ended(process) => {}
            () = asked(&mut stopped) => {
                let grace = component.grace;
                tokio::task::spawn_blocking(move || process.terminate(grace)).await.ok();
                reap(process.pid);
                return;
            }
        }
        reap(process.pid);
        if began.elapsed() > STEADY {
            wait = BACKOFF.0;
        }
        restarts += 1;
        eprintln!(
            "{}: pid {} ended; starting it again in {} ms",
            component.name,
            process.pid,
            wait.as_millis()
        );
        pause(&mut stopped, wait).await;
        wait = (wait * 2).min(BACKOFF.1);
    }
}

/// Waits until the files that the component needs are there, or for the wish to stop.
async fn present(component: &Component, stopped: &mut watch::Receiver<bool>) {
    let began = Instant::now();
    let mut told = false;
    while let Some(file) = component.needs.iter().find(|file| !file.exists()) {
        if !told && began.elapsed() > Duration::from_secs(5) {
            told = true;
            eprintln!("{}: waits for {}", component.name, file.display());
        }
        // Start-up only: a few looks until the component before has made its socket or key.
        pause(stopped, Duration::from_millis(20)).await;
        if *stopped.borrow() {
            return;
        }
    }
}

async fn pause(stopped: &mut watch::Receiver<bool>, wait: Duration) {
    // Either outcome continues the caller's loop, which looks at the wish to stop.
    tokio::time::timeout(wait, asked(stopped)).await.ok();
}

/// Returns once the components are to be stopped.
async fn asked(stopped: &mut watch::Receiver<bool>) {
    // The sender lives as long as the supervisor; were it gone, stopping would be right too.
    stopped.wait_for(|stop| *stop).await.map(drop).ok();
}

/// The component as an earlier supervisor started it, when it still runs.
fn adoptable(layout: &Layout, component: &Component) -> Option<ProcessId> {
    let record =
        Record::load_all(&layout.procs()).into_iter().find(|record| record.name == component.name)?;
    record.process.is_alive().then_some(record.process)
}

fn start(layout: &Layout, component: &Component, restarts: u32) -> Result<ProcessId> {
    let log = log_file(&layout.log(), &component.name)?;
    let mut command = match &component.node {
        Some(node) => crate::fabric::inside(node, &component.program)?,
        None => std::process::Command::new(&component.program),
    };
    let child = command
        .args(&component.args)
        .stdin(std::process::Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // A Ctrl-C at the terminal is for `up`, which then stops the components in order.
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {}", component.program.display()))?;
    let pid = child.id().cast_signed();
    let Some(process) = ProcessId::of(pid) else {
        reap(pid);
        anyhow::bail!("it ended at once; see {}/{}.log", layout.log().display(), component.name);
    };
    Record { name: component.name.clone(), process, restarts }.save(&layout.procs())?;
    Ok(process)
}

fn log_file(dir: &Path, name: &str) -> Result<fs::File> {
    let path = dir.join(format!("{name}.log"));
    if fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_LIMIT) {
        fs::rename(&path, dir.join(format!("{name}.log.1"))).ok();
    }
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))
}

/// Returns when the process has ended.
async fn ended(process: ProcessId) {
    // A thread each for a handful of processes; it ends with the process, which `supervise` sees to.
    tokio::task::spawn_blocking(move || process.wait_end()).await.ok();
}

/// Collects the exit status of an own child; an adopted process has another parent, which is fine.
fn reap(pid: i32) {
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), Some(nix::sys::wait::WaitPidFlag::WNOHANG)).ok();
}

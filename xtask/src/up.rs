//! `cargo xtask up`: from a checkout to a Ready node.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cmd::step;
use crate::paths::Layout;
use crate::process::{ProcessId, Record};
use crate::status::kubectl;
use crate::{binaries, config, down, fabric, host, images, preflight, setup};

/// Options of `up`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Return when the node is Ready, instead of staying in front with the log.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Run the binaries in target/release as they are.
    #[arg(long)]
    pub(crate) no_build: bool,
    /// Attach the socket programs to this cgroup2 directory only, instead of the whole host.
    #[arg(long, value_name = "DIR")]
    pub(crate) cgroup_root: Option<PathBuf>,
    /// Start this many nodes (1 to 5), each with a network namespace of its own; without it, the host is the node.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub(crate) nodes: Option<u8>,
    /// Pods of a node at most; more than the usual 110 widen the nodes' pod ranges.
    #[arg(long, value_name = "N", default_value_t = config::MAX_PODS, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) max_pods: u16,
    #[command(flatten)]
    pub(crate) overlay: config::Overlay,
}

/// From start to Ready; the slowest machine that we know needs a third of it.
const READY_LIMIT: Duration = Duration::from_secs(90);

/// Brings the node up.
pub(crate) fn run(layout: &Layout, options: &Options) -> Result<()> {
    preflight::require_root()?;
    if let Some(supervisor) = running(layout) {
        println!("already up (supervisor pid {}); nothing was changed.\n", supervisor.pid);
        hints(layout);
        return Ok(());
    }
    if options.no_build {
        binaries::require(&layout.repo)?;
    } else {
        setup::run(&layout.repo, setup::Scope::Run)?;
        binaries::build(&layout.repo)?;
    }
    images::ensure(&layout.images())?;
    // Components that outlived their supervisor hold the ports: they are adopted, not checked against.
    let adopting = Record::load_all(&layout.procs()).iter().any(|record| record.process.is_alive());
    if adopting {
        println!("==> adopting the components that an earlier supervisor left running");
    } else {
        fs::create_dir_all(&layout.data).with_context(|| format!("creating {}", layout.data.display()))?;
        prepare(layout, options)?;
    }
    let supervisor = start_supervisor(layout)?;
    if let Err(error) = step("waiting until the node is Ready", || wait_ready(layout, supervisor)) {
        tell_logs(layout);
        return Err(error.context("the cluster did not come up; `cargo xtask down` removes what was started"));
    }
    hints(layout);
    if options.detach {
        return Ok(());
    }
    follow(layout, supervisor)
}

/// Checks the host, then writes the configuration of all nodes, and makes the namespaces of several.
fn prepare(layout: &Layout, options: &Options) -> Result<()> {
    let cgroup_root = options.cgroup_root.as_deref();
    let Some(count) = options.nodes.filter(|count| *count > 1) else {
        let node = preflight::check(layout, cgroup_root)?;
        host::raise_limits(layout)?;
        let address = node.address.clone();
        return config::write_sized(layout, &address, &[(layout.clone(), node)], options.max_pods);
    };
    let nodes = preflight::check_nodes(layout, cgroup_root, count, options.overlay)?;
    host::raise_limits(layout)?;
    fabric::create(layout, count, options.overlay.dual_stack)?;
    config::write_sized(layout, &fabric::HOST.to_string(), &nodes, options.max_pods)
}

/// The supervisor, when it runs.
pub(crate) fn running(layout: &Layout) -> Option<ProcessId> {
    let record = Record::load_all(&layout.procs()).into_iter().find(|record| record.name == "supervisor")?;
    record.process.is_alive().then_some(record.process)
}

fn start_supervisor(layout: &Layout) -> Result<ProcessId> {
    let path = layout.log().join("supervisor.log");
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    // A copy of its own: a rebuild of xtask must not replace the file that the supervisor runs from.
    let program = layout.data.join("supervisor");
    fs::remove_file(&program).ok();
    fs::copy(std::env::current_exe()?, &program)
        .with_context(|| format!("copying to {}", program.display()))?;
    let child = Command::new(&program)
        .arg("supervise")
        .current_dir(&layout.repo)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .context("starting the supervisor")?;
    ProcessId::of(child.id().cast_signed())
        .context("the supervisor ended at once; see its log below target/up/log")
}

fn wait_ready(layout: &Layout, supervisor: ProcessId) -> Result<()> {
    let end = Instant::now() + READY_LIMIT;
    let mut last = String::new();
    loop {
        if !supervisor.is_alive() {
            bail!("the supervisor ended");
        }
        match readiness(layout) {
            Ok(()) => return Ok(()),
            Err(state) if state != last => {
                println!("    {state}");
                last = state;
            }
            Err(_) => {}
        }
        if Instant::now() >= end {
            bail!("not Ready after {} s; last seen: {last}", READY_LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Ready, or what it waits for.
fn readiness(layout: &Layout) -> Result<(), String> {
    if !layout.kubeconfig().is_file() {
        return Err("control plane: starting".to_owned());
    }
    let listed = kubectl(layout, &["get", "nodes", "-o", "jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=='Ready')].status} {.status.conditions[?(@.type=='Ready')].message}{'\\n'}{end}"])
        .map_err(|_starting| "control plane: not answering yet".to_owned())?;
    let expected = layout.nodes().len().max(1);
    let nodes: Vec<&str> = listed.lines().filter(|line| !line.trim().is_empty()).collect();
    if nodes.len() < expected {
        return Err(match expected {
            1 => "node: not registered yet".to_owned(),
            _ => format!("nodes: {} of {expected} registered", nodes.len()),
        });
    }
    for node in nodes {
        let (name, state) = node.split_once(' ').unwrap_or((node, ""));
        let reason = state.trim_start_matches("False ").trim_start_matches("Unknown ");
        match expected {
            _ if state.starts_with("True") => {}
            1 => return Err(format!("node: not Ready: {reason}")),
            _ => return Err(format!("{name}: not Ready: {reason}")),
        }
    }
    pods_allowed(layout)
}

/// Pods can only be made where their namespace's default service account is.
fn pods_allowed(layout: &Layout) -> Result<(), String> {
    kubectl(layout, &["get", "serviceaccount", "default", "-o", "name"])
        .map(drop)
        .map_err(|_missing| "default service account: not there yet".to_owned())
}

fn hints(layout: &Layout) {
    let here = std::env::current_dir().unwrap_or_default();
    let shown = |path: &Path| path.strip_prefix(&here).unwrap_or(path).display().to_string();
    let kubeconfig = shown(&layout.kubeconfig());
    println!("\nkubeconfig: {kubeconfig}\n\nTry:");
    println!(
        "  kubectl --kubeconfig {kubeconfig} apply -f {}",
        shown(&layout.repo.join("examples/nginx.yaml"))
    );
    println!("  kubectl --kubeconfig {kubeconfig} get nodes,deployments,rs,pods,svc,endpointslices -o wide");
    match layout.nodes().first() {
        Some(node) => println!(
            "  cargo xtask node {} -- curl http://{}:30000/\n",
            node.name(),
            fabric::address(fabric::number(&node.name()).unwrap_or(1))
        ),
        None => println!("  curl http://127.0.0.1:30000/\n"),
    }
}

fn tell_logs(layout: &Layout) {
    for name in log_names(layout, &["supervisor", "control", "containerd", "cri", "agent"]) {
        let path = layout.log().join(format!("{name}.log"));
        let text = fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(8)..];
        if !last.is_empty() {
            eprintln!("--- {} (last lines)\n{}", path.display(), last.join("\n"));
        }
    }
}

/// The names of components' logs: those of a node are there once for each.
fn log_names(layout: &Layout, components: &[&str]) -> Vec<String> {
    let nodes = layout.nodes();
    let names = |component: &&str| -> Vec<String> {
        if nodes.is_empty() || matches!(*component, "supervisor" | "control") {
            return vec![(*component).to_owned()];
        }
        nodes.iter().map(|node| format!("{component}@{}", node.name())).collect()
    };
    components.iter().flat_map(names).collect()
}

/// Streams the logs until Ctrl-C, then brings everything down.
fn follow(layout: &Layout, supervisor: ProcessId) -> Result<()> {
    println!("==> log of all components; Ctrl-C shuts the cluster down\n");
    let logs: Vec<PathBuf> = log_names(layout, &["control", "cri", "agent", "supervisor"])
        .iter()
        .map(|name| layout.log().join(format!("{name}.log")))
        .collect();
    let mut tail = Command::new("tail")
        .args(["-n", "0", "-F"])
        .args(&logs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("starting tail")?;
    let lines = tail.stdout.take().context("tail without output")?;
    std::thread::spawn(move || print_log(BufReader::new(lines)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let asked = runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let gone = tokio::task::spawn_blocking(move || supervisor.wait_end());
        // Cancel-safe: each arm only waits.
        tokio::select! {
            result = tokio::signal::ctrl_c() => result.map(|()| true),
            _ = terminate.recv() => Ok(true),
            _ = gone => Ok(false),
        }
    })?;
    runtime.shutdown_background();
    tail.kill().ok();
    tail.wait().ok();
    if !asked {
        bail!(
            "the supervisor has ended; the components run on: `cargo xtask up` adopts them, `cargo xtask down` ends them"
        );
    }
    println!("\n==> shutting down");
    down::run(layout)
}

/// Turns tail's `==> file <==` headings into a prefix on each line.
fn print_log(lines: impl BufRead) {
    let mut name = String::new();
    for line in lines.lines().map_while(Result::ok) {
        if let Some(path) = line.strip_prefix("==> ").and_then(|rest| rest.strip_suffix(" <==")) {
            name = Path::new(path).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        } else if !line.is_empty() {
            println!("{name:<12} | {line}");
        }
    }
}

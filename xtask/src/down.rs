//! `cargo xtask down`: ends everything of this instance and removes its traces, also after its supervisor was killed.

use std::fs;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::fabric;
use crate::host;
use crate::paths::Layout;
use crate::preflight;
use crate::process::Record;

/// How long the supervisor may take to stop its components in order.
const SUPERVISOR_GRACE: Duration = Duration::from_secs(45);

/// Stops and removes; every step is tried even when one before it failed, and all failures are told.
pub(crate) fn run(layout: &Layout) -> Result<()> {
    preflight::require_root()?;
    let existed = layout.run.exists();
    let mut failures = Vec::new();
    let nodes = layout.nodes();
    let sockets: Vec<_> = nodes.iter().chain([layout]).flat_map(host::shim_sockets).collect();
    stop_processes(layout);
    let mut step = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            failures.push(format!("{what}: {error:#}"));
        }
    };
    for node in &nodes {
        step("service load balancer", host::remove_data_plane(node));
    }
    step("service load balancer", host::remove_data_plane(layout));
    step("packet filter", host::remove_packet_filter(layout));
    step("nodes' links", fabric::remove(layout));
    step("mounts", host::unmount_below(&layout.run));
    step("mounts", host::unmount_inside(&layout.data));
    step("sockets of containers", host::remove_sockets(&sockets));
    step("links", host::remove_links(layout));
    step("cgroups", host::remove_cgroups(layout));
    step("kernel settings", host::restore_settings(layout));
    step("run directory", remove_dir(&layout.run));
    if let Some(parent) = layout.run.parent() {
        // Shared with other instances: goes with the last.
        fs::remove_dir(parent).ok();
    }
    step("data directory", remove_data(layout));
    if !failures.is_empty() {
        bail!(
            "not everything could be removed (run `cargo xtask down` again once the cause is gone):\n  - {}",
            failures.join("\n  - ")
        );
    }
    println!("{}", if existed { "down: nothing is left running or mounted" } else { "nothing was up" });
    Ok(())
}

/// Supervisor first, so that it restarts nothing; then whatever it left; then the pods.
fn stop_processes(layout: &Layout) {
    let records = Record::load_all(&layout.procs());
    for record in records.iter().filter(|record| record.name == "supervisor") {
        record.process.terminate(SUPERVISOR_GRACE);
    }
    for name in ["agent", "cri", "control"] {
        let is_it = |record: &&Record| record.name.split('@').next() == Some(name);
        for record in records.iter().filter(is_it) {
            record.process.terminate(Duration::from_secs(10));
        }
    }
    // Shims before the pods would only log their deaths; containerd last, since it writes what the shims report.
    host::kill_all(&host::cgroup_processes(layout));
    host::kill_all(&host::leftover_processes(layout));
    for record in records {
        record.process.terminate(Duration::from_secs(10));
    }
}

/// The cluster's data goes; logs stay for reading.
fn remove_data(layout: &Layout) -> Result<()> {
    for entry in fs::read_dir(&layout.data).into_iter().flatten().flatten() {
        let path = entry.path();
        if path == layout.log() {
            continue;
        }
        if entry.file_type()?.is_dir() {
            remove_dir(&path)?;
        } else {
            fs::remove_file(&path)?;
        }
    }
    remove_dir(&layout.log().join("pods"))?;
    remove_dir(&layout.log().join("containers"))
}

fn remove_dir(dir: &std::path::Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(anyhow::Error::new(error).context(format!("removing {}", dir.display())))
        }
        _ => Ok(()),
    }
}

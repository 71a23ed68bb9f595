//! What `up` leaves on the host, found and removed again: mounts, namespaces, links, cgroups, pins, settings.
//!
//! Everything is found by its place or name below this instance's own paths, never by memory of what was done, so
//! that it works after a crash of anything.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use rustix::process::Signal;
use serde_json::json;

use crate::cmd::Cmd;
use crate::paths::Layout;
use crate::process::{ProcessId, write_atomic};

/// Kernel settings that a node changes.
const SETTINGS: &[&str] = &[
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "fs/inotify/max_user_instances",
    "fs/inotify/max_user_watches",
];
/// All of root's processes share these, those in pods too, and what kernels give is for a desktop.
const LIMITS: &[(&str, u64)] =
    &[("fs/inotify/max_user_instances", 8192), ("fs/inotify/max_user_watches", 1_048_576)];

/// Keeps the host's settings for `restore_settings`; the record of a running or crashed instance is left as it is.
fn record_settings(layout: &Layout) -> Result<()> {
    let file = layout.host_record();
    if file.is_file() {
        return Ok(());
    }
    let settings: BTreeMap<&str, String> = SETTINGS
        .iter()
        .filter_map(|name| Some((*name, fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?)))
        .collect();
    write_atomic(&file, &serde_json::to_vec_pretty(&settings)?)
}

/// Keeps the host's settings, then raises what is too little for many pods; nothing is lowered.
pub(crate) fn raise_limits(layout: &Layout) -> Result<()> {
    record_settings(layout)?;
    for (name, wanted) in LIMITS {
        let path = Path::new("/proc/sys").join(name);
        let now = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        if now.is_some_and(|now| now < *wanted) {
            // Where the machine's owner allows no more, few pods still run.
            fs::write(&path, wanted.to_string()).ok();
        }
    }
    Ok(())
}

/// Puts the recorded settings back.
pub(crate) fn restore_settings(layout: &Layout) -> Result<()> {
    let file = layout.host_record();
    let Ok(text) = fs::read(&file) else { return Ok(()) };
    let settings: BTreeMap<String, String> =
        serde_json::from_slice(&text).with_context(|| format!("parsing {}", file.display()))?;
    for (name, value) in settings {
        let path = Path::new("/proc/sys").join(&name);
        if fs::read_to_string(&path).is_ok_and(|now| now != value) {
            fs::write(&path, value).with_context(|| format!("restoring {}", path.display()))?;
        }
    }
    Ok(())
}

/// Mount points below `dir`, innermost first.
pub(crate) fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut mounts: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(unescape(path)))
        .filter(|path| path.starts_with(dir))
        .collect();
    mounts.reverse();
    mounts
}

/// Blanks and the like stand as octal in mountinfo.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Unmounts all below `dir`, and what is mounted there itself.
pub(crate) fn unmount_below(dir: &Path) -> Result<()> {
    unmount(&mounts_below(dir))
}

/// Unmounts all below `dir`, which may be a mount of the operator's.
pub(crate) fn unmount_inside(dir: &Path) -> Result<()> {
    let mut mounts = mounts_below(dir);
    mounts.retain(|mount| mount != dir);
    unmount(&mounts)
}

fn unmount(mounts: &[PathBuf]) -> Result<()> {
    for mount in mounts {
        umount2(mount, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", mount.display()))?;
    }
    Ok(())
}

/// The instance's cgroup directories in every mounted hierarchy.
pub(crate) fn cgroups(layout: &Layout) -> Vec<PathBuf> {
    cgroups_named(&layout.cgroup())
}

/// The directories of one cgroup path in every mounted hierarchy.
pub(crate) fn cgroups_named(path: &str) -> Vec<PathBuf> {
    let relative = path.trim_start_matches('/');
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let dir = fields.nth(1)?;
            fields.next()?.starts_with("cgroup").then(|| Path::new(dir).join(relative))
        })
        .filter(|dir| dir.is_dir())
        .collect()
}

/// Processes in the cgroups: what ran in pods.
pub(crate) fn cgroup_processes(layout: &Layout) -> Vec<ProcessId> {
    processes_below(&cgroups(layout))
}

/// Processes in these cgroups and all below them, each once.
pub(crate) fn processes_below(cgroups: &[PathBuf]) -> Vec<ProcessId> {
    let mut found = Vec::new();
    for dir in cgroups {
        visit(dir, &mut |dir| {
            let list = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            found.extend(list.lines().filter_map(|pid| ProcessId::of(pid.parse().ok()?)));
        });
    }
    found.sort_by_key(|process| process.pid);
    found.dedup();
    found
}

/// Sockets of this instance's shims. containerd 1.6 has their folder built in, outside of its configurable
/// directories; a killed shim leaves its socket there.
pub(crate) fn shim_sockets(layout: &Layout) -> Vec<PathBuf> {
    let bundles = layout.run.join("containerd/io.containerd.runtime.v2.task/keelson");
    fs::read_dir(bundles)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|bundle| fs::read_to_string(bundle.path().join("address")).ok())
        .filter_map(|address| address.trim().strip_prefix("unix://").map(PathBuf::from))
        .collect()
}

/// Removes sockets that nobody listens on any more.
pub(crate) fn remove_sockets(sockets: &[PathBuf]) -> Result<()> {
    for socket in sockets {
        match fs::remove_file(socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(anyhow::Error::new(error).context(format!("removing {}", socket.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Calls `look` for every directory of a tree, children first.
fn visit(dir: &Path, look: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            visit(&entry.path(), look);
        }
    }
    look(dir);
}

/// Removes the cgroups; a process that is just ending makes its directory busy for some milliseconds.
pub(crate) fn remove_cgroups(layout: &Layout) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let dirs = cgroups(layout);
        let mut failed = None;
        for root in &dirs {
            visit(root, &mut |dir| {
                if let Err(error) = fs::remove_dir(dir) {
                    failed =
                        Some(anyhow::Error::new(error).context(format!("removing cgroup {}", dir.display())));
                }
            });
            // The shared parent goes with its last instance.
            if let Some(parent) = root.parent() {
                fs::remove_dir(parent).ok();
            }
        }
        match failed {
            None => return Ok(()),
            Some(error) if Instant::now() >= end => return Err(error),
            Some(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Shims of this instance's containerd, and what else was started with one of its paths on the command line or from
/// a program below its data directory (the keepers of containers' pipes); never the caller.
pub(crate) fn leftover_processes(layout: &Layout) -> Vec<ProcessId> {
    let own = std::process::id().cast_signed();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let ours = pid != own
                && (runs_our_program(layout, &entry.path()) || names_our_path(layout, &entry.path()));
            ours.then(|| ProcessId::of(pid)).flatten()
        })
        .collect()
}

fn runs_our_program(layout: &Layout, process: &Path) -> bool {
    fs::read_link(process.join("exe")).is_ok_and(|program| program.starts_with(&layout.data))
}

fn names_our_path(layout: &Layout, process: &Path) -> bool {
    const PROGRAMS: &[&str] = &[
        "containerd",
        "containerd-shim-runc-v2",
        "containerd-shim-keelson-v1",
        "keelson-control",
        "keelson-cri",
        "keelson-agent",
    ];
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let args: Vec<&str> =
        line.split(|byte| *byte == 0).filter_map(|arg| std::str::from_utf8(arg).ok()).collect();
    let program = args.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default();
    let mut places = args.iter().skip(1).map(Path::new);
    PROGRAMS.iter().any(|name| program == *name)
        && places.any(|path| path.starts_with(&layout.run) || path.starts_with(&layout.data))
}

/// Kills and waits.
pub(crate) fn kill_all(processes: &[ProcessId]) {
    for process in processes {
        process.signal(Signal::KILL);
    }
    for process in processes {
        process.terminate(Duration::from_secs(5));
    }
}

/// Deletes the pods' bridge and the veths on it.
pub(crate) fn remove_links(layout: &Layout) -> Result<()> {
    let bridge = layout.bridge();
    if !Path::new("/sys/class/net").join(&bridge).exists() {
        return Ok(());
    }
    for port in fs::read_dir(format!("/sys/class/net/{bridge}/brif")).into_iter().flatten().flatten() {
        // The kernel removes a veth with its namespace, maybe just now.
        Cmd::new("ip").args(["link".as_ref(), "del".as_ref(), port.file_name().as_os_str()]).output().ok();
    }
    Cmd::new("ip").args(["link", "del", &bridge]).output().map(drop)
}

/// Takes this instance's addresses and host ports out of the table of the CNI plugins, and the table when nobody else
/// has anything in it. Nodes with namespaces of their own take theirs along.
pub(crate) fn remove_packet_filter(layout: &Layout) -> Result<()> {
    let plugins = ["keelson-masquerade", "keelson-portmap"].map(|plugin| layout.cni_bin().join(plugin));
    let table = ["table", "inet", "keelson_cni"];
    let shown = || Cmd::new("nft").args(["list"]).args(table).output();
    if !plugins.iter().all(|plugin| plugin.exists()) || shown().is_err() {
        return Ok(());
    }
    for plugin in plugins {
        let config = json!({
            "cniVersion": "1.1.0",
            "name": crate::config::network_name(layout),
            "type": plugin.file_name().unwrap_or_default().to_string_lossy(),
            "stateDir": layout.run.join("cni/state"),
            "logFile": "",
            "cni.dev/valid-attachments": [],
        });
        Cmd::new(plugin)
            .env("CNI_COMMAND", "GC")
            .env("CNI_PATH", layout.cni_bin())
            .input(config.to_string())
            .output()?;
    }
    if !shown()?.contains("elements = ") {
        Cmd::new("nft").args(["delete"]).args(table).output()?;
    }
    Ok(())
}

/// Detaches and unpins the BPF programs and removes the proxy's route, by the agent that knows both.
pub(crate) fn remove_data_plane(layout: &Layout) -> Result<()> {
    let pins = layout.bpf_pins();
    let agent = layout.binary("keelson-agent");
    if agent.is_file() {
        Cmd::new(agent)
            .args(["proxy", "cleanup", "--service-cidr", crate::config::SERVICE_CIDR, "--pin-dir"])
            .args([&pins])
            .output()?;
    } else if pins.exists() {
        // Without the binary: an unpinned link is a detached program.
        fs::remove_dir_all(&pins).with_context(|| format!("removing {}", pins.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_escapes_are_undone() {
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
    }
}

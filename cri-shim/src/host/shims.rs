//! Shims that containerd has forgotten.
//!
//! containerd 1.6 starts a shim before it knows it; when the client of that call dies, or containerd itself does, the shim
//! may stay behind with a prepared process or with none, and nobody will ever ask it anything (containerd#7496, #8931).
//! Input: the process table. Output: the shims of one containerd and namespace, ended with what they leave behind.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{files, mounts, process};
use crate::error::RuntimeError;

/// How long an ended shim may take to go.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at it.
const PAUSE: Duration = Duration::from_millis(5);

/// A running shim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shim {
    /// Its process.
    pub pid: u32,
    /// When that began.
    began: u64,
    /// The container it was started for, the first of its pod.
    pub id: String,
    /// The cgroups of its child processes: those of containers, running or prepared, or runc at work.
    children: Vec<String>,
}

impl Shim {
    /// Whether it has any child process.
    pub fn has_children(&self) -> bool {
        !self.children.is_empty()
    }

    /// Whether one of its child processes is in the cgroup of one of these containers.
    pub fn serves_any(&self, containers: &HashSet<String>) -> bool {
        self.children.iter().any(|cgroups| containers.iter().any(|id| cgroups.contains(id.as_str())))
    }
}

/// The shims of a namespace of the containerd at `socket`.
pub fn list(socket: &Path, namespace: &str) -> Result<Vec<Shim>, RuntimeError> {
    let proc = Path::new("/proc");
    let mut found = Vec::new();
    for name in files::names_in(proc)? {
        let Ok(pid) = name.parse::<u32>() else { continue };
        let line = fs::read(proc.join(&name).join("cmdline")).unwrap_or_default();
        let Some(id) = shim_of(&line, socket, namespace) else { continue };
        if let Some(began) = process::start_time(pid) {
            found.push(Shim { pid, began, id, children: Vec::new() });
        }
    }
    if !found.is_empty() {
        let parents = parents()?;
        for shim in &mut found {
            let children = parents.iter().filter(|(_, parent)| **parent == shim.pid).map(|(child, _)| child);
            shim.children = children
                .map(|child| fs::read_to_string(format!("/proc/{child}/cgroup")).unwrap_or_default())
                .collect();
        }
    }
    Ok(found)
}

/// Ends a shim that nobody knows any more, and takes away its socket, its mounts and its directory.
pub fn end(shim: &Shim) -> Result<(), RuntimeError> {
    let place = PathBuf::from(format!("/proc/{}", shim.pid));
    let bundle = fs::read_link(place.join("cwd")).ok();
    let socket = bundle.as_ref().and_then(|bundle| fs::read_to_string(bundle.join("address")).ok());
    let lost = |source| RuntimeError::host("end the forgotten shim", &place)(source);
    if let Some(held) = process::open(shim.pid, shim.began).map_err(lost)? {
        process::kill(&held)
            .map_err(|source| RuntimeError::host("end the forgotten shim", &place)(source))?;
        let begun = Instant::now();
        while process::start_time(shim.pid) == Some(shim.began) && !is_zombie(shim.pid) {
            if begun.elapsed() > PATIENCE {
                let what = format!("ending the forgotten shim {}", shim.pid);
                return Err(RuntimeError::Deadline { what, seconds: PATIENCE.as_secs() });
            }
            std::thread::sleep(PAUSE);
        }
    }
    if let Some(path) = socket.as_deref().and_then(|address| address.trim().strip_prefix("unix://")) {
        files::remove_file(Path::new(path))?;
    }
    // Only a directory of the form that containerd gives its bundles, so that nothing else can ever be meant.
    match bundle.filter(|bundle| bundle.file_name() == Some(shim.id.as_ref())) {
        Some(bundle) => {
            mounts::unmount_below(&bundle)?;
            files::remove_tree(&bundle)
        }
        None => Ok(()),
    }
}

/// The container a command line's shim was started for, when it is a shim of this containerd and namespace that stays.
fn shim_of(line: &[u8], socket: &Path, namespace: &str) -> Option<String> {
    let words: Vec<&str> =
        line.split(|byte| *byte == 0).filter_map(|word| std::str::from_utf8(word).ok()).collect();
    let program = Path::new(words.first()?).file_name()?.to_str()?;
    let value = |flag: &str| {
        let place = words.iter().position(|word| word.trim_start_matches('-') == flag)?;
        words.get(place + 1).copied()
    };
    let ours = program.starts_with("containerd-shim-")
        && value("namespace") == Some(namespace)
        && value("address").map(Path::new) == Some(socket);
    // `start` and `delete` are calls that end by themselves.
    let passing = words.iter().any(|word| matches!(*word, "start" | "delete"));
    (ours && !passing).then(|| value("id").map(str::to_owned)).flatten()
}

/// Every process with its parent.
fn parents() -> Result<HashMap<u32, u32>, RuntimeError> {
    let names = files::names_in(Path::new("/proc"))?;
    let pids = names.iter().filter_map(|name| name.parse::<u32>().ok());
    Ok(pids.filter_map(|pid| Some((pid, stat_field(pid, 1)?.parse().ok()?))).collect())
}

fn is_zombie(pid: u32) -> bool {
    stat_field(pid, 0).is_none_or(|state| state == "Z")
}

/// A field after the command's name in `/proc/<pid>/stat`.
fn stat_field(pid: u32, index: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(index).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shims_are_told_by_their_command_line() {
        let socket = Path::new("/run/c.sock");
        let line = |words: &[&str]| words.join("\0").into_bytes();
        let shim =
            ["/usr/bin/containerd-shim-runc-v2", "-namespace", "k", "-id", "c1", "-address", "/run/c.sock"];
        assert_eq!(shim_of(&line(&shim), socket, "k").as_deref(), Some("c1"));
        assert_eq!(shim_of(&line(&shim), socket, "other"), None);
        assert_eq!(shim_of(&line(&shim), Path::new("/run/d.sock"), "k"), None);
        let mut start = shim.to_vec();
        start.push("start");
        assert_eq!(shim_of(&line(&start), socket, "k"), None);
        assert_eq!(shim_of(b"", socket, "k"), None);
    }
}

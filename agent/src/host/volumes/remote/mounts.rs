//! Mounts and unmounts by the system's tools, told by the mount table alone: a server that is gone answers no other question.
//!
//! Input: what to mount where. Output: it is mounted, or it is not and why. No path at or below a mount is looked at.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tracing::{info, warn};

use super::tools::{Ended, ToolError, Tools};
use crate::host::mount_table::{self, Mount};

/// Where things are, and how patient to be.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub(super) tools: Tools,
    /// The mount table.
    pub(super) table: PathBuf,
    /// `/dev`.
    pub(super) dev: PathBuf,
    /// `/sys`.
    pub(super) sys: PathBuf,
    /// Deadline of a mount from a server: those of other pods must not wait for long when they share nothing but the server.
    pub(super) mount: Duration,
    /// Deadline of each way to unmount.
    pub(super) unmount: Duration,
    /// Deadline of an `iscsiadm`.
    pub(super) login: Duration,
    /// Deadline of a check of a file system, and of making one.
    pub(super) format: Duration,
    /// How long a disk may take to appear.
    pub(super) device: Duration,
    /// How long the one device may take to appear that stands for several ways to a disk.
    pub(super) multipath: Duration,
    /// Files of the kernel and devices that somebody is waiting for.
    pub(super) waiting: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Places {
    /// Those of this system.
    pub(super) fn system() -> Self {
        Self {
            tools: Tools::system(),
            table: PathBuf::from(mount_table::TABLE),
            dev: PathBuf::from("/dev"),
            sys: PathBuf::from("/sys"),
            mount: Duration::from_secs(30),
            unmount: Duration::from_secs(15),
            login: Duration::from_secs(60),
            // A check that is killed half-way has helped nobody.
            format: Duration::from_secs(6 * 3600),
            device: Duration::from_secs(10),
            // Upstream's.
            multipath: Duration::from_secs(10),
            waiting: Arc::default(),
        }
    }

    /// Every mount.
    pub(super) fn mounts(&self) -> Result<Vec<Mount>, String> {
        let text = std::fs::read_to_string(&self.table);
        let text = text.map_err(|error| format!("cannot read {}: {error}", self.table.display()))?;
        Ok(mount_table::parse(&text))
    }

    /// Whether something is mounted at `path`.
    pub(super) fn is_mounted(&self, path: &Path) -> Result<bool, String> {
        let real = real(path);
        Ok(self.mounts()?.iter().any(|mount| mount.point == real))
    }

    /// Mounts, unless something is mounted there. A directory that stays empty goes again.
    pub(super) async fn mount(
        &self,
        target: &Path,
        arguments: &[String],
        deadline: Duration,
    ) -> Result<(), String> {
        super::super::make_dir(target, 0o750).map_err(|error| error.to_string())?;
        if self.is_mounted(target)? {
            return Ok(());
        }
        let done = self.tools.run("mount", arguments, deadline).await;
        // Who was killed may have done it a moment before.
        if self.is_mounted(target)? {
            return Ok(());
        }
        let problem = match done {
            Ok(Ended { status, text }) if status.success() => {
                format!("mount has ended well, and nothing is mounted; it said: {text}")
            }
            Ok(Ended { status, text }) => format!(
                "mount failed: {status}\nMounting command: mount\nMounting arguments: {}\nOutput: {text}\n",
                arguments.join(" ")
            ),
            Err(error @ ToolError::Late { .. }) => format!(
                "mount failed: {error}: the server does not answer\nMounting command: mount\nMounting arguments: {}\n",
                arguments.join(" ")
            ),
            Err(error) => error.to_string(),
        };
        std::fs::remove_dir(target).ok();
        Err(problem)
    }

    /// Unmounts, where it need not be proper: with a server that does not answer, the mount is taken out of sight and the kernel
    /// left to wait for the server alone.
    pub(super) async fn unmount_anyhow(&self, target: &Path) -> Result<(), String> {
        let shown = target.to_string_lossy().into_owned();
        let mut problem = String::new();
        // One try for each mount that lies upon another.
        for _ in 0..MOST_LAYERS {
            // `-c`: a path of a mount is not asked for links; `-i`: no helper asks a server that is gone.
            for flags in [&[] as &[&str], &["-i", "-l"], &["-i", "-f", "-l"]] {
                if !self.is_mounted(target)? {
                    return Ok(());
                }
                let arguments = [flags, &["-c", shown.as_str()]].concat();
                problem = self.unmount_once(&arguments).await.err().unwrap_or_default();
                if !problem.is_empty() {
                    warn!(path = %shown, %problem, "unmounting");
                }
            }
        }
        if self.is_mounted(target)? {
            return Err(format!("{shown} is still mounted: {problem}"));
        }
        Ok(())
    }

    /// Unmounts properly, or says why not.
    pub(super) async fn unmount(&self, target: &Path, deadline: Duration) -> Result<(), String> {
        let shown = target.to_string_lossy().into_owned();
        for _ in 0..MOST_LAYERS {
            if !self.is_mounted(target)? {
                return Ok(());
            }
            let done = self.tools.run("umount", &["-c", shown.as_str()], deadline).await;
            said(done).map_err(|problem| format!("unmount failed: {problem}"))?;
            info!(path = %shown, "unmounted");
        }
        if self.is_mounted(target)? { Err(format!("{shown} is still mounted")) } else { Ok(()) }
    }

    async fn unmount_once(&self, arguments: &[&str]) -> Result<(), String> {
        said(self.tools.run("umount", arguments, self.unmount).await).map(|_| ())
    }
}

/// Mounts that may lie upon each other at one place.
const MOST_LAYERS: usize = 4;

/// What a tool said where it ended well; else that and how it ended.
pub(super) fn said(done: Result<Ended, ToolError>) -> Result<String, String> {
    match done {
        Ok(Ended { status, text }) if status.success() => Ok(text),
        Ok(Ended { status, text }) => Err(format!("{status}: {text}")),
        Err(error) => Err(error.to_string()),
    }
}

/// The path as the mount table has it. Only what is above the mount is asked.
pub(super) fn real(path: &Path) -> PathBuf {
    let above = path.parent().and_then(|parent| parent.canonicalize().ok());
    match (above, path.file_name()) {
        (Some(above), Some(name)) => above.join(name),
        _ => path.to_owned(),
    }
}

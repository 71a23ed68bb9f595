//! Runs the system's own tools (`mount`, `iscsiadm`, `mkfs.ext4`) as children with a deadline.
//!
//! Input: a name and arguments. Output: what the tool said, and how it ended. A tool that talks to a server may never end:
//! each runs in a process group of its own, which is killed at the deadline and when nobody waits for it any more. What it says
//! goes to a file in memory, so that a daemon that it leaves behind (`rpc.statd`) cannot hold the caller by an open pipe.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Command;

/// Where tools of the system are, beside `PATH`: services often have none with `sbin`.
const SYSTEM: &[&str] = &["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// No more of what a tool says is kept.
const MOST_TEXT: u64 = 16 * 1024;
/// How long a killed tool may take to be gone. One that the kernel holds is left to it.
const KILLED: Duration = Duration::from_secs(1);

/// How a tool ended.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    /// Its exit status.
    pub(super) status: ExitStatus,
    /// Standard output and error, as they came.
    pub(super) text: String,
}

/// A tool that did not end by itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum ToolError {
    /// There is none of this name.
    #[error("{name}: executable file not found{}", package.map(|package| format!("; Debian has it in the package {package}")).unwrap_or_default())]
    Missing {
        /// The tool.
        name: String,
        /// Debian's package, where it is not one that every system has.
        package: Option<&'static str>,
    },
    /// It could not be started.
    #[error("{name} cannot be run: {problem}")]
    Start {
        /// The tool.
        name: String,
        /// Why.
        problem: io::Error,
    },
    /// It was killed.
    #[error("{name} did not end within {} s and was killed", deadline.as_secs())]
    Late {
        /// The tool.
        name: String,
        /// How long it had.
        deadline: Duration,
    },
}

/// Where tools are looked for.
#[derive(Debug, Clone)]
pub(super) struct Tools {
    dirs: Vec<PathBuf>,
}

impl Tools {
    /// Those of this system.
    pub(super) fn system() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let system = SYSTEM.iter().map(PathBuf::from);
        Self { dirs: std::env::split_paths(&path).chain(system).collect() }
    }

    /// Those in these directories alone.
    #[cfg(test)]
    pub(super) fn at(dirs: Vec<PathBuf>) -> Self {
        Self { dirs }
    }

    /// The file of a tool.
    pub(super) fn find(&self, name: &str) -> Option<PathBuf> {
        self.dirs.iter().map(|dir| dir.join(name)).find(|file| file.is_file())
    }

    /// Runs a tool to its end, at most for so long.
    pub(super) async fn run<A: AsRef<std::ffi::OsStr>>(
        &self,
        name: &str,
        arguments: &[A],
        deadline: Duration,
    ) -> Result<Ended, ToolError> {
        let missing = || ToolError::Missing { name: name.to_owned(), package: package(name) };
        let file = self.find(name).ok_or_else(missing)?;
        let failed = |problem| ToolError::Start { name: name.to_owned(), problem };
        let said = memfd_create("said", MFdFlags::MFD_CLOEXEC).map(File::from);
        let mut said = said.map_err(|error| failed(error.into()))?;
        let (out, err) = (said.try_clone().map_err(failed)?, said.try_clone().map_err(failed)?);
        let mut child = self.command(&file, arguments, out, err).spawn().map_err(failed)?;
        let mut group = Group::of(child.id());
        let Ok(ended) = tokio::time::timeout(deadline, child.wait()).await else {
            group.kill();
            // Reaps it. One in the kernel's hands is reaped by the runtime whenever it ends.
            drop(tokio::time::timeout(KILLED, child.wait()).await);
            return Err(ToolError::Late { name: name.to_owned(), deadline });
        };
        group.0 = None;
        let status = ended.map_err(failed)?;
        let text = read(&mut said).map_err(failed)?;
        Ok(Ended { status, text })
    }

    fn command<A: AsRef<std::ffi::OsStr>>(
        &self,
        file: &Path,
        arguments: &[A],
        out: File,
        err: File,
    ) -> Command {
        let mut command = Command::new(file);
        command.args(arguments).stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        // Its words are parsed, and its helpers are found where it was.
        command.env("LC_ALL", "C");
        if let Ok(path) = std::env::join_paths(&self.dirs) {
            command.env("PATH", path);
        }
        command
    }
}

/// The process group of a tool, killed when nobody waits for it any more.
struct Group(Option<Pid>);

impl Group {
    fn of(id: Option<u32>) -> Self {
        Self(id.and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw))
    }

    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            // One that has just ended is as good.
            killpg(group, Signal::SIGKILL).ok();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

fn read(said: &mut File) -> io::Result<String> {
    said.rewind()?;
    let mut bytes = Vec::new();
    said.take(MOST_TEXT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// Debian's package of a tool that is no part of every system.
fn package(name: &str) -> Option<&'static str> {
    match name {
        "mount.nfs" => Some("nfs-common"),
        "iscsiadm" => Some("open-iscsi"),
        "mkfs.xfs" => Some("xfsprogs"),
        "mkfs.btrfs" => Some("btrfs-progs"),
        "mount" | "umount" => Some("mount"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn tool(text: &str) -> (tempfile::TempDir, Tools) {
        let dir = tempfile::tempdir().unwrap();
        super::super::tests::write_tool(dir.path(), "tool", text);
        let tools = Tools::at(vec![dir.path().to_owned(), PathBuf::from("/bin")]);
        (dir, tools)
    }

    #[tokio::test]
    async fn both_outputs_and_the_status_are_told() {
        let (_dir, tools) = tool("echo out $1; echo err >&2; exit 7");
        let ended = tools.run("tool", &["word"], Duration::from_secs(60)).await.unwrap();
        assert_eq!((ended.status.code(), ended.text.as_str()), (Some(7), "out word\nerr"));
        let error = tools.run("iscsiadm", &["x"], Duration::from_secs(60)).await.unwrap_err().to_string();
        assert_eq!(error, "iscsiadm: executable file not found; Debian has it in the package open-iscsi");
    }

    #[tokio::test]
    async fn a_daemon_that_is_left_behind_keeps_nobody() {
        let (_dir, tools) = tool("sleep 1000 & echo $!");
        let ended = tools.run("tool", &[""; 0], Duration::from_secs(60)).await.unwrap();
        let daemon = Pid::from_raw(ended.text.parse().unwrap());
        assert!(nix::sys::signal::kill(daemon, Signal::SIGKILL).is_ok(), "it was left alone");
    }

    #[tokio::test]
    async fn who_is_late_goes_with_all_its_helpers() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("pid");
        let (_tools_dir, tools) = tool(&format!("sleep 1000 & echo $! > {}; wait", mark.display()));
        let began = Instant::now();
        let error = tools.run("tool", &[""; 0], Duration::from_secs(1)).await.unwrap_err().to_string();
        assert_eq!(error, "tool did not end within 1 s and was killed");
        assert!(began.elapsed() < Duration::from_secs(60));
        let helper = std::fs::read_to_string(&mark).unwrap();
        let is_gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", helper.trim())).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        while !is_gone() {
            assert!(began.elapsed() < Duration::from_secs(60), "the helper is still there");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

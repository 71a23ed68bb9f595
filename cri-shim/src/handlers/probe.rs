//! Tries one handler: finds its program and has it make a container, as far as a container without a command gets.
//!
//! Input: what the configuration says of the handler. Output: the program with what it can do, or a sentence why not. What a
//! try makes is written down below the scratch directory first, so that the next one takes back what a crash or a program
//! that had to be killed has left.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Features, SHIM};
use crate::config::{HandlerConfig, HandlerKind};
use crate::error::chain;
use crate::host::blocking;
use crate::host::cgroup::Roots;

/// How long a program may take to answer on a busy machine: a node has the most to do while it boots.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long what a killed program left running may take to go.
const CLEAR_PATIENCE: Duration = Duration::from_secs(10);
/// A command that no root file system has: a program that gets as far as missing it has done everything else.
pub(super) const ABSENT: &str = "/no-such-command-of-keelson";
/// The kernel that can make bind mounts read-only with everything below them (`mount_setattr`).
const RECURSIVE_READONLY_KERNEL: (u32, u32) = (5, 12);
/// The kernel that can map owners on overlay mounts, which volumes of pods with a user namespace need.
const MAPPED_MOUNTS_KERNEL: (u32, u32) = (5, 19);

/// Where and with what handlers are tried.
#[derive(Debug)]
pub(super) struct Ground {
    /// Our shim, where the configuration names it.
    pub(super) shim_binary: Option<PathBuf>,
    /// A directory of ours alone; each handler that is being tried has one in it.
    pub(super) scratch: PathBuf,
    /// Every cgroup hierarchy.
    pub(super) cgroups: Roots,
}

impl Ground {
    /// The program and what it can do, or why it is not offered. One try of a handler at a time.
    pub(super) async fn probe(&self, handler: &HandlerConfig) -> Result<(PathBuf, Features), String> {
        match handler.kind {
            HandlerKind::Keelson => {
                let shim = match handler.binary.as_ref().or(self.shim_binary.as_ref()) {
                    Some(path) => path.clone(),
                    None => own_shim()
                        .ok_or_else(|| format!("{SHIM} is neither beside keelson-cri nor in PATH"))?,
                };
                if !is_program(&shim) {
                    return Err(format!("{} is no executable file", shim.display()));
                }
                // A shim of another machine or with a missing library does not get as far as this.
                run(&shim, &["-v"]).await?;
                self.try_container(&shim, handler).await?;
                let recursive_readonly = kernel_is(RECURSIVE_READONLY_KERNEL);
                Ok((shim, Features { recursive_readonly, user_namespaces: user_namespaces() }))
            }
            HandlerKind::Runc => {
                let name = handler.binary.clone().unwrap_or_else(|| PathBuf::from(&handler.name));
                let binary = in_path(&name).ok_or_else(|| format!("{} is not in PATH", name.display()))?;
                run(&binary, &["--version"]).await?;
                self.try_container(&binary, handler).await?;
                let told = run(&binary, &["features"]).await.unwrap_or_default();
                let recursive_readonly = told.contains("\"rro\"") && kernel_is(RECURSIVE_READONLY_KERNEL);
                Ok((binary, Features { recursive_readonly, user_namespaces: user_namespaces() }))
            }
        }
    }

    /// Has the program make a container up to the point where the command would run, which does not exist; so nothing runs
    /// and the program itself takes everything back. This finds what no version number tells, such as crun's refusal of
    /// hybrid cgroups, or a kernel or a library that our own runtime cannot work with.
    async fn try_container(&self, binary: &Path, handler: &HandlerConfig) -> Result<(), String> {
        let scratch = self.scratch.join(&handler.name);
        let told = |error: std::io::Error| format!("{} cannot be probed: {error}", binary.display());
        self.take_back(&scratch).await?;
        let bundle = scratch.join("bundle");
        // crun makes no directory for what it mounts.
        for directory in ["dev", "proc", "sys"] {
            tokio::fs::create_dir_all(bundle.join("rootfs").join(directory)).await.map_err(told)?;
        }
        // Tries run beside each other: one that takes its cgroup back must not end what another has in it.
        let id = format!("keelson-probe-{}-{}", std::process::id(), handler.name);
        let spec = specification(&id, handler.kind).to_string();
        tokio::fs::write(bundle.join("config.json"), spec).await.map_err(told)?;
        let (root, directory) = (scratch.join("root"), bundle.to_string_lossy().into_owned());
        let root = root.to_string_lossy();
        let outcome = match handler.kind {
            HandlerKind::Runc => run(binary, &["--root", &root, "run", "--bundle", &directory, &id]).await,
            HandlerKind::Keelson => run(binary, &["-id", &id, "-bundle", &directory, "probe"]).await,
        };
        if let Err(problem) = self.take_back(&scratch).await {
            tracing::warn!(handler = handler.name, problem, "what its probe left stays until the next one");
        }
        match outcome {
            Ok(_) => Ok(()),
            Err(words) if words.contains(ABSENT) => Ok(()),
            Err(words) => Err(words),
        }
    }

    /// Takes away what a try left: nothing, unless its program was killed or we were.
    async fn take_back(&self, scratch: &Path) -> Result<(), String> {
        let (scratch, cgroups) = (scratch.to_owned(), self.cgroups.clone());
        let gone = blocking(move || {
            let spec = std::fs::read(scratch.join("bundle/config.json")).unwrap_or_default();
            let spec: Value = serde_json::from_slice(&spec).unwrap_or_default();
            if let Some(cgroup) = spec["linux"]["cgroupsPath"].as_str() {
                cgroups.clear(cgroup, CLEAR_PATIENCE)?;
            }
            crate::host::files::remove_tree(&scratch)
        });
        gone.await.map_err(|error| format!("an earlier probe cannot be taken back: {}", chain(&error)))
    }
}

/// The container of a try.
fn specification(id: &str, kind: HandlerKind) -> Value {
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "process": { "args": [ABSENT], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            // Devices cannot be opened below /run, which is mounted `nodev` on most hosts.
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
        ],
        "linux": { "cgroupsPath": format!("/{id}"), "namespaces": [{ "type": "mount" }, { "type": "pid" }] },
    });
    if kind == HandlerKind::Keelson {
        // It loads libseccomp only when a profile has to be compiled.
        spec["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
    }
    spec
}

/// What the program prints, or the last line of what it complains about.
async fn run(binary: &Path, arguments: &[&str]) -> Result<String, String> {
    let command = tokio::process::Command::new(binary)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let told = |words: &str| format!("{}: {words}", binary.display());
    let output = match tokio::time::timeout(DEADLINE, command).await {
        Ok(output) => output.map_err(|error| told(&error.to_string()))?,
        Err(_) => return Err(told("does not answer")),
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = complaint.lines().rev().find(|line| !line.trim().is_empty()).map(str::trim);
    Err(told(last.unwrap_or(&output.status.to_string())))
}

/// Our shim beside this executable, or in PATH.
fn own_shim() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(SHIM)));
    beside.filter(|path| is_program(path)).or_else(|| in_path(Path::new(SHIM)))
}

/// The path of a program given by name or path.
fn in_path(name: &Path) -> Option<PathBuf> {
    if name.components().count() > 1 {
        return is_program(name).then(|| name.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|program| is_program(program))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Mounts are mapped by `keelson-cri` itself, so that every handler can run pods with a user namespace.
fn user_namespaces() -> bool {
    kernel_is(MAPPED_MOUNTS_KERNEL) && Path::new("/proc/self/ns/user").exists()
}

fn kernel_is(wanted: (u32, u32)) -> bool {
    nix::sys::utsname::uname()
        .ok()
        .and_then(|name| version_of(&name.release().to_string_lossy()))
        .is_some_and(|version| version >= wanted)
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-', '+']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_kernels() {
        assert_eq!(version_of("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version_of("5.12-rc1"), Some((5, 12)));
        assert_eq!(version_of("next"), None);
    }
}

//! Runtime handlers: what may run a pod's containers, found out once at start by really trying.
//!
//! Input: the configuration and the node. Output: the handlers that are offered with what each of them can do, and the
//! reason for each one that is not, which the log tells once and Status tells whoever asks.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};

use crate::config::{Config, HandlerConfig, HandlerKind};
use crate::containerd::containers::RUNC_SHIM;
use crate::error::RuntimeError;

/// File name of our own shim.
pub const SHIM: &str = "containerd-shim-keelson-v1";
/// How long a program may take to answer a probe on a busy machine. One that is refused is so until the next start, and a
/// node has the most to do while it boots.
const PROBE_DEADLINE: Duration = Duration::from_secs(60);
/// A command that no root file system has: a program that gets as far as missing it has done everything else.
const ABSENT: &str = "/keelson-probe";
/// The handler of sandboxes made before handlers were recorded.
const FIRST: &str = "runc";
/// The handlers of pods that name none, where the configuration names none either: the first one that works.
const PREFERRED: [&str; 2] = ["keelson", FIRST];
/// The kernel that can make bind mounts read-only with everything below them (`mount_setattr`).
const RECURSIVE_READONLY_KERNEL: (u32, u32) = (5, 12);
/// The kernel that can map owners on overlay mounts, which volumes of pods with a user namespace need.
const MAPPED_MOUNTS_KERNEL: (u32, u32) = (5, 19);

/// What a handler can do beyond the ordinary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Bind mounts read-only with everything below them.
    pub recursive_readonly: bool,
    /// Pods with a user namespace of their own.
    pub user_namespaces: bool,
}

/// One handler that works here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handler {
    /// Its name.
    pub name: String,
    /// How it runs containers.
    pub kind: HandlerKind,
    /// The program: runc's stand-in, or our shim.
    pub binary: PathBuf,
    /// What it can do.
    pub features: Features,
}

impl Handler {
    /// The shim as containerd wants it named.
    pub fn shim(&self) -> String {
        match self.kind {
            HandlerKind::Keelson => self.binary.to_string_lossy().into_owned(),
            HandlerKind::Runc => RUNC_SHIM.to_owned(),
        }
    }
}

/// The handlers of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handlers {
    offered: Vec<Handler>,
    refused: Vec<Refused>,
    default: String,
}

/// A handler that is not offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Its name.
    pub name: String,
    /// How it would run containers.
    pub kind: HandlerKind,
    /// Why it is not offered.
    pub reason: String,
}

impl Handlers {
    /// Tries every handler. `scratch` is a directory for the time of the probes.
    pub async fn find(config: &Config, scratch: &Path) -> Self {
        let wanted = config.handlers.clone().unwrap_or_else(defaults);
        let probes = wanted.iter().map(|handler| probe(handler, config, scratch));
        let mut found = Self { offered: Vec::new(), refused: Vec::new(), default: String::new() };
        for (handler, outcome) in wanted.iter().zip(join_all(probes).await) {
            match outcome {
                Ok((binary, features)) => {
                    tracing::info!(
                        handler = handler.name,
                        binary = %binary.display(),
                        rro = features.recursive_readonly,
                        user_namespaces = features.user_namespaces,
                        "handler is offered"
                    );
                    let (name, kind) = (handler.name.clone(), handler.kind);
                    found.offered.push(Handler { name, kind, binary, features });
                }
                Err(reason) => {
                    tracing::warn!(handler = handler.name, reason, "handler is not offered");
                    let (name, kind) = (handler.name.clone(), handler.kind);
                    found.refused.push(Refused { name, kind, reason });
                }
            }
        }
        found.choose_default(config.default_handler.as_deref(), &wanted);
        if let Some(problem) = found.default_problem() {
            tracing::error!(problem, "pods without a runtime class cannot run");
        }
        found
    }

    /// The handler of this name; the default one for an empty name.
    pub fn get(&self, name: &str) -> Result<&Handler, RuntimeError> {
        let name = if name.is_empty() { &self.default } else { name };
        if let Some(handler) = self.offered.iter().find(|handler| handler.name == name) {
            return Ok(handler);
        }
        Err(RuntimeError::Handler { problem: self.problem_with(name) })
    }

    /// The handler a record names; sandboxes of the first version name none and ran with runc.
    pub fn of_record(&self, name: &str) -> Result<&Handler, RuntimeError> {
        self.get(if name.is_empty() { FIRST } else { name })
    }

    /// How the handler that a record names runs containers, also when it is not offered any more: what it started lives on.
    pub fn kind_of_record(&self, name: &str) -> Option<HandlerKind> {
        let name = if name.is_empty() { FIRST } else { name };
        let offered = self.offered.iter().find(|handler| handler.name == name).map(|handler| handler.kind);
        offered
            .or_else(|| self.refused.iter().find(|handler| handler.name == name).map(|handler| handler.kind))
    }

    /// Settles which handler runs pods that name none.
    fn choose_default(&mut self, configured: Option<&str>, wanted: &[HandlerConfig]) {
        if let Some(name) = configured {
            name.clone_into(&mut self.default);
            return;
        }
        let is_wanted = |name: &&str| wanted.iter().any(|handler| handler.name == *name);
        let others = wanted.iter().map(|handler| handler.name.as_str());
        let mut candidates = PREFERRED.into_iter().filter(is_wanted).chain(others).peekable();
        let best = candidates.peek().copied().unwrap_or_default();
        let works = |name: &&str| self.offered.iter().any(|handler| handler.name == *name);
        let chosen = candidates.find(works).unwrap_or(best).to_owned();
        if let Some(refused) = self.refused.iter().find(|handler| handler.name == best && chosen != best) {
            let (instead, reason) = (&chosen, &refused.reason);
            tracing::warn!(handler = best, instead, reason, "the default handler does not work on this node");
        }
        self.default = chosen;
    }

    /// The handlers that are offered.
    pub fn offered(&self) -> &[Handler] {
        &self.offered
    }

    /// Why pods that name no handler cannot run, if so.
    pub fn default_problem(&self) -> Option<String> {
        self.get("").err().map(|_| self.problem_with(&self.default))
    }

    /// For Status: what is there, what is not and why.
    pub fn info(&self) -> Value {
        let offered = self.offered.iter().map(|handler| {
            let kind = match handler.kind {
                HandlerKind::Keelson => "keelson",
                HandlerKind::Runc => "runc",
            };
            json!({ "name": handler.name, "kind": kind, "binary": handler.binary })
        });
        let refused =
            self.refused.iter().map(|handler| json!({ "name": handler.name, "reason": handler.reason }));
        json!({
            "default": self.default,
            "offered": offered.collect::<Vec<_>>(),
            "refused": refused.collect::<Vec<_>>(),
        })
    }

    fn problem_with(&self, name: &str) -> String {
        let names: Vec<&str> = self.offered.iter().map(|handler| handler.name.as_str()).collect();
        let there = if names.is_empty() {
            "there are none".to_owned()
        } else {
            format!("there are {}", names.join(", "))
        };
        match self.refused.iter().find(|refused| refused.name == name) {
            Some(Refused { reason, .. }) => {
                format!("runtime handler {name:?} does not work on this node: {reason}; {there}")
            }
            None => format!("runtime handler {name:?} is not configured; {there}"),
        }
    }
}

/// What is offered where the configuration says nothing.
fn defaults() -> Vec<HandlerConfig> {
    let handler = |name: &str, kind| HandlerConfig { name: name.to_owned(), kind, binary: None };
    vec![
        handler("keelson", HandlerKind::Keelson),
        handler("runc", HandlerKind::Runc),
        handler("crun", HandlerKind::Runc),
    ]
}

/// The program and what it can do, or why it is not offered.
async fn probe(
    handler: &HandlerConfig,
    config: &Config,
    scratch: &Path,
) -> Result<(PathBuf, Features), String> {
    match handler.kind {
        HandlerKind::Keelson => {
            let shim = match handler.binary.as_ref().or(config.shim_binary.as_ref()) {
                Some(path) => path.clone(),
                None => {
                    own_shim().ok_or_else(|| format!("{SHIM} is neither beside keelson-cri nor in PATH"))?
                }
            };
            if !is_program(&shim) {
                return Err(format!("{} is no executable file", shim.display()));
            }
            // A shim of another machine or with a missing library does not get as far as this.
            run(&shim, &["-v"]).await?;
            try_container(&shim, handler.kind, &scratch.join(&handler.name)).await?;
            let recursive_readonly = kernel_is(RECURSIVE_READONLY_KERNEL);
            Ok((shim, Features { recursive_readonly, user_namespaces: user_namespaces() }))
        }
        HandlerKind::Runc => {
            let name = handler.binary.clone().unwrap_or_else(|| PathBuf::from(&handler.name));
            let binary = in_path(&name).ok_or_else(|| format!("{} is not in PATH", name.display()))?;
            run(&binary, &["--version"]).await?;
            try_container(&binary, handler.kind, &scratch.join(&handler.name)).await?;
            let told = run(&binary, &["features"]).await.unwrap_or_default();
            let recursive_readonly = told.contains("\"rro\"") && kernel_is(RECURSIVE_READONLY_KERNEL);
            Ok((binary, Features { recursive_readonly, user_namespaces: user_namespaces() }))
        }
    }
}

/// Has the program make a container up to the point where the command would run, which does not exist; so nothing runs
/// and the program itself takes everything back. This finds what no version number tells, such as crun's refusal of
/// hybrid cgroups, or a kernel or a library that our own runtime cannot work with.
async fn try_container(binary: &Path, kind: HandlerKind, scratch: &Path) -> Result<(), String> {
    let told = |error: std::io::Error| format!("{} cannot be probed: {error}", binary.display());
    let bundle = scratch.join("bundle");
    // crun makes no directory for what it mounts.
    for directory in ["dev", "proc", "sys"] {
        tokio::fs::create_dir_all(bundle.join("rootfs").join(directory)).await.map_err(told)?;
    }
    // Probes run beside each other: one that takes its cgroup back must not end what another has in it.
    let handler = scratch.file_name().unwrap_or_default().to_string_lossy();
    let id = format!("keelson-probe-{}-{handler}", std::process::id());
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
    tokio::fs::write(bundle.join("config.json"), spec.to_string()).await.map_err(told)?;
    let (root, directory) = (scratch.join("root"), bundle.to_string_lossy().into_owned());
    let root = root.to_string_lossy();
    let outcome = match kind {
        HandlerKind::Runc => run(binary, &["--root", &root, "run", "--bundle", &directory, &id]).await,
        HandlerKind::Keelson => run(binary, &["-id", &id, "-bundle", &directory, "probe"]).await,
    };
    drop(tokio::fs::remove_dir_all(scratch).await);
    match outcome {
        Ok(_) => Ok(()),
        Err(words) if words.contains(ABSENT) => Ok(()),
        Err(words) => Err(words),
    }
}

/// What the program prints, or the last line of what it complains about.
async fn run(binary: &Path, arguments: &[&str]) -> Result<String, String> {
    let command = tokio::process::Command::new(binary)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let told = |words: &str| format!("{}: {words}", binary.display());
    let output = match tokio::time::timeout(PROBE_DEADLINE, command).await {
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

    fn handlers(default: &str) -> Handlers {
        let runc = Handler {
            name: "runc".into(),
            kind: HandlerKind::Runc,
            binary: "/usr/sbin/runc".into(),
            features: Features::default(),
        };
        let reason = "crun: cgroups in hybrid mode not supported".to_owned();
        let crun = Refused { name: "crun".into(), kind: HandlerKind::Runc, reason };
        Handlers { offered: vec![runc], refused: vec![crun], default: default.into() }
    }

    #[test]
    fn pods_that_name_none_get_the_best_handler_that_works() {
        let chosen = |mut all: Handlers, configured: Option<&str>, wanted: &[HandlerConfig]| {
            all.choose_default(configured, wanted);
            all.default
        };
        let broken = || {
            let mut all = handlers("");
            let (name, reason) = ("keelson".to_owned(), "no libseccomp".to_owned());
            all.refused.push(Refused { name, kind: HandlerKind::Keelson, reason });
            all
        };
        let whole = || {
            let mut all = handlers("");
            let mut own = all.offered[0].clone();
            own.name = "keelson".to_owned();
            all.offered.push(own);
            all
        };
        assert_eq!(chosen(whole(), None, &defaults()), "keelson");
        assert_eq!(chosen(broken(), None, &defaults()), "runc");
        assert_eq!(chosen(broken(), Some("keelson"), &defaults()), "keelson", "as asked, to be told");
        let only = [HandlerConfig { name: "crun".into(), kind: HandlerKind::Runc, binary: None }];
        assert_eq!(chosen(handlers(""), None, &only), "crun", "nothing else was configured");
        assert_eq!(broken().kind_of_record("keelson"), Some(HandlerKind::Keelson));
        assert_eq!(broken().kind_of_record(""), Some(HandlerKind::Runc));
        assert_eq!(broken().kind_of_record("gone"), None);
    }

    #[test]
    fn refusals_name_the_cause_and_what_there_is() {
        let all = handlers("runc");
        assert_eq!(all.get("").unwrap().name, "runc");
        assert_eq!(all.of_record("").unwrap().name, "runc");
        let words = |name| tonic::Status::from(all.get(name).unwrap_err());
        assert_eq!(words("kata").code(), tonic::Code::InvalidArgument);
        assert_eq!(words("kata").message(), r#"runtime handler "kata" is not configured; there are runc"#);
        assert!(words("crun").message().contains("hybrid mode not supported; there are runc"));
        assert_eq!(all.default_problem(), None);
        assert!(handlers("keelson").default_problem().unwrap().contains("keelson"));
    }

    #[test]
    fn versions_of_kernels() {
        assert_eq!(version_of("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version_of("5.12-rc1"), Some((5, 12)));
        assert_eq!(version_of("next"), None);
    }
}

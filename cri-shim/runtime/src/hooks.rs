//! OCI hooks: programs that the specification names for points in the life of a container.
//!
//! `prestart`, `createRuntime`, `poststart` and `poststop` are run here, in the caller's process and namespaces;
//! `createContainer` and `startContainer` by the container's own process ([`crate::host::hook`]), from what is planned here.
//! Each gets the container's state as JSON on its standard input and may take as long as its `timeout` says.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::plan::process::{Strings, c_string, strings};

/// How long a hook may take that has no `timeout`.
const PATIENCE: Duration = Duration::from_secs(100);
/// How long all hooks may take together that run when a container that could not be made has gone.
const GIVEN_UP: Duration = Duration::from_secs(10);
/// How much of a failed hook's output is told.
const OUTPUT: usize = 1024;

/// A point at which hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// Namespaces and mounts are there, the root is not yet changed; in the caller's namespaces. The older name.
    Prestart,
    /// The same.
    CreateRuntime,
    /// The same, in the container's namespaces.
    CreateContainer,
    /// Before the program, as the program will run.
    StartContainer,
    /// The program runs.
    Poststart,
    /// The container is deleted.
    Poststop,
}

/// A hook and its place in the specification.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Named {
    name: String,
    hook: Hook,
}

/// The state of a container, as hooks read it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State {
    oci_version: String,
    id: String,
    status: String,
    pid: i32,
    bundle: PathBuf,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// Hooks that run when the container is gone.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Last {
    state: State,
    hooks: Vec<Named>,
}

/// What the child needs to run a hook.
#[derive(Debug)]
pub(crate) struct ChildHook {
    pub(crate) name: String,
    pub(crate) path: std::ffi::CString,
    pub(crate) argv: Strings,
    pub(crate) envp: Strings,
    pub(crate) timeout: Duration,
}

/// All hooks of a container. Made before the fork.
#[derive(Debug)]
pub(crate) struct Hooks {
    state: State,
    before: Vec<Named>,
    poststart: Vec<Named>,
    poststop: Vec<Named>,
    /// Run by the child before it changes its root.
    pub(crate) create_container: Vec<ChildHook>,
    /// Where the child reads the state.
    pub(crate) input: OwnedFd,
    /// Where what those hooks print goes.
    pub(crate) output: OwnedFd,
}

/// What is left to run when a created container is started.
#[derive(Debug)]
pub(crate) struct AtStart {
    state: State,
    input: OwnedFd,
    /// Names of the hooks that the child runs, and how long they may take.
    start_container: Vec<String>,
    limit: Duration,
    poststart: Vec<Named>,
}

/// The hooks that the child runs before its program.
#[derive(Debug)]
pub(crate) struct StartHooks {
    pub(crate) list: Vec<ChildHook>,
    pub(crate) input: OwnedFd,
}

/// The hooks of one point, looked at.
fn at(spec: &Spec, point: Point) -> Result<Vec<Named>, Error> {
    let Some(hooks) = spec.hooks() else { return Ok(Vec::new()) };
    let (name, list) = match point {
        #[allow(deprecated, reason = "specifications may still have it")]
        Point::Prestart => ("prestart", hooks.prestart()),
        Point::CreateRuntime => ("createRuntime", hooks.create_runtime()),
        Point::CreateContainer => ("createContainer", hooks.create_container()),
        Point::StartContainer => ("startContainer", hooks.start_container()),
        Point::Poststart => ("poststart", hooks.poststart()),
        Point::Poststop => ("poststop", hooks.poststop()),
    };
    let named = list.iter().flatten().enumerate().map(|(index, hook)| {
        let name = format!("hooks.{name}[{index}]");
        if !hook.path().is_absolute() {
            return Err(Error::spec(
                format!("{name}.path"),
                format!("{:?} is not absolute", hook.path().to_string_lossy()),
            ));
        }
        if hook.timeout().is_some_and(|seconds| seconds <= 0) {
            return Err(Error::spec(format!("{name}.timeout"), "must be greater than zero"));
        }
        Ok(Named { name, hook: hook.clone() })
    });
    named.collect()
}

impl Named {
    fn timeout(&self) -> Duration {
        let seconds = self.hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
        seconds.map_or(PATIENCE, Duration::from_secs)
    }

    /// The name of the program as it sees it, and what follows.
    fn args(&self) -> Vec<String> {
        let args = self.hook.args().clone().filter(|args| !args.is_empty());
        args.unwrap_or_else(|| vec![self.hook.path().to_string_lossy().into_owned()])
    }

    fn for_child(&self) -> Result<ChildHook, Error> {
        let env = self.hook.env().clone().unwrap_or_default();
        Ok(ChildHook {
            name: format!("{}: {}", self.name, self.hook.path().display()),
            path: c_string(self.hook.path().as_os_str().as_encoded_bytes(), &format!("{}.path", self.name))?,
            argv: strings(&self.args(), &format!("{}.args", self.name))?,
            envp: strings(&env, &format!("{}.env", self.name))?,
            timeout: self.timeout(),
        })
    }

    fn failed(&self, problem: &str, output: &str) -> Error {
        let output = output.trim();
        let told = if output.is_empty() { String::new() } else { format!(": {output}") };
        Error::Hook {
            hook: format!("{}: {}", self.name, self.hook.path().display()),
            problem: format!("{problem}{told}"),
        }
    }

    /// Runs it in this process's namespaces and waits for its end.
    fn run(&self, state: &State) -> Result<(), Error> {
        self.run_within(state, self.timeout())
    }

    fn run_within(&self, state: &State, limit: Duration) -> Result<(), Error> {
        let cannot = |error: &dyn std::fmt::Display| self.failed(&error.to_string(), "");
        let mut input = memory("hook-state").map_err(|error| cannot(&error))?;
        input.write_all(&state.json()).and_then(|()| input.rewind()).map_err(|error| cannot(&error))?;
        let output = memory("hook-output").map_err(|error| cannot(&error))?;
        let copy = || output.try_clone().map_err(|error| cannot(&error));
        let args = self.args();
        let env = self.hook.env().iter().flatten().filter_map(|pair| pair.split_once('='));
        let mut command = Command::new(self.hook.path());
        command.args(args.get(1..).unwrap_or_default()).env_clear().envs(env);
        if let Some(name) = args.first() {
            command.arg0(name);
        }
        if state.bundle.is_dir() {
            command.current_dir(&state.bundle);
        }
        command.stdin(Stdio::from(input)).stdout(Stdio::from(copy()?)).stderr(Stdio::from(copy()?));
        let child = command.process_group(0).spawn().map_err(|error| cannot(&error))?;
        match ended(child, limit).map_err(|error| cannot(&error))? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.failed(&words(status), &told(&output))),
            None => {
                let problem = format!("has not ended after {} s", limit.as_secs());
                Err(self.failed(&problem, &told(&output)))
            }
        }
    }
}

impl State {
    fn json(&self) -> Vec<u8> {
        // Strings and numbers: it cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    fn with(&self, status: &str) -> Self {
        Self { status: status.to_owned(), ..self.clone() }
    }
}

impl Hooks {
    /// The hooks of a specification and those of them that the child runs at the start; nothing when there are none.
    pub(crate) fn plan(
        spec: &Spec,
        id: &str,
        bundle: &Path,
    ) -> Result<Option<(Self, Option<StartHooks>)>, Error> {
        let mut before = at(spec, Point::Prestart)?;
        before.extend(at(spec, Point::CreateRuntime)?);
        let create_container = at(spec, Point::CreateContainer)?;
        let start_container = at(spec, Point::StartContainer)?;
        let (poststart, poststop) = (at(spec, Point::Poststart)?, at(spec, Point::Poststop)?);
        let lists = [&before, &create_container, &start_container, &poststart, &poststop];
        if lists.iter().all(|list| list.is_empty()) {
            return Ok(None);
        }
        let for_child = |list: &[Named]| list.iter().map(Named::for_child).collect::<Result<Vec<_>, _>>();
        let input: OwnedFd = memory("hook-state").map_err(Error::step("make a file for hooks"))?.into();
        let output: OwnedFd = memory("hook-output").map_err(Error::step("make a file for hooks"))?.into();
        let list = for_child(&start_container)?;
        let start = if list.is_empty() {
            None
        } else {
            let input = input.try_clone().map_err(Error::step("copy a file for hooks"))?;
            Some(StartHooks { list, input })
        };
        let state = State {
            oci_version: spec.version().clone(),
            id: id.to_owned(),
            status: "creating".to_owned(),
            pid: 0,
            bundle: bundle.to_owned(),
            annotations: spec
                .annotations()
                .iter()
                .flatten()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
        };
        let create_container = for_child(&create_container)?;
        Ok(Some((Self { state, before, poststart, poststop, create_container, input, output }, start)))
    }

    /// Whether the child must wait before it changes its root.
    pub(crate) fn before_root(&self) -> bool {
        !self.before.is_empty() || !self.create_container.is_empty()
    }

    /// How long the child may take longer because of hooks.
    pub(crate) fn limit(&self) -> Duration {
        self.create_container.iter().map(|hook| hook.timeout).sum()
    }

    /// The child has its mounts: runs what is to be run here, and lets it read the state.
    pub(crate) fn created(&mut self, pid: i32) -> Result<(), Error> {
        self.state.pid = pid;
        self.before.iter().try_for_each(|hook| hook.run(&self.state))?;
        show(&self.input, &self.state)
    }

    /// What a hook that the child ran has printed.
    pub(crate) fn output(&self) -> String {
        self.output.try_clone().map(|output| told(&File::from(output))).unwrap_or_default()
    }

    /// Goes on to the start; and to what is left for the end.
    pub(crate) fn ready(self, pid: i32, start: Option<(Vec<String>, Duration)>) -> (AtStart, Option<Last>) {
        let state = State { pid, ..self.state };
        let last = (!self.poststop.is_empty())
            .then(|| Last { state: State { pid: 0, ..state.with("stopped") }, hooks: self.poststop });
        let (start_container, limit) = start.unwrap_or_default();
        let poststart = self.poststart;
        (AtStart { state: state.with("created"), input: self.input, start_container, limit, poststart }, last)
    }

    /// What is left to run when the container could not be made.
    pub(crate) fn given_up(&self) {
        let last = Last { state: self.state.with("stopped"), hooks: self.poststop.clone() };
        // What made it fail is what is told.
        drop(last.run(GIVEN_UP));
    }
}

impl StartHooks {
    /// Names and the longest time of all.
    pub(crate) fn summary(&self) -> (Vec<String>, Duration) {
        let names = self.list.iter().map(|hook| hook.name.clone()).collect();
        (names, self.list.iter().map(|hook| hook.timeout).sum())
    }
}

impl AtStart {
    /// Lets the child read the state; gives how long its hooks may take.
    pub(crate) fn begin(&self) -> Result<Duration, Error> {
        show(&self.input, &self.state)?;
        Ok(self.limit)
    }

    /// The name of a hook that the child ran.
    pub(crate) fn name(&self, index: usize) -> &str {
        self.start_container.get(index).map_or("hooks.startContainer", String::as_str)
    }

    /// The program runs.
    pub(crate) fn started(&self) -> Result<(), Error> {
        let state = self.state.with("running");
        self.poststart.iter().try_for_each(|hook| hook.run(&state))
    }
}

impl Last {
    /// Runs them all within `limit`, each within its own; gives what went wrong. Those for which no time is left are not
    /// run.
    pub(crate) fn run(&self, limit: Duration) -> Vec<String> {
        let end = Instant::now() + limit;
        let run = |hook: &Named| {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(
                    hook.failed("was not run: the hooks before it took all the time that there is", "")
                );
            }
            hook.run_within(&self.state, hook.timeout().min(left))
        };
        self.hooks.iter().filter_map(|hook| run(hook).err()).map(|error| error.chain()).collect()
    }
}

/// A file in memory.
fn memory(name: &str) -> std::io::Result<File> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?.into())
}

/// Replaces what the child's hooks will read.
fn show(input: &OwnedFd, state: &State) -> Result<(), Error> {
    let written = input.try_clone().map(File::from).and_then(|file| {
        file.set_len(0)?;
        file.write_all_at(&state.json(), 0)
    });
    written.map_err(Error::step("write the state for hooks"))
}

/// The beginning of what was printed.
fn told(output: &File) -> String {
    let mut text = [0_u8; OUTPUT];
    let length = output.read_at(&mut text, 0).unwrap_or(0);
    String::from_utf8_lossy(text.get(..length).unwrap_or_default()).into_owned()
}

fn words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, signal) => format!("was ended by signal {}", signal.unwrap_or(0)),
    }
}

/// Waits for the end of a child; one that takes too long is killed with what it started.
fn ended(mut child: Child, patience: Duration) -> std::io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| std::io::Error::other("an odd process id"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    let mut polled = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    let in_time = rustix::io::retry_on_intr(|| poll(&mut polled, Some(&limit)))? > 0;
    if !in_time {
        // It is its group's leader.
        let _gone = kill_process_group(pid, Signal::KILL);
    }
    let status = child.wait()?;
    Ok(in_time.then_some(status))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(hooks: &serde_json::Value) -> Spec {
        serde_json::from_value(json!({ "ociVersion": "1.0.2", "hooks": hooks })).unwrap()
    }

    fn planned(hooks: &serde_json::Value) -> Result<Option<(Hooks, Option<StartHooks>)>, Error> {
        Hooks::plan(&spec(hooks), "c1", Path::new("/"))
    }

    #[test]
    fn hooks_that_cannot_run_are_refused_by_their_place() {
        assert!(planned(&json!({ "poststop": [] })).unwrap().is_none());
        let refused = |hooks: &serde_json::Value| planned(hooks).unwrap_err().to_string();
        let text = refused(&json!({ "createRuntime": [{ "path": "/bin/true" }, { "path": "true" }] }));
        assert_eq!(text, "hooks.createRuntime[1].path: \"true\" is not absolute");
        let text = refused(&json!({ "poststop": [{ "path": "/bin/true", "timeout": 0 }] }));
        assert_eq!(text, "hooks.poststop[0].timeout: must be greater than zero");
        let text = refused(&json!({ "startContainer": [{ "path": "/bin/true", "env": ["A=\u{0}"] }] }));
        assert!(text.starts_with("hooks.startContainer[0].env[0]: "), "{text}");
    }

    #[test]
    fn a_hook_reads_the_state_and_its_failure_is_told_in_its_words() {
        let directory = tempfile::tempdir().unwrap();
        let seen = directory.path().join("seen");
        let script = format!("cat > {}; echo $0 $A >&2; exit 3", seen.display());
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script, "me"], "env": ["A=b"] });
        let (mut hooks, _) = planned(&json!({ "createRuntime": [hook] })).unwrap().unwrap();
        let error = hooks.created(77).unwrap_err().chain();
        assert_eq!(error, "hooks.createRuntime[0]: /bin/sh: ended with status 3: me b");
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(seen).unwrap()).unwrap();
        assert_eq!(
            state,
            json!({ "ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 77, "bundle": "/" })
        );
    }

    #[test]
    fn a_hook_that_hangs_is_ended_with_its_children() {
        let hook =
            json!({ "path": "/bin/sh", "args": ["sh", "-c", "sleep 1000 & echo at; wait"], "timeout": 1 });
        let (mut hooks, _) = planned(&json!({ "prestart": [hook] })).unwrap().unwrap();
        let error = hooks.created(1).unwrap_err().chain();
        assert_eq!(error, "hooks.prestart[0]: /bin/sh: has not ended after 1 s: at");
    }

    #[test]
    fn the_last_hooks_share_one_limit() {
        let slow = json!({ "path": "/bin/sh", "args": ["sh", "-c", "echo on; sleep 1000"] });
        let (hooks, _) = planned(&json!({ "poststop": [slow, slow] })).unwrap().unwrap();
        let last = Last { state: hooks.state.with("stopped"), hooks: hooks.poststop };
        let problems = last.run(Duration::from_millis(1500));
        assert_eq!(problems[0], "hooks.poststop[0]: /bin/sh: has not ended after 1 s: on");
        assert!(problems[1].starts_with("hooks.poststop[1]: /bin/sh: was not run: "), "{problems:?}");
        assert_eq!(problems.len(), 2);
    }
}

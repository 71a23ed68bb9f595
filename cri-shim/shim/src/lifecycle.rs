//! Making, starting and deleting processes: what containerd's Create, Start and Delete do. Each runs in a thread of its own.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cri_shim_runtime::cgroup::CgroupDriver;
use cri_shim_runtime::{Create, Exec, Pending};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use prost::Message;

use crate::bundle::Bundle;
use crate::process::{Phase, Process};
use crate::proto;
use crate::proto::events::{TaskCreate, TaskDelete, TaskExecStarted, TaskIo, TaskStart};
use crate::proto::task as msg;
use crate::protocol::SOCKET_ANNOTATION;
use crate::rootfs;
use crate::shim::{Container, SIGKILL, Shim, State, Watched};
use crate::stdio::Names;
use crate::ttrpc::{Code, Failure};

/// How long killed processes may take to go when a container is deleted.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long the hooks of a deleted container may take together: containerd's caller waits two minutes for all of a deletion.
const HOOKS_PATIENCE: Duration = Duration::from_secs(60);
/// Where compiled seccomp profiles are kept when no keelson-cri has named its directory, for all shims of the host.
const SECCOMP_CACHE: &str = "/run/keelson/seccomp";

fn host(what: &str, error: &io::Error) -> Failure {
    let code =
        if error.kind() == io::ErrorKind::InvalidInput { Code::InvalidArgument } else { Code::Unknown };
    Failure::new(code, format!("{what}: {error}"))
}

/// Makes a container; its first process waits.
pub fn create(shim: &Arc<Shim>, request: msg::CreateTaskRequest) -> Result<msg::CreateTaskResponse, Failure> {
    if !request.checkpoint.is_empty() {
        return Err(Failure::new(
            Code::Unimplemented,
            "restoring a checkpoint is not offered by this runtime",
        ));
    }
    shim.reserve(&request.id)?;
    let made = make(shim, &request);
    if made.is_err() {
        shim.forget(&request.id);
    }
    let pid = made?;
    shim.events.publish(&TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: Some(TaskIo {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        }),
        checkpoint: String::new(),
        pid,
    });
    Ok(msg::CreateTaskResponse { pid })
}

fn make(shim: &Arc<Shim>, request: &msg::CreateTaskRequest) -> Result<u32, Failure> {
    let bundle = Bundle::at(&request.bundle);
    let mut spec = bundle.spec().map_err(|error| host("bundle", &error))?;
    if let Some(process) = spec.process_mut() {
        shim.files.keep(process);
    }
    let root = root(&bundle, &spec, request);
    if let Some(path) = own_socket(&spec) {
        shim.serve_own(path).map_err(|error| host(SOCKET_ANNOTATION, &error))?;
    }
    if !request.rootfs.is_empty() {
        rootfs::make(&request.rootfs, &root).map_err(|error| host("root file system", &error))?;
    }
    let result = make_on(shim, request, bundle, &spec, &root);
    if result.is_err() && !request.rootfs.is_empty() {
        // Shown by the mount table when it stays; the failure to be told is the other one.
        rootfs::remove(&root).ok();
    }
    result
}

/// Where the root is: mounted below the bundle, or where the specification says.
fn root(bundle: &Bundle, spec: &Spec, request: &msg::CreateTaskRequest) -> PathBuf {
    match spec.root() {
        Some(root) if request.rootfs.is_empty() => bundle.path.join(root.path()),
        _ => bundle.rootfs(),
    }
}

fn make_on(
    shim: &Arc<Shim>,
    request: &msg::CreateTaskRequest,
    bundle: Bundle,
    spec: &Spec,
    root: &Path,
) -> Result<u32, Failure> {
    let names = Names {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let (stdio, held) = names.open().map_err(|error| host("stdio", &error))?;
    let created = Create {
        id: &request.id,
        spec,
        bundle: &bundle.path,
        rootfs: root,
        stdio,
        cgroups: driver(request.options.as_ref(), spec)?,
        seccomp_cache: seccomp_cache(own_socket(spec)).as_deref(),
    }
    .create()
    .map_err(|error| Failure::new(Code::Unknown, format!("OCI runtime create failed: {}", error.chain())))?;
    for warning in &created.warnings {
        bundle.say(warning);
    }
    let runtime = created.container;
    let pid = u32::try_from(runtime.pid).unwrap_or_default();
    if let Err(error) = bundle.keep(&runtime) {
        undo(Some(created.pending), &runtime, &created.pidfd);
        return Err(host("bundle", &error));
    }
    let init = Process { names, pid, console: created.console, held, ..Process::default() };
    let state = State {
        pending: Some(created.pending),
        init,
        execs: BTreeMap::new(),
        paused: false,
        oom_kills: 0,
        limit_reached: Arc::default(),
    };
    let container = Arc::new(Container::new(request.id.clone(), bundle, runtime, own_pids(spec), state));
    if let Err(error) = run(shim, &container, "", &created.pidfd) {
        let (pending, pump) = {
            let mut state = container.lock();
            (state.pending.take(), state.init.pump.take())
        };
        undo(pending, &container.runtime, &created.pidfd);
        if let Some(pump) = pump {
            pump.stop();
        }
        container.bundle.forget();
        return Err(host("watch", &error));
    }
    if let Ok(watch) = container.runtime.oom_watch() {
        // Without it kills by the memory limit are still seen when the first process ends.
        container.lock().limit_reached = Arc::clone(&watch.told);
        shim.watch(Watched::Oom(Arc::clone(&container), watch)).ok();
    }
    shim.add(&container);
    Ok(pid)
}

/// Takes a container back that was made and that nobody watches yet.
fn undo(pending: Option<Pending>, runtime: &cri_shim_runtime::Container, pidfd: &OwnedFd) {
    drop(pending);
    cri_shim_runtime::wait::kill(pidfd).ok();
    cri_shim_runtime::wait::reap(pidfd, true).ok();
    runtime.delete(KILL_PATIENCE).ok();
    // The failure to be told is the other one.
    drop(runtime.run_poststop(HOOKS_PATIENCE));
}

/// Whether the container's processes end with its first one.
fn own_pids(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Pid
            && namespace.path().as_ref().is_none_or(|path| path.as_os_str().is_empty())
    })
}

/// Whether systemd makes the cgroups: as runc's options say, which keelson-cri gives. containerd's own CRI plugin gives those
/// to runc only; then it is the path that tells, which names a unit where the pod's cgroup parent is a slice.
pub fn driver(options: Option<&prost_types::Any>, spec: &Spec) -> Result<CgroupDriver, Failure> {
    let Some(options) = options.filter(|options| options.type_url.ends_with("runc.v1.Options")) else {
        let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref()?.to_str());
        let names_unit = path.is_some_and(|path| !path.starts_with('/') && path.matches(':').count() == 2);
        return Ok(if names_unit { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs });
    };
    let options = msg::RuncOptions::decode(options.value.as_slice())
        .map_err(|error| Failure::new(Code::InvalidArgument, format!("runtime options: {error}")))?;
    Ok(if options.systemd_cgroup { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs })
}

/// Where keelson-cri wants to reach the shim.
fn own_socket(spec: &Spec) -> Option<&Path> {
    spec.annotations().as_ref()?.get(SOCKET_ANNOTATION).map(Path::new)
}

/// Where compiled profiles are kept: in keelson-cri's directory of volatile state (its sockets are in a folder there). `None`
/// when that cannot be had.
fn seccomp_cache(own_socket: Option<&Path>) -> Option<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let state = own_socket.and_then(|socket| socket.parent()?.parent());
    let path = state.map_or_else(|| PathBuf::from(SECCOMP_CACHE), |state| state.join("seccomp"));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).ok()?;
    Some(path)
}

/// Watches a process that exists, and moves its output. When this fails nobody does, and the process is the caller's to end.
fn run(shim: &Arc<Shim>, container: &Arc<Container>, exec: &str, pidfd: &OwnedFd) -> io::Result<()> {
    let watched = pidfd.try_clone()?;
    let (shim_, container_, exec_) = (Arc::clone(shim), Arc::clone(container), exec.to_owned());
    let mut state = container.lock();
    let Some(process) = state.process(exec) else { return Ok(()) };
    let pid = process.pid;
    process.pidfd = Some(pidfd.try_clone()?);
    let drained = move || shim_.drained(&container_, &exec_);
    process.pump = process.held.pump(process.console.as_ref(), drained)?;
    drop(state);
    let container = Arc::clone(container);
    shim.watch(Watched::Process { container, exec: exec.to_owned(), pid, pidfd: watched })
}

/// Runs a process that was made; gives its id.
pub fn start(shim: &Arc<Shim>, request: &msg::StartRequest) -> Result<u32, Failure> {
    let container = shim.container(&request.id)?;
    if request.exec_id.is_empty() {
        start_init(shim, &container)
    } else {
        start_exec(shim, &container, &request.exec_id)
    }
}

fn start_init(shim: &Arc<Shim>, container: &Arc<Container>) -> Result<u32, Failure> {
    let _one_at_a_time = container.operate();
    let (pending, pid) = {
        let mut state = container.lock();
        if state.init.phase != Phase::Created {
            let words = format!("container {} was started already or has ended", container.id);
            return Err(Failure::new(Code::FailedPrecondition, words));
        }
        let Some(pending) = state.pending.take() else {
            return Err(Failure::new(Code::FailedPrecondition, "the container was started already"));
        };
        state.init.phase = Phase::Starting;
        (pending, state.init.pid)
    };
    let started = pending.start();
    if started.is_ok() {
        shim.events.publish(&TaskStart { container_id: container.id.clone(), pid });
    }
    now_running(shim, container, "");
    match started {
        Ok(()) => Ok(pid),
        Err(error) => {
            // It ends by itself, unless a hook failed when it ran; who hears of the failure can delete it at once.
            container.runtime.kill_all(SIGKILL).ok();
            container.wait_ended(KILL_PATIENCE);
            Err(Failure::new(Code::Unknown, format!("OCI runtime start failed: {}", error.chain())))
        }
    }
}

/// The start is over: an end that was seen meanwhile is told now.
fn now_running(shim: &Arc<Shim>, container: &Arc<Container>, exec: &str) {
    let early = {
        let mut state = container.lock();
        let Some(process) = state.process(exec) else { return };
        process.phase = Phase::Running;
        process.early.take()
    };
    if let Some(exit) = early {
        shim.process_ended(container, exec, exit);
    }
}

fn start_exec(shim: &Arc<Shim>, container: &Arc<Container>, exec: &str) -> Result<u32, Failure> {
    let (names, spec) = {
        let mut state = container.lock();
        let process = state.find(&container.id, exec)?;
        let Some(spec) = process.spec.take().filter(|_| process.phase == Phase::Created) else {
            let words = format!("exec process {exec} was started already");
            return Err(Failure::new(Code::FailedPrecondition, words));
        };
        process.phase = Phase::Starting;
        (process.names.clone(), spec)
    };
    match spawn_exec(shim, container, exec, &names, &spec) {
        Ok(pid) => {
            let container_id = container.id.clone();
            shim.events.publish(&TaskExecStarted { container_id, exec_id: exec.to_owned(), pid });
            now_running(shim, container, exec);
            Ok(pid)
        }
        Err(failure) => {
            let mut state = container.lock();
            if let Some(process) = state.process(exec) {
                // Over without having been: there is no end to be told but to those who wait.
                process.held.release();
                let exit = crate::process::Exit { status: 255, at: std::time::SystemTime::now() };
                process.phase = Phase::Told(exit);
                let waiting = std::mem::take(&mut process.waiting);
                drop(state);
                for responder in waiting {
                    responder.answer(Ok(exit.to_answer()));
                }
            }
            Err(failure)
        }
    }
}

fn spawn_exec(
    shim: &Arc<Shim>,
    container: &Arc<Container>,
    exec: &str,
    names: &Names,
    spec: &oci_spec::runtime::Process,
) -> Result<u32, Failure> {
    let mut spec = spec.clone();
    shim.files.keep(&mut spec);
    if spec.oom_score_adj().is_none() {
        // Not the shim's own, which is the node's most protected one.
        spec.set_oom_score_adj(container.bundle.process().ok().and_then(|process| process.oom_score_adj()));
    }
    let (stdio, held) = names.open().map_err(|error| host("stdio", &error))?;
    let child = container
        .runtime
        .exec(Exec { process: &spec, stdio, subreaper: false })
        .map_err(|error| Failure::new(Code::Unknown, exec_words(&error)))?;
    let pid = u32::try_from(child.pid).unwrap_or_default();
    {
        let mut state = container.lock();
        let process = state.find(&container.id, exec)?;
        process.pid = pid;
        process.held = held;
        process.console = child.console;
    }
    run(shim, container, exec, &child.pidfd).map_err(|error| {
        // Its start is told as failed, so that it must not go on: whoever asks again would have it twice.
        cri_shim_runtime::wait::kill(&child.pidfd).ok();
        cri_shim_runtime::wait::reap(&child.pidfd, true).ok();
        let pump = container.lock().process(exec).and_then(|process| process.pump.take());
        if let Some(pump) = pump {
            pump.stop();
        }
        host("watch", &error)
    })?;
    Ok(pid)
}

/// A refusal to run a command in the words of runc, which callers know.
pub fn exec_words(error: &cri_shim_runtime::Error) -> String {
    format!("OCI runtime exec failed: exec failed: unable to start container process: {}", error.chain())
}

/// Forgets an ended exec process, or an ended container with everything of it.
pub fn delete(shim: &Arc<Shim>, request: &msg::DeleteRequest) -> Result<msg::DeleteResponse, Failure> {
    let container = shim.container(&request.id)?;
    if !request.exec_id.is_empty() {
        return delete_exec(shim, &container, &request.exec_id);
    }
    let _one_at_a_time = container.operate();
    end_created(&container)?;
    let (pid, exit, pump) = {
        let state = container.lock();
        let Some(exit) = state.init.exit() else {
            let words = format!("container {} is running", container.id);
            return Err(Failure::new(Code::FailedPrecondition, words));
        };
        (state.init.pid, exit, state.init.pump.clone())
    };
    container
        .runtime
        .delete(KILL_PATIENCE)
        .map_err(|error| Failure::new(Code::Unknown, format!("delete: {}", error.chain())))?;
    if let Some(pump) = pump {
        pump.stop();
    }
    rootfs::remove(&container.bundle.rootfs()).map_err(|error| host("unmount", &error))?;
    container.bundle.forget();
    shim.unwatch_container(&container);
    // Last, once nothing can fail any more: a repeated deletion must not run them again.
    for problem in container.runtime.run_poststop(HOOKS_PATIENCE) {
        container.bundle.say(&problem);
    }
    shim.forget(&container.id);
    Ok(gone(shim, &container.id, &container.id, pid, exit))
}

/// A container that was never started is ended here.
fn end_created(container: &Arc<Container>) -> Result<(), Failure> {
    let pending = container.lock().pending.take();
    if pending.is_none() {
        return Ok(());
    }
    drop(pending);
    container.runtime.kill_all(SIGKILL).ok();
    if container.wait_ended(KILL_PATIENCE) {
        return Ok(());
    }
    Err(Failure::new(Code::Internal, format!("container {} does not end", container.id)))
}

fn delete_exec(
    shim: &Arc<Shim>,
    container: &Arc<Container>,
    exec: &str,
) -> Result<msg::DeleteResponse, Failure> {
    let mut state = container.lock();
    let process = state.find(&container.id, exec)?;
    let exit = match process.phase {
        Phase::Told(exit) => exit,
        // Never started: nothing was.
        Phase::Created => crate::process::Exit { status: 0, at: std::time::SystemTime::now() },
        _ => {
            let words = format!("exec process {exec} is running");
            return Err(Failure::new(Code::FailedPrecondition, words));
        }
    };
    let Some(process) = state.execs.remove(exec) else { return Err(Failure::new(Code::NotFound, exec)) };
    drop(state);
    if let Some(pump) = &process.pump {
        pump.stop();
    }
    Ok(gone(shim, &container.id, exec, process.pid, exit))
}

fn gone(shim: &Shim, container: &str, id: &str, pid: u32, exit: crate::process::Exit) -> msg::DeleteResponse {
    let exited_at = Some(proto::timestamp(exit.at));
    shim.events.publish(&TaskDelete {
        container_id: container.to_owned(),
        pid,
        exit_status: exit.status,
        exited_at,
        id: id.to_owned(),
    });
    msg::DeleteResponse { pid, exit_status: exit.status, exited_at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_driver_follows_the_options_or_else_the_path() {
        let spec = |path: &str| -> Spec {
            serde_json::from_value(serde_json::json!({"ociVersion": "1.0.2", "linux": {"cgroupsPath": path}}))
                .unwrap()
        };
        let unit = spec("kubepods-burstable.slice:cri-containerd:abc");
        let chosen = |options: Option<&prost_types::Any>, spec: &Spec| driver(options, spec).unwrap();
        assert!(matches!(chosen(None, &unit), CgroupDriver::Systemd));
        assert!(matches!(chosen(None, &spec("/kubepods/a:b:c")), CgroupDriver::Cgroupfs));
        assert!(matches!(chosen(None, &spec("/kubepods/burstable/abc")), CgroupDriver::Cgroupfs));
        let other = prost_types::Any { type_url: "runtimeoptions.v1.Options".to_owned(), value: Vec::new() };
        assert!(matches!(chosen(Some(&other), &unit), CgroupDriver::Systemd));
        let told = msg::RuncOptions { systemd_cgroup: false, ..msg::RuncOptions::default() };
        let told = prost_types::Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: told.encode_to_vec(),
        };
        assert!(matches!(chosen(Some(&told), &unit), CgroupDriver::Cgroupfs), "what is said counts");
    }
}

//! The task service: each of containerd's calls to its place, quick ones at once, those that may block in a thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prost::Message;
use prost_types::Any;

use crate::lifecycle;
use crate::process::Phase;
use crate::process::Process;
use crate::proto::events::{TaskExecAdded, TaskPaused, TaskResumed};
use crate::proto::task as msg;
use crate::proto::ttrpc::Request;
use crate::shim::{Container, SIGKILL, Shim};
use crate::stdio::Names;
use crate::ttrpc::{Code, Failure, Responder};
use crate::{figures, host, proto, threads};

/// Service of our own on the same socket, by which `start` finds out whether a shim stays for a new container.
pub const STAY: (&str, &str) = ("keelson.shim.v1.Shim", "Stay");
/// How long the shim then waits for that container.
const STAY_PATIENCE: Duration = Duration::from_secs(10);
/// Most calls that work at once.
const MOST_BUSY: usize = 256;

type Answer = Result<Vec<u8>, Failure>;

/// Answers a call, now or later.
pub fn handle(shim: &Arc<Shim>, request: Request, responder: Responder) {
    let Request { service, method, payload, .. } = request;
    if (service.as_str(), method.as_str()) == STAY {
        shim.stay(STAY_PATIENCE);
        return responder.answer(Ok(Vec::new()));
    }
    if !msg::SERVICES.contains(&service.as_str()) {
        let words = format!("service {service} is not served");
        return responder.answer(Err(Failure::new(Code::Unimplemented, words)));
    }
    match method.as_str() {
        "Wait" => wait(shim, &payload, responder),
        "Create" | "Start" | "Delete" | "Pause" | "Resume" | "Update" | "Stats" | "Pids" => {
            in_thread(shim, method, payload, responder);
        }
        _ => responder.answer(quick(shim, &method, &payload)),
    }
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, Failure> {
    M::decode(payload).map_err(|error| Failure::new(Code::InvalidArgument, error.to_string()))
}

fn encode(message: &impl Message) -> Vec<u8> {
    message.encode_to_vec()
}

fn in_thread(shim: &Arc<Shim>, method: String, payload: Vec<u8>, responder: Responder) {
    if shim.busy.fetch_add(1, Ordering::AcqRel) >= MOST_BUSY {
        shim.busy.fetch_sub(1, Ordering::AcqRel);
        return responder.answer(Err(Failure::new(Code::ResourceExhausted, "too many calls at once")));
    }
    let (worker, name) = (Arc::clone(shim), method.clone());
    let work = move || {
        let answer = slow(&worker, &method, &payload);
        responder.answer(answer);
        // Not before: a shim without work may end, and its connections with it.
        worker.work_done();
    };
    if threads::spawn(&name, work).is_err() {
        // The responder is gone with the closure; containerd's own deadline tells the caller.
        shim.work_done();
    }
}

fn slow(shim: &Arc<Shim>, method: &str, payload: &[u8]) -> Answer {
    match method {
        "Create" => lifecycle::create(shim, decode(payload)?).map(|answer| encode(&answer)),
        "Start" => lifecycle::start(shim, &decode(payload)?).map(|pid| encode(&msg::StartResponse { pid })),
        "Delete" => lifecycle::delete(shim, &decode(payload)?).map(|answer| encode(&answer)),
        "Pause" => pause(shim, &decode(payload)?, true),
        "Resume" => pause(shim, &decode(payload)?, false),
        "Update" => update(shim, &decode(payload)?),
        "Pids" => pids(shim, &decode(payload)?),
        _ => stats(shim, &decode(payload)?),
    }
}

fn quick(shim: &Arc<Shim>, method: &str, payload: &[u8]) -> Answer {
    match method {
        "State" => state(shim, &decode(payload)?),
        "Kill" => kill(shim, &decode(payload)?),
        "Exec" => exec(shim, decode(payload)?),
        "ResizePty" => resize(shim, &decode(payload)?),
        "CloseIO" => close_io(shim, &decode(payload)?),
        "Connect" => connect(shim, &decode(payload)?),
        "Shutdown" => {
            shutdown(shim, &decode(payload)?);
            Ok(Vec::new())
        }
        "Checkpoint" => Err(Failure::new(
            Code::Unimplemented,
            "checkpoints need CRIU, which this runtime does not drive; use the handler runc",
        )),
        _ => Err(Failure::new(Code::Unimplemented, format!("method {method} is not served"))),
    }
}

/// Answered when the process ends.
fn wait(shim: &Arc<Shim>, payload: &[u8], responder: Responder) {
    let found =
        decode::<msg::WaitRequest>(payload).and_then(|request| Ok((shim.container(&request.id)?, request)));
    let (container, request) = match found {
        Ok(found) => found,
        Err(failure) => return responder.answer(Err(failure)),
    };
    let mut state = container.lock();
    let exit = match state.find(&request.id, &request.exec_id) {
        Err(failure) => {
            drop(state);
            return responder.answer(Err(failure));
        }
        Ok(process) => match process.exit() {
            Some(exit) => exit,
            None => return process.waiting.push(responder),
        },
    };
    drop(state);
    responder.answer(Ok(exit.to_answer()));
}

fn state(shim: &Shim, request: &msg::StateRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let mut state = container.lock();
    let paused = state.paused;
    let process = state.find(&request.id, &request.exec_id)?;
    let exit = process.exit();
    Ok(encode(&msg::StateResponse {
        id: container.id.clone(),
        bundle: container.bundle.path.to_string_lossy().into_owned(),
        pid: process.pid,
        status: process.status(paused).into(),
        stdin: process.names.stdin.clone(),
        stdout: process.names.stdout.clone(),
        stderr: process.names.stderr.clone(),
        terminal: process.names.terminal,
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| proto::timestamp(exit.at)),
        exec_id: request.exec_id.clone(),
    }))
}

fn runtime_failure(what: &str, error: &cri_shim_runtime::Error) -> Failure {
    Failure::new(Code::Unknown, format!("{what}: {}", error.chain()))
}

fn finished() -> Failure {
    Failure::new(Code::NotFound, "process already finished")
}

fn kill(shim: &Shim, request: &msg::KillRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let signal = i32::try_from(request.signal).map_err(|_large| {
        Failure::new(Code::InvalidArgument, format!("signal {} does not exist", request.signal))
    })?;
    if request.all {
        container.runtime.kill_all(signal).map_err(|error| runtime_failure("kill all", &error))?;
    } else {
        let mut state = container.lock();
        let process = state.find(&request.id, &request.exec_id)?;
        if matches!(process.phase, Phase::Created) && !request.exec_id.is_empty() {
            return Err(Failure::new(Code::FailedPrecondition, "the exec process was not started"));
        }
        let Some(pidfd) = process.pidfd.as_ref().filter(|_| process.is_alive()) else {
            return Err(finished());
        };
        match host::signal::send(pidfd, signal) {
            Ok(true) => {}
            Ok(false) => return Err(finished()),
            Err(error) => {
                return Err(Failure::new(Code::InvalidArgument, format!("signal {signal}: {error}")));
            }
        }
    }
    if signal == SIGKILL && container.lock().paused {
        thaw(shim, &container)?;
    }
    Ok(Vec::new())
}

/// A frozen process takes no signal before it is thawed.
fn thaw(shim: &Shim, container: &Container) -> Result<(), Failure> {
    container.runtime.resume().map_err(|error| runtime_failure("resume", &error))?;
    container.lock().paused = false;
    shim.events.publish(&TaskResumed { container_id: container.id.clone() });
    Ok(())
}

fn exec(shim: &Shim, request: msg::ExecProcessRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let spec = request.spec.map(|spec| spec.value).unwrap_or_default();
    let spec = serde_json::from_slice(&spec)
        .map_err(|error| Failure::new(Code::InvalidArgument, format!("exec process: {error}")))?;
    let process = Process {
        names: Names {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
        spec: Some(Box::new(spec)),
        ..Process::default()
    };
    let mut state = container.lock();
    if !matches!(state.init.phase, Phase::Running) {
        let words = format!("container {} is not running", request.id);
        return Err(Failure::new(Code::FailedPrecondition, words));
    }
    if request.exec_id.is_empty() || state.execs.contains_key(&request.exec_id) {
        return Err(Failure::new(
            Code::AlreadyExists,
            format!("exec process {} already exists", request.exec_id),
        ));
    }
    state.execs.insert(request.exec_id.clone(), process);
    drop(state);
    shim.events.publish(&TaskExecAdded { container_id: request.id, exec_id: request.exec_id });
    Ok(Vec::new())
}

fn resize(shim: &Shim, request: &msg::ResizePtyRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let mut state = container.lock();
    let process = state.find(&request.id, &request.exec_id)?;
    let Some(console) = &process.console else {
        return Err(Failure::new(Code::FailedPrecondition, "the process has no terminal"));
    };
    let size = rustix::termios::Winsize {
        ws_row: u16::try_from(request.height).unwrap_or(u16::MAX),
        ws_col: u16::try_from(request.width).unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(console, size)
        .map_err(|errno| Failure::new(Code::Internal, format!("set the terminal's size: {errno}")))?;
    Ok(Vec::new())
}

fn close_io(shim: &Shim, request: &msg::CloseIoRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let mut state = container.lock();
    let process = state.find(&request.id, &request.exec_id)?;
    if request.stdin {
        process.held.close_stdin();
    }
    Ok(Vec::new())
}

fn connect(shim: &Shim, request: &msg::ConnectRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let task_pid = container.lock().init.pid;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    Ok(encode(&msg::ConnectResponse { shim_pid: std::process::id(), task_pid, version }))
}

/// containerd says so after each container; with others left the shim is still needed.
fn shutdown(shim: &Shim, request: &msg::ShutdownRequest) {
    shim.ending.fetch_or(request.now, Ordering::AcqRel);
    shim.idle_now();
}

fn pause(shim: &Shim, request: &msg::IdRequest, paused: bool) -> Answer {
    let container = shim.container(&request.id)?;
    let _one_at_a_time = container.operate();
    if !paused {
        thaw(shim, &container)?;
        return Ok(Vec::new());
    }
    container.runtime.pause().map_err(|error| runtime_failure("pause", &error))?;
    container.lock().paused = true;
    shim.events.publish(&TaskPaused { container_id: request.id.clone() });
    Ok(Vec::new())
}

fn update(shim: &Shim, request: &msg::UpdateTaskRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let _one_at_a_time = container.operate();
    let resources = request.resources.as_ref().map(|any| any.value.as_slice()).unwrap_or_default();
    let resources = serde_json::from_slice(resources)
        .map_err(|error| Failure::new(Code::InvalidArgument, format!("resources: {error}")))?;
    container.runtime.update(&resources).map_err(|error| runtime_failure("update", &error))?;
    Ok(Vec::new())
}

fn stats(shim: &Shim, request: &msg::StatsRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let stats = container.runtime.stats().map_err(|error| runtime_failure("stats", &error))?;
    Ok(encode(&msg::StatsResponse { stats: Some(figures::metrics(&stats)) }))
}

fn pids(shim: &Shim, request: &msg::PidsRequest) -> Answer {
    let container = shim.container(&request.id)?;
    let all = container.runtime.pids().map_err(|error| runtime_failure("pids", &error))?;
    let state = container.lock();
    let exec_of =
        |pid: u32| state.execs.iter().find(|(_, process)| process.pid == pid).map(|(id, _)| id.clone());
    let processes = all
        .into_iter()
        .filter_map(|pid| u32::try_from(pid).ok())
        .map(|pid| {
            let info = exec_of(pid).map(|exec_id| Any {
                type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
                value: encode(&msg::ProcessDetails { exec_id }),
            });
            msg::ProcessInfo { pid, info }
        })
        .collect();
    drop(state);
    Ok(encode(&msg::PidsResponse { processes }))
}

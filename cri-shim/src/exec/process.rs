//! One exec process: made in a running container over FIFOs, waited for, and cleaned up.
//!
//! Input: a container and a command. Output: the process's streams and its exit. It inherits the container's user,
//! environment, capabilities and limits.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use cri_shim_core::oci::SANDBOX_ID_ANNOTATION;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tonic::Code;

use super::Executor;
use super::error::ExecError;
use super::fifo::{self, Ends, Fifos, Wanted};
use super::tree;
use crate::containerd::tasks::{Exit, Stdio};
use crate::containerd::{Client, ContainerdError};

/// Bytes read from a FIFO at once.
const READ: usize = 16 * 1024;

/// How long a killed process may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long containerd may be away while a process is waited for, and how often it is tried.
const RESTART_PATIENCE: Duration = Duration::from_secs(60);
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// A process that started.
pub struct ExecProcess {
    client: Client,
    container: String,
    exec: String,
    pid: u32,
    // Removes the directory when the process is forgotten.
    fifos: Fifos,
}

impl ExecProcess {
    /// Starts `command` in `container`, with a terminal and input as asked.
    pub async fn start(
        executor: &Executor,
        container: &str,
        command: &[String],
        stdin: bool,
        terminal: bool,
    ) -> Result<(Self, Ends), ExecError> {
        let Executor { client, dir, starting, .. } = executor;
        let (process, pod) = process_spec(client, container, command, terminal).await?;
        // The shims of runc and crun start one at a time anyway, under a lock that they also need to tell of ends. With many in
        // line for it ends pile up, and from the thirty-third on each is waited for a second.
        let turn = starting.lock(&pod).await;
        let exec = executor.next_id();
        let wanted = Wanted { stdin, stderr: !terminal };
        let (fifos, ends) = Fifos::create(dir, container, &exec, wanted)?;
        let stdio = Stdio {
            stdin: fifos.path("stdin"),
            stdout: fifos.path("stdout"),
            stderr: fifos.path("stderr"),
            terminal,
        };
        client.exec_task(container, &exec, process, stdio).await?;
        let started = client.start_task(container, &exec).await;
        drop(turn);
        match started {
            Ok(pid) => {
                let (client, container) = (client.clone(), container.to_owned());
                Ok((Self { client, container, exec, pid, fifos }, ends))
            }
            Err(error) => {
                if let Err(error) = client.delete_exec(container, &exec).await {
                    tracing::debug!(error = &error as &dyn std::error::Error, "a failed exec process stays");
                }
                Err(refusal(exec, error))
            }
        }
    }

    /// Waits for the process's end.
    pub async fn wait(&self) -> Result<Exit, ExecError> {
        let begun = tokio::time::Instant::now();
        loop {
            match self.client.wait_task(&self.container, &self.exec).await {
                // containerd restarts without the process noticing; so do we.
                Err(error) if error.is_unavailable() && begun.elapsed() < RESTART_PATIENCE => {
                    tokio::time::sleep(RESTART_PAUSE).await;
                }
                result => return Ok(result?),
            }
        }
    }

    /// Sends a signal to the process itself. One that has ended is fine.
    pub async fn signal(&self, signal: Signal) -> Result<(), ExecError> {
        let number = (signal as i32).unsigned_abs();
        match self.client.kill_task(&self.container, &self.exec, number, false).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Kills the process with everything it started, and waits for its end.
    pub async fn kill_tree(&self) {
        let pid = self.pid;
        if let Err(error) = tokio::task::spawn_blocking(move || tree::kill(pid)).await {
            tracing::warn!(%error, "cannot kill a process tree");
        }
        let ended = async {
            self.signal(Signal::SIGKILL).await?;
            self.wait().await
        };
        match tokio::time::timeout(KILL_DEADLINE, ended).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(error = error.chain(), "cannot kill an exec process"),
            Err(_elapsed) => {
                tracing::warn!(pid, container = self.container, "a killed exec process does not end");
            }
        }
    }

    /// Sets the terminal's size.
    pub async fn resize(&self, width: u16, height: u16) -> Result<(), ExecError> {
        Ok(self.client.resize_terminal(&self.container, &self.exec, width.into(), height.into()).await?)
    }

    /// Lets the process see the end of its input. `fifo` is our end of it.
    pub async fn close_stdin(&self, fifo: pipe::Sender) -> Result<(), ExecError> {
        self.fifos.end_input(fifo).await;
        match self.client.close_stdin(&self.container, &self.exec).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Forgets the ended process. The shim first gives its output a moment to drain, then closes it.
    pub async fn delete(&self) -> Result<(), ExecError> {
        Ok(self.client.delete_exec(&self.container, &self.exec).await?)
    }
}

/// Ends and forgets a process of a former run, of which only the directory is known.
pub async fn abandon(client: &Client, dir: &Path, container: &str, exec: &str) -> Result<(), ExecError> {
    match client.kill_task(container, exec, 9, false).await {
        Ok(()) => drop(tokio::time::timeout(KILL_DEADLINE, client.wait_task(container, exec)).await),
        Err(error) if error.is_unavailable() => return Err(error.into()),
        // Ended already, or its container did.
        Err(_) => {}
    }
    match client.delete_exec(container, exec).await {
        Err(error) if error.is_unavailable() => return Err(error.into()),
        Err(error) => {
            tracing::debug!(error = &error as &dyn std::error::Error, "containerd knows no such exec");
        }
        Ok(()) => {}
    }
    fifo::remove(&dir.join(container).join(exec));
    Ok(())
}

/// Tells whether a process's output still moves.
#[derive(Clone, Debug, Default)]
pub struct Moved(Arc<MovedState>);

#[derive(Debug, Default)]
struct MovedState {
    pieces: AtomicU64,
    waiting: AtomicU64,
}

impl Moved {
    /// A number that changes with every piece of output; `None` while a piece waits for the client to take it.
    pub fn get(&self) -> Option<u64> {
        let waiting = self.0.waiting.load(Ordering::Relaxed) > 0;
        (!waiting).then(|| self.0.pieces.load(Ordering::Relaxed))
    }

    /// Counts one piece.
    fn step(&self) {
        self.0.pieces.fetch_add(1, Ordering::Relaxed);
    }

    /// Runs what hands a piece to the client.
    pub async fn while_waiting<T>(&self, work: impl Future<Output = T>) -> T {
        self.0.waiting.fetch_add(1, Ordering::Relaxed);
        let result = work.await;
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        result
    }
}

/// Reads the next piece of a FIFO; `None` at its end.
pub async fn read_piece(pipe: &mut pipe::Receiver, moved: &Moved) -> Option<bytes::Bytes> {
    let mut buffer = BytesMut::with_capacity(READ);
    match pipe.read_buf(&mut buffer).await {
        Ok(1..) => {
            moved.step();
            Some(buffer.freeze())
        }
        Ok(0) => None,
        Err(error) => {
            tracing::debug!(%error, "a process's output broke");
            None
        }
    }
}

/// The container's own process with another command; and the pod, whose containers share a shim.
async fn process_spec(
    client: &Client,
    container: &str,
    command: &[String],
    terminal: bool,
) -> Result<(Vec<u8>, String), ExecError> {
    if command.is_empty() {
        return Err(ExecError::NoCommand);
    }
    let record = client.container(container).await?;
    let record = record.ok_or_else(|| ExecError::NotFound(container.to_owned()))?;
    let spec = record.spec.map(|spec| spec.value).unwrap_or_default();
    let failed = |source| ExecError::Spec { container: container.to_owned(), source };
    let pod = pod_of(&spec).map_err(failed)?.unwrap_or_else(|| container.to_owned());
    Ok((adapt(&spec, command, terminal).map_err(failed)?, pod))
}

fn pod_of(spec: &[u8]) -> Result<Option<String>, serde_json::Error> {
    #[derive(serde::Deserialize)]
    struct Spec {
        #[serde(default)]
        annotations: HashMap<String, String>,
    }
    Ok(serde_json::from_slice::<Spec>(spec)?.annotations.remove(SANDBOX_ID_ANNOTATION))
}

fn adapt(spec: &[u8], command: &[String], terminal: bool) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(serde::Deserialize)]
    struct Spec {
        process: serde_json::Map<String, Value>,
    }
    let mut process = serde_json::from_slice::<Spec>(spec)?.process;
    process.insert("args".to_owned(), command.into());
    process.insert("terminal".to_owned(), terminal.into());
    process.remove("consoleSize");
    // Adjusting needs a capability we may not have, and the exec inherits the container's value.
    process.remove("oomScoreAdj");
    if terminal && let Some(Value::Array(env)) = process.get_mut("env") {
        let has_term = env.iter().any(|one| one.as_str().is_some_and(|one| one.starts_with("TERM=")));
        if !has_term {
            env.push("TERM=xterm".into());
        }
    }
    serde_json::to_vec(&process)
}

/// runc's refusal to run a command, told apart from other failures of containerd.
fn refusal(exec: String, error: ContainerdError) -> ExecError {
    match &error {
        ContainerdError::Call { status, .. }
            if status.code() == Code::Unknown || status.message().contains("OCI runtime") =>
        {
            ExecError::Refused { exec, reason: status.message().to_owned() }
        }
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_inherits_all_but_the_command() {
        let spec =
            br#"{"process":{"args":["nginx"],"env":["A=1"],"cwd":"/x","user":{"uid":7},"oomScoreAdj":-5}}"#;
        let adapted = adapt(spec, &["sh".to_owned()], true).expect("adapted");
        let adapted: Value = serde_json::from_slice(&adapted).expect("JSON");
        let wanted = serde_json::json!({
            "args": ["sh"], "env": ["A=1", "TERM=xterm"], "cwd": "/x", "user": {"uid": 7}, "terminal": true,
        });
        assert_eq!(adapted, wanted);
        assert!(adapt(b"{}", &["sh".to_owned()], false).is_err());
    }
}

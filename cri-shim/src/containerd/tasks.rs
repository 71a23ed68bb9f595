//! Tasks: the processes of containers, run by the shim.

use std::path::Path;
use std::time::Duration;

use containerd_client::services::v1::{
    CheckpointTaskRequest, CloseIoRequest, CreateTaskRequest, DeleteProcessRequest, DeleteTaskRequest,
    ExecProcessRequest, GetRequest, KillRequest, ListPidsRequest, ListTasksRequest, ResizePtyRequest,
    StartRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_client::types::Mount;
use containerd_client::types::v1::Process;
use prost::Message;
use prost_types::{Any, Timestamp};

use super::error::gone;
use super::options::CheckpointOptions;
use super::{Client, ContainerdError, METADATA_DEADLINE, TASK_DEADLINE, call};

const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const CHECKPOINT_TYPE: &str = "containerd.runc.v1.CheckpointOptions";
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Paths of a process's FIFOs; empty means none.
#[derive(Clone, Debug, Default)]
pub struct Stdio {
    /// Where the shim reads standard input.
    pub stdin: String,
    /// Where the shim writes standard output.
    pub stdout: String,
    /// Where the shim writes standard error; empty with a terminal.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit status; 128 + n when signal n ended it.
    pub status: u32,
    /// When, in nanoseconds since the epoch.
    pub at: i64,
}

impl Exit {
    /// From containerd's fields; an absent time becomes `now`.
    pub fn new(status: u32, at: Option<Timestamp>) -> Self {
        let nanoseconds =
            at.filter(|at| at.seconds > 0).map(|at| at.seconds * 1_000_000_000 + i64::from(at.nanos));
        Self { status, at: nanoseconds.unwrap_or_else(crate::clock::now) }
    }
}

/// A shim that is just ending answers "ttrpc: closed" until containerd has noticed; then the task is not found. Tries,
/// and the pause between two.
const SHIM_RETRIES: (usize, Duration) = (20, Duration::from_millis(50));

impl Client {
    /// Creates the task of container `id`, not yet running; gives its process id.
    pub async fn create_task(
        &self,
        id: &str,
        rootfs: Vec<Mount>,
        stdio: Stdio,
    ) -> Result<u32, ContainerdError> {
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            ..CreateTaskRequest::default()
        };
        for _attempt in 0..SHIM_RETRIES.0 {
            let created =
                call("Tasks.Create", id, TASK_DEADLINE, self.tasks_client().create(request.clone())).await;
            match created {
                // Nothing was made: containerd has taken back what there was.
                Err(error) if error.is_shim_gone_at_start() || error.is_shim_closing() => {
                    tokio::time::sleep(SHIM_RETRIES.1).await;
                }
                outcome => return Ok(outcome?.pid),
            }
        }
        let answer = call("Tasks.Create", id, TASK_DEADLINE, self.tasks_client().create(request)).await?;
        Ok(answer.pid)
    }

    /// Runs the created task, or the exec process `exec` of it ("" for the task itself); gives its process id.
    pub async fn start_task(&self, id: &str, exec: &str) -> Result<u32, ContainerdError> {
        let request = StartRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        let answer = call("Tasks.Start", id, TASK_DEADLINE, self.tasks_client().start(request)).await?;
        Ok(answer.pid)
    }

    /// Sends `signal` to the task's first process, to the exec process `exec`, or with `all` to every process.
    pub async fn kill_task(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ContainerdError> {
        for _attempt in 0..SHIM_RETRIES.0 {
            match self.kill_task_once(id, exec, signal, all).await {
                Err(error) if error.is_shim_closing() => tokio::time::sleep(SHIM_RETRIES.1).await,
                outcome => return outcome,
            }
        }
        self.kill_task_once(id, exec, signal, all).await
    }

    async fn kill_task_once(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ContainerdError> {
        let request = KillRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), signal, all };
        call("Tasks.Kill", id, TASK_DEADLINE, self.tasks_client().kill(request)).await
    }

    /// Waits until the task, or its exec process `exec`, has ended. The only call without a deadline: the caller gives
    /// one, or none because it watches a container for life.
    pub async fn wait_task(&self, id: &str, exec: &str) -> Result<Exit, ContainerdError> {
        let request = WaitRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        match self.tasks_client().wait(request).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                Ok(Exit::new(answer.exit_status, answer.exited_at))
            }
            Err(status) => Err(ContainerdError::call("Tasks.Wait", id, status)),
        }
    }

    /// Deletes the ended task of `id`; gives its exit when it had one, nothing when there was no task.
    pub async fn delete_task(&self, id: &str) -> Result<Option<Exit>, ContainerdError> {
        for _attempt in 0..SHIM_RETRIES.0 {
            match self.delete_task_once(id).await {
                // Another call deletes it just now.
                Err(error) if error.is_shim_closing() => tokio::time::sleep(SHIM_RETRIES.1).await,
                outcome => return outcome,
            }
        }
        self.delete_task_once(id).await
    }

    async fn delete_task_once(&self, id: &str) -> Result<Option<Exit>, ContainerdError> {
        let request = DeleteTaskRequest { container_id: id.to_owned() };
        match call("Tasks.Delete", id, TASK_DEADLINE, self.tasks_client().delete(request)).await {
            Ok(answer) => Ok(Some(Exit::new(answer.exit_status, answer.exited_at))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The task of `id` as its shim sees it, when there is one.
    pub async fn task(&self, id: &str) -> Result<Option<Process>, ContainerdError> {
        let request = GetRequest { container_id: id.to_owned(), exec_id: String::new() };
        match call("Tasks.Get", id, METADATA_DEADLINE, self.tasks_client().get(request)).await {
            Ok(answer) => Ok(answer.process),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every task of the namespace.
    pub async fn tasks(&self) -> Result<Vec<Process>, ContainerdError> {
        let request = ListTasksRequest::default();
        // containerd asks one shim after the other, and gives each that hangs two seconds.
        Ok(call("Tasks.List", "", TASK_DEADLINE, self.tasks_client().list(request)).await?.tasks)
    }

    /// The processes of task `id`, as the node numbers them.
    pub async fn task_pids(&self, id: &str) -> Result<Vec<u32>, ContainerdError> {
        let request = ListPidsRequest { container_id: id.to_owned() };
        let answer =
            call("Tasks.ListPids", id, METADATA_DEADLINE, self.tasks_client().list_pids(request)).await?;
        Ok(answer.processes.into_iter().map(|process| process.pid).collect())
    }

    /// Changes the resource limits of a running task; `resources` is OCI `LinuxResources` as JSON.
    pub async fn update_task(&self, id: &str, resources: Vec<u8>) -> Result<(), ContainerdError> {
        let request = UpdateTaskRequest {
            container_id: id.to_owned(),
            resources: Some(Any { type_url: RESOURCES_TYPE.to_owned(), value: resources }),
            ..UpdateTaskRequest::default()
        };
        call("Tasks.Update", id, TASK_DEADLINE, self.tasks_client().update(request)).await
    }

    /// Has CRIU write images of the running task into the directory `images`, with its log in `work`. The task goes on.
    pub async fn checkpoint_task(
        &self,
        id: &str,
        images: &Path,
        work: &Path,
        deadline: Duration,
    ) -> Result<(), ContainerdError> {
        let options = CheckpointOptions {
            open_tcp: true,
            external_unix_sockets: true,
            file_locks: true,
            image_path: images.to_string_lossy().into_owned(),
            work_path: work.to_string_lossy().into_owned(),
        };
        let request = CheckpointTaskRequest {
            container_id: id.to_owned(),
            options: Some(Any { type_url: CHECKPOINT_TYPE.to_owned(), value: options.encode_to_vec() }),
            ..CheckpointTaskRequest::default()
        };
        // containerd hands the deadline on to the shim, which ends the program; by itself it would go on for ever.
        let mut request = tonic::Request::new(request);
        request.set_timeout(deadline);
        let begun = std::time::Instant::now();
        let patience = deadline + TASK_DEADLINE;
        match call("Tasks.Checkpoint", id, patience, self.tasks_client().checkpoint(request)).await {
            // Whoever noticed it first words it in its own way.
            Err(_) if begun.elapsed() >= deadline => {
                Err(ContainerdError::Deadline { call: "Tasks.Checkpoint", object: id.to_owned(), deadline })
            }
            other => other.map(drop),
        }
    }

    /// Adds the exec process `exec`, not yet running, to a running task; `process` is an OCI `Process` as JSON.
    pub async fn exec_task(
        &self,
        id: &str,
        exec: &str,
        process: Vec<u8>,
        stdio: Stdio,
    ) -> Result<(), ContainerdError> {
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            spec: Some(Any { type_url: PROCESS_TYPE.to_owned(), value: process }),
        };
        call("Tasks.Exec", id, TASK_DEADLINE, self.tasks_client().exec(request)).await
    }

    /// Deletes the ended exec process `exec`; one that is gone is fine.
    pub async fn delete_exec(&self, id: &str, exec: &str) -> Result<(), ContainerdError> {
        let request = DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        gone(
            call("Tasks.DeleteProcess", id, TASK_DEADLINE, self.tasks_client().delete_process(request)).await,
        )
    }

    /// Sets the size of the terminal of the task or of its exec process.
    pub async fn resize_terminal(
        &self,
        id: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), ContainerdError> {
        let request =
            ResizePtyRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), width, height };
        call("Tasks.ResizePty", id, METADATA_DEADLINE, self.tasks_client().resize_pty(request)).await
    }

    /// Closes standard input of the task or of its exec process.
    pub async fn close_stdin(&self, id: &str, exec: &str) -> Result<(), ContainerdError> {
        let request = CloseIoRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), stdin: true };
        call("Tasks.CloseIO", id, METADATA_DEADLINE, self.tasks_client().close_io(request)).await
    }

    /// Ends whatever task `id` has and deletes it, waiting at most `patience` for its processes.
    pub async fn force_delete_task(
        &self,
        id: &str,
        patience: Duration,
    ) -> Result<Option<Exit>, ContainerdError> {
        const SIGKILL: u32 = 9;
        match self.kill_task(id, "", SIGKILL, true).await {
            // Ended already, or never started: deleting tells.
            Ok(()) => {
                if let Ok(Err(error)) = tokio::time::timeout(patience, self.wait_task(id, "")).await
                    && !error.is_not_found()
                {
                    return Err(error);
                }
            }
            Err(error) if error.is_unavailable() => return Err(error),
            Err(_) => {}
        }
        // Also for a task that containerd does not know: deleting makes it clean up after a shim that died.
        self.delete_task(id).await
    }
}

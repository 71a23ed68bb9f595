//! The task service (`containerd.task.v2.Task`; version 3 has the same messages) and what `start`, `delete` and `-info` print.

use prost_types::{Any, Timestamp};

/// Names the service goes by.
pub const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// The life of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Status {
    /// Not known.
    Unknown = 0,
    /// Made, waits to be started.
    Created = 1,
    /// Runs.
    Running = 2,
    /// Ended.
    Stopped = 3,
    /// Frozen.
    Paused = 4,
    /// Being frozen.
    Pausing = 5,
}

/// A file system to be mounted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    /// Its type.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// What is mounted.
    #[prost(string, tag = "2")]
    pub source: String,
    /// Where below the root; containerd 1.6 has none.
    #[prost(string, tag = "3")]
    pub target: String,
    /// Its options.
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// Makes a task.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateTaskRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its bundle.
    #[prost(string, tag = "2")]
    pub bundle: String,
    /// What its root is made of.
    #[prost(message, repeated, tag = "3")]
    pub rootfs: Vec<Mount>,
    /// Whether it has a terminal.
    #[prost(bool, tag = "4")]
    pub terminal: bool,
    /// Standard input.
    #[prost(string, tag = "5")]
    pub stdin: String,
    /// Standard output.
    #[prost(string, tag = "6")]
    pub stdout: String,
    /// Standard error.
    #[prost(string, tag = "7")]
    pub stderr: String,
    /// What to restore it from.
    #[prost(string, tag = "8")]
    pub checkpoint: String,
    /// What that builds on.
    #[prost(string, tag = "9")]
    pub parent_checkpoint: String,
    /// Options of the runtime.
    #[prost(message, optional, tag = "10")]
    pub options: Option<Any>,
}

/// The task made.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct CreateTaskResponse {
    /// Its first process.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// Runs a process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StartRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The exec process; empty for the first one.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// The process that runs.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct StartResponse {
    /// The process.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// Forgets an ended process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeleteRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The exec process; empty for the whole task.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// How the process ended.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeleteResponse {
    /// The process.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// Its status.
    #[prost(uint32, tag = "2")]
    pub exit_status: u32,
    /// When.
    #[prost(message, optional, tag = "3")]
    pub exited_at: Option<Timestamp>,
}

/// Makes an exec process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExecProcessRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its id.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Whether it has a terminal.
    #[prost(bool, tag = "3")]
    pub terminal: bool,
    /// Standard input.
    #[prost(string, tag = "4")]
    pub stdin: String,
    /// Standard output.
    #[prost(string, tag = "5")]
    pub stdout: String,
    /// Standard error.
    #[prost(string, tag = "6")]
    pub stderr: String,
    /// OCI process as JSON.
    #[prost(message, optional, tag = "7")]
    pub spec: Option<Any>,
}

/// Sets a terminal's size.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResizePtyRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The exec process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Columns.
    #[prost(uint32, tag = "3")]
    pub width: u32,
    /// Lines.
    #[prost(uint32, tag = "4")]
    pub height: u32,
}

/// Asks for a process's state.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StateRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The exec process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// A process's state.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StateResponse {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its bundle.
    #[prost(string, tag = "2")]
    pub bundle: String,
    /// The process.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// Where it is in its life.
    #[prost(enumeration = "Status", tag = "4")]
    pub status: i32,
    /// Standard input.
    #[prost(string, tag = "5")]
    pub stdin: String,
    /// Standard output.
    #[prost(string, tag = "6")]
    pub stdout: String,
    /// Standard error.
    #[prost(string, tag = "7")]
    pub stderr: String,
    /// Whether it has a terminal.
    #[prost(bool, tag = "8")]
    pub terminal: bool,
    /// How it ended.
    #[prost(uint32, tag = "9")]
    pub exit_status: u32,
    /// When.
    #[prost(message, optional, tag = "10")]
    pub exited_at: Option<Timestamp>,
    /// The exec process.
    #[prost(string, tag = "11")]
    pub exec_id: String,
}

/// Sends a signal.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KillRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The exec process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Its number.
    #[prost(uint32, tag = "3")]
    pub signal: u32,
    /// To every process of the container.
    #[prost(bool, tag = "4")]
    pub all: bool,
}

/// Closes a process's streams.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CloseIoRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The exec process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Standard input.
    #[prost(bool, tag = "3")]
    pub stdin: bool,
}

/// Asks for a container's processes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PidsRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// A container's processes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PidsResponse {
    /// Each process.
    #[prost(message, repeated, tag = "1")]
    pub processes: Vec<ProcessInfo>,
}

/// A process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ProcessInfo {
    /// Its id.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// Which exec process it is.
    #[prost(message, optional, tag = "2")]
    pub info: Option<Any>,
}

/// What is known of a process.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ProcessDetails {
    /// Which exec process it is.
    #[prost(string, tag = "1")]
    pub exec_id: String,
}

/// Changes limits.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateTaskRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// OCI Linux resources as JSON.
    #[prost(message, optional, tag = "2")]
    pub resources: Option<Any>,
}

/// Waits for a process's end.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WaitRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The exec process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// How a process ended.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WaitResponse {
    /// Its status.
    #[prost(uint32, tag = "1")]
    pub exit_status: u32,
    /// When.
    #[prost(message, optional, tag = "2")]
    pub exited_at: Option<Timestamp>,
}

/// Asks for a container's figures.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatsRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// A container's figures.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatsResponse {
    /// See [`super::metrics`].
    #[prost(message, optional, tag = "1")]
    pub stats: Option<Any>,
}

/// Asks who is there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConnectRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Who is there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConnectResponse {
    /// This process.
    #[prost(uint32, tag = "1")]
    pub shim_pid: u32,
    /// The container's first process.
    #[prost(uint32, tag = "2")]
    pub task_pid: u32,
    /// Version of the shim.
    #[prost(string, tag = "3")]
    pub version: String,
}

/// Asks the shim to end.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ShutdownRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Also with containers left.
    #[prost(bool, tag = "2")]
    pub now: bool,
}

/// A request about a container: pause, resume, checkpoint.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IdRequest {
    /// The container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Nothing.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Empty {}

/// `containerd.runc.v1.Options`, which this runtime takes too.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuncOptions {
    /// Not supported.
    #[prost(bool, tag = "1")]
    pub no_pivot_root: bool,
    /// Keep the session keyring.
    #[prost(bool, tag = "2")]
    pub no_new_keyring: bool,
    /// Put the shim into this cgroup.
    #[prost(string, tag = "3")]
    pub shim_cgroup: String,
    /// No meaning here.
    #[prost(string, tag = "6")]
    pub binary_name: String,
    /// No meaning here.
    #[prost(string, tag = "7")]
    pub root: String,
    /// Cgroup paths are systemd's.
    #[prost(bool, tag = "9")]
    pub systemd_cgroup: bool,
}

/// Version of a runtime.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuntimeVersion {
    /// Its version.
    #[prost(string, tag = "1")]
    pub version: String,
    /// Its commit.
    #[prost(string, tag = "2")]
    pub revision: String,
}

/// What `-info` prints, for containerd 2.x.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuntimeInfo {
    /// Name of the runtime.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its version.
    #[prost(message, optional, tag = "2")]
    pub version: Option<RuntimeVersion>,
    /// Its options.
    #[prost(message, optional, tag = "3")]
    pub options: Option<Any>,
    /// OCI features as JSON.
    #[prost(message, optional, tag = "4")]
    pub features: Option<Any>,
}

//! Events of tasks (`containerd.events`) and the service they are sent to (`containerd.services.events.ttrpc.v1`).

use prost_types::{Any, Timestamp};

use super::task::Mount;

/// What [`FORWARD`] takes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ForwardRequest {
    /// The event.
    #[prost(message, optional, tag = "1")]
    pub envelope: Option<Envelope>,
}

/// An event with its topic.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Envelope {
    /// When it happened.
    #[prost(message, optional, tag = "1")]
    pub timestamp: Option<Timestamp>,
    /// containerd's namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Such as `/tasks/exit`.
    #[prost(string, tag = "3")]
    pub topic: String,
    /// The event itself.
    #[prost(message, optional, tag = "4")]
    pub event: Option<Any>,
}

/// The service and method that containerd takes events at.
pub const FORWARD: (&str, &str) = ("containerd.services.events.ttrpc.v1.Events", "Forward");

/// An event: its topic and its type's full name.
pub trait Event: prost::Message {
    /// Where subscribers look for it.
    const TOPIC: &'static str;
    /// Name of the message.
    const TYPE: &'static str;
}

macro_rules! event {
    ($name:ident, $topic:literal) => {
        impl Event for $name {
            const TOPIC: &'static str = concat!("/tasks/", $topic);
            const TYPE: &'static str = concat!("containerd.events.", stringify!($name));
        }
    };
}

/// A task was made.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskCreate {
    /// Its container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Its bundle.
    #[prost(string, tag = "2")]
    pub bundle: String,
    /// What its root is made of.
    #[prost(message, repeated, tag = "3")]
    pub rootfs: Vec<Mount>,
    /// Its streams.
    #[prost(message, optional, tag = "4")]
    pub io: Option<TaskIo>,
    /// What it was restored from.
    #[prost(string, tag = "5")]
    pub checkpoint: String,
    /// Its first process.
    #[prost(uint32, tag = "6")]
    pub pid: u32,
}
event!(TaskCreate, "create");

/// Paths of a task's streams.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskIo {
    /// Standard input.
    #[prost(string, tag = "1")]
    pub stdin: String,
    /// Standard output.
    #[prost(string, tag = "2")]
    pub stdout: String,
    /// Standard error.
    #[prost(string, tag = "3")]
    pub stderr: String,
    /// Whether it has a terminal.
    #[prost(bool, tag = "4")]
    pub terminal: bool,
}

/// A task's first process runs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskStart {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The process.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
}
event!(TaskStart, "start");

/// A task or exec process was deleted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskDelete {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The process.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// How it ended.
    #[prost(uint32, tag = "3")]
    pub exit_status: u32,
    /// When.
    #[prost(message, optional, tag = "4")]
    pub exited_at: Option<Timestamp>,
    /// The container, or the exec process.
    #[prost(string, tag = "5")]
    pub id: String,
}
event!(TaskDelete, "delete");

/// A process ended.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskExit {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The container, or the exec process.
    #[prost(string, tag = "2")]
    pub id: String,
    /// The process.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// How it ended.
    #[prost(uint32, tag = "4")]
    pub exit_status: u32,
    /// When.
    #[prost(message, optional, tag = "5")]
    pub exited_at: Option<Timestamp>,
}
event!(TaskExit, "exit");

/// The kernel killed a process for want of memory.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskOom {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
}

impl Event for TaskOom {
    const TOPIC: &'static str = "/tasks/oom";
    const TYPE: &'static str = "containerd.events.TaskOOM";
}

/// An exec process was made.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskExecAdded {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The exec process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}
event!(TaskExecAdded, "exec-added");

/// An exec process runs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskExecStarted {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The exec process.
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// The process.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
}
event!(TaskExecStarted, "exec-started");

/// A task was paused.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskPaused {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
}
event!(TaskPaused, "paused");

/// A task goes on.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskResumed {
    /// The container.
    #[prost(string, tag = "1")]
    pub container_id: String,
}
event!(TaskResumed, "resumed");

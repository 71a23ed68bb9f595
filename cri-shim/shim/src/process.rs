//! One process of a container, its first or an exec: what is known of it, and who waits for its end.

use std::os::fd::OwnedFd;
use std::time::SystemTime;

use prost::Message;

use crate::proto;
use crate::proto::task::{Status, WaitResponse};
use crate::pump::Pump;
use crate::stdio::{Held, Names};
use crate::ttrpc::Responder;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit status; 128 + n when signal n ended it.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Known; the first process exists already and waits, an exec process does not exist yet. Next: started or deleted.
    #[default]
    Created,
    /// Being started in a thread; an end seen meanwhile is told after the start.
    Starting,
    /// Runs. Next: ends.
    Running,
    /// Ended and reaped; its last output is awaited. Next: told.
    Ended(Exit),
    /// Its end was told. Next: deleted.
    Told(Exit),
}

/// A process.
#[derive(Debug, Default)]
pub struct Process {
    /// Its streams.
    pub names: Names,
    /// Where it is in its life.
    pub phase: Phase,
    /// An end that was seen while it was being started.
    pub early: Option<Exit>,
    /// Its id in the shim's PID namespace; 0 before it exists.
    pub pid: u32,
    /// Names it for ever.
    pub pidfd: Option<OwnedFd>,
    /// Its terminal.
    pub console: Option<OwnedFd>,
    /// What the shim holds of its streams.
    pub held: Held,
    /// What moves its output, where something has to.
    pub pump: Option<Pump>,
    /// Whether all its output has arrived.
    pub drained: bool,
    /// Calls that wait for its end.
    pub waiting: Vec<Responder>,
    /// What to run: an exec process before it is started.
    pub spec: Option<Box<oci_spec::runtime::Process>>,
}

impl Process {
    /// Its end, once it was told.
    pub fn exit(&self) -> Option<Exit> {
        match self.phase {
            Phase::Told(exit) => Some(exit),
            _ => None,
        }
    }

    /// Whether it exists and has not ended.
    pub fn is_alive(&self) -> bool {
        self.pid != 0 && matches!(self.phase, Phase::Created | Phase::Starting | Phase::Running)
    }

    /// The state containerd shows.
    pub fn status(&self, paused: bool) -> Status {
        match self.phase {
            Phase::Created | Phase::Starting => Status::Created,
            Phase::Running if paused => Status::Paused,
            Phase::Running | Phase::Ended(_) => Status::Running,
            Phase::Told(_) => Status::Stopped,
        }
    }
}

impl Exit {
    /// The answer to a call that waited for it.
    pub fn to_answer(self) -> Vec<u8> {
        WaitResponse { exit_status: self.status, exited_at: Some(proto::timestamp(self.at)) }.encode_to_vec()
    }
}

//! What is known of one sandbox or container, in the form it is kept on disk, and how it may change.
//!
//! A record is written before the first side effect of what it describes, with everything needed to undo all of them;
//! so whatever exists after a crash is explained by a record or may be removed. The form is protobuf: fields may be added,
//! numbers are never used again.

use cri_shim_api::v1::{
    ContainerConfig, ContainerState, ContainerUser, LinuxContainerResources, PodSandboxConfig,
    PodSandboxState,
};

/// A pod sandbox.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SandboxRecord {
    /// Its id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its unique name, see [`crate::names::sandbox`].
    #[prost(string, tag = "2")]
    pub name: String,
    /// What was asked for.
    #[prost(message, required, tag = "3")]
    pub config: PodSandboxConfig,
    /// The runtime handler that was asked for.
    #[prost(string, tag = "4")]
    pub runtime_handler: String,
    /// Nanoseconds since the epoch.
    #[prost(int64, tag = "5")]
    pub created_at: i64,
    /// File that pins the network namespace; empty on the host's network.
    #[prost(string, tag = "6")]
    pub netns: String,
    /// Where it is in its life.
    #[prost(enumeration = "SandboxPhase", tag = "7")]
    pub phase: i32,
    /// Addresses that CNI gave, the primary one first.
    #[prost(string, repeated, tag = "8")]
    pub addresses: Vec<String>,
    /// Process id of the pause process.
    #[prost(uint32, tag = "9")]
    pub pid: u32,
    /// The CNI network it was attached to.
    #[prost(string, tag = "10")]
    pub network: String,
    /// The handler that runs its containers, also where none was asked for; empty in records of the first version.
    #[prost(string, tag = "11")]
    pub handler: String,
    /// When the pause process began, in the kernel's ticks: with `pid` it names one process for ever.
    #[prost(uint64, tag = "12")]
    pub pause_began: u64,
}

/// The life of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SandboxPhase {
    /// Being made; after a restart everything of it is undone.
    Creating = 0,
    /// The pause process runs and the network is attached.
    Ready = 1,
    /// Its process ended or it was asked to stop; the network may still be attached.
    Stopping = 2,
    /// Nothing runs and the network is detached; waits to be removed.
    Stopped = 3,
    /// Being removed; after a restart removal goes on.
    Removing = 4,
}

impl SandboxRecord {
    /// Moves on in life. Phases only go forward, so a late writer cannot bring a stopped sandbox back.
    pub fn advance(&mut self, phase: SandboxPhase) {
        if phase > self.phase() {
            self.set_phase(phase);
        }
    }

    /// The state CRI shows.
    pub fn state(&self) -> PodSandboxState {
        match self.phase() {
            SandboxPhase::Ready => PodSandboxState::SandboxReady,
            _ => PodSandboxState::SandboxNotready,
        }
    }

    /// Whether its pause process may be a container of containerd's, as the first version made it.
    pub fn pause_in_containerd(&self) -> bool {
        self.pause_began == 0
    }

    /// Whether the pod uses the host's network.
    pub fn host_network(&self) -> bool {
        self.netns.is_empty()
    }

    /// The cgroup all of the pod's containers are below, as the kubelet gave it.
    pub fn cgroup_parent(&self) -> &str {
        self.config.linux.as_ref().map_or("", |linux| linux.cgroup_parent.as_str())
    }
}

/// A sandbox that is no more, but could not be detached from the pod network: what it held there is still to be given back.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DetachmentRecord {
    /// The sandbox, as it was.
    #[prost(message, required, tag = "1")]
    pub sandbox: SandboxRecord,
}

/// A container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerRecord {
    /// Its id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its unique name, see [`crate::names::container`].
    #[prost(string, tag = "2")]
    pub name: String,
    /// Its sandbox.
    #[prost(string, tag = "3")]
    pub sandbox_id: String,
    /// What was asked for.
    #[prost(message, required, tag = "4")]
    pub config: ContainerConfig,
    /// The image's id (digest of its configuration).
    #[prost(string, tag = "5")]
    pub image_id: String,
    /// The image by a digested reference.
    #[prost(string, tag = "6")]
    pub image_ref: String,
    /// The log file; empty when output is dropped.
    #[prost(string, tag = "7")]
    pub log_path: String,
    /// Nanoseconds since the epoch.
    #[prost(int64, tag = "8")]
    pub created_at: i64,
    /// Nanoseconds since the epoch; 0 before it started.
    #[prost(int64, tag = "9")]
    pub started_at: i64,
    /// Nanoseconds since the epoch; 0 before it ended.
    #[prost(int64, tag = "10")]
    pub finished_at: i64,
    /// Exit code once it ended.
    #[prost(int32, tag = "11")]
    pub exit_code: i32,
    /// Why it ended, see [`crate::exit`].
    #[prost(string, tag = "12")]
    pub reason: String,
    /// The reason in words.
    #[prost(string, tag = "13")]
    pub message: String,
    /// Where it is in its life.
    #[prost(enumeration = "ContainerPhase", tag = "14")]
    pub phase: i32,
    /// The identity its first process starts with.
    #[prost(message, optional, tag = "15")]
    pub user: Option<ContainerUser>,
    /// Number of the signal that asks it to stop.
    #[prost(uint32, tag = "16")]
    pub stop_signal: u32,
    /// Process id of its first process while it runs.
    #[prost(uint32, tag = "17")]
    pub pid: u32,
    /// The limits in force.
    #[prost(message, optional, tag = "18")]
    pub resources: Option<LinuxContainerResources>,
    /// Its cgroup below each controller's mount.
    #[prost(string, tag = "19")]
    pub cgroup: String,
    /// What containerd may not have yet of a created container.
    #[prost(message, optional, tag = "20")]
    pub registration: Option<Registration>,
}

/// What containerd must be told before a created container can start. Telling it twice is fine.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Registration {
    /// The OCI specification as JSON.
    #[prost(bytes = "vec", tag = "1")]
    pub spec: Vec<u8>,
    /// The snapshot that its writable one is made on.
    #[prost(string, tag = "2")]
    pub chain_id: String,
}

/// The life of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ContainerPhase {
    /// Being made; after a restart everything of it is undone.
    Creating = 0,
    /// Made, not started.
    Created = 1,
    /// Its first process runs, or is about to.
    Running = 2,
    /// Its first process has ended, or never came to run.
    Exited = 3,
    /// Being removed; after a restart removal goes on.
    Removing = 4,
}

/// How a container came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Nanoseconds since the epoch.
    pub at: i64,
    /// Exit code.
    pub code: i32,
    /// One word, see [`crate::exit`].
    pub reason: String,
    /// The reason in words.
    pub message: String,
}

impl ContainerRecord {
    /// Notes that its first process runs. Nothing happens when it has ended meanwhile.
    pub fn started(&mut self, pid: u32, at: i64) {
        if self.phase() <= ContainerPhase::Running {
            self.set_phase(ContainerPhase::Running);
            self.pid = pid;
            self.started_at = at;
        }
    }

    /// Notes its end; says whether that was news. The first report wins, so that a repeated one cannot change the past.
    pub fn ended(&mut self, ending: Ending) -> bool {
        if self.phase() >= ContainerPhase::Exited {
            return false;
        }
        self.set_phase(ContainerPhase::Exited);
        self.pid = 0;
        // A process that ended before it could be seen running has no lifetime, never a negative one.
        self.finished_at = ending.at.max(self.started_at).max(1);
        self.exit_code = ending.code;
        self.reason = ending.reason;
        self.message = ending.message;
        true
    }

    /// Notes that removal has begun.
    pub fn removing(&mut self) {
        self.set_phase(ContainerPhase::Removing);
    }

    /// The state CRI shows.
    pub fn state(&self) -> ContainerState {
        match self.phase() {
            ContainerPhase::Creating | ContainerPhase::Created => ContainerState::ContainerCreated,
            ContainerPhase::Running => ContainerState::ContainerRunning,
            ContainerPhase::Exited | ContainerPhase::Removing => ContainerState::ContainerExited,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    fn ending(code: i32) -> Ending {
        Ending { at: 50, code, reason: "Error".into(), message: String::new() }
    }

    #[test]
    fn the_first_exit_wins_and_time_does_not_run_backwards() {
        let mut record = ContainerRecord::default();
        record.started(7, 100);
        assert_eq!(record.state(), ContainerState::ContainerRunning);
        assert!(record.ended(ending(3)));
        assert!(!record.ended(ending(9)));
        assert_eq!((record.exit_code, record.finished_at, record.pid), (3, 100, 0));
    }

    #[test]
    fn a_late_start_does_not_revive_a_container_that_ended() {
        let mut record = ContainerRecord::default();
        assert!(record.ended(ending(1)));
        record.started(7, 100);
        assert_eq!(record.state(), ContainerState::ContainerExited);
    }

    #[test]
    fn sandbox_phases_only_go_forward() {
        let mut record = SandboxRecord::default();
        record.advance(SandboxPhase::Stopped);
        record.advance(SandboxPhase::Ready);
        assert_eq!(record.phase(), SandboxPhase::Stopped);
        assert_eq!(record.state(), PodSandboxState::SandboxNotready);
    }

    #[test]
    fn a_record_survives_the_disk() {
        let record =
            SandboxRecord { id: "a".into(), addresses: vec!["10.0.0.2".into()], ..Default::default() };
        let bytes = record.encode_to_vec();
        assert_eq!(SandboxRecord::decode(bytes.as_slice()).unwrap(), record);
        assert!(SandboxRecord::decode(&bytes[..1]).is_err(), "half a file is noticed");
    }
}

//! Eviction: when the node runs short of something, what it says and which pod has to go. Pure.
//!
//! Input: thresholds of the configuration, what is left of each resource, the pods' use of it. Output: conditions of
//! the node, thresholds to act on, pods in the order in which they go, and the words they are told.
//!
//! Reading order: [`Signal`] → [`thresholds`] → [`State::decide`] → [`rank`].

mod decide;
mod limits;
mod rank;
mod thresholds;

pub use decide::{Decision, State};
pub use limits::{has_disk_limits, limited_volumes, over_limit};
pub use rank::{ContainerUse, PodUse, admit, is_critical, message, rank};
pub use thresholds::{Amount, Threshold, ThresholdSettings, for_container_fs, parse_thresholds};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    /// `memory.available`: what pods can still get.
    MemoryAvailable,
    /// `allocatableMemory.available`: what pods can still get of what pods may use together.
    AllocatableMemoryAvailable,
    /// `nodefs.available`: bytes of the kubelet's file system.
    NodeFsAvailable,
    /// `nodefs.inodesFree`.
    NodeFsInodesFree,
    /// `imagefs.available`: bytes of the images' file system.
    ImageFsAvailable,
    /// `imagefs.inodesFree`.
    ImageFsInodesFree,
    /// `containerfs.available`: bytes of the file system of the containers' writable layers, where it is one of its own.
    ContainerFsAvailable,
    /// `containerfs.inodesFree`.
    ContainerFsInodesFree,
    /// `pid.available`.
    PidAvailable,
}

/// A condition of the node that a signal causes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// `MemoryPressure`.
    Memory,
    /// `DiskPressure`.
    Disk,
    /// `PIDPressure`.
    Pid,
}

/// What is left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Observation {
    /// Left.
    pub available: u64,
    /// Of so much.
    pub capacity: u64,
}

impl Signal {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::MemoryAvailable,
        Self::AllocatableMemoryAvailable,
        Self::NodeFsAvailable,
        Self::NodeFsInodesFree,
        Self::ImageFsAvailable,
        Self::ImageFsInodesFree,
        Self::ContainerFsAvailable,
        Self::ContainerFsInodesFree,
        Self::PidAvailable,
    ];

    /// As the configuration spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MemoryAvailable => "memory.available",
            Self::AllocatableMemoryAvailable => "allocatableMemory.available",
            Self::NodeFsAvailable => "nodefs.available",
            Self::NodeFsInodesFree => "nodefs.inodesFree",
            Self::ImageFsAvailable => "imagefs.available",
            Self::ImageFsInodesFree => "imagefs.inodesFree",
            Self::ContainerFsAvailable => "containerfs.available",
            Self::ContainerFsInodesFree => "containerfs.inodesFree",
            Self::PidAvailable => "pid.available",
        }
    }

    /// The condition it causes.
    pub fn pressure(self) -> Pressure {
        match self {
            Self::MemoryAvailable | Self::AllocatableMemoryAvailable => Pressure::Memory,
            Self::PidAvailable => Pressure::Pid,
            _ => Pressure::Disk,
        }
    }

    /// The resource that pods give back, as messages name it.
    pub fn resource(self) -> &'static str {
        match self {
            Self::MemoryAvailable | Self::AllocatableMemoryAvailable => "memory",
            Self::NodeFsAvailable | Self::ImageFsAvailable | Self::ContainerFsAvailable => {
                "ephemeral-storage"
            }
            Self::NodeFsInodesFree | Self::ImageFsInodesFree | Self::ContainerFsInodesFree => "inodes",
            Self::PidAvailable => "pids",
        }
    }

    /// Whether it counts bytes.
    pub fn is_in_bytes(self) -> bool {
        !matches!(
            self,
            Self::NodeFsInodesFree
                | Self::ImageFsInodesFree
                | Self::ContainerFsInodesFree
                | Self::PidAvailable
        )
    }
}

impl Pressure {
    /// As the API spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "MemoryPressure",
            Self::Disk => "DiskPressure",
            Self::Pid => "PIDPressure",
        }
    }
}

#[cfg(test)]
mod tests;

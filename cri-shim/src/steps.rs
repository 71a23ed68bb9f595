//! The steps of the operations: each one is a point between two side effects at which `kill -9` may come.
//!
//! A test names one in [`ABORT_AT`] and the process ends there, as a crash would end it; so every step that is added to the
//! list is tested without another line. `name:2` means the second time. Without the variable a step costs one load.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The environment variable that names the step to end at. For tests only.
pub const ABORT_AT: &str = "KEELSON_CRI_ABORT_AT";

/// The environment variable that names the step at which to halt until SIGCONT comes, so that something else can die in
/// the meantime. For tests only.
pub const HALT_AT: &str = "KEELSON_CRI_HALT_AT";

/// The environment variable that names the step at which to hold one operation while all others go on, and behind `=` a
/// FIFO: it goes on when somebody has opened and closed that for writing. For tests only.
pub const HOLD_AT: &str = "KEELSON_CRI_HOLD_AT";

macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident = $name:literal,)*) => {
        /// A point between two side effects.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step { $($(#[$doc])* $step,)* }

        impl Step {
            /// Every step, in the order in which the life of a pod reaches them.
            pub const ALL: &[Self] = &[$(Self::$step,)*];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$step => $name,)* }
            }
        }
    };
}

steps! {
    /// The intent to make a sandbox is on disk, nothing else.
    SandboxIntent = "sandbox-intent",
    /// Its files and shared memory are made.
    SandboxFiles = "sandbox-files",
    /// Its network namespace is pinned.
    SandboxNetns = "sandbox-netns",
    /// Its pause process runs, and nobody has written down its id.
    SandboxPause = "sandbox-pause",
    /// CNI has attached it.
    SandboxAttached = "sandbox-attached",
    /// It is written down as ready; the caller does not know.
    SandboxReady = "sandbox-ready",
    /// The intent to make a container is there, nothing else: on disk where something is made before it is created.
    ContainerIntent = "container-intent",
    /// The volumes that its image declares are filled.
    ContainerVolumes = "container-volumes",
    /// Images that it has as volumes are mounted.
    ContainerImages = "container-images",
    /// Its writable snapshot exists.
    ContainerSnapshot = "container-snapshot",
    /// containerd has its record.
    ContainerRecord = "container-record",
    /// It is written down as created; the caller does not know.
    ContainerCreated = "container-created",
    /// Its pipes exist.
    ContainerPipes = "container-pipes",
    /// Its task exists, and nobody has written down its process id.
    ContainerTask = "container-task",
    /// It is written down as running, and does not run.
    ContainerRunning = "container-running",
    /// It runs; the caller does not know.
    ContainerStarted = "container-started",
    /// New limits are in force, and not written down.
    ContainerLimited = "container-limited",
    /// It has been told to stop.
    ContainerSignalled = "container-signalled",
    /// Its end is written down; its task still exists.
    ContainerEnded = "container-ended",
    /// Its task is deleted.
    ContainerTaskDeleted = "container-task-deleted",
    /// Its removal is written down.
    ContainerRemoving = "container-removing",
    /// containerd has forgotten it.
    ContainerRecordDeleted = "container-record-deleted",
    /// Its snapshot is removed.
    ContainerSnapshotRemoved = "container-snapshot-removed",
    /// Its own record is removed; the caller does not know.
    ContainerForgotten = "container-forgotten",
    /// The intent to stop a sandbox is on disk.
    SandboxStopping = "sandbox-stopping",
    /// Its containers have ended.
    SandboxContainersEnded = "sandbox-containers-ended",
    /// Its pause process is gone.
    SandboxPauseEnded = "sandbox-pause-ended",
    /// CNI has detached it.
    SandboxDetached = "sandbox-detached",
    /// Its network namespace is no longer pinned.
    SandboxNetnsRemoved = "sandbox-netns-removed",
    /// It is written down as stopped; the caller does not know.
    SandboxStopped = "sandbox-stopped",
    /// Its removal is written down.
    SandboxRemoving = "sandbox-removing",
    /// Its files are removed.
    SandboxFilesRemoved = "sandbox-files-removed",
    /// Its own record is removed; the caller does not know.
    SandboxForgotten = "sandbox-forgotten",
}

/// A step that the environment names, and how often it was reached.
struct Point {
    name: String,
    times: usize,
    reached: AtomicUsize,
    fifo: PathBuf,
}

impl Point {
    fn of(variable: &str) -> Option<Self> {
        let wanted = std::env::var(variable).ok()?;
        let (step, fifo) = wanted.split_once('=').unwrap_or((&wanted, ""));
        let (name, times) = step.split_once(':').unwrap_or((step, "1"));
        let (name, times) = (name.to_owned(), times.parse().ok()?);
        Some(Self { name, times, reached: AtomicUsize::new(0), fifo: fifo.into() })
    }

    fn is(&self, step: Step) -> bool {
        self.name == step.name() && self.reached.fetch_add(1, Ordering::AcqRel) + 1 == self.times
    }
}

/// Says that a step is reached.
pub fn reached(step: Step) {
    static POINTS: OnceLock<[Option<Point>; 3]> = OnceLock::new();
    let [abort, halt, hold] = POINTS.get_or_init(|| [ABORT_AT, HALT_AT, HOLD_AT].map(Point::of));
    if abort.as_ref().is_some_and(|point| point.is(step)) {
        tracing::error!(step = step.name(), "ending here, as the environment asks");
        std::process::abort();
    }
    if halt.as_ref().is_some_and(|point| point.is(step)) {
        tracing::error!(step = step.name(), "halting here, as the environment asks");
        if let Err(error) = nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP) {
            tracing::error!(%error, "and cannot");
        }
    }
    if let Some(point) = hold.as_ref().filter(|point| point.is(step)) {
        tracing::error!(step = step.name(), "holding here, as the environment asks");
        // Opening waits for who writes, reading for its end.
        if let Err(error) = tokio::task::block_in_place(|| std::fs::read(&point.fifo)) {
            tracing::error!(%error, "and cannot");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let names: std::collections::BTreeSet<_> = Step::ALL.iter().map(|step| step.name()).collect();
        assert_eq!(names.len(), Step::ALL.len());
    }
}

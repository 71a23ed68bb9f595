//! Running commands in containers and reaching into sandboxes: ExecSync, and the [`Runtime`](cri_shim_streaming::runtime::Runtime)
//! behind the streaming server (exec, attach, port-forward).
//!
//! Input: container and sandbox ids that the caller has found to exist and run. Output: exit codes and bytes.
//! In reading order: [`direct`] (our own shim), [`sync`] (ExecSync through containerd), [`streaming`] (the interactive three), [`process`] (one exec process over
//! FIFOs), [`fifo`] (where its streams meet the shim), [`tree`] (ending a process with all it started),
//! [`port`] (sockets in another network namespace).
//!
//! Crash-only: each exec process has a directory that names it before it exists; [`Executor::recover`] ends what the
//! last run left.

pub mod direct;
pub mod error;
pub mod fifo;
pub mod port;
pub mod process;
pub mod streaming;
pub mod sync;
pub mod tree;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::containerd::Client;
use crate::keyed::KeyedLocks;

pub use self::direct::OwnShim;
pub use self::error::ExecError;
pub use self::streaming::{ContainerIo, Containers, Streamer};

/// Runs commands in containers. Cloning is cheap.
#[derive(Clone)]
pub struct Executor {
    client: Client,
    dir: PathBuf,
    names: Arc<Names>,
    /// Pods in which a command is being started.
    starting: Arc<KeyedLocks>,
}

/// Ids of exec processes: those of this run of the program begin alike.
struct Names {
    run: String,
    next: AtomicU64,
}

impl Executor {
    /// An executor that keeps its FIFOs below `state_dir`.
    pub fn new(client: Client, state_dir: &Path) -> Self {
        let random = getrandom::u64().unwrap_or_else(|_none| crate::clock::now().unsigned_abs());
        let names = Names { run: format!("{random:016x}-"), next: AtomicU64::new(0) };
        Self { client, dir: state_dir.join("exec"), names: Arc::new(names), starting: Arc::default() }
    }

    fn next_id(&self) -> String {
        format!("{}{}", self.names.run, self.names.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Ends the exec processes that a former run of this program left behind: nobody reads their streams any more.
    /// Those of this run are left alone, so it may come late.
    pub async fn recover(&self) {
        let dir = self.dir.clone();
        let left = tokio::task::spawn_blocking(move || fifo::left_behind(&dir)).await;
        let left = match left {
            Ok(Ok(left)) => left,
            Ok(Err(error)) => {
                return tracing::warn!(error = %error, dir = %self.dir.display(), "cannot look for old execs");
            }
            Err(error) => return tracing::warn!(%error, "cannot look for old execs"),
        };
        for (container, exec) in left.into_iter().filter(|(_, exec)| !exec.starts_with(&self.names.run)) {
            match process::abandon(&self.client, &self.dir, &container, &exec).await {
                Ok(()) => tracing::info!(container, exec, "ended an exec process of the last run"),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, container, exec, "an exec process of the last run stays");
                }
            }
        }
    }
}

//! Effects on the host: AppArmor, questions that may never be answered, FIFOs, mounts, files of sandboxes, devices, cgroups, processes, a container's root file system.
//!
//! Plain functions that block; asynchronous callers use [`blocking`]. Nothing here decides anything or talks to containerd.
//! `bare/` holds no modules: `build.rs` makes executables of its files.

pub mod apparmor;
pub mod asked;
pub mod cgroup;
pub mod copy;
pub mod criu;
pub mod devices;
pub mod fifo;
pub mod figures;
pub mod files;
pub mod handles;
pub mod idmap;
pub mod keeper;
pub mod memory;
pub mod mounts;
pub mod pause;
pub mod process;
pub mod rootfs;
pub mod shims;
pub mod snapshot;

use crate::error::RuntimeError;

/// Runs blocking work on a thread of its own.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RuntimeError> + Send + 'static,
) -> Result<T, RuntimeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(RuntimeError::Interrupted("work on the host's files")),
    }
}

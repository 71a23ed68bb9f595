//! `probe`: makes the container of a bundle and lets its program begin, to find out whether the runtime works on this node.
//!
//! Input: a bundle (`-bundle`) with a specification and a root file system, an id (`-id`) for its cgroups. Output: nothing,
//! or the reason why it does not work. Nothing is left of the container. `keelson-cri` does so once at its start.

use std::time::Duration;

use cri_shim_runtime::cgroup::CgroupDriver;
use cri_shim_runtime::{Create, Created, Stdio, wait};

use crate::bundle::Bundle;
use crate::options::Options;
use crate::shim::SIGKILL;

/// How long the killed process and its cgroups may take to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes, starts, ends and removes the container.
pub fn run(options: &Options) -> Result<(), String> {
    let bundle = options.bundle.clone().map_or_else(|| Bundle::at("."), Bundle::at);
    let spec = bundle.spec().map_err(|error| error.to_string())?;
    let create = Create {
        id: &options.id,
        spec: &spec,
        bundle: &bundle.path,
        rootfs: &bundle.rootfs(),
        stdio: Stdio::null(),
        cgroups: CgroupDriver::Cgroupfs,
        seccomp_cache: None,
    };
    let Created { container, pending, pidfd, .. } = create.create().map_err(|error| error.chain())?;
    let started = pending.start();
    // It has ended already when its program could not begin.
    container.kill(SIGKILL).ok();
    let ended = wait::reap(&pidfd, true);
    let deleted = container.delete(PATIENCE);
    started.map_err(|error| error.chain())?;
    ended.map_err(|error| error.chain())?;
    deleted.map_err(|error| error.chain())
}

//! The pause process: made directly by the runtime inside this process, whatever handler runs the pod's containers, which
//! only need its namespaces. No containerd, no shim, no executable but the pause program itself.
//!
//! A process that dies with us before it is written down is found by its cgroup, whose path follows from the sandbox's id.
//! Afterwards it is known by its id and the time it began, and held by a pidfd: watched, killed and never confused.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use cri_shim_core::cgroup::Driver;
use cri_shim_core::oci::sandbox::{SandboxSpec, spec};
use cri_shim_core::record::SandboxRecord;
use cri_shim_runtime::cgroup::CgroupDriver;
use cri_shim_runtime::{Create, Stdio};
use oci_spec::runtime::Spec;
use tokio::io::unix::AsyncFd;

use crate::error::RuntimeError;
use crate::host::{blocking, process};
use crate::runtime::Runtime;
use crate::state::Sandbox;
use crate::steps::{Step, reached};
use crate::telemetry::stage;

/// How long a killed pause process may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// A pause process that is held.
#[derive(Debug)]
pub struct Pause {
    descriptor: AsyncFd<OwnedFd>,
}

/// A pause process that was made just now.
#[derive(Debug)]
pub(crate) struct Started {
    /// Its id.
    pub(crate) pid: u32,
    /// When it began.
    pub(crate) began: u64,
    descriptor: Option<OwnedFd>,
}

impl Pause {
    /// Holds the process behind a descriptor.
    fn new(descriptor: OwnedFd) -> std::io::Result<Self> {
        Ok(Self { descriptor: process::watched(descriptor)? })
    }

    /// Waits until it has ended.
    pub(crate) async fn ended(&self) {
        // A pidfd becomes readable once and stays so. An error would mean that the runtime is shutting down.
        drop(self.descriptor.readable().await);
        process::reap(self.descriptor.get_ref());
    }

    fn kill(&self) -> std::io::Result<()> {
        process::kill(self.descriptor.get_ref())
    }
}

impl Runtime {
    /// What the pause process of a sandbox is.
    pub(crate) fn pause_spec(&self, record: &SandboxRecord) -> Result<Spec, RuntimeError> {
        let cgroup = self.cgroup(record.cgroup_parent(), &record.id)?.for_runtime;
        let netns = (!record.netns.is_empty()).then(|| record.netns.clone().into());
        let (id, config, node) = (record.id.as_str(), &record.config, &self.node);
        Ok(spec(&SandboxSpec { id, config, netns, cgroup: &cgroup, node })?)
    }

    /// Runs the pause process of a sandbox.
    pub(crate) async fn start_pause(&self, record: &SandboxRecord) -> Result<Started, RuntimeError> {
        let spec = self.pause_spec(record)?;
        let (id, root) = (record.id.clone(), self.paths.pause_root.clone());
        let cache = self.paths.state_dir.join("seccomp");
        let cgroups = match self.cgroup_driver {
            Driver::Cgroupfs => CgroupDriver::Cgroupfs,
            Driver::Systemd => CgroupDriver::Systemd,
        };
        let made = blocking(move || {
            std::fs::create_dir_all(&cache).map_err(RuntimeError::host("make", &cache))?;
            let failed = |source| RuntimeError::Pause { id: id.clone(), source: Box::new(source) };
            let make = |spec: &Spec| {
                let stdio = Stdio::null();
                let seccomp_cache = Some(cache.as_path());
                Create { id: &id, spec, bundle: &root, rootfs: &root, stdio, cgroups, seccomp_cache }.create()
            };
            let created = match make(&spec) {
                // On a node without libseccomp pause still has no rights at all, and runs no code but ours.
                Err(cri_shim_runtime::Error::Unavailable { feature: "linux.seccomp", .. }) => {
                    make(&unfiltered(spec))
                }
                outcome => outcome,
            }
            .map_err(failed)?;
            for warning in created.warnings {
                tracing::debug!(sandbox = id, warning, "pause");
            }
            let pid = created.container.pid.unsigned_abs();
            if let Err(error) = created.pending.start() {
                process::end_child(&created.pidfd);
                return Err(failed(error));
            }
            Ok(Started { pid, began: created.container.start_time, descriptor: Some(created.pidfd) })
        });
        stage("pause", made).await
    }

    /// Ends the pause process, if there is one, and removes its cgroup with whatever else is in it.
    pub(crate) async fn end_pause(&self, sandbox: &Sandbox) -> Result<(), RuntimeError> {
        let record = sandbox.record.get();
        if record.pause_in_containerd() {
            self.client.force_delete_task(&sandbox.id, KILL_PATIENCE).await?;
        }
        if let Some(pause) = sandbox.pause() {
            pause.kill().map_err(lost(&sandbox.id))?;
            if tokio::time::timeout(KILL_PATIENCE, pause.ended()).await.is_err() {
                let what = format!("killing the pause process of sandbox {}", sandbox.id);
                return Err(RuntimeError::Deadline { what, seconds: KILL_PATIENCE.as_secs() });
            }
            sandbox.set_pause(None);
        }
        // A parent that names none was refused before anything was made.
        if let Ok(place) = self.cgroup(record.cgroup_parent(), &record.id) {
            let cgroups = self.cgroups.clone();
            blocking(move || cgroups.clear(&place.directory, KILL_PATIENCE)).await?;
        }
        reached(Step::SandboxPauseEnded);
        Ok(())
    }
}

impl Sandbox {
    /// Keeps hold of the pause process that was made for it.
    pub(crate) fn hold_pause(&self, started: &mut Started) -> Result<(), RuntimeError> {
        let pause = started.descriptor.take().map(Pause::new).transpose().map_err(lost(&self.id))?;
        self.set_pause(pause.map(Arc::new));
        Ok(())
    }

    /// Takes hold of the pause process an earlier server made; false when it has ended.
    pub(crate) fn take_pause_up(&self) -> Result<bool, RuntimeError> {
        let (pid, began) = self.record.with(|record| (record.pid, record.pause_began));
        let Some(descriptor) = process::open(pid, began).map_err(lost(&self.id))? else {
            return Ok(false);
        };
        self.set_pause(Some(Arc::new(Pause::new(descriptor).map_err(lost(&self.id))?)));
        Ok(true)
    }
}

fn unfiltered(mut spec: Spec) -> Spec {
    if let Some(linux) = spec.linux_mut() {
        linux.set_seccomp(None);
    }
    spec
}

fn lost(id: &str) -> impl FnOnce(std::io::Error) -> RuntimeError {
    let id = id.to_owned();
    move |source| RuntimeError::PauseLost { id, source }
}

//! StopPodSandbox and RemovePodSandbox: everything run does, backwards. Both may be repeated and continued after a crash.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cni_plugins_host::netns;
use cri_shim_api::v1::ContainerEventType;
use cri_shim_core::record::{SandboxPhase, SandboxRecord};
use futures::future::join_all;

use crate::error::{RuntimeError, chain};
use crate::host::blocking;
use crate::runtime::Runtime;
use crate::state::Sandbox;
use crate::steps::{Step, reached};

impl Runtime {
    /// Stops a sandbox with all its containers and gives its network back. An unknown one is fine. A repeated call joins
    /// the one under way, which goes on when every caller has gone away.
    pub async fn stop_sandbox(self: &Arc<Self>, id: &str) -> Result<(), RuntimeError> {
        let Some(sandbox) = self.registry.sandbox(id) else { return Ok(()) };
        let runtime = Arc::clone(self);
        let work = async move {
            let _one_at_a_time = sandbox.operation.lock().await;
            runtime.shut_down(&sandbox).await
        };
        self.ending_flights.join(&format!("stop {id}"), Box::pin(work)).await
    }

    /// Removes a sandbox with all its containers. An unknown one is fine. A repeated call joins the one under way, which
    /// goes on when every caller has gone away.
    pub async fn remove_sandbox(self: &Arc<Self>, id: &str) -> Result<(), RuntimeError> {
        let Some(sandbox) = self.registry.sandbox(id) else { return Ok(()) };
        let runtime = Arc::clone(self);
        let work = async move {
            let _one_at_a_time = sandbox.operation.lock().await;
            if runtime.registry.sandbox(&sandbox.id).is_none() {
                // Somebody else removed it while we waited.
                return Ok(());
            }
            runtime.erase_sandbox(&sandbox, true).await?;
            tracing::info!(sandbox = sandbox.id, "sandbox is removed");
            Ok(())
        };
        self.ending_flights.join(&format!("remove {id}"), Box::pin(work)).await
    }

    /// Stops what runs and takes everything of the sandbox away, its record last. The caller holds its operation. `asked` says
    /// that a client asked for it, who asks again when it hears nothing.
    pub(crate) async fn erase_sandbox(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        asked: bool,
    ) -> Result<(), RuntimeError> {
        self.shut_down(sandbox).await?;
        sandbox.record.change(|record| record.advance(SandboxPhase::Removing));
        if !asked {
            // Nobody asks for it again, so a restart must go on with it.
            self.save(&sandbox.record).await?;
        }
        reached(Step::SandboxRemoving);
        let mut containers = self.registry.containers_of(&sandbox.id);
        // Those that were removed by themselves need nothing of the sandbox, and go on going without it.
        containers.retain(|container| !container.erasing.load(Ordering::Acquire));
        for result in
            join_all(containers.iter().map(|container| self.remove_container_wholly(container))).await
        {
            result?;
        }
        if sandbox.record.with(SandboxRecord::pause_in_containerd) {
            self.client.delete_container(&sandbox.id).await?;
        }
        let (dirs, journal) = (self.sandbox_dirs(&sandbox.id), self.journal.clone());
        let (record, id) = (sandbox.record.clone(), sandbox.id.clone());
        blocking(move || {
            dirs.remove()?;
            reached(Step::SandboxFilesRemoved);
            record.forget(&journal, &id)
        })
        .await?;
        reached(Step::SandboxForgotten);
        self.tell(ContainerEventType::ContainerDeletedEvent, &sandbox.id, &sandbox.id);
        self.registry.drop_sandbox(&sandbox.id);
        Ok(())
    }

    /// Ends every process, detaches the network, removes the namespace. The caller holds the sandbox's operation.
    async fn shut_down(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), RuntimeError> {
        if sandbox.phase() >= SandboxPhase::Stopped {
            return Ok(());
        }
        // From here on no container can be made or started in it.
        sandbox.record.change(|record| record.advance(SandboxPhase::Stopping));
        self.save(&sandbox.record).await?;
        reached(Step::SandboxStopping);
        let containers = self.registry.containers_of(&sandbox.id);
        for result in join_all(containers.iter().map(|container| self.stop_container(&container.id, 0))).await
        {
            result?;
        }
        reached(Step::SandboxContainersEnded);
        let record = sandbox.record.get();
        let dirs = self.sandbox_dirs(&sandbox.id);
        // Nothing of the pod runs any more, and the namespace is pinned: these three do not see each other.
        let (ended, detached, released) = tokio::join!(
            self.end_pause(sandbox),
            self.detach(sandbox, &record),
            blocking(move || dirs.release())
        );
        ended?;
        self.tell_end(sandbox);
        detached?;
        released?;
        if !record.netns.is_empty() {
            blocking(move || Ok(netns::remove(Path::new(&record.netns))?)).await?;
        }
        reached(Step::SandboxNetnsRemoved);
        sandbox.record.change(|record| {
            record.advance(SandboxPhase::Stopped);
            record.pid = 0;
        });
        self.save(&sandbox.record).await?;
        reached(Step::SandboxStopped);
        sandbox.last_figures.files().close();
        tracing::info!(sandbox = sandbox.id, "sandbox is stopped");
        Ok(())
    }

    async fn detach(&self, sandbox: &Sandbox, record: &SandboxRecord) -> Result<(), RuntimeError> {
        match self.network.detach(record).await {
            // It was never ready, so nobody can ask for this again; what the plugins gave it is given back later.
            Err(error) if record.addresses.is_empty() => {
                tracing::warn!(sandbox = sandbox.id, error = %chain(&error), "detaching a half-made sandbox failed; it is tried again");
                self.owe_detachment(record).await?;
            }
            other => other?,
        }
        reached(Step::SandboxDetached);
        Ok(())
    }
}

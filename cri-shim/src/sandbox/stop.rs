//! StopPodSandbox and RemovePodSandbox: everything run does, backwards. Both may be repeated and continued after a crash.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cni_plugins_host::netns;
use cri_shim_api::v1::ContainerEventType;
use cri_shim_core::record::SandboxPhase;
use futures::future::join_all;

use crate::error::{RuntimeError, chain};
use crate::host::blocking;
use crate::runtime::Runtime;
use crate::state::Sandbox;

/// How long a killed pause process may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

impl Runtime {
    /// Stops a sandbox with all its containers and gives its network back. An unknown one is fine.
    pub async fn stop_sandbox(self: &Arc<Self>, id: &str) -> Result<(), RuntimeError> {
        let Some(sandbox) = self.registry.sandbox(id) else { return Ok(()) };
        let _one_at_a_time = sandbox.operation.lock().await;
        self.shut_down(&sandbox).await
    }

    /// Removes a sandbox with all its containers. An unknown one is fine.
    pub async fn remove_sandbox(self: &Arc<Self>, id: &str) -> Result<(), RuntimeError> {
        let Some(sandbox) = self.registry.sandbox(id) else { return Ok(()) };
        let _one_at_a_time = sandbox.operation.lock().await;
        if self.registry.sandbox(id).is_none() {
            // Somebody else removed it while we waited.
            return Ok(());
        }
        self.erase_sandbox(&sandbox).await?;
        tracing::info!(sandbox = id, "sandbox is removed");
        Ok(())
    }

    /// Stops what runs and takes everything of the sandbox away, its record last. The caller holds its operation.
    pub(crate) async fn erase_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), RuntimeError> {
        self.shut_down(sandbox).await?;
        sandbox.record.change(|record| record.advance(SandboxPhase::Removing));
        self.save(&sandbox.record).await?;
        let containers = self.registry.containers_of(&sandbox.id);
        for result in join_all(containers.iter().map(|container| self.remove_container(&container.id))).await
        {
            result?;
        }
        self.client.delete_container(&sandbox.id).await?;
        let dirs = self.sandbox_dirs(&sandbox.id);
        blocking(move || dirs.remove()).await?;
        self.tell(ContainerEventType::ContainerDeletedEvent, &sandbox.id, &sandbox.id);
        self.forget(&sandbox.id, &sandbox.record).await?;
        self.registry.drop_sandbox(&sandbox.id);
        Ok(())
    }

    /// Ends every process, detaches the network, removes the namespace. The caller holds the sandbox's operation.
    async fn shut_down(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), RuntimeError> {
        if sandbox.phase() >= SandboxPhase::Stopped {
            return Ok(());
        }
        let was_ready = sandbox.phase() == SandboxPhase::Ready;
        // From here on no container can be made or started in it.
        sandbox.record.change(|record| record.advance(SandboxPhase::Stopping));
        self.save(&sandbox.record).await?;
        let containers = self.registry.containers_of(&sandbox.id);
        for result in join_all(containers.iter().map(|container| self.stop_container(&container.id, 0))).await
        {
            result?;
        }
        self.client.force_delete_task(&sandbox.id, KILL_PATIENCE).await?;
        let record = sandbox.record.get();
        match self.network.detach(&record).await {
            // Of an attachment that never came about nothing must be left, and nobody could ever detach it better.
            Err(error) if record.addresses.is_empty() => {
                tracing::warn!(sandbox = sandbox.id, error = %chain(&error), "detaching a half-made sandbox failed");
            }
            other => other?,
        }
        let dirs = self.sandbox_dirs(&sandbox.id);
        blocking(move || {
            if !record.netns.is_empty() {
                netns::remove(Path::new(&record.netns))?;
            }
            dirs.release()
        })
        .await?;
        sandbox.record.change(|record| {
            record.advance(SandboxPhase::Stopped);
            record.pid = 0;
        });
        self.save(&sandbox.record).await?;
        if was_ready {
            self.tell(ContainerEventType::ContainerStoppedEvent, &sandbox.id, &sandbox.id);
            tracing::info!(sandbox = sandbox.id, "sandbox is stopped");
        }
        Ok(())
    }
}

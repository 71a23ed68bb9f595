//! UpdatePodSandboxResources.

use cri_shim_api::v1::UpdatePodSandboxResourcesRequest;
use cri_shim_core::record::SandboxRecord;

use crate::error::RuntimeError;
use crate::runtime::Runtime;

impl Runtime {
    /// Notes a pod's new resources and overhead. The kubelet owns the pod's cgroup and has changed it itself; the pause process
    /// has no limits of its own, so nothing else is to be done here than to remember what holds now.
    pub async fn update_sandbox_resources(
        &self,
        request: UpdatePodSandboxResourcesRequest,
    ) -> Result<(), RuntimeError> {
        let sandbox = self.ready_sandbox(&request.pod_sandbox_id)?;
        let _one_at_a_time = sandbox.operation.lock().await;
        sandbox.must_be_ready()?;
        sandbox.record.change(|record| note(record, request));
        self.save(&sandbox.record).await
    }
}

/// What is not given stays as it is.
fn note(record: &mut SandboxRecord, request: UpdatePodSandboxResourcesRequest) {
    let linux = record.config.linux.get_or_insert_default();
    linux.overhead = request.overhead.or_else(|| linux.overhead.take());
    linux.resources = request.resources.or_else(|| linux.resources.take());
}

#[cfg(test)]
mod tests {
    use super::*;
    use cri_shim_api::v1::LinuxContainerResources;

    #[test]
    fn what_is_not_given_stays() {
        let some =
            |cpu_shares| Some(LinuxContainerResources { cpu_shares, ..LinuxContainerResources::default() });
        let mut record = SandboxRecord::default();
        let request = UpdatePodSandboxResourcesRequest {
            overhead: some(1),
            resources: some(2),
            ..UpdatePodSandboxResourcesRequest::default()
        };
        note(&mut record, request);
        note(&mut record, UpdatePodSandboxResourcesRequest { resources: some(3), ..Default::default() });
        let linux = record.config.linux.expect("noted");
        assert_eq!((linux.overhead, linux.resources), (some(1), some(3)));
    }
}

//! The life of a pod as a kubelet drives it, call by call, for tests in which something dies in between.

use std::time::Duration;

use cri_shim_api::v1;
use cri_shim_api::v1::ContainerState;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use nix::sys::signal::Signal;
use tonic::transport::Channel;

use super::cri::{Cri, PATIENCE, shell};

/// The calls in the life of a pod, in order.
pub const CALLS: [Call; 8] = [
    Call::Run,
    Call::Create,
    Call::Start,
    Call::Update,
    Call::StopContainer,
    Call::RemoveContainer,
    Call::Stop,
    Call::Remove,
];

/// The memory that [`Call::Update`] allows.
pub const MEMORY: i64 = 96 << 20;

/// A call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// RunPodSandbox.
    Run,
    /// CreateContainer.
    Create,
    /// StartContainer.
    Start,
    /// UpdateContainerResources.
    Update,
    /// StopContainer.
    StopContainer,
    /// RemoveContainer.
    RemoveContainer,
    /// StopPodSandbox.
    Stop,
    /// RemovePodSandbox.
    Remove,
}

/// A pod, and the ids it was given.
pub struct Life {
    /// Its configuration.
    pub pod: v1::PodSandboxConfig,
    /// Its container's.
    pub config: v1::ContainerConfig,
    /// Its sandbox, once it has one.
    pub sandbox: String,
    /// Its container, once it has one.
    pub container: String,
}

impl Life {
    /// A pod with one container that sleeps.
    pub fn of(pod: v1::PodSandboxConfig) -> Self {
        Self::with(pod, shell("main", "exec sleep 3600"))
    }

    /// A pod with this container.
    pub fn with(pod: v1::PodSandboxConfig, config: v1::ContainerConfig) -> Self {
        Self { pod, config, sandbox: String::new(), container: String::new() }
    }

    /// Makes a call.
    pub async fn call(
        &mut self,
        mut client: RuntimeServiceClient<Channel>,
        call: Call,
    ) -> Result<(), tonic::Status> {
        let (sandbox, container) = (self.sandbox.clone(), self.container.clone());
        match call {
            Call::Run => {
                let request =
                    v1::RunPodSandboxRequest { config: Some(self.pod.clone()), ..Default::default() };
                self.sandbox = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
            }
            Call::Create => {
                let request = v1::CreateContainerRequest {
                    pod_sandbox_id: sandbox,
                    config: Some(self.config.clone()),
                    sandbox_config: Some(self.pod.clone()),
                };
                let answer = Box::pin(client.create_container(request)).await?;
                self.container = answer.into_inner().container_id;
            }
            Call::Start => {
                client.start_container(v1::StartContainerRequest { container_id: container }).await?;
            }
            Call::Update => {
                let linux =
                    v1::LinuxContainerResources { memory_limit_in_bytes: MEMORY, ..Default::default() };
                let request = v1::UpdateContainerResourcesRequest {
                    container_id: container,
                    linux: Some(linux),
                    ..Default::default()
                };
                client.update_container_resources(request).await?;
            }
            Call::StopContainer => {
                let request = v1::StopContainerRequest { container_id: container, timeout: 0 };
                client.stop_container(request).await?;
            }
            Call::RemoveContainer => {
                client.remove_container(v1::RemoveContainerRequest { container_id: container }).await?;
            }
            Call::Stop => {
                client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: sandbox }).await?;
            }
            Call::Remove => {
                client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox }).await?;
            }
        }
        Ok(())
    }

    /// Makes calls, in one of which the server dies.
    pub async fn go_on(&mut self, cri: &mut Cri, calls: &[Call], step: &str) {
        let mut died = false;
        for call in calls {
            // What ended in the meantime takes no limits.
            if *call == Call::Update && !self.is_alive(cri).await {
                continue;
            }
            if let Err(status) = self.call(cri.runtime(), *call).await {
                assert!(!died, "{call:?} after the restart at {step}: {status}");
                assert_eq!(cri.died().await, Some(Signal::SIGABRT as i32), "{call:?}: {status}");
                died = true;
                cri.start_again().await;
                Box::pin(self.repeat(cri, *call)).await;
            }
            if *call == Call::Update {
                self.has_limit(cri).await;
            }
        }
        if !died {
            // What goes on behind the last answer reaches the step, or nothing does.
            assert_eq!(cri.died().await, Some(Signal::SIGABRT as i32), "after the calls, at {step}");
            cri.start_again().await;
        }
    }

    async fn is_alive(&self, cri: &Cri) -> bool {
        let state = cri.status(&self.container).await.state();
        matches!(state, ContainerState::ContainerCreated | ContainerState::ContainerRunning)
    }

    /// A container that runs has the limit that it was given, and says so.
    async fn has_limit(&self, cri: &Cri) {
        let status = cri.status(&self.container).await;
        if status.state() != ContainerState::ContainerRunning {
            return;
        }
        let told = status.resources.and_then(|all| all.linux).unwrap_or_default().memory_limit_in_bytes;
        assert_eq!(told, MEMORY, "as the status says");
        let files = ["memory.limit_in_bytes", "memory.max"];
        let found = cri.cgroups().into_iter().flat_map(|root| super::cri::walk(&root)).find_map(|path| {
            let own = path.file_name().is_some_and(|name| name.to_string_lossy().contains(&self.container));
            own.then(|| files.iter().find_map(|file| std::fs::read_to_string(path.join(file)).ok()))?
        });
        assert_eq!(found.as_deref().map(str::trim), Some(MEMORY.to_string().as_str()), "in the kernel");
    }

    /// Makes the call that was cut off once more. Nobody repeats a start or an update without looking first.
    pub async fn repeat(&mut self, cri: &Cri, call: Call) {
        if matches!(call, Call::Start | Call::Update) {
            let status = cri.status(&self.container).await;
            match status.state() {
                ContainerState::ContainerCreated => {}
                ContainerState::ContainerRunning if call == Call::Update => {}
                ContainerState::ContainerRunning => return cri.answers(&self.container).await,
                _ => return assert_eq!((status.reason.as_str(), status.exit_code), ("StartError", 128)),
            }
        }
        self.call(cri.runtime(), call).await.unwrap_or_else(|status| panic!("{call:?} repeated: {status}"));
    }

    /// Makes a call while the server halts at a step, does `deed` then, and lets it go on. Says how the call ended; the
    /// step may also be reached behind an answer, or by no call at all.
    pub async fn halted_at_step(
        &mut self,
        cri: &mut Cri,
        call: Call,
        deed: impl FnOnce(&mut Cri),
    ) -> (Result<(), tonic::Status>, bool) {
        let client = cri.runtime();
        let mut work = Box::pin(self.call(client, call));
        let result = loop {
            let pause = tokio::time::sleep(Duration::from_millis(2));
            // Cancel-safe: the call is polled again, by the next round or below.
            tokio::select! {
                result = &mut work => break result,
                () = pause => {}
            }
            if cri.halted() {
                deed(cri);
                cri.signal(Signal::SIGCONT);
                let result = tokio::time::timeout(2 * PATIENCE, work).await;
                return (result.unwrap_or_else(|_| panic!("{call:?} does not end")), true);
            }
        };
        (result, false)
    }
}

/// A sandbox in which a container runs and answers. Like a kubelet, which starts over when containerd ends the shim of
/// a call that the death cut off, and with it the pod.
pub async fn usable(cri: &Cri, pod: &v1::PodSandboxConfig) -> String {
    let mut last = None;
    for _attempt in 0..5 {
        match attempt(cri, pod).await {
            Ok(sandbox) => return sandbox,
            Err(status) => last = Some(status),
        }
        let all = cri.runtime().list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.expect("listed");
        for sandbox in all.into_inner().items {
            cri.remove(&sandbox.id).await;
        }
    }
    panic!("no usable sandbox: {last:?}");
}

/// A sandbox, and a container in it that answers.
pub async fn attempt(cri: &Cri, pod: &v1::PodSandboxConfig) -> Result<String, tonic::Status> {
    let sandbox = cri.run(pod).await?;
    let id = cri.create(&sandbox, pod, shell("again", "exec sleep 3600")).await?;
    cri.launch(&id).await?;
    let words = ["echo", "works"].map(str::to_owned).to_vec();
    let request = v1::ExecSyncRequest { container_id: id, cmd: words, timeout: 10 };
    let answer = cri.runtime().exec_sync(request).await?.into_inner();
    assert_eq!(answer.stdout, b"works\n");
    Ok(sandbox)
}

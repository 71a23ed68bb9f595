//! The calls of a kubelet, timed: one pod with one container from run to remove.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cri_shim_api::v1;

use crate::cri_hosts::{CriHost, IDLE_IMAGE, Kind};
use crate::host as traces;

/// Longest that one call may take.
const DEADLINE: Duration = Duration::from_secs(120);
/// Longest wait for a started workload to be able to take a signal.
const SIGNAL_READY: Duration = Duration::from_secs(30);
/// Second argument of the workload, by which it is told from a pause process of the same program.
pub(super) const WORKLOAD: &str = "idle";

/// The timed calls, in the order in which a pod goes through them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Call {
    RunPodSandbox,
    CreateContainer,
    StartContainer,
    StopContainer,
    RemoveContainer,
    StopPodSandbox,
    RemovePodSandbox,
}

/// All calls.
pub(super) const CALLS: [Call; 7] = [
    Call::RunPodSandbox,
    Call::CreateContainer,
    Call::StartContainer,
    Call::StopContainer,
    Call::RemoveContainer,
    Call::StopPodSandbox,
    Call::RemovePodSandbox,
];

impl Call {
    /// What the report calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Call::RunPodSandbox => "sandbox run",
            Call::CreateContainer => "container create",
            Call::StartContainer => "container start",
            Call::StopContainer => "container stop",
            Call::RemoveContainer => "container remove",
            Call::StopPodSandbox => "sandbox stop",
            Call::RemovePodSandbox => "sandbox remove",
        }
    }

    /// Whether it is about the sandbox.
    pub(super) fn of_sandbox(self) -> bool {
        matches!(self, Call::RunPodSandbox | Call::StopPodSandbox | Call::RemovePodSandbox)
    }
}

/// Milliseconds of each call of one cycle.
pub(super) type Times = BTreeMap<Call, f64>;

/// A running pod.
pub(super) struct Pod {
    sandbox: String,
    /// Its container.
    pub(super) container: String,
}

/// A client of one server.
pub(super) struct Driver {
    pub(super) host: CriHost,
    handler: String,
    seccomp: bool,
    image: String,
    serial: AtomicU64,
}

impl Driver {
    /// Pulls the workload's image.
    pub(super) async fn new(host: CriHost, handler: String, seccomp: bool) -> Result<Self> {
        let image = v1::ImageSpec { image: IDLE_IMAGE.to_owned(), ..v1::ImageSpec::default() };
        let request = v1::PullImageRequest { image: Some(image), ..v1::PullImageRequest::default() };
        let pulled = Box::pin(host.images().pull_image(request))
            .await
            .context("pulling")
            .with_context(|| host.logs())?;
        let image = pulled.into_inner().image_ref;
        Ok(Self { host, handler, seccomp, image, serial: AtomicU64::new(0) })
    }

    /// An error with the side it came from and what the daemons said last.
    pub(super) fn explain(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow::anyhow!("{}: {error:#}\n{}", self.name(), self.host.logs())
    }

    /// What the report calls this side.
    pub(super) fn name(&self) -> &'static str {
        match self.host.kind() {
            Kind::Keelson => "keelson-cri",
            Kind::Containerd => "containerd",
        }
    }

    /// One pod with one container, from run to remove; milliseconds of each call.
    pub(super) async fn cycle(&self, name: &str) -> Result<Times> {
        let mut times = Times::new();
        let pod = self.start(name, &mut times).await?;
        self.end(&pod, &mut times).await?;
        Ok(times)
    }

    /// Runs a sandbox and starts a container in it.
    pub(super) async fn start(&self, name: &str, times: &mut Times) -> Result<Pod> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let config = self.pod(&format!("{name}-{serial}"));
        let parent = config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default();
        let mut client = self.host.runtime();
        let request =
            v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: self.handler.clone() };
        let sandbox = timed(times, Call::RunPodSandbox, Box::pin(client.run_pod_sandbox(request)))
            .await?
            .pod_sandbox_id;
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(self.container()),
            sandbox_config: Some(config),
        };
        let container = timed(times, Call::CreateContainer, Box::pin(client.create_container(request)))
            .await?
            .container_id;
        let request = v1::StartContainerRequest { container_id: container.clone() };
        timed(times, Call::StartContainer, Box::pin(client.start_container(request))).await?;
        self.wait_until_stoppable(&parent).await?;
        Ok(Pod { sandbox, container })
    }

    /// Waits until the workload waits for SIGTERM. A first process of a PID namespace never sees a signal that comes
    /// earlier, so that stopping it would take the whole grace period, on either side.
    async fn wait_until_stoppable(&self, cgroup: &str) -> Result<()> {
        let end = Instant::now() + SIGNAL_READY;
        while !traces::processes_below(&traces::cgroups_named(cgroup)).iter().any(|found| waits(found.pid)) {
            anyhow::ensure!(Instant::now() < end, "the workload in {cgroup} does not run");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Stops and removes a pod.
    pub(super) async fn end(&self, pod: &Pod, times: &mut Times) -> Result<()> {
        let mut client = self.host.runtime();
        // The workload ends at SIGTERM at once, so that the grace period is never waited for.
        let request = v1::StopContainerRequest { container_id: pod.container.clone(), timeout: 30 };
        timed(times, Call::StopContainer, Box::pin(client.stop_container(request))).await?;
        let request = v1::RemoveContainerRequest { container_id: pod.container.clone() };
        timed(times, Call::RemoveContainer, Box::pin(client.remove_container(request))).await?;
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
        timed(times, Call::StopPodSandbox, Box::pin(client.stop_pod_sandbox(request))).await?;
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
        timed(times, Call::RemovePodSandbox, Box::pin(client.remove_pod_sandbox(request))).await?;
        Ok(())
    }

    /// Runs `true` in a container; milliseconds.
    pub(super) async fn exec_true(&self, pod: &Pod) -> Result<f64> {
        let request = v1::ExecSyncRequest {
            container_id: pod.container.clone(),
            cmd: vec!["/bin/true".to_owned()],
            timeout: 30,
        };
        let begin = Instant::now();
        let answer = tokio::time::timeout(DEADLINE, Box::pin(self.host.runtime().exec_sync(request)))
            .await
            .context("ExecSync: no answer")??
            .into_inner();
        let took = millis(begin);
        anyhow::ensure!(answer.exit_code == 0, "`true` ended with {}", answer.exit_code);
        Ok(took)
    }

    fn pod(&self, name: &str) -> v1::PodSandboxConfig {
        let uid = format!("{name}-{}", std::process::id());
        let options = v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
        let security = v1::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            seccomp: Some(self.profile()),
            ..Default::default()
        };
        let linux = v1::LinuxPodSandboxConfig {
            cgroup_parent: format!("{}/{uid}", self.host.pod_cgroup()),
            security_context: Some(security),
            ..Default::default()
        };
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.clone(),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.host.pod_logs().join(&uid).display().to_string(),
            labels: BTreeMap::from([
                ("io.kubernetes.pod.name".to_owned(), name.to_owned()),
                ("io.kubernetes.pod.namespace".to_owned(), "bench".to_owned()),
                ("io.kubernetes.pod.uid".to_owned(), uid),
            ]),
            linux: Some(linux),
            ..Default::default()
        }
    }

    fn container(&self) -> v1::ContainerConfig {
        let options = v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
        let security = v1::LinuxContainerSecurityContext {
            namespace_options: Some(options),
            seccomp: Some(self.profile()),
            ..Default::default()
        };
        let linux = v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources {
                cpu_shares: 2,
                oom_score_adj: 1000,
                ..Default::default()
            }),
            security_context: Some(security),
        };
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "idle".to_owned(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: self.image.clone(), ..Default::default() }),
            command: vec!["/pause".to_owned(), WORKLOAD.to_owned()],
            log_path: "idle_0.log".to_owned(),
            labels: BTreeMap::from([("io.kubernetes.container.name".to_owned(), "idle".to_owned())]),
            linux: Some(linux),
            ..Default::default()
        }
    }

    fn profile(&self) -> v1::SecurityProfile {
        let kind = if self.seccomp {
            v1::security_profile::ProfileType::RuntimeDefault
        } else {
            v1::security_profile::ProfileType::Unconfined
        };
        v1::SecurityProfile { profile_type: kind.into(), ..Default::default() }
    }
}

/// Whether this process is the workload and waits for a signal.
fn waits(pid: i32) -> bool {
    // rt_sigtimedwait on x86-64 and on arm64. The mask in `status` does not tell: it lacks what is being waited for.
    const WAITING: [&str; 2] = ["128", "137"];
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    read("cmdline").split('\0').nth(1) == Some(WORKLOAD)
        && read("syscall").split(' ').next().is_some_and(|number| WAITING.contains(&number))
}

async fn timed<T>(
    times: &mut Times,
    call: Call,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T> {
    let begin = Instant::now();
    let answer = tokio::time::timeout(DEADLINE, answer)
        .await
        .with_context(|| format!("{call:?}: no answer"))?
        .with_context(|| format!("{call:?}"))?;
    times.insert(call, millis(begin));
    Ok(answer.into_inner())
}

fn millis(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1000.0
}

//! What a case works with: the endpoint's clients, pods and containers with everyday settings, and a registry of what
//! the case made, so that the runner removes it also when the case fails or is cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cri_shim_api::v1::image_service_client::ImageServiceClient;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use cri_shim_api::v1::{self, ContainerState};
use tonic::transport::Channel;

use super::images::Catalog;
use super::probe::Facts;

/// Most bytes of an answer: two streams of 16 MiB and the rest.
const MAX_ANSWER: usize = 64 << 20;

/// What all cases share.
pub(crate) struct Suite {
    /// RuntimeService.
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    /// ImageService.
    pub(crate) images: ImageServiceClient<Channel>,
    /// What the endpoint and its host can do.
    pub(crate) facts: Facts,
    /// The images that the suite serves.
    pub(crate) catalog: Catalog,
    /// RuntimeClass handler of every sandbox.
    pub(crate) handler: String,
    /// Parent of the pods' cgroups.
    pub(crate) cgroup_parent: String,
    /// Everything on disk is below.
    pub(crate) dir: PathBuf,
    /// The id of the everyday image, once pulled.
    pub(crate) image: String,
    /// Tells this run's objects from others'.
    pub(crate) run: String,
    /// How long one case may take.
    pub(crate) deadline: Duration,
    /// Counts cases and pods.
    pub(crate) counter: AtomicU64,
    /// Images to remove when the run ends.
    pub(crate) shared: Mutex<BTreeSet<String>>,
}

/// Undoes something on the host.
type Undo = Box<dyn FnOnce() + Send>;

struct Made {
    sandboxes: Mutex<Vec<String>>,
    images: Mutex<Vec<String>>,
    undo: Mutex<Vec<Undo>>,
}

/// One run of one case.
#[derive(Clone)]
pub(crate) struct T {
    /// What all cases share.
    pub(crate) suite: Arc<Suite>,
    made: Arc<Made>,
    /// A directory of this run alone.
    pub(crate) dir: PathBuf,
}

/// A running sandbox and what it was made of.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    /// The sandbox's id.
    pub(crate) id: String,
    /// Its configuration.
    pub(crate) config: v1::PodSandboxConfig,
}

impl T {
    /// A new run.
    pub(crate) fn new(suite: &Arc<Suite>) -> Result<Self> {
        let number = suite.counter.fetch_add(1, Ordering::Relaxed);
        let dir = suite.dir.join(format!("case-{number}"));
        std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let made = Made { sandboxes: Mutex::default(), images: Mutex::default(), undo: Mutex::default() };
        Ok(Self { suite: Arc::clone(suite), made: Arc::new(made), dir })
    }

    /// RuntimeService.
    pub(crate) fn rt(&self) -> RuntimeServiceClient<Channel> {
        self.suite.runtime.clone().max_decoding_message_size(MAX_ANSWER)
    }

    /// ImageService.
    pub(crate) fn im(&self) -> ImageServiceClient<Channel> {
        self.suite.images.clone().max_decoding_message_size(MAX_ANSWER)
    }

    /// Remembers an action that puts the host back.
    pub(crate) fn undo(&self, action: impl FnOnce() + Send + 'static) {
        lock(&self.made.undo).push(Box::new(action));
    }

    /// Remembers an image reference to remove.
    pub(crate) fn remember_image(&self, reference: &str) {
        lock(&self.made.images).push(reference.to_owned());
    }

    /// Remembers a sandbox to remove.
    pub(crate) fn remember_sandbox(&self, id: &str) {
        lock(&self.made.sandboxes).push(id.to_owned());
    }

    /// A pod's configuration as a kubelet would send it, with a name of its own.
    pub(crate) fn pod(&self) -> v1::PodSandboxConfig {
        let number = self.suite.counter.fetch_add(1, Ordering::Relaxed);
        let name = format!("pod-{number}");
        let uid = format!("{}-{number}", self.suite.run);
        let metadata = v1::PodSandboxMetadata {
            name: name.clone(),
            uid: uid.clone(),
            namespace: "conformance".to_owned(),
            attempt: 0,
        };
        let security = v1::LinuxSandboxSecurityContext {
            namespace_options: Some(namespaces()),
            ..v1::LinuxSandboxSecurityContext::default()
        };
        let linux = v1::LinuxPodSandboxConfig {
            cgroup_parent: self.suite.facts.pod_cgroup(&self.suite.cgroup_parent, &uid),
            security_context: Some(security),
            ..v1::LinuxPodSandboxConfig::default()
        };
        v1::PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name,
            log_directory: self.dir.join("logs").join(&uid).display().to_string(),
            labels: BTreeMap::from([("conformance".to_owned(), self.suite.run.clone())]),
            linux: Some(linux),
            ..v1::PodSandboxConfig::default()
        }
    }

    /// Asks for a sandbox; a made one is removed with the case.
    pub(crate) async fn try_run(&self, config: &v1::PodSandboxConfig) -> Result<Pod, tonic::Status> {
        self.try_run_with(config, &self.suite.handler).await
    }

    /// The same with a given handler.
    pub(crate) async fn try_run_with(
        &self,
        config: &v1::PodSandboxConfig,
        handler: &str,
    ) -> Result<Pod, tonic::Status> {
        // Endpoints differ in who makes it; the kubelet does.
        std::fs::create_dir_all(&config.log_directory).ok();
        let request =
            v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let id = self.rt().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        self.remember_sandbox(&id);
        Ok(Pod { id, config: config.clone() })
    }

    /// A sandbox of this configuration.
    pub(crate) async fn run(&self, config: &v1::PodSandboxConfig) -> Result<Pod> {
        self.try_run(config).await.context("RunPodSandbox")
    }

    /// A sandbox with everyday settings.
    pub(crate) async fn sandbox(&self) -> Result<Pod> {
        self.run(&self.pod()).await
    }

    /// A container's configuration, as a kubelet would send it, that runs a shell script.
    pub(crate) fn shell(&self, script: &str) -> v1::ContainerConfig {
        let mut config = self.container();
        config.command = strings(&["/bin/sh", "-c", script]);
        config
    }

    /// The same with the image's own command.
    pub(crate) fn container(&self) -> v1::ContainerConfig {
        let number = self.suite.counter.fetch_add(1, Ordering::Relaxed);
        let name = format!("c{number}");
        let security = v1::LinuxContainerSecurityContext {
            namespace_options: Some(namespaces()),
            masked_paths: strings(MASKED),
            readonly_paths: strings(READONLY),
            ..v1::LinuxContainerSecurityContext::default()
        };
        let resources =
            v1::LinuxContainerResources { cpu_shares: 102, oom_score_adj: 1000, ..Default::default() };
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: name.clone(), attempt: 0 }),
            image: Some(image_spec(&self.suite.image)),
            log_path: format!("{name}.log"),
            labels: BTreeMap::from([("conformance".to_owned(), self.suite.run.clone())]),
            linux: Some(v1::LinuxContainerConfig {
                resources: Some(resources),
                security_context: Some(security),
            }),
            ..v1::ContainerConfig::default()
        }
    }

    /// Asks for a container.
    pub(crate) async fn try_create(
        &self,
        pod: &Pod,
        config: &v1::ContainerConfig,
    ) -> Result<String, tonic::Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.config.clone()),
        };
        Ok(self.rt().create_container(request).await?.into_inner().container_id)
    }

    /// Makes a container.
    pub(crate) async fn create(&self, pod: &Pod, config: &v1::ContainerConfig) -> Result<String> {
        self.try_create(pod, config).await.context("CreateContainer")
    }

    /// Asks to start a container.
    pub(crate) async fn try_start(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        self.rt().start_container(request).await.map(drop)
    }

    /// Makes and starts a container.
    pub(crate) async fn launch(&self, pod: &Pod, config: &v1::ContainerConfig) -> Result<String> {
        let id = self.create(pod, config).await?;
        self.try_start(&id).await.context("StartContainer")?;
        Ok(id)
    }

    /// A new pod with one container that waits to be looked into.
    pub(crate) async fn idle(&self) -> Result<(Pod, String)> {
        let pod = self.sandbox().await?;
        let id = self.launch(&pod, &self.shell(IDLE)).await?;
        Ok((pod, id))
    }

    /// A new pod with one container that waits, both changed before they are made.
    pub(crate) async fn idle_with(
        &self,
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<(Pod, String)> {
        let pod = self.sandbox().await?;
        let mut config = self.shell(IDLE);
        change(&mut config);
        let id = self.launch(&pod, &config).await?;
        Ok((pod, id))
    }

    /// Runs a container in a new pod to its end and gives its log's text, stdout and stderr together.
    pub(crate) async fn output(
        &self,
        script: &str,
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<String> {
        let pod = self.sandbox().await?;
        self.output_in(&pod, script, change).await
    }

    /// The same in an existing pod.
    pub(crate) async fn output_in(
        &self,
        pod: &Pod,
        script: &str,
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<String> {
        let mut config = self.shell(script);
        change(&mut config);
        let id = self.launch(pod, &config).await?;
        let status = self.exited(&id).await?;
        let text = self.log(pod, &config).await?;
        anyhow::ensure!(
            status.exit_code == 0,
            "`{script}` ended with {} ({} {}): {text}",
            status.exit_code,
            status.reason,
            status.message
        );
        Ok(text)
    }

    /// Asks for a command's run.
    pub(crate) async fn try_exec(
        &self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<v1::ExecSyncResponse, tonic::Status> {
        let request = v1::ExecSyncRequest { container_id: id.to_owned(), cmd: strings(command), timeout };
        Ok(self.rt().exec_sync(request).await?.into_inner())
    }

    /// Runs a shell script in a container and gives its trimmed output; a status other than 0 fails.
    pub(crate) async fn sh(&self, id: &str, script: &str) -> Result<String> {
        let answer = self
            .try_exec(id, &["/bin/sh", "-c", script], 60)
            .await
            .with_context(|| format!("ExecSync `{script}`"))?;
        let text = String::from_utf8_lossy(&answer.stdout).trim_end().to_owned();
        anyhow::ensure!(
            answer.exit_code == 0,
            "`{script}` ended with {}: {text} {}",
            answer.exit_code,
            String::from_utf8_lossy(&answer.stderr)
        );
        Ok(text)
    }

    /// Asks for a container's status.
    pub(crate) async fn try_status(&self, id: &str) -> Result<v1::ContainerStatus, tonic::Status> {
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        Ok(self.rt().container_status(request).await?.into_inner().status.unwrap_or_default())
    }

    /// A container's status.
    pub(crate) async fn status(&self, id: &str) -> Result<v1::ContainerStatus> {
        self.try_status(id).await.context("ContainerStatus")
    }

    /// Asks for a sandbox's status.
    pub(crate) async fn try_pod_status(&self, id: &str) -> Result<v1::PodSandboxStatus, tonic::Status> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        Ok(self.rt().pod_sandbox_status(request).await?.into_inner().status.unwrap_or_default())
    }

    /// A sandbox's status.
    pub(crate) async fn pod_status(&self, id: &str) -> Result<v1::PodSandboxStatus> {
        self.try_pod_status(id).await.context("PodSandboxStatus")
    }

    /// Waits until a container has ended.
    pub(crate) async fn exited(&self, id: &str) -> Result<v1::ContainerStatus> {
        self.until("the container has ended", || async {
            let status = self.status(id).await?;
            Ok((status.state() == ContainerState::ContainerExited).then_some(status))
        })
        .await
    }

    /// Stops a container.
    pub(crate) async fn stop(&self, id: &str, timeout: i64) -> Result<()> {
        self.try_stop(id, timeout).await.context("StopContainer")
    }

    /// Asks to stop a container.
    pub(crate) async fn try_stop(&self, id: &str, timeout: i64) -> Result<(), tonic::Status> {
        let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout };
        self.rt().stop_container(request).await.map(drop)
    }

    /// Asks to remove a container.
    pub(crate) async fn try_remove(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
        self.rt().remove_container(request).await.map(drop)
    }

    /// Asks to stop a sandbox.
    pub(crate) async fn try_stop_pod(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.rt().stop_pod_sandbox(request).await.map(drop)
    }

    /// Asks to remove a sandbox.
    pub(crate) async fn try_remove_pod(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.rt().remove_pod_sandbox(request).await.map(drop)
    }

    /// Where a container's log is.
    pub(crate) fn log_file(pod: &Pod, config: &v1::ContainerConfig) -> PathBuf {
        Path::new(&pod.config.log_directory).join(&config.log_path)
    }

    /// The text of an ended container's log without the prefixes; partial lines are joined.
    pub(crate) async fn log(&self, pod: &Pod, config: &v1::ContainerConfig) -> Result<String> {
        let file = Self::log_file(pod, config);
        // An exit may be told a moment before the last line is written.
        let mut last = String::new();
        let mut calm = 0;
        loop {
            let text = std::fs::read_to_string(&file)
                .with_context(|| format!("reading the container's log {}", file.display()))?;
            // A silent container's log stays empty; wait a little longer for that.
            calm = if text == last { calm + 1 } else { 0 };
            if calm >= if text.is_empty() { 40 } else { 2 } {
                return super::cases::logs::text_of(&text);
            }
            last = text;
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    }

    /// Waits until `look` gives something; the case's own deadline bounds it.
    pub(crate) async fn until<V, F, Fut>(&self, what: &str, mut look: F) -> Result<V>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<Option<V>>>,
    {
        let end = tokio::time::Instant::now() + self.suite.deadline.mul_f32(0.8);
        loop {
            if let Some(value) = look().await? {
                return Ok(value);
            }
            if tokio::time::Instant::now() >= end {
                bail!("waited in vain until {what}");
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    }

    /// Pulls one of the suite's images that several cases use: it stays until the run ends.
    pub(crate) async fn pull(&self, reference: &str) -> Result<String> {
        let request =
            v1::PullImageRequest { image: Some(image_spec(reference)), ..v1::PullImageRequest::default() };
        let pulled = self.im().pull_image(request).await.with_context(|| format!("PullImage {reference}"))?;
        lock(&self.suite.shared).insert(reference.to_owned());
        Ok(pulled.into_inner().image_ref)
    }

    /// Asks for a pull of an image that no other case uses; it is removed with the case.
    pub(crate) async fn try_pull(
        &self,
        reference: &str,
        auth: Option<v1::AuthConfig>,
    ) -> Result<String, tonic::Status> {
        let request = v1::PullImageRequest { image: Some(image_spec(reference)), auth, sandbox_config: None };
        self.remember_image(reference);
        Ok(self.im().pull_image(request).await?.into_inner().image_ref)
    }

    /// An image's status; `None` for an unknown one.
    pub(crate) async fn image(&self, reference: &str) -> Result<Option<v1::Image>> {
        let request = v1::ImageStatusRequest { image: Some(image_spec(reference)), verbose: false };
        Ok(self.im().image_status(request).await.context("ImageStatus")?.into_inner().image)
    }

    /// Removes an image.
    pub(crate) async fn remove_image(&self, reference: &str) -> Result<()> {
        let request = v1::RemoveImageRequest { image: Some(image_spec(reference)) };
        self.im().remove_image(request).await.map(drop).context("RemoveImage")
    }

    /// Removes all that the case made; a failure of it is a failure of the case.
    pub(crate) async fn clean_up(&self) -> Result<()> {
        let mut failed = Vec::new();
        let sandboxes = std::mem::take(&mut *lock(&self.made.sandboxes));
        for id in sandboxes {
            for (call, result) in [
                ("StopPodSandbox", self.try_stop_pod(&id).await),
                ("RemovePodSandbox", self.try_remove_pod(&id).await),
            ] {
                // The case may have removed it itself.
                if let Err(status) = result.or_else(not_found_is_fine) {
                    failed.push(format!("{call}: {}", status.message()));
                }
            }
        }
        let images = std::mem::take(&mut *lock(&self.made.images));
        for reference in images {
            let request = v1::RemoveImageRequest { image: Some(image_spec(&reference)) };
            // A name that was never valid is nothing to remove.
            self.im().remove_image(request).await.ok();
        }
        let undo = std::mem::take(&mut *lock(&self.made.undo));
        for action in undo.into_iter().rev() {
            action();
        }
        std::fs::remove_dir_all(&self.dir).ok();
        anyhow::ensure!(failed.is_empty(), "cleaning up failed: {}", failed.join("; "));
        Ok(())
    }
}

fn not_found_is_fine(status: tonic::Status) -> Result<(), tonic::Status> {
    if status.code() == tonic::Code::NotFound { Ok(()) } else { Err(status) }
}

fn lock<V>(mutex: &Mutex<V>) -> std::sync::MutexGuard<'_, V> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A script that waits for its end.
pub(crate) const IDLE: &str = "trap 'exit 0' TERM; sleep 3600 & wait";

/// What the kubelet masks for `procMount: Default`.
pub(crate) const MASKED: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// What the kubelet makes read-only.
pub(crate) const READONLY: &[&str] =
    &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The namespaces of an ordinary pod: its own network and IPC, one PID namespace per container.
pub(crate) fn namespaces() -> v1::NamespaceOption {
    v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..v1::NamespaceOption::default() }
}

/// A reference as the CRI carries it.
pub(crate) fn image_spec(reference: &str) -> v1::ImageSpec {
    v1::ImageSpec {
        image: reference.to_owned(),
        user_specified_image: reference.to_owned(),
        ..v1::ImageSpec::default()
    }
}

/// Owned copies.
pub(crate) fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

/// The security context of a container's configuration, to be changed.
pub(crate) fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    config.linux.get_or_insert_with(Default::default).security_context.get_or_insert_with(Default::default)
}

/// The resources of a container's configuration, to be changed.
pub(crate) fn resources(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerResources {
    config.linux.get_or_insert_with(Default::default).resources.get_or_insert_with(Default::default)
}

/// The security context of a pod's configuration, to be changed.
pub(crate) fn pod_security(config: &mut v1::PodSandboxConfig) -> &mut v1::LinuxSandboxSecurityContext {
    config.linux.get_or_insert_with(Default::default).security_context.get_or_insert_with(Default::default)
}

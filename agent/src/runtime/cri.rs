//! CRI client: one lazily connected channel per socket, a deadline on every call, errors that say which call failed.
//!
//! A runtime that goes away makes calls fail with [`CriError::is_unavailable`]; the channel reconnects by itself on the
//! next call, so callers only have to try again later.

use std::path::PathBuf;
use std::time::Duration;

use cri_shim_api::v1;
use cri_shim_api::v1::image_service_client::ImageServiceClient;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::contracts::CriClients;

/// Deadline of calls that only read.
pub const READ_DEADLINE: Duration = Duration::from_secs(10);
/// Deadline of a pull as a whole; the runtime itself gives up a pull that makes no progress.
pub const PULL_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// Answers can be as large as 16 MiB per exec stream.
const MAX_MESSAGE: usize = 40 << 20;

/// A failed CRI call.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct CriError {
    /// RPC name.
    pub call: &'static str,
    /// gRPC code.
    pub code: Code,
    /// The runtime's message, as it goes into statuses and events.
    pub message: String,
}

impl CriError {
    fn new(call: &'static str, status: &Status) -> Self {
        let message = format!("rpc error: code = {:?} desc = {}", status.code(), status.message());
        Self { call, code: status.code(), message }
    }

    fn deadline(call: &'static str, after: Duration) -> Self {
        let message = format!("rpc error: code = DeadlineExceeded desc = {call}: no answer within {after:?}");
        Self { call, code: Code::DeadlineExceeded, message }
    }

    /// The runtime cannot be reached (now): says nothing about the pod.
    pub fn is_unavailable(&self) -> bool {
        self.code == Code::Unavailable
    }

    /// The runtime has answered, and so has ended what it was asked for: the connection did not break and no deadline passed.
    pub fn is_answer(&self) -> bool {
        !matches!(self.code, Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled)
    }

    /// The object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code == Code::NotFound
    }
}

/// The CRI, with deadlines. Clones share the connections.
#[derive(Debug, Clone)]
pub struct Cri {
    clients: CriClients,
    deadline: Duration,
}

/// Makes the clients; connects on the first call. `deadline` is that of calls that change something.
pub fn connect(runtime: PathBuf, images: PathBuf, deadline: Duration) -> Cri {
    let runtime_channel = channel(runtime);
    let images_channel = channel(images);
    let clients = CriClients {
        runtime: RuntimeServiceClient::new(runtime_channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE),
        images: ImageServiceClient::new(images_channel).max_decoding_message_size(MAX_MESSAGE),
    };
    Cri { clients, deadline }
}

fn channel(socket: PathBuf) -> Channel {
    // The URI is never resolved: the connector dials the socket.
    Endpoint::from_static("http://cri.invalid").connect_with_connector_lazy(tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    }))
}

/// Boxes the call: requests are large, and futures that hold them would be.
fn within<T>(
    call: &'static str,
    deadline: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>> + Send,
) -> impl Future<Output = Result<T, CriError>> + Send
where
    T: Send,
{
    let answer = Box::pin(answer);
    async move {
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(CriError::new(call, &status)),
            Err(_elapsed) => Err(CriError::deadline(call, deadline)),
        }
    }
}

impl Cri {
    /// The raw clients, for the parts that stream or proxy.
    pub fn clients(&self) -> CriClients {
        self.clients.clone()
    }

    /// Version.
    pub async fn version(&self) -> Result<v1::VersionResponse, CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::VersionRequest { version: "v1".to_owned() };
        within("Version", READ_DEADLINE, client.version(request)).await
    }

    /// Status.
    pub async fn status(&self) -> Result<v1::StatusResponse, CriError> {
        let mut client = self.clients.runtime.clone();
        within("Status", READ_DEADLINE, client.status(v1::StatusRequest { verbose: false })).await
    }

    /// Sandboxes, of one pod when `uid` is given.
    pub async fn list_sandboxes(&self, uid: Option<&str>) -> Result<Vec<v1::PodSandbox>, CriError> {
        let mut client = self.clients.runtime.clone();
        let filter = uid.map(|uid| v1::PodSandboxFilter {
            label_selector: super::labels::of_pod(uid),
            ..v1::PodSandboxFilter::default()
        });
        let answer = client.list_pod_sandbox(v1::ListPodSandboxRequest { filter });
        Ok(within("ListPodSandbox", READ_DEADLINE, answer).await?.items)
    }

    /// Containers, of one pod when `uid` is given.
    pub async fn list_containers(&self, uid: Option<&str>) -> Result<Vec<v1::Container>, CriError> {
        let mut client = self.clients.runtime.clone();
        let filter = uid.map(|uid| v1::ContainerFilter {
            label_selector: super::labels::of_pod(uid),
            ..v1::ContainerFilter::default()
        });
        let answer = client.list_containers(v1::ListContainersRequest { filter });
        Ok(within("ListContainers", READ_DEADLINE, answer).await?.containers)
    }

    /// One sandbox's status; `None` when it is gone.
    pub async fn sandbox_status(&self, id: &str) -> Result<Option<v1::PodSandboxStatus>, CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        found(within("PodSandboxStatus", READ_DEADLINE, client.pod_sandbox_status(request)).await)
            .map(|answer| answer.and_then(|answer| answer.status))
    }

    /// One container's status; `None` when it is gone.
    pub async fn container_status(&self, id: &str) -> Result<Option<v1::ContainerStatus>, CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        found(within("ContainerStatus", READ_DEADLINE, client.container_status(request)).await)
            .map(|answer| answer.and_then(|answer| answer.status))
    }

    /// RunPodSandbox; the id.
    pub async fn run_sandbox(&self, config: v1::PodSandboxConfig, handler: &str) -> Result<String, CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        // Upstream's double deadline: networks may be slow, and giving up early only makes the next try wait.
        let answer = client.run_pod_sandbox(request);
        Ok(within("RunPodSandbox", self.deadline.saturating_mul(2), answer).await?.pod_sandbox_id)
    }

    /// StopPodSandbox; gone counts as stopped.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        found(within("StopPodSandbox", self.deadline, client.stop_pod_sandbox(request)).await).map(|_| ())
    }

    /// RemovePodSandbox; gone counts as removed.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        found(within("RemovePodSandbox", self.deadline, client.remove_pod_sandbox(request)).await).map(|_| ())
    }

    /// CreateContainer; the id.
    pub async fn create_container(&self, request: v1::CreateContainerRequest) -> Result<String, CriError> {
        let mut client = self.clients.runtime.clone();
        Ok(within("CreateContainer", self.deadline, client.create_container(request)).await?.container_id)
    }

    /// StartContainer.
    pub async fn start_container(&self, id: &str) -> Result<(), CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        within("StartContainer", self.deadline, client.start_container(request)).await.map(|_| ())
    }

    /// StopContainer with its grace; gone counts as stopped.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), CriError> {
        let mut client = self.clients.runtime.clone();
        // Rounded up: a fraction of a second is not worth a whole one of the grace period.
        let seconds = grace.as_secs() + u64::from(grace.subsec_nanos() > 0);
        let timeout = i64::try_from(seconds).unwrap_or(i64::MAX);
        let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout };
        let answer = client.stop_container(request);
        found(within("StopContainer", self.deadline.saturating_add(grace), answer).await).map(|_| ())
    }

    /// RemoveContainer; gone counts as removed.
    pub async fn remove_container(&self, id: &str) -> Result<(), CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
        found(within("RemoveContainer", self.deadline, client.remove_container(request)).await).map(|_| ())
    }

    /// ReopenContainerLog: the container goes on in a new file at its log's path.
    pub async fn reopen_log(&self, id: &str) -> Result<(), CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::ReopenContainerLogRequest { container_id: id.to_owned() };
        within("ReopenContainerLog", READ_DEADLINE, client.reopen_container_log(request)).await.map(|_| ())
    }

    /// UpdateContainerResources.
    pub async fn update_resources(
        &self,
        id: &str,
        resources: v1::LinuxContainerResources,
    ) -> Result<(), CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            ..v1::UpdateContainerResourcesRequest::default()
        };
        let answer = client.update_container_resources(request);
        within("UpdateContainerResources", self.deadline, answer).await.map(|_| ())
    }

    /// Statistics of all pods, with their running containers.
    pub async fn sandbox_stats(&self) -> Result<Vec<v1::PodSandboxStats>, CriError> {
        let mut client = self.clients.runtime.clone();
        let answer = client.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest::default());
        Ok(within("ListPodSandboxStats", READ_DEADLINE, answer).await?.stats)
    }

    /// Statistics of one container; `None` when it is gone.
    pub async fn container_stats(&self, id: &str) -> Result<Option<v1::ContainerStats>, CriError> {
        let mut client = self.clients.runtime.clone();
        let request = v1::ContainerStatsRequest { container_id: id.to_owned() };
        found(within("ContainerStats", READ_DEADLINE, client.container_stats(request)).await)
            .map(|answer| answer.and_then(|answer| answer.stats))
    }

    /// The image that the runtime makes sandboxes from, where it tells: it is in no pod and no container.
    pub async fn sandbox_image(&self) -> Option<String> {
        let mut client = self.clients.runtime.clone();
        let answer = client.status(v1::StatusRequest { verbose: true });
        let info = within("Status", READ_DEADLINE, answer).await.ok()?.info;
        info.values().find_map(|text| sandbox_image_of(text))
    }

    /// Every image.
    pub async fn images(&self) -> Result<Vec<v1::Image>, CriError> {
        let mut client = self.clients.images.clone();
        let answer = client.list_images(v1::ListImagesRequest::default());
        Ok(within("ListImages", READ_DEADLINE, answer).await?.images)
    }

    /// RemoveImage; gone counts as removed.
    pub async fn remove_image(&self, id: &str) -> Result<(), CriError> {
        let mut client = self.clients.images.clone();
        let image = v1::ImageSpec { image: id.to_owned(), ..v1::ImageSpec::default() };
        let answer = client.remove_image(v1::RemoveImageRequest { image: Some(image) });
        found(within("RemoveImage", self.deadline, answer).await).map(|_| ())
    }

    /// Directory of the file system that holds the images; `None` when the runtime does not say.
    pub async fn image_directory(&self) -> Result<Option<PathBuf>, CriError> {
        let mut client = self.clients.images.clone();
        let answer =
            within("ImageFsInfo", READ_DEADLINE, client.image_fs_info(v1::ImageFsInfoRequest {})).await?;
        Ok(mount_point(answer.image_filesystems))
    }

    /// Directories of the file systems that hold the images and the containers' writable layers, each where the runtime
    /// says so.
    pub async fn file_systems(&self) -> Result<(Option<PathBuf>, Option<PathBuf>), CriError> {
        let mut client = self.clients.images.clone();
        let answer =
            within("ImageFsInfo", READ_DEADLINE, client.image_fs_info(v1::ImageFsInfoRequest {})).await?;
        Ok((mount_point(answer.image_filesystems), mount_point(answer.container_filesystems)))
    }

    /// ExecSync; the runtime ends the process at `timeout`.
    pub async fn exec(
        &self,
        id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse, CriError> {
        let mut client = self.clients.runtime.clone();
        let seconds = i64::try_from(timeout.as_secs().max(1)).unwrap_or(i64::MAX);
        let request = v1::ExecSyncRequest { container_id: id.to_owned(), cmd: command, timeout: seconds };
        // A runtime that keeps its own deadline answers first.
        let deadline = timeout.saturating_add(READ_DEADLINE);
        within("ExecSync", deadline, client.exec_sync(request)).await
    }

    /// ImageStatus; `None` when the image is not there.
    pub async fn image(&self, image: v1::ImageSpec) -> Result<Option<v1::Image>, CriError> {
        let mut client = self.clients.images.clone();
        let request = v1::ImageStatusRequest { image: Some(image), verbose: false };
        found(within("ImageStatus", READ_DEADLINE, client.image_status(request)).await)
            .map(|answer| answer.and_then(|answer| answer.image))
    }

    /// PullImage; the image reference.
    pub async fn pull(&self, request: v1::PullImageRequest) -> Result<String, CriError> {
        let mut client = self.clients.images.clone();
        Ok(within("PullImage", PULL_DEADLINE, client.pull_image(request)).await?.image_ref)
    }

    /// The event stream; it ends when the runtime does. The one call without a deadline: a runtime may answer only with
    /// its first event.
    pub async fn events(&self) -> Result<tonic::Streaming<v1::ContainerEventResponse>, CriError> {
        let mut client = self.clients.runtime.clone();
        let answer = client.get_container_events(v1::GetEventsRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| CriError::new("GetContainerEvents", &status))
    }
}

fn mount_point(file_systems: Vec<v1::FilesystemUsage>) -> Option<PathBuf> {
    file_systems.into_iter().next().and_then(|fs| fs.fs_id).map(|id| PathBuf::from(id.mountpoint))
}

/// `sandboxImage` of containerd's configuration, or `pause_image` of CRI-O's.
fn sandbox_image_of(info: &str) -> Option<String> {
    let info: serde_json::Value = serde_json::from_str(info).ok()?;
    ["sandboxImage", "pause_image"].iter().find_map(|key| Some(info.get(key)?.as_str()?.to_owned()))
}

fn found<T>(result: Result<T, CriError>) -> Result<Option<T>, CriError> {
    match result {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

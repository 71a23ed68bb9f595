//! A CRI runtime made of memory, served on a real unix socket; it survives a stop of its server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cri_shim_api::v1;
use cri_shim_api::v1::image_service_server::{ImageService, ImageServiceServer};
use cri_shim_api::v1::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use futures::Stream;
use tokio::net::UnixListener;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{BroadcastStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::{Journal, selected};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The runtime.
pub(super) struct FakeCri {
    runtime: Runtime,
    socket: PathBuf,
    server: Option<(JoinHandle<()>, CancellationToken)>,
}

impl FakeCri {
    pub(super) fn new(journal: Journal, socket: PathBuf) -> Self {
        let runtime = Runtime {
            journal,
            state: Arc::default(),
            events: broadcast::Sender::new(64),
            stalled: watch::Sender::new(false),
            held: Arc::default(),
            listed: Arc::default(),
        };
        Self { runtime, socket, server: None }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn serve(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.socket) {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        }
        let listener = UnixListener::bind(&self.socket).expect("a socket");
        let runtime = self.runtime.clone();
        let cancel = CancellationToken::new();
        let stopped = cancel.clone();
        let task = tokio::spawn(async move {
            let server = Server::builder()
                .add_service(RuntimeServiceServer::new(runtime.clone()))
                .add_service(ImageServiceServer::new(runtime))
                .serve_with_incoming(UnixListenerStream::new(listener));
            tokio::select! {
                served = server => served.expect("serves"),
                () = stopped.cancelled() => {}
            }
        });
        self.server = Some((task, cancel));
    }

    /// As kill -9: connections break, the state stays.
    pub(super) async fn stop(&mut self) {
        let (task, cancel) = self.server.take().expect("it serves");
        cancel.cancel();
        task.await.expect("it ends");
        self.runtime.events.send(None).ok();
    }

    /// Whether calls wait until they may go on.
    pub(super) fn stall(&self, stalled: bool) {
        self.runtime.stalled.send_replace(stalled);
    }

    /// How many calls had to wait.
    pub(super) fn held(&self) -> usize {
        self.runtime.held.load(Ordering::SeqCst)
    }

    /// How many lists of containers were given.
    pub(super) fn listed(&self) -> usize {
        self.runtime.listed.load(Ordering::SeqCst)
    }

    /// Has the agent look again.
    pub(super) fn nudge(&self) {
        self.runtime.tell();
    }

    /// Sandboxes and containers that are there, and how many instances of one container run at most.
    pub(super) fn left(&self) -> (usize, usize, usize) {
        let state = self.runtime.lock();
        let mut running: BTreeMap<String, usize> = BTreeMap::new();
        let is_running = |c: &&Container| c.status.state == v1::ContainerState::ContainerRunning as i32;
        for container in state.containers.values().filter(is_running) {
            let name = container.status.metadata.clone().unwrap_or_default().name;
            *running.entry(name).or_default() += 1;
        }
        (state.sandboxes.len(), state.containers.len(), running.values().copied().max().unwrap_or(0))
    }

    pub(super) fn exit(&self, name: &str, code: i32) {
        let mut state = self.runtime.lock();
        let newest = state
            .containers
            .values_mut()
            .filter(|c| c.status.metadata.as_ref().is_some_and(|m| m.name == name));
        if let Some(container) = newest.max_by_key(|c| c.status.created_at) {
            container.end(code);
        }
        drop(state);
        self.runtime.tell();
    }
}

#[derive(Clone)]
struct Runtime {
    journal: Journal,
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<Option<v1::ContainerEventResponse>>,
    /// Calls wait.
    stalled: watch::Sender<bool>,
    /// Calls that had to wait.
    held: Arc<AtomicUsize>,
    /// Lists of containers that were given.
    listed: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    clock: i64,
    sandboxes: BTreeMap<String, v1::PodSandbox>,
    containers: BTreeMap<String, Container>,
}

struct Container {
    sandbox: String,
    status: v1::ContainerStatus,
}

impl Container {
    fn end(&mut self, code: i32) {
        self.status.state = v1::ContainerState::ContainerExited as i32;
        self.status.exit_code = code;
        self.status.finished_at = now();
    }
}

fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).expect("before 2262")
}

impl Runtime {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells that something of the one pod changed.
    fn tell(&self) {
        let sandbox = self.lock().sandboxes.values().next_back().cloned();
        let event = v1::ContainerEventResponse {
            pod_sandbox_status: sandbox.map(|sandbox| v1::PodSandboxStatus {
                labels: sandbox.labels,
                ..v1::PodSandboxStatus::default()
            }),
            ..v1::ContainerEventResponse::default()
        };
        self.events.send(Some(event)).ok();
    }

    /// Returns when calls may go on.
    async fn gate(&self) {
        let mut stalled = self.stalled.subscribe();
        self.held.fetch_add(usize::from(*stalled.borrow()), Ordering::SeqCst);
        // The sender lives as long as the runtime does.
        stalled.wait_for(|stalled| !stalled).await.ok();
    }

    /// A name is taken until its container is removed, as in containerd.
    fn reserve(&self, metadata: &v1::ContainerMetadata, uid: Option<&String>) -> Result<(), Status> {
        let state = self.lock();
        let taken = state.containers.values().any(|other| {
            other.status.metadata.as_ref() == Some(metadata)
                && other.status.labels.get(crate::runtime::labels::POD_UID) == uid
        });
        if taken { Err(Status::unknown(format!("name {metadata:?} is reserved"))) } else { Ok(()) }
    }

    fn name_of(&self, id: &str) -> String {
        let state = self.lock();
        let metadata = state.containers.get(id).and_then(|container| container.status.metadata.clone());
        metadata.unwrap_or_default().name
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send + 'a>>;

/// Methods as `async_trait` writes them: a macro's output is not seen by that attribute.
macro_rules! not_offered {
    ($($name:ident($request:ident) -> $response:ident;)*) => {
        $(fn $name<'life0, 'async_trait>(
            &'life0 self,
            _request: Request<v1::$request>,
        ) -> Answer<'async_trait, v1::$response>
        where
            'life0: 'async_trait,
            Self: 'async_trait,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($name))) })
        })*
    };
}

macro_rules! not_streamed {
    ($($name:ident($request:ident) -> $stream:ident of $response:ident;)*) => {
        $(type $stream = Answers<v1::$response>;

        fn $name<'life0, 'async_trait>(
            &'life0 self,
            _request: Request<v1::$request>,
        ) -> Answer<'async_trait, Self::$stream>
        where
            'life0: 'async_trait,
            Self: 'async_trait,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($name))) })
        })*
    };
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    type GetContainerEventsStream = Answers<v1::ContainerEventResponse>;

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Result<Response<v1::RunPodSandboxResponse>, Status> {
        self.gate().await;
        let config = request.into_inner().config.unwrap_or_default();
        let metadata = config.metadata.unwrap_or_default();
        self.journal.add(format!("cri: run sandbox {}", metadata.attempt));
        let id = format!("sandbox{}", metadata.attempt);
        if self.lock().sandboxes.get(&id).is_some_and(|other| other.metadata.as_ref() == Some(&metadata)) {
            return Err(Status::unknown(format!("name {metadata:?} is reserved")));
        }
        let sandbox = v1::PodSandbox {
            id: id.clone(),
            metadata: Some(metadata),
            labels: config.labels,
            created_at: now(),
            ..v1::PodSandbox::default()
        };
        self.lock().sandboxes.insert(id.clone(), sandbox);
        self.tell();
        Ok(Response::new(v1::RunPodSandboxResponse { pod_sandbox_id: id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Result<Response<v1::StopPodSandboxResponse>, Status> {
        self.journal.add("cri: stop sandbox");
        let id = request.into_inner().pod_sandbox_id;
        if let Some(sandbox) = self.lock().sandboxes.get_mut(&id) {
            sandbox.state = v1::PodSandboxState::SandboxNotready as i32;
        }
        self.tell();
        Ok(Response::new(v1::StopPodSandboxResponse::default()))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Result<Response<v1::RemovePodSandboxResponse>, Status> {
        self.journal.add("cri: remove sandbox");
        let id = request.into_inner().pod_sandbox_id;
        let mut state = self.lock();
        state.containers.retain(|_, container| container.sandbox != id);
        state.sandboxes.remove(&id);
        Ok(Response::new(v1::RemovePodSandboxResponse::default()))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Result<Response<v1::PodSandboxStatusResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        let network = v1::PodSandboxNetworkStatus { ip: "10.244.0.7".to_owned(), ..Default::default() };
        let status = v1::PodSandboxStatus { id, network: Some(network), ..v1::PodSandboxStatus::default() };
        Ok(Response::new(v1::PodSandboxStatusResponse { status: Some(status), ..Default::default() }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Result<Response<v1::ListPodSandboxResponse>, Status> {
        self.gate().await;
        let filter = request.into_inner().filter.unwrap_or_default();
        let state = self.lock();
        let items =
            state.sandboxes.values().filter(|sandbox| selected(&sandbox.labels, &filter.label_selector));
        Ok(Response::new(v1::ListPodSandboxResponse { items: items.cloned().collect() }))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Result<Response<v1::CreateContainerResponse>, Status> {
        self.gate().await;
        let request = request.into_inner();
        let config = request.config.unwrap_or_default();
        let metadata = config.metadata.unwrap_or_default();
        let namespaces =
            config.linux.and_then(|linux| linux.security_context?.namespace_options).unwrap_or_default();
        let is_target = namespaces.pid == v1::NamespaceMode::Target as i32;
        let target = if is_target { format!(" target {}", namespaces.target_id) } else { String::new() };
        let claimed: Vec<String> =
            config.cdi_devices.iter().map(|device| format!(" cdi {}", device.name)).collect();
        let claimed = claimed.concat();
        self.journal.add(format!("cri: create {} {}{target}{claimed}", metadata.name, metadata.attempt));
        self.reserve(&metadata, config.labels.get(crate::runtime::labels::POD_UID))?;
        let mut state = self.lock();
        state.clock += 1;
        let id = format!("c{}", state.clock);
        let status = v1::ContainerStatus {
            id: id.clone(),
            metadata: Some(metadata),
            state: v1::ContainerState::ContainerCreated as i32,
            created_at: now(),
            image: config.image,
            labels: config.labels,
            annotations: config.annotations,
            ..v1::ContainerStatus::default()
        };
        state.containers.insert(id.clone(), Container { sandbox: request.pod_sandbox_id, status });
        Ok(Response::new(v1::CreateContainerResponse { container_id: id }))
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Result<Response<v1::StartContainerResponse>, Status> {
        self.gate().await;
        let id = request.into_inner().container_id;
        self.journal.add(format!("cri: start {}", self.name_of(&id)));
        if let Some(container) = self.lock().containers.get_mut(&id) {
            container.status.state = v1::ContainerState::ContainerRunning as i32;
            container.status.started_at = now();
        }
        self.tell();
        Ok(Response::new(v1::StartContainerResponse::default()))
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Result<Response<v1::StopContainerResponse>, Status> {
        self.gate().await;
        let request = request.into_inner();
        self.journal.add(format!("cri: stop {} {}", self.name_of(&request.container_id), request.timeout));
        if let Some(container) = self.lock().containers.get_mut(&request.container_id) {
            container.end(143);
        }
        self.tell();
        Ok(Response::new(v1::StopContainerResponse::default()))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Result<Response<v1::RemoveContainerResponse>, Status> {
        let id = request.into_inner().container_id;
        self.journal.add(format!("cri: remove {}", self.name_of(&id)));
        self.lock().containers.remove(&id);
        Ok(Response::new(v1::RemoveContainerResponse::default()))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        self.gate().await;
        let filter = request.into_inner().filter.unwrap_or_default();
        let state = self.lock();
        let containers = state
            .containers
            .values()
            .filter(|container| selected(&container.status.labels, &filter.label_selector))
            .map(|container| v1::Container {
                id: container.status.id.clone(),
                pod_sandbox_id: container.sandbox.clone(),
                metadata: container.status.metadata.clone(),
                state: container.status.state,
                labels: container.status.labels.clone(),
                annotations: container.status.annotations.clone(),
                ..v1::Container::default()
            });
        let containers = containers.collect();
        self.listed.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(v1::ListContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Result<Response<v1::ContainerStatusResponse>, Status> {
        let id = request.into_inner().container_id;
        let status = self.lock().containers.get(&id).map(|container| container.status.clone());
        match status {
            Some(status) => {
                Ok(Response::new(v1::ContainerStatusResponse { status: Some(status), ..Default::default() }))
            }
            None => Err(Status::not_found(id)),
        }
    }

    async fn exec_sync(
        &self,
        request: Request<v1::ExecSyncRequest>,
    ) -> Result<Response<v1::ExecSyncResponse>, Status> {
        self.journal.add(format!("cri: exec {}", self.name_of(&request.into_inner().container_id)));
        Ok(Response::new(v1::ExecSyncResponse::default()))
    }

    async fn get_container_events(
        &self,
        _request: Request<v1::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        // `None` ends the stream: the server was stopped.
        let events =
            BroadcastStream::new(self.events.subscribe()).map_while(|event| event.ok().flatten().map(Ok));
        Ok(Response::new(Box::pin(events)))
    }

    not_offered! {
        version(VersionRequest) -> VersionResponse;
        status(StatusRequest) -> StatusResponse;
        update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
        reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
        exec(ExecRequest) -> ExecResponse;
        attach(AttachRequest) -> AttachResponse;
        port_forward(PortForwardRequest) -> PortForwardResponse;
        container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
        list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
        pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
        update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
        runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse;
    }

    not_streamed! {
        stream_pod_sandboxes(StreamPodSandboxesRequest) -> StreamPodSandboxesStream of StreamPodSandboxesResponse;
        stream_containers(StreamContainersRequest) -> StreamContainersStream of StreamContainersResponse;
        stream_container_stats(StreamContainerStatsRequest) -> StreamContainerStatsStream of StreamContainerStatsResponse;
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> StreamPodSandboxStatsStream of StreamPodSandboxStatsResponse;
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) -> StreamPodSandboxMetricsStream of StreamPodSandboxMetricsResponse;
    }
}

#[tonic::async_trait]
impl ImageService for Runtime {
    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        let name = request.into_inner().image.unwrap_or_default().image;
        let image =
            (name != "missing").then(|| v1::Image { id: "sha256:1".to_owned(), ..v1::Image::default() });
        Ok(Response::new(v1::ImageStatusResponse { image, ..Default::default() }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        let name = request.into_inner().image.unwrap_or_default().image;
        if name == "missing" {
            return Err(Status::not_found("no such image"));
        }
        Ok(Response::new(v1::PullImageResponse { image_ref: "sha256:1".to_owned() }))
    }

    not_offered! {
        list_images(ListImagesRequest) -> ListImagesResponse;
        remove_image(RemoveImageRequest) -> RemoveImageResponse;
        image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
    }

    not_streamed! {
        stream_images(StreamImagesRequest) -> StreamImagesStream of StreamImagesResponse;
    }
}

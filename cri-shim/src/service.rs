//! The CRI RuntimeService: requests in, [`Runtime`] calls, answers and gRPC codes out. It decides nothing itself.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cri_shim_api::v1::{self, runtime_service_server::RuntimeService};
use cri_shim_streaming::runtime::{AttachRequest, ExecRequest, Wanted};
use cri_shim_streaming::server::Handle;
use futures::{Stream, StreamExt};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::exec::Executor;
use crate::runtime::Runtime;
use crate::status;
use crate::telemetry::{self, rpc, stage};

/// Items per message of a streamed list.
const BATCH: usize = 100;
/// Sandboxes per message of streamed metrics: each has some hundred figures.
const METRICS_BATCH: usize = 10;

type Answer<T> = Result<Response<T>, Status>;
type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves `runtime.v1.RuntimeService`.
pub struct Service {
    runtime: Arc<Runtime>,
    executor: Executor,
    streaming: Handle,
    cancel: CancellationToken,
}

impl Service {
    /// Serves `runtime`; streams of events end at `cancel`.
    pub fn new(
        runtime: Arc<Runtime>,
        executor: Executor,
        streaming: Handle,
        cancel: CancellationToken,
    ) -> Self {
        Self { runtime, executor, streaming, cancel }
    }

    /// The runtime, once it knows what ran before it.
    async fn runtime(&self) -> Result<&Arc<Runtime>, Status> {
        self.runtime.recovered().await?;
        Ok(&self.runtime)
    }

    /// The same for a request about a container; its id is completed, and noted in the request's span.
    async fn of_container(&self, id: &mut String) -> Result<&Arc<Runtime>, Status> {
        let runtime = self.runtime().await;
        let complete = runtime.as_ref().map_or(Ok(()), |runtime| runtime.registry.complete_container(id));
        rpc::container(id);
        complete?;
        runtime
    }

    /// The same for a request about a sandbox.
    async fn of_sandbox(&self, id: &mut String) -> Result<&Arc<Runtime>, Status> {
        let runtime = self.runtime().await;
        let complete = runtime.as_ref().map_or(Ok(()), |runtime| runtime.registry.complete_sandbox(id));
        rpc::sandbox(id);
        complete?;
        runtime
    }
}

/// A list in messages of `size` items; each is made when the client takes it.
fn batches<T, M>(items: Vec<T>, size: usize, message: fn(Vec<T>) -> M) -> Response<Messages<M>>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let mut items = items.into_iter();
    let messages = std::iter::from_fn(move || {
        let batch: Vec<_> = items.by_ref().take(size).collect();
        (!batch.is_empty()).then(|| Ok(message(batch)))
    });
    Response::new(Box::pin(futures::stream::iter(messages)))
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(status::version()))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Answer<v1::RunPodSandboxResponse> {
        let pod_sandbox_id = self.runtime().await?.run_sandbox(request.into_inner()).await?;
        rpc::sandbox(&pod_sandbox_id);
        Ok(Response::new(v1::RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        let mut id = request.into_inner().pod_sandbox_id;
        self.of_sandbox(&mut id).await?.stop_sandbox(&id).await?;
        Ok(Response::new(v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        let mut id = request.into_inner().pod_sandbox_id;
        self.of_sandbox(&mut id).await?.remove_sandbox(&id).await?;
        Ok(Response::new(v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let v1::PodSandboxStatusRequest { mut pod_sandbox_id, verbose } = request.into_inner();
        let runtime = self.of_sandbox(&mut pod_sandbox_id).await?;
        let mut response = runtime.sandbox_status_response(&pod_sandbox_id, false)?;
        if verbose {
            response.info = runtime.sandbox_info(&pod_sandbox_id)?;
        }
        Ok(Response::new(response))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        let items = self.runtime().await?.list_sandboxes(request.get_ref().filter.as_ref());
        Ok(Response::new(v1::ListPodSandboxResponse { items }))
    }

    type StreamPodSandboxesStream = Messages<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = self.runtime().await?.list_sandboxes(request.get_ref().filter.as_ref());
        Ok(batches(items, BATCH, |pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let mut request = request.into_inner();
        let runtime = self.of_sandbox(&mut request.pod_sandbox_id).await?;
        let container_id = runtime.create_container(request).await?;
        rpc::container(&container_id);
        Ok(Response::new(v1::CreateContainerResponse { container_id }))
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerResponse> {
        let mut id = request.into_inner().container_id;
        self.of_container(&mut id).await?.start_container(&id).await?;
        Ok(Response::new(v1::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Answer<v1::StopContainerResponse> {
        let v1::StopContainerRequest { mut container_id, timeout } = request.into_inner();
        let runtime = self.of_container(&mut container_id).await?;
        runtime.stop_container(&container_id, timeout).await?;
        Ok(Response::new(v1::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        let mut id = request.into_inner().container_id;
        self.of_container(&mut id).await?.remove_container(&id).await?;
        Ok(Response::new(v1::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersResponse> {
        let containers = self.runtime().await?.list_containers(request.get_ref().filter.as_ref());
        Ok(Response::new(v1::ListContainersResponse { containers }))
    }

    type StreamContainersStream = Messages<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let items = self.runtime().await?.list_containers(request.get_ref().filter.as_ref());
        Ok(batches(items, BATCH, |containers| v1::StreamContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let v1::ContainerStatusRequest { mut container_id, verbose } = request.into_inner();
        let runtime = self.of_container(&mut container_id).await?;
        let mut response = runtime.container_status_response(&container_id, false)?;
        if verbose {
            response.info = runtime.container_info(&container_id).await?;
        }
        Ok(Response::new(response))
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        let mut request = request.into_inner();
        self.of_container(&mut request.container_id).await?.update_resources(request).await?;
        Ok(Response::new(v1::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let mut id = request.into_inner().container_id;
        self.of_container(&mut id).await?.reopen_log(&id).await?;
        Ok(Response::new(v1::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, request: Request<v1::ExecSyncRequest>) -> Answer<v1::ExecSyncResponse> {
        let v1::ExecSyncRequest { mut container_id, cmd, timeout } = request.into_inner();
        let runtime = self.of_container(&mut container_id).await?;
        let container = runtime.running_container(&container_id)?;
        let limit = u64::try_from(timeout).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
        let output = match runtime.own_shim(&container) {
            Some(shim) => stage("exec", shim.exec_sync(&container_id, &cmd, limit)).await,
            None => stage("exec", self.executor.exec_sync(&container_id, &cmd, limit)).await,
        };
        let output = output.map_err(|error| Status::from(&error))?;
        Ok(Response::new(v1::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: i32::try_from(output.exit_code).unwrap_or(i32::MAX),
        }))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        let mut request = request.into_inner();
        self.of_container(&mut request.container_id).await?.running_container(&request.container_id)?;
        let wanted =
            Wanted { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, tty: request.tty };
        let request = ExecRequest { container: request.container_id, command: request.cmd, wanted };
        let url =
            self.streaming.exec(request).map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(v1::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        let mut request = request.into_inner();
        self.of_container(&mut request.container_id).await?.running_container(&request.container_id)?;
        let wanted =
            Wanted { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, tty: request.tty };
        let request = AttachRequest { container: request.container_id, wanted };
        let url =
            self.streaming.attach(request).map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(v1::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Answer<v1::PortForwardResponse> {
        let mut id = request.into_inner().pod_sandbox_id;
        self.of_sandbox(&mut id).await?.ready_sandbox(&id)?;
        let url =
            self.streaming.port_forward(&id).map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(v1::PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Answer<v1::ContainerStatsResponse> {
        let mut id = request.into_inner().container_id;
        let stats = self.of_container(&mut id).await?.container_stats(&id).await?;
        Ok(Response::new(v1::ContainerStatsResponse { stats: Some(stats) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        let stats = self.runtime().await?.list_container_stats(request.get_ref().filter.as_ref()).await?;
        Ok(Response::new(v1::ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = Messages<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let stats = self.runtime().await?.list_container_stats(request.get_ref().filter.as_ref()).await?;
        Ok(batches(stats, BATCH, |container_stats| v1::StreamContainerStatsResponse { container_stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        let mut id = request.into_inner().pod_sandbox_id;
        let stats = self.of_sandbox(&mut id).await?.sandbox_stats(&id).await?;
        Ok(Response::new(v1::PodSandboxStatsResponse { stats: Some(stats) }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        let stats = self.runtime().await?.list_sandbox_stats(request.get_ref().filter.as_ref()).await?;
        Ok(Response::new(v1::ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = Messages<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let stats = self.runtime().await?.list_sandbox_stats(request.get_ref().filter.as_ref()).await?;
        Ok(batches(stats, BATCH, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        // Only ever carries a pod CIDR, which the CNI configuration brings: it is kept to be shown, and changes nothing.
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config);
        if let Some(network) = network {
            self.runtime.collector.set_pod_cidr(network.pod_cidr)?;
        }
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        // Answered at any time: it is how a client learns that the runtime is not ready.
        self.runtime.handlers.look_again();
        Ok(Response::new(status::status(&self.runtime, request.get_ref().verbose)))
    }

    async fn checkpoint_container(
        &self,
        request: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        let mut request = request.into_inner();
        self.of_container(&mut request.container_id).await?.checkpoint(request).await?;
        Ok(Response::new(v1::CheckpointContainerResponse {}))
    }

    type GetContainerEventsStream = Messages<v1::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let events = BroadcastStream::new(self.runtime().await?.events.follow());
        let messages = events.map(|event| {
            // The client starts over: it follows again, then lists.
            event.map_err(|BroadcastStreamRecvError::Lagged(missed)| {
                telemetry::events_missed(missed);
                Status::data_loss(format!("the client is too slow: it missed {missed} events"))
            })
        });
        let messages = messages.take_until(self.cancel.clone().cancelled_owned());
        Ok(Response::new(Box::pin(messages)))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        Ok(Response::new(v1::ListMetricDescriptorsResponse { descriptors: Runtime::metric_descriptors() }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        let pod_metrics = self.runtime().await?.sandbox_metrics().await?;
        Ok(Response::new(v1::ListPodSandboxMetricsResponse { pod_metrics }))
    }

    type StreamPodSandboxMetricsStream = Messages<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let metrics = self.runtime().await?.sandbox_metrics().await?;
        Ok(batches(metrics, METRICS_BATCH, |pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        }))
    }

    async fn runtime_config(
        &self,
        _: Request<v1::RuntimeConfigRequest>,
    ) -> Answer<v1::RuntimeConfigResponse> {
        Ok(Response::new(status::runtime_config(&self.runtime)))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        let mut request = request.into_inner();
        self.of_sandbox(&mut request.pod_sandbox_id).await?.update_sandbox_resources(request).await?;
        Ok(Response::new(v1::UpdatePodSandboxResourcesResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn streamed_lists_come_whole_and_in_bounded_messages() {
        for (count, messages) in [(0, 0), (1, 1), (BATCH, 1), (BATCH + 1, 2), (10 * BATCH, 10)] {
            let items: Vec<usize> = (0..count).collect();
            let got: Vec<Vec<usize>> = batches(items.clone(), BATCH, |batch| batch)
                .into_inner()
                .map(|batch| batch.expect("a message"))
                .collect()
                .await;
            assert_eq!(got.len(), messages, "{count} items");
            assert!(got.iter().all(|batch| batch.len() <= BATCH));
            assert_eq!(got.concat(), items);
        }
    }
}

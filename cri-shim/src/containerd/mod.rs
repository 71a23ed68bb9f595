//! containerd's native API, reduced to what a CRI server needs.
//!
//! Input: a socket path and a containerd namespace. Output: small typed calls, one file per containerd service, each with
//! a deadline and an error that names the call and its object. Connections are made when first used and again after
//! containerd died; a call while it is away fails at once with `Unavailable`.
//! This module knows no CRI message, keeps no state of its own and never touches the host.

pub mod containers;
pub mod error;
pub mod events;
pub mod options;
pub mod snapshots;
pub mod tasks;

use std::path::Path;
use std::time::{Duration, Instant};

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{CreateNamespaceRequest, Namespace};
use hyper_util::rt::TokioIo;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

pub use error::ContainerdError;

use crate::telemetry;

/// Deadline of calls that only read or write containerd's metadata.
pub const METADATA_DEADLINE: Duration = Duration::from_secs(10);
/// Deadline of calls that start or end processes or unpack layers on a busy node.
pub const TASK_DEADLINE: Duration = Duration::from_secs(120);
/// Largest answer accepted: lists of every container with its spec stay below it on a full node.
const MAX_MESSAGE: usize = 32 << 20;

/// A channel to containerd that carries the namespace header.
pub type Service = InterceptedService<Channel, Headers>;

/// The namespace header that containerd reads on every request.
#[derive(Clone, Debug)]
pub struct Headers {
    namespace: MetadataValue<Ascii>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        Ok(request)
    }
}

/// A cheap handle: clones share one connection.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    headers: Headers,
    namespace: String,
}

impl Client {
    /// A handle that connects when it is first used.
    pub fn new(socket: &Path, namespace: &str) -> Result<Self, ContainerdError> {
        let header = namespace
            .parse()
            .map_err(|source| ContainerdError::Namespace { namespace: namespace.to_owned(), source })?;
        let path = socket.to_owned();
        let channel = Endpoint::from_static("http://containerd.invalid")
            .connect_timeout(Duration::from_secs(5))
            .connect_with_connector_lazy(tower::service_fn(move |_: http::Uri| {
                let path = path.clone();
                async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
            }));
        Ok(Self { channel, headers: Headers { namespace: header }, namespace: namespace.to_owned() })
    }

    /// The containerd namespace that every call works in.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// containerd's version, which is also the probe that it is there.
    pub async fn version(&self) -> Result<String, ContainerdError> {
        let mut client = VersionClient::new(self.service());
        let answer = call("Version", "", METADATA_DEADLINE, client.version(())).await?;
        Ok(answer.version)
    }

    /// Makes the namespace known to containerd; one that exists is fine.
    pub async fn ensure_namespace(&self) -> Result<(), ContainerdError> {
        let mut client = NamespacesClient::new(self.service());
        let namespace = Namespace { name: self.namespace.clone(), ..Namespace::default() };
        let request = CreateNamespaceRequest { namespace: Some(namespace) };
        match call("Namespaces.Create", &self.namespace, METADATA_DEADLINE, client.create(request)).await {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    /// The bare connection, for services that this module does not wrap; see [`Client::request`].
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A request for [`Client::channel`]: with the namespace header and a deadline.
    pub fn request<T>(&self, message: T, deadline: Duration) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.headers.namespace.clone());
        request.set_timeout(deadline);
        request
    }

    fn service(&self) -> Service {
        InterceptedService::new(self.channel.clone(), self.headers.clone())
    }

    fn containers_client(&self) -> ContainersClient<Service> {
        ContainersClient::new(self.service()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn tasks_client(&self) -> TasksClient<Service> {
        TasksClient::new(self.service()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn events_client(&self) -> EventsClient<Service> {
        EventsClient::new(self.service()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn snapshots_client(&self) -> SnapshotsClient<Service> {
        SnapshotsClient::new(self.service()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// Runs one call under `deadline`, naming it and its object in the error.
async fn call<T>(
    name: &'static str,
    object: &str,
    deadline: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, ContainerdError> {
    let begun = Instant::now();
    let answer = tokio::time::timeout(deadline, answer).await;
    telemetry::containerd_call(name, begun.elapsed(), !matches!(answer, Ok(Ok(_))));
    match answer {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(ContainerdError::call(name, object, status)),
        Err(_) => Err(ContainerdError::Deadline { call: name, object: object.to_owned(), deadline }),
    }
}

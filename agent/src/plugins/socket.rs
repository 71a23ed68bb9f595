//! gRPC over Unix sockets: calls with deadlines, and small services whose methods are functions.
//!
//! Messages are `prost` structs of whoever calls; a method is its path. Nothing is generated.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::chain::chain;

/// A channel to a socket; connects on the first call, and again after the other side went.
pub fn channel(socket: PathBuf) -> Channel {
    Endpoint::from_static("http://plugin.invalid").connect_with_connector_lazy(tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    }))
}

/// One call with a deadline.
pub async fn unary<Q, A>(
    channel: &Channel,
    path: &'static str,
    request: Q,
    deadline: Duration,
) -> Result<A, Status>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    let call = async {
        grpc.ready().await.map_err(|error| Status::unavailable(chain(&error)))?;
        let codec = ProstCodec::<Q, A>::default();
        grpc.unary(Request::new(request), PathAndQuery::from_static(path), codec).await
    };
    match tokio::time::timeout(deadline, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_elapsed) => Err(late(deadline)),
    }
}

/// A stream of answers; its beginning has a deadline.
pub async fn stream<Q, A>(
    channel: &Channel,
    path: &'static str,
    request: Q,
    deadline: Duration,
) -> Result<Streaming<A>, Status>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    let call = async {
        grpc.ready().await.map_err(|error| Status::unavailable(chain(&error)))?;
        let codec = ProstCodec::<Q, A>::default();
        grpc.server_streaming(Request::new(request), PathAndQuery::from_static(path), codec).await
    };
    match tokio::time::timeout(deadline, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_elapsed) => Err(late(deadline)),
    }
}

fn late(deadline: Duration) -> Status {
    Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs()))
}

/// Serves on `socket`, which is made anew, until `cancel`.
pub async fn serve<S>(socket: &Path, service: S, cancel: CancellationToken) -> anyhow::Result<()>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    let listener = listen(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), cancel.cancelled_owned())
        .await
        .with_context(|| format!("cannot serve on {}", socket.display()))
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = socket.parent() {
        std::fs::create_dir_all(directory)?;
    }
    crate::files::remove(socket)?;
    UnixListener::bind(socket)
}

/// Answers one call with a function.
pub async fn answer<Q, A, F>(
    request: http::Request<Body>,
    answer: impl FnOnce(Q) -> F + Clone + Send + 'static,
) -> http::Response<Body>
where
    Q: Message + Default + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
    F: Future<Output = Result<A, Status>> + Send + 'static,
{
    let service = tower::service_fn(move |request: Request<Q>| {
        let answer = answer.clone();
        async move { answer(request.into_inner()).await.map(Response::new) }
    });
    Grpc::new(ProstCodec::<A, Q>::default()).unary(service, request).await
}

/// The answer to a method that is not served.
pub fn unimplemented() -> http::Response<Body> {
    Status::unimplemented("the method is not served here").into_http()
}

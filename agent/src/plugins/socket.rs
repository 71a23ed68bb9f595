//! gRPC over Unix sockets: calls with deadlines, and small services whose methods are functions.
//!
//! Messages are `prost` structs of whoever calls; a method is its path. Nothing is generated.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;
use futures::future::BoxFuture;
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
    let call = async {
        let mut grpc = ready(channel).await?;
        let codec = ProstCodec::<Q, A>::default();
        grpc.unary(Request::new(request), PathAndQuery::from_static(path), codec).await
    };
    within(deadline, call).await
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
    let call = async {
        let mut grpc = ready(channel).await?;
        let codec = ProstCodec::<Q, A>::default();
        grpc.server_streaming(Request::new(request), PathAndQuery::from_static(path), codec).await
    };
    within(deadline, call).await
}

/// A client whose channel is connected.
async fn ready(channel: &Channel) -> Result<tonic::client::Grpc<Channel>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(chain(&error)))?;
    Ok(grpc)
}

async fn within<A>(
    deadline: Duration,
    call: impl Future<Output = Result<Response<A>, Status>>,
) -> Result<A, Status> {
    match tokio::time::timeout(deadline, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_elapsed) => Err(Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs()))),
    }
}

/// A small service.
pub trait Methods: Clone + Send + Sync + 'static {
    /// Its full name.
    const NAME: &'static str;

    /// Answers one call: with [`answer`], or with [`unimplemented`] where there is no such method.
    fn call(self, request: http::Request<Body>) -> impl Future<Output = http::Response<Body>> + Send;
}

/// What the server takes for a service.
#[derive(Clone)]
struct Served<M>(M);

impl<M: Methods> NamedService for Served<M> {
    const NAME: &'static str = M::NAME;
}

impl<M: Methods> tower::Service<http::Request<Body>> for Served<M> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.0.clone().call(request).map(Ok).boxed()
    }
}

/// Serves on `socket`, which is made anew, until `cancel`.
pub async fn serve<M: Methods>(socket: &Path, methods: M, cancel: CancellationToken) -> anyhow::Result<()> {
    let listener = listen(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    tonic::transport::Server::builder()
        .add_service(Served(methods))
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

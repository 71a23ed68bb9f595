//! Serves the registration of plugins and the pod-resources API on Unix sockets.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::Context as _;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use prost::Message;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::wire::{self, Empty, GetRequest, GetResponse, PodResourcesList, RegisterRequest};
use super::{Devices, pod_resources};
use crate::contracts::PodLookup;

/// Serves on `socket`, which is made anew, until `cancel`.
pub(super) async fn serve<S>(socket: &Path, service: S, cancel: CancellationToken) -> anyhow::Result<()>
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
pub(super) async fn unary<Q, A, F>(
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
pub(super) fn unimplemented() -> http::Response<Body> {
    Status::unimplemented("the method is not served here").into_http()
}

/// `v1beta1.Registration`.
#[derive(Clone)]
pub(super) struct Registration(pub(super) Devices);

impl NamedService for Registration {
    const NAME: &'static str = "v1beta1.Registration";
}

impl tower::Service<http::Request<Body>> for Registration {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let devices = self.0.clone();
        async move {
            if request.uri().path() != wire::REGISTER {
                return Ok(unimplemented());
            }
            let register =
                move |request: RegisterRequest| async move { devices.register(request).map(|()| Empty {}) };
            Ok(unary(request, register).await)
        }
        .boxed()
    }
}

/// `v1.PodResourcesLister`.
#[derive(Clone)]
pub(super) struct PodResourcesLister(pub(super) Devices, pub(super) Arc<dyn PodLookup>);

impl NamedService for PodResourcesLister {
    const NAME: &'static str = "v1.PodResourcesLister";
}

impl tower::Service<http::Request<Body>> for PodResourcesLister {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (devices, pods) = (self.0.clone(), Arc::clone(&self.1));
        async move {
            Ok(match request.uri().path() {
                wire::LIST => {
                    let list = move |_: Empty| async move {
                        Ok(PodResourcesList { pods: pod_resources::list(&devices, &pods.pods()) })
                    };
                    unary(request, list).await
                }
                wire::GET => {
                    let get = move |wanted: GetRequest| async move {
                        let pod = pod_resources::get(&devices, &pods.pods(), &wanted)?;
                        Ok(GetResponse { pod: Some(pod) })
                    };
                    unary(request, get).await
                }
                wire::ALLOCATABLE => {
                    let allocatable = move |_: Empty| async move { Ok(pod_resources::allocatable(&devices)) };
                    unary(request, allocatable).await
                }
                _ => unimplemented(),
            })
        }
        .boxed()
    }
}

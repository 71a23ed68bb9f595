//! Watches every gRPC call: a span with the object it is about, its outcome in the log, its count and time.
//!
//! A layer around the services, so that none of them needs to know. The outcome is what the client gets to see: the status
//! in the answer's head or trailer, or `Cancelled` when the client left before.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument, Span, field};

use super::{METRICS, Rpc, RpcOutcome, milliseconds};
use crate::host::memory;

/// Longest part of an object's name in a span; ids have 64 digits.
const MAX_NAME: usize = 128;

/// How much of a request belongs in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Noise {
    /// Changes something: always.
    Change,
    /// Asked all the time, or by probes: only in detail, unless the server is at fault.
    Frequent,
}

use Noise::{Change, Frequent};

/// Every RPC of the CRI.
const RPCS: [(&str, Noise); 41] = [
    ("Version", Frequent),
    ("RunPodSandbox", Change),
    ("StopPodSandbox", Change),
    ("RemovePodSandbox", Change),
    ("PodSandboxStatus", Frequent),
    ("ListPodSandbox", Frequent),
    ("StreamPodSandboxes", Frequent),
    ("CreateContainer", Change),
    ("StartContainer", Change),
    ("StopContainer", Change),
    ("RemoveContainer", Change),
    ("ListContainers", Frequent),
    ("StreamContainers", Frequent),
    ("ContainerStatus", Frequent),
    ("UpdateContainerResources", Change),
    ("ReopenContainerLog", Change),
    ("ExecSync", Frequent),
    ("Exec", Change),
    ("Attach", Change),
    ("PortForward", Change),
    ("ContainerStats", Frequent),
    ("ListContainerStats", Frequent),
    ("StreamContainerStats", Frequent),
    ("PodSandboxStats", Frequent),
    ("ListPodSandboxStats", Frequent),
    ("StreamPodSandboxStats", Frequent),
    ("UpdateRuntimeConfig", Change),
    ("Status", Frequent),
    ("CheckpointContainer", Change),
    ("GetContainerEvents", Change),
    ("ListMetricDescriptors", Frequent),
    ("ListPodSandboxMetrics", Frequent),
    ("StreamPodSandboxMetrics", Frequent),
    ("RuntimeConfig", Frequent),
    ("UpdatePodSandboxResources", Change),
    ("ListImages", Frequent),
    ("StreamImages", Frequent),
    ("ImageStatus", Frequent),
    ("PullImage", Change),
    ("RemoveImage", Change),
    ("ImageFsInfo", Frequent),
];

/// Notes in the span of this request which sandbox it is about.
pub fn sandbox(id: &str) {
    note("sandbox", id);
}

/// Notes in the span of this request which container it is about.
pub fn container(id: &str) {
    note("container", id);
}

/// Notes in the span of this request which image it is about.
pub fn image(name: &str) {
    note("image", name);
}

fn note(kind: &'static str, name: &str) {
    let end = name.floor_char_boundary(MAX_NAME);
    Span::current().record(kind, &name[..end]);
}

/// Puts a [`Watched`] around a service.
#[derive(Clone, Copy, Debug)]
pub struct Watch;

impl<S> Layer<S> for Watch {
    type Service = Watched<S>;

    fn layer(&self, inner: S) -> Watched<S> {
        Watched { inner }
    }
}

/// A service whose calls are watched.
#[derive(Clone, Debug)]
pub struct Watched<S> {
    inner: S,
}

impl<S, A, B> Service<Request<A>> for Watched<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<WatchedBody<B>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let mut call = Call::begin(request.uri().path());
        let work = self.inner.call(request).instrument(call.span.clone());
        Box::pin(async move {
            let response = work.await?;
            let status = Status::from_header_map(response.headers());
            if let Some(status) = status {
                call.end(&status);
            }
            Ok(response.map(|inner| WatchedBody { inner, call }))
        })
    }
}

/// An answer whose trailer is watched.
#[derive(Debug)]
pub struct WatchedBody<B> {
    inner: B,
    call: Call,
}

impl<B: Body + Unpin> Body for WatchedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.call.end(&status_of(trailers));
                }
            }
            Poll::Ready(Some(Err(_))) => self.call.end(&Status::internal("the answer broke")),
            Poll::Ready(None) => self.call.end(&Status::ok("")),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

fn status_of(trailers: &HeaderMap) -> Status {
    Status::from_header_map(trailers).unwrap_or_else(|| Status::ok(""))
}

/// One call under way. Dropped before its end, it was cancelled.
#[derive(Debug)]
struct Call {
    rpc: &'static str,
    noise: Noise,
    begun: Instant,
    span: Span,
    ended: bool,
}

impl Call {
    fn begin(path: &str) -> Self {
        let name = path.rsplit('/').next().unwrap_or_default();
        // What is no RPC of ours is answered by the router; it must not make labels of its own.
        let (rpc, noise) = RPCS.into_iter().find(|(known, _)| *known == name).unwrap_or(("other", Change));
        let span = tracing::info_span!(
            "rpc",
            name = rpc,
            sandbox = field::Empty,
            container = field::Empty,
            image = field::Empty
        );
        METRICS.rpcs_in_flight.inc();
        Self { rpc, noise, begun: Instant::now(), span, ended: false }
    }

    fn end(&mut self, status: &Status) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        memory::after_work();
        if self.noise == Change {
            memory::after_change();
        }
        let time = self.begun.elapsed();
        METRICS.rpcs_in_flight.dec();
        METRICS.rpc_times.get_or_create(&Rpc { rpc: self.rpc }).observe(time.as_secs_f64());
        let code = format!("{:?}", status.code());
        METRICS.rpcs.get_or_create(&RpcOutcome { rpc: self.rpc, code: code.clone() }).inc();
        let _in_span = self.span.enter();
        let milliseconds = milliseconds(time);
        let error = status.message();
        match (status.code(), self.noise) {
            (Code::Ok, Frequent) => tracing::debug!(code, milliseconds, "answered"),
            (Code::Ok, Change) => tracing::info!(code, milliseconds, "answered"),
            (
                Code::Internal
                | Code::Unknown
                | Code::Unavailable
                | Code::DataLoss
                | Code::DeadlineExceeded
                | Code::ResourceExhausted,
                _,
            ) => tracing::warn!(code, milliseconds, error, "failed"),
            (Code::NotFound | Code::Cancelled, Frequent) => {
                tracing::debug!(code, milliseconds, error, "refused");
            }
            _ => tracing::info!(code, milliseconds, error, "refused"),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(&Status::cancelled("the client went away"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{BodyExt, Empty, StreamBody};

    fn counted(rpc: &'static str, code: &str) -> u64 {
        METRICS.rpcs.get_or_create(&RpcOutcome { rpc, code: code.to_owned() }).get()
    }

    fn request(rpc: &str) -> Request<()> {
        Request::builder().uri(format!("http://cri/runtime.v1.RuntimeService/{rpc}")).body(()).unwrap()
    }

    #[test]
    fn every_rpc_of_the_api_is_known() {
        let api = include_str!("../../api/proto/runtime/v1/api.proto");
        let names = api.lines().filter_map(|line| line.trim().strip_prefix("rpc ")?.split('(').next());
        let names: std::collections::BTreeSet<_> = names.collect();
        assert_eq!(names, RPCS.iter().map(|(name, _)| *name).collect());
    }

    #[tokio::test]
    async fn an_error_in_the_head_is_the_outcome() {
        let mut service = Watch.layer(tower::service_fn(async |_: Request<()>| {
            Ok::<_, ()>(Status::not_found("gone").into_http::<Empty<Bytes>>())
        }));
        let before = counted("StopContainer", "NotFound");
        drop(service.call(request("StopContainer")).await.unwrap());
        assert_eq!(counted("StopContainer", "NotFound"), before + 1);
        assert_eq!(counted("StopContainer", "Cancelled"), 0);
    }

    #[tokio::test]
    async fn a_trailer_is_the_outcome_and_a_dropped_answer_is_cancelled() {
        let answer = async |_: Request<()>| {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", http::HeaderValue::from_static("15"));
            let frames =
                vec![Ok::<_, ()>(Frame::data(Bytes::from_static(b"x"))), Ok(Frame::trailers(trailers))];
            Ok::<_, ()>(Response::new(StreamBody::new(futures::stream::iter(frames))))
        };
        let mut service = Watch.layer(tower::service_fn(answer));
        let response = service.call(request("GetContainerEvents")).await.unwrap();
        let before = counted("GetContainerEvents", "DataLoss");
        response.into_body().collect().await.unwrap();
        assert_eq!(counted("GetContainerEvents", "DataLoss"), before + 1);
        let response = service.call(request("GetContainerEvents")).await.unwrap();
        let before = counted("GetContainerEvents", "Cancelled");
        drop(response);
        assert_eq!(counted("GetContainerEvents", "Cancelled"), before + 1);
    }

    #[tokio::test]
    async fn paths_of_strangers_make_no_labels() {
        let mut service = Watch.layer(tower::service_fn(async |_: Request<()>| {
            Ok::<_, ()>(Status::unimplemented("").into_http::<Empty<Bytes>>())
        }));
        let before = counted("other", "Unimplemented");
        for name in ["a", "b", &"c".repeat(1000)] {
            drop(service.call(request(name)).await.unwrap());
        }
        assert_eq!(counted("other", "Unimplemented"), before + 3);
    }
}

//! A registry in memory on a loopback port: what the suite's images are pulled from.
//!
//! Plain HTTP, as every CRI accepts for loopback addresses. Repositories below `private/` want a user and a password.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use base64::Engine;
use futures::StreamExt;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use tokio::net::TcpListener;

/// Who may pull from `private/`.
pub(crate) const USER: &str = "conformance";
/// With which password.
pub(crate) const PASSWORD: &str = "correct horse";

/// Media type and bytes by the path below `/v2/`.
pub(crate) type Objects = HashMap<String, (String, Bytes)>;

/// A running registry.
#[derive(Clone)]
pub(crate) struct Registry {
    /// Host and port.
    pub(crate) address: String,
    asked: Arc<Mutex<Vec<String>>>,
    stalled: Arc<Mutex<BTreeSet<String>>>,
}

/// What an answer carries.
type Body = BoxBody<Bytes, Infallible>;

impl Registry {
    /// Serves `objects` until the program ends, on `port` or a free one.
    pub(crate) async fn start(objects: Arc<Objects>, port: u16) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.context("the suite's registry")?;
        let this = Self {
            address: listener.local_addr()?.to_string(),
            asked: Arc::default(),
            stalled: Arc::default(),
        };
        let (asked, stalled) = (Arc::clone(&this.asked), Arc::clone(&this.stalled));
        tokio::spawn(async move {
            loop {
                // An accept that fails (no descriptors left) is tried again at the client's next try.
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                };
                let (objects, asked, stalled) =
                    (Arc::clone(&objects), Arc::clone(&asked), Arc::clone(&stalled));
                let service = service_fn(move |request| {
                    let answer = answer(&objects, &asked, &stalled, &request);
                    async move { Ok::<_, Infallible>(answer) }
                });
                tokio::spawn(async move {
                    let io = hyper_util::rt::TokioIo::new(stream);
                    // A client that leaves early ends its own connection only.
                    hyper::server::conn::http1::Builder::new().serve_connection(io, service).await.ok();
                });
            }
        });
        Ok(this)
    }

    /// From now on blobs of this repository come by half, and then nothing; or as they are again.
    pub(crate) fn stall(&self, repository: &str, stalls: bool) {
        let mut stalled = self.stalled.lock().unwrap_or_else(PoisonError::into_inner);
        if stalls {
            stalled.insert(repository.to_owned());
        } else {
            stalled.remove(repository);
        }
    }

    /// How often a path of this text was asked for.
    pub(crate) fn asked(&self, part: &str) -> usize {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|path| path.contains(part)).count()
    }
}

fn answer<B>(
    objects: &Objects,
    asked: &Mutex<Vec<String>>,
    stalled: &Mutex<BTreeSet<String>>,
    request: &Request<B>,
) -> Response<Body> {
    let path = request.uri().path();
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{} {path}", request.method()));
    let Some(rest) = path.strip_prefix("/v2/") else { return empty(StatusCode::NOT_FOUND) };
    if rest.is_empty() {
        return empty(StatusCode::OK);
    }
    if rest.starts_with("private/") && !authorized(request) {
        let mut refusal = empty(StatusCode::UNAUTHORIZED);
        let challenge = header::HeaderValue::from_static("Basic realm=\"conformance\"");
        refusal.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        return refusal;
    }
    let Some((kind, bytes)) = objects.get(rest) else { return empty(StatusCode::NOT_FOUND) };
    let repository = rest.split_once("/blobs/").map(|(repository, _)| repository);
    let stalls = repository.is_some_and(|repository| {
        stalled.lock().unwrap_or_else(PoisonError::into_inner).contains(repository)
    });
    let mut response = Response::new(if stalls { half(bytes) } else { Full::new(bytes.clone()).boxed() });
    if stalls {
        response.headers_mut().insert(header::CONTENT_LENGTH, bytes.len().into());
    }
    let digest = rest.rsplit('/').next().filter(|last| last.starts_with("sha256:"));
    for (name, value) in [("content-type", Some(kind.as_str())), ("docker-content-digest", digest)] {
        if let Some(Ok(value)) = value.map(header::HeaderValue::from_str) {
            response.headers_mut().insert(header::HeaderName::from_static(name), value);
        }
    }
    response
}

fn authorized<B>(request: &Request<B>) -> bool {
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    request.headers().get(header::AUTHORIZATION).is_some_and(|value| *value == format!("Basic {pair}"))
}

/// The first half, and then nothing until the connection ends.
fn half(bytes: &Bytes) -> Body {
    let first = Ok(Frame::data(bytes.slice(..bytes.len() / 2)));
    BodyExt::boxed(StreamBody::new(futures::stream::iter([first]).chain(futures::stream::pending())))
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::new()).boxed());
    *response.status_mut() = status;
    response
}

//! The streaming server: gives out URLs for requests and serves each once, over SPDY or WebSocket.
//!
//! Input: requests from the CRI service; connections on a loopback address. Output: calls of a [`Runtime`]. Who may do
//! what was decided before a URL was given: the token in it is the only proof, so it is secret, short-lived and one-shot.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::exec_spdy::{self, Version};
use crate::port_forward;
use crate::relay::is_upgrade;
use crate::runtime::{AttachRequest, ExecRequest, Runtime, Streams, Wanted};
use crate::status::Outcome;
use crate::tokens::{TokenError, Tokens};
use crate::websocket::{self, Protocol};

/// Connections served at once.
const MAX_CONNECTIONS: usize = 1024;

/// How long a client may take to send its request.
const REQUEST_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// Why no URL was given.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// A terminal has but one output.
    #[error("tty and stderr cannot both be true")]
    TtyAndStderr,
    /// There is nothing to stream.
    #[error("one of stdin, stdout, or stderr must be set")]
    NoStream,
    /// No token.
    #[error("cannot give out a URL")]
    Token(#[from] TokenError),
}

/// What a URL stands for.
#[derive(Clone, Debug)]
enum Task {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward { sandbox: String },
}

impl Task {
    /// Its word in the URL.
    fn kind(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// Gives out URLs. Cloning is cheap.
#[derive(Clone)]
pub struct Handle {
    base: Arc<str>,
    tokens: Arc<Tokens<Task>>,
}

impl Handle {
    /// A URL that runs a command.
    pub fn exec(&self, request: ExecRequest) -> Result<String, UrlError> {
        check(request.wanted)?;
        self.url(Task::Exec(request))
    }

    /// A URL that connects to a container's process.
    pub fn attach(&self, request: AttachRequest) -> Result<String, UrlError> {
        check(request.wanted)?;
        self.url(Task::Attach(request))
    }

    /// A URL that forwards ports of a sandbox.
    pub fn port_forward(&self, sandbox: &str) -> Result<String, UrlError> {
        self.url(Task::PortForward { sandbox: sandbox.to_owned() })
    }

    fn url(&self, task: Task) -> Result<String, UrlError> {
        let kind = task.kind();
        let token = self.tokens.insert(task)?;
        Ok(format!("{}/{kind}/{token}", self.base))
    }
}

fn check(wanted: Wanted) -> Result<(), UrlError> {
    match wanted {
        Wanted { tty: true, stderr: true, .. } => Err(UrlError::TtyAndStderr),
        Wanted { stdin: false, stdout: false, stderr: false, .. } => Err(UrlError::NoStream),
        _ => Ok(()),
    }
}

/// A bound server that is not yet serving.
pub struct Server<R> {
    listener: TcpListener,
    tokens: Arc<Tokens<Task>>,
    runtime: Arc<R>,
}

impl<R: Runtime> Server<R> {
    /// Binds `address` (port 0 for any) and gives the handle that makes its URLs.
    pub async fn bind(address: SocketAddr, runtime: Arc<R>) -> std::io::Result<(Self, Handle)> {
        let listener = TcpListener::bind(address).await?;
        let base = format!("http://{}", listener.local_addr()?);
        let tokens = Arc::new(Tokens::default());
        let handle = Handle { base: base.into(), tokens: Arc::clone(&tokens) };
        Ok((Self { listener, tokens, runtime }, handle))
    }

    /// Serves until `cancel`; connections that are open then go on.
    pub async fn serve(self, cancel: CancellationToken) {
        let Self { listener, tokens, runtime } = self;
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // Cancel-safe: an accepted connection is handled below, none is lost.
            let accepted = tokio::select! {
                () = cancel.cancelled() => return,
                accepted = accept(&listener, &room) => accepted,
            };
            let Some((stream, permit)) = accepted else { continue };
            let (tokens, runtime) = (Arc::clone(&tokens), Arc::clone(&runtime));
            tokio::spawn(async move {
                let permit = Arc::new(permit);
                let service = service_fn(|request| {
                    let (tokens, runtime) = (Arc::clone(&tokens), Arc::clone(&runtime));
                    let permit = Arc::clone(&permit);
                    async move { Ok::<_, Infallible>(answer(request, &tokens, runtime, permit)) }
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(REQUEST_DEADLINE)
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades()
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "a streaming connection broke before its upgrade");
                }
            });
        }
    }
}

type Permit = tokio::sync::OwnedSemaphorePermit;

async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> Option<(TcpStream, Permit)> {
    let permit = Arc::clone(room).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _peer)) => {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "a streaming connection broke at once");
            }
            Some((stream, permit))
        }
        Err(error) => {
            tracing::warn!(%error, "cannot accept a streaming connection");
            // Out of file descriptors, most likely: give others time to close theirs.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            None
        }
    }
}

/// The wire protocol that client and server agreed on.
#[derive(Clone, Copy)]
enum Agreed {
    Spdy(Version),
    WebSocket(Protocol),
    PortForward,
    Tunnel,
}

fn answer<R: Runtime>(
    mut request: Request<Incoming>,
    tokens: &Tokens<Task>,
    runtime: Arc<R>,
    permit: Arc<Permit>,
) -> Response<Full<Bytes>> {
    let parts: Vec<&str> = request.uri().path().trim_matches('/').split('/').collect();
    let &[kind @ ("exec" | "attach" | "portforward"), token] = parts.as_slice() else {
        return refuse(StatusCode::NOT_FOUND, "no such path");
    };
    if !is_upgrade(request.headers()) {
        return refuse(StatusCode::BAD_REQUEST, "the request must upgrade to SPDY/3.1 or WebSocket");
    }
    let (agreed, response) = match negotiate(request.headers(), kind == "portforward") {
        Ok(agreed) => agreed,
        Err(response) => return *response,
    };
    let Some(task) = tokens.take(token).filter(|task| task.kind() == kind) else {
        return refuse(StatusCode::NOT_FOUND, "the token is unknown, used or expired");
    };
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let _counted = permit;
        match upgrade.await {
            Ok(upgraded) => run(task, agreed, upgraded, runtime).await,
            Err(error) => tracing::debug!(%error, "a streaming connection was not upgraded"),
        }
    });
    response
}

async fn run<R: Runtime>(task: Task, agreed: Agreed, upgraded: Upgraded, runtime: Arc<R>) {
    match task {
        Task::Exec(request) => {
            let wanted = request.wanted;
            let work = |streams| runtime.exec(request, streams);
            stream(agreed, upgraded, wanted, "error executing command in container", work).await;
        }
        Task::Attach(request) => {
            let wanted = request.wanted;
            let work = async |streams| runtime.attach(request, streams).await.map(|()| 0);
            stream(agreed, upgraded, wanted, "error attaching to container", work).await;
        }
        Task::PortForward { sandbox } => match agreed {
            Agreed::Tunnel => {
                let inner = websocket::tunnel(TokioIo::new(upgraded)).await;
                port_forward::serve(inner, &sandbox, &runtime).await;
            }
            _ => port_forward::serve(TokioIo::new(upgraded), &sandbox, &runtime).await,
        },
    }
}

async fn stream<F>(
    agreed: Agreed,
    upgraded: Upgraded,
    wanted: Wanted,
    doing: &str,
    work: impl FnOnce(Streams) -> F,
) where
    F: Future<Output = Outcome>,
{
    let io = TokioIo::new(upgraded);
    match agreed {
        Agreed::Spdy(version) => exec_spdy::serve(io, version, wanted, doing, work).await,
        Agreed::WebSocket(protocol) => websocket::serve(io, protocol, wanted, doing, work).await,
        // The path, which negotiation goes by, was checked against the task.
        Agreed::PortForward | Agreed::Tunnel => {}
    }
}

/// The agreement with the answer that seals it, or the refusal.
type Negotiated = Result<(Agreed, Response<Full<Bytes>>), Box<Response<Full<Bytes>>>>;

fn negotiate(headers: &HeaderMap, forward: bool) -> Negotiated {
    let upgrade = headers.get(header::UPGRADE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match upgrade.to_ascii_lowercase().as_str() {
        "websocket" => negotiate_websocket(headers, forward),
        "spdy/3.1" => negotiate_spdy(headers, forward),
        _ => Err(Box::new(refuse(StatusCode::BAD_REQUEST, "only SPDY/3.1 and WebSocket are spoken here"))),
    }
}

fn negotiate_spdy(headers: &HeaderMap, forward: bool) -> Negotiated {
    let values = headers.get_all(STREAM_PROTOCOL).into_iter().filter_map(|value| value.to_str().ok());
    let offered: Vec<&str> = values.flat_map(|value| value.split(',')).map(str::trim).collect();
    let agreed = match (forward, offered.is_empty()) {
        (true, true) => Some((port_forward::PROTOCOL, Agreed::PortForward)),
        (true, false) => {
            offered.contains(&port_forward::PROTOCOL).then_some((port_forward::PROTOCOL, Agreed::PortForward))
        }
        // The first clients named no version.
        (false, true) => Some(("", Agreed::Spdy(Version::V1))),
        (false, false) => Version::NAMES
            .into_iter()
            .find(|(name, _)| offered.contains(name))
            .map(|(name, version)| (name, Agreed::Spdy(version))),
    };
    let Some((name, agreed)) = agreed else {
        let ours: Vec<_> = if forward {
            vec![port_forward::PROTOCOL]
        } else {
            Version::NAMES.map(|(name, _)| name).to_vec()
        };
        let text = format!(
            "unable to upgrade: unable to negotiate protocol: client supports {offered:?}, server accepts {ours:?}"
        );
        let mut response = refuse(StatusCode::FORBIDDEN, &text);
        for name in ours {
            response.headers_mut().append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(name));
        }
        return Err(Box::new(response));
    };
    let mut response = switching("SPDY/3.1");
    if !name.is_empty() {
        response.headers_mut().insert(STREAM_PROTOCOL, HeaderValue::from_static(name));
    }
    Ok((agreed, response))
}

fn negotiate_websocket(headers: &HeaderMap, forward: bool) -> Negotiated {
    let accept = websocket::accept_key(headers).and_then(|key| HeaderValue::from_str(&key).ok());
    let Some(accept) = accept else {
        return Err(Box::new(refuse(StatusCode::BAD_REQUEST, "no WebSocket handshake of version 13")));
    };
    let offered = websocket::offered(headers);
    let agreed = if forward {
        port_forward::TUNNELS
            .into_iter()
            .find(|name| offered.contains(name))
            .map(|name| (name, Agreed::Tunnel))
    } else {
        let fits =
            |one: &Protocol| offered.contains(&one.name) || (offered.is_empty() && one.name.is_empty());
        Protocol::ALL.into_iter().find(fits).map(|one| (one.name, Agreed::WebSocket(one)))
    };
    let Some((name, agreed)) = agreed else {
        let text = format!("unable to negotiate protocol: none of {offered:?} is spoken here");
        return Err(Box::new(refuse(StatusCode::BAD_REQUEST, &text)));
    };
    let mut response = switching("websocket");
    response.headers_mut().insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    if !name.is_empty() {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    Ok((agreed, response))
}

fn switching(protocol: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(protocol));
    response
}

fn refuse(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{text}\n")));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;

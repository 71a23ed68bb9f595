//! Forwards one HTTP/1.1 Upgrade request (SPDY/3.1 or WebSocket) to an upstream stream and then copies raw bytes.
//!
//! Input: the client's request and a connected upstream. Output: the upstream's own answer, either `101` with its headers
//! (the copying then goes on in a task of its own) or its error response with its body. It never looks inside the
//! upgraded stream, never passes on the client's credentials and never retries.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::BoxBody;

/// How long the upstream may take to answer the upgrade request.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// How long one direction may stay silent after the other has ended, before both are dropped.
pub const LINGER: Duration = Duration::from_secs(10);

/// Bytes buffered in each direction of one relayed connection.
const COPY_BUFFER: usize = 16 * 1024;

/// Why an upgrade could not be relayed. Nothing was sent to the client yet.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The client's request asks for no upgrade, or its connection cannot be upgraded (HTTP/2).
    #[error("the request does not ask for a connection upgrade")]
    NotAnUpgrade,
    /// The target path or host is not valid in an HTTP request.
    #[error("cannot form the upstream request for {0:?}")]
    BadTarget(String, #[source] http::Error),
    /// The upstream closed, or spoke something that is not HTTP/1.1.
    #[error("upstream {host} did not answer the upgrade")]
    Upstream {
        /// The upstream asked.
        host: String,
        /// What hyper saw.
        #[source]
        source: hyper::Error,
    },
    /// The upstream did not answer within [`ANSWER_DEADLINE`].
    #[error("upstream {0} did not answer the upgrade within {ANSWER_DEADLINE:?}")]
    Deadline(String),
}

/// Tells whether `headers` ask to switch protocols (`Connection: Upgrade` with an `Upgrade` field).
pub fn is_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
        && headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|token| token.trim().eq_ignore_ascii_case("upgrade"))
}

/// Sends `client_req` to `upstream` under a new path and host, and returns the upstream's answer.
///
/// A `101` starts a task that copies both ways until either side is gone: an end of stream is passed on as a half-close,
/// the other direction then has [`LINGER`] of silence left. The client's server connection must allow upgrades
/// (`with_upgrades`), and the returned response must be sent as it is. `Authorization` and cookies stay behind.
pub async fn relay_upgrade<B, S>(
    mut client_req: Request<B>,
    upstream: S,
    upstream_path_and_query: &str,
    host: &str,
) -> Result<Response<BoxBody>, RelayError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if !is_upgrade(client_req.headers()) || client_req.extensions().get::<OnUpgrade>().is_none() {
        return Err(RelayError::NotAnUpgrade);
    }
    let on_client = hyper::upgrade::on(&mut client_req);
    let request = upstream_request(&client_req, upstream_path_and_query, host)
        .map_err(|error| RelayError::BadTarget(format!("{host}{upstream_path_and_query}"), error))?;
    let failed = |source| RelayError::Upstream { host: host.to_owned(), source };
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(upstream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "relayed upstream connection ended");
            }
        });
        sender.send_request(request).await
    };
    let mut response = tokio::time::timeout(ANSWER_DEADLINE, exchange)
        .await
        .map_err(|_elapsed| RelayError::Deadline(host.to_owned()))?
        .map_err(failed)?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let on_upstream = hyper::upgrade::on(&mut response);
        tokio::spawn(join(on_client, on_upstream));
        let (parts, _no_body) = response.into_parts();
        return Ok(Response::from_parts(parts, empty_body()));
    }
    let (mut parts, body) = response.into_parts();
    for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE] {
        parts.headers.remove(name);
    }
    Ok(Response::from_parts(parts, body.map_err(Into::into).boxed()))
}

/// Copies bytes between two streams until either side is gone; see [`relay_upgrade`] for how an end is treated.
pub async fn copy_both_ways<A, B>(a: A, b: B) -> std::io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    copy_with_linger(a, b, LINGER).await
}

async fn copy_with_linger<A, B>(a: A, b: B, silence: Duration) -> std::io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (a_read, a_write) = tokio::io::split(a);
    let (b_read, b_write) = tokio::io::split(b);
    let moved = AtomicU64::new(0);
    let forward = pump(a_read, b_write, &moved);
    let backward = pump(b_read, a_write, &moved);
    tokio::pin!(forward, backward);
    // Cancel-safe: both pumps are polled in place and never dropped by the select itself.
    tokio::select! {
        result = &mut forward => { result?; linger(backward, &moved, silence).await }
        result = &mut backward => { result?; linger(forward, &moved, silence).await }
    }
}

async fn linger(
    rest: impl Future<Output = std::io::Result<()>>,
    moved: &AtomicU64,
    silence: Duration,
) -> std::io::Result<()> {
    tokio::pin!(rest);
    loop {
        let before = moved.load(Ordering::Relaxed);
        match tokio::time::timeout(silence, &mut rest).await {
            Ok(result) => return result,
            Err(_elapsed) if moved.load(Ordering::Relaxed) == before => return Ok(()),
            Err(_elapsed) => {}
        }
    }
}

async fn pump<R, W>(mut reader: R, mut writer: W, moved: &AtomicU64) -> std::io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; COPY_BUFFER];
    loop {
        let count = reader.read(&mut buffer).await?;
        if count == 0 {
            return writer.shutdown().await;
        }
        writer.write_all(&buffer[..count]).await?;
        writer.flush().await?;
        moved.fetch_add(1, Ordering::Relaxed);
    }
}

async fn join(on_client: OnUpgrade, on_upstream: OnUpgrade) {
    let both = async { tokio::try_join!(on_client, on_upstream) };
    let (client, upstream): (Upgraded, Upgraded) = match tokio::time::timeout(ANSWER_DEADLINE, both).await {
        Ok(Ok(pair)) => pair,
        Ok(Err(error)) => {
            return tracing::debug!(%error, "an upgraded connection was lost before the relay began");
        }
        Err(_elapsed) => return tracing::debug!("a peer did not finish its upgrade in time"),
    };
    if let Err(error) = copy_both_ways(TokioIo::new(client), TokioIo::new(upstream)).await {
        tracing::debug!(%error, "a relayed connection was cut");
    }
}

fn upstream_request<B>(
    client: &Request<B>,
    path_and_query: &str,
    host: &str,
) -> Result<Request<Empty<Bytes>>, http::Error> {
    let mut request =
        Request::builder().method(client.method().clone()).uri(path_and_query).body(Empty::new())?;
    let headers = request.headers_mut();
    for (name, value) in client.headers() {
        if !stays_behind(name) {
            headers.append(name.clone(), value.clone());
        }
    }
    headers.insert(header::HOST, HeaderValue::from_str(host)?);
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    Ok(request)
}

/// Credentials belong to the hop that checked them; lengths belong to a body that is not sent.
fn stays_behind(name: &HeaderName) -> bool {
    [
        header::AUTHORIZATION,
        header::COOKIE,
        header::PROXY_AUTHORIZATION,
        header::HOST,
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
    ]
    .contains(name)
        || name.as_str().starts_with("impersonate-")
}

fn empty_body() -> BoxBody {
    Empty::new().map_err(|never| match never {}).boxed()
}

#[cfg(test)]
mod tests {
    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use tokio::io::DuplexStream;

    use super::*;

    /// Serves `relay_upgrade` to the given upstream on one end of a pipe and returns the client's end.
    fn relay_to(upstream: DuplexStream) -> DuplexStream {
        let (client, server) = tokio::io::duplex(4096);
        let upstream = std::sync::Mutex::new(Some(upstream));
        let service = service_fn(move |request: Request<Incoming>| {
            let upstream = upstream.lock().expect("not poisoned").take().expect("one request");
            async move { relay_upgrade(request, upstream, "/exec/abc?x=1", "node:1").await }
        });
        tokio::spawn(async move {
            let served = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(server), service)
                .with_upgrades();
            drop(served.await);
        });
        client
    }

    async fn read_head(stream: &mut DuplexStream) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("head"));
        }
        String::from_utf8(head).expect("ascii")
    }

    const REQUEST: &[u8] =
        b"POST /api/v1/exec HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer secret\r\nConnection: Upgrade\r\n\
        Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nContent-Length: 0\r\n\r\n";

    #[tokio::test]
    async fn switches_and_copies_both_ways_with_half_close() {
        let (upstream, mut server) = tokio::io::duplex(4096);
        let mut client = relay_to(upstream);
        client.write_all(REQUEST).await.expect("send");
        let head = read_head(&mut server).await.to_lowercase();
        assert!(head.starts_with("post /exec/abc?x=1 http/1.1\r\n"), "{head}");
        assert!(
            head.contains("upgrade: spdy/3.1") && head.contains("x-stream-protocol-version: v4.channel"),
            "{head}"
        );
        assert!(head.contains("host: node:1") && !head.contains("secret"), "{head}");
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
            X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\nearly";
        server.write_all(answer).await.expect("answer");
        let head = read_head(&mut client).await.to_lowercase();
        assert!(
            head.starts_with("http/1.1 101") && head.contains("x-stream-protocol-version: v4.channel"),
            "{head}"
        );
        let mut early = [0; 5];
        client.read_exact(&mut early).await.expect("bytes sent with the answer");
        client.write_all(b"ping").await.expect("send");
        client.shutdown().await.expect("half-close");
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.expect("read to the client's end");
        assert_eq!(got, b"ping");
        server.write_all(b"after").await.expect("the other direction still works");
        drop(server);
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.expect("read to end");
        assert_eq!(got, b"after");
    }

    #[tokio::test]
    async fn passes_an_error_answer_on_with_its_body() {
        let (upstream, mut server) = tokio::io::duplex(4096);
        let mut client = relay_to(upstream);
        client.write_all(REQUEST).await.expect("send");
        read_head(&mut server).await;
        server.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope").await.expect("answer");
        let head = read_head(&mut client).await;
        assert!(head.starts_with("HTTP/1.1 404"), "{head}");
        let mut body = [0; 4];
        client.read_exact(&mut body).await.expect("body");
        assert_eq!(&body, b"nope");
    }

    #[tokio::test]
    async fn a_silent_peer_does_not_hold_the_relay_after_the_other_left() {
        let (a, a_far) = tokio::io::duplex(64);
        let (b, _b_far_kept_open) = tokio::io::duplex(64);
        drop(a_far);
        let copy = copy_with_linger(a, b, Duration::from_millis(20));
        tokio::time::timeout(Duration::from_secs(5), copy)
            .await
            .expect("ends by itself")
            .expect("without an error");
    }

    #[test]
    fn recognises_upgrades() {
        let mut headers = HeaderMap::new();
        assert!(!is_upgrade(&headers));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("keep-alive, Upgrade"));
        assert!(is_upgrade(&headers));
    }
}

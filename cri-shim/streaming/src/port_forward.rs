//! Port-forward over SPDY: pairs of an error and a data stream, one pair per connection the client forwards.
//!
//! Input: an upgraded connection (or the inside of a WebSocket tunnel). Each pair becomes one connection in the sandbox;
//! what goes wrong is told on the pair's error stream and ends that pair only. Protocol: `portforward.k8s.io`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::exec_spdy::OUTPUT_QUEUE;
use crate::runtime::{PortStream, Runtime};
use crate::spdy::headers::header;
use crate::spdy::{Connection, Stream};

/// The protocol's name in the upgrade.
pub(crate) const PROTOCOL: &str = "portforward.k8s.io";

/// Names of the WebSocket tunnel that carries it.
pub(crate) const TUNNELS: [&str; 2] = ["SPDY/3.1+portforward.k8s.io", "v2.portforward.k8s.io"];

/// Streams of one client at a time, two per forwarded connection.
const MAX_STREAMS: usize = 1024;

/// How long half a pair waits for the other half.
const PAIR_DEADLINE: Duration = Duration::from_secs(30);

/// Serves one client until it leaves; a client with nothing open costs nothing.
pub(crate) async fn serve<T, R>(io: T, sandbox: &str, runtime: &Arc<R>)
where
    T: AsyncRead + AsyncWrite + Send + 'static,
    R: Runtime,
{
    let (connection, mut incoming) = Connection::serve(io, MAX_STREAMS);
    let mut halves: BTreeMap<String, Half> = BTreeMap::new();
    let mut forwards = JoinSet::new();
    loop {
        // Cancel-safe: receiving and joining lose nothing.
        let stream = tokio::select! {
            stream = incoming.recv() => stream,
            Some(_) = forwards.join_next() => continue,
            () = connection.gone().cancelled() => None,
        };
        let Some(stream) = stream else { break };
        halves.retain(|_, half| half.since.elapsed() < PAIR_DEADLINE);
        if let Some((error, data, port)) = pair(&mut halves, stream) {
            let (sandbox, runtime) = (sandbox.to_owned(), Arc::clone(runtime));
            let gone = connection.gone().clone();
            forwards.spawn(async move { forward(&*runtime, &sandbox, port, error, data, gone).await });
        }
    }
    // Everybody sees that the client is gone and ends by itself; what runs on behind that is the runtime's.
    while forwards.join_next().await.is_some() {}
}

struct Half {
    stream: Stream,
    is_error: bool,
    since: Instant,
}

/// Adds a stream; gives error stream, data stream and port when a pair is complete.
fn pair(halves: &mut BTreeMap<String, Half>, stream: Stream) -> Option<(Stream, Stream, u16)> {
    let is_error = match header(&stream.headers, "streamtype") {
        Some("error") => true,
        Some("data") => false,
        other => {
            tracing::debug!(stream = ?other, "a client opened a stream that is no part of port-forward");
            return None;
        }
    };
    let port = header(&stream.headers, "port").and_then(|port| port.parse().ok()).filter(|port| *port > 0)?;
    // Clients before 1.2 sent no request id, and one connection at a time per port.
    let key = header(&stream.headers, "requestid").map_or_else(|| format!("port {port}"), str::to_owned);
    match halves.remove(&key) {
        Some(half) if half.is_error && !is_error => Some((half.stream, stream, port)),
        Some(half) if !half.is_error && is_error => Some((stream, half.stream, port)),
        _ => {
            halves.insert(key, Half { stream, is_error, since: Instant::now() });
            None
        }
    }
}

async fn forward<R: Runtime>(
    runtime: &R,
    sandbox: &str,
    port: u16,
    error: Stream,
    data: Stream,
    gone: tokio_util::sync::CancellationToken,
) {
    let Stream { input, output, .. } = data;
    let (sender, mut receiver) = mpsc::channel::<Bytes>(OUTPUT_QUEUE);
    let work = runtime.port_forward(sandbox, port, PortStream { input, output: sender, gone });
    let pump = async {
        while let Some(bytes) = receiver.recv().await {
            if output.send(bytes).await.is_err() {
                // Tells the runtime that the client takes no more.
                return receiver.close();
            }
        }
        output.finish().await;
    };
    let (result, ()) = tokio::join!(work, pump);
    if let Err(failure) = result {
        let text = format!("error forwarding port {port} to pod {sandbox}: {failure}");
        if error.output.send(Bytes::from(text)).await.is_err() {
            tracing::debug!(%failure, port, "a client left before it could be told of a failure");
        }
    }
    output.finish().await;
    error.output.finish().await;
}

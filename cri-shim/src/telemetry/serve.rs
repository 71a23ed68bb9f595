//! Hands the figures out: `GET /metrics` on a loopback address or a Unix socket, when configured.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;

use super::{METRICS, State};
use crate::runtime::{Readiness, Runtime};

/// Scrapes at once.
const MAX_CONNECTIONS: usize = 16;
/// How long a client may take to send its request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
const TYPE: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
/// A page and a clock tick, as Linux shows them in procfs on the machines we build for.
const PAGE: i64 = 4096;
const TICKS: f64 = 100.0;

/// Figures of this process.
#[derive(Debug, Default)]
pub(super) struct Process {
    memory: Gauge,
    files: Gauge,
    threads: Gauge,
    cpu: Counter<f64, AtomicU64>,
}

impl Process {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("process_resident_memory_bytes", "Memory of this process", self.memory.clone());
        registry.register("process_open_fds", "Open files of this process", self.files.clone());
        registry.register("process_threads", "Threads of this process", self.threads.clone());
        registry.register("process_cpu_seconds", "CPU time of this process", self.cpu.clone());
    }

    fn read(&self) {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // Fields are counted from behind the command, which may hold anything.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let field = |index: usize| fields.get(index).and_then(|field| field.parse::<i64>().ok()).unwrap_or(0);
        self.memory.set(field(21) * PAGE);
        self.threads.set(field(17));
        #[allow(clippy::cast_precision_loss, reason = "ticks stay far below 2^52")]
        let used = (field(11) + field(12)) as f64 / TICKS;
        self.cpu.inc_by((used - self.cpu.get()).max(0.0));
        let files = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        self.files.set(i64::try_from(files).unwrap_or(i64::MAX));
    }
}

/// Every figure as text, read now.
fn text(runtime: &Runtime) -> Result<String, std::fmt::Error> {
    METRICS.process.read();
    METRICS.followers.set(i64::try_from(runtime.events.followers()).unwrap_or(i64::MAX));
    METRICS.ready.set(i64::from(matches!(*runtime.readiness.borrow(), Readiness::Ready { .. })));
    METRICS.detachments_owed.set(i64::try_from(runtime.owed.count()).unwrap_or(i64::MAX));
    METRICS.pulls.set(i64::try_from(runtime.images.pulls().count()).unwrap_or(i64::MAX));
    METRICS.sandboxes.clear();
    for sandbox in runtime.registry.sandboxes() {
        let state = crate::state::sandbox_word(sandbox.phase());
        METRICS.sandboxes.get_or_create(&State { state }).inc();
    }
    METRICS.containers.clear();
    for container in runtime.registry.containers() {
        let state = crate::state::container_word(container.phase());
        METRICS.containers.get_or_create(&State { state }).inc();
    }
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &METRICS.registry)?;
    Ok(text)
}

fn answer(request: &Request<Incoming>, runtime: &Runtime) -> Response<Full<Bytes>> {
    let plain = |status, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => match text(runtime) {
            Ok(text) => {
                let mut response = Response::new(Full::from(text));
                response.headers_mut().insert(header::CONTENT_TYPE, TYPE);
                response
            }
            Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the figures cannot be written\n"),
        },
        (_, "/metrics") => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
        _ => plain(StatusCode::NOT_FOUND, "there is only /metrics\n"),
    }
}

/// Where scrapes come from.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    async fn accept(&self) -> std::io::Result<Either<TcpStream, UnixStream>> {
        match self {
            Self::Tcp(listener) => Ok(Either::Left(listener.accept().await?.0)),
            Self::Unix(listener) => Ok(Either::Right(listener.accept().await?.0)),
        }
    }
}

/// Serves on a TCP address until `cancel`; gives the address it got.
pub async fn on_address(
    address: SocketAddr,
    runtime: Arc<Runtime>,
    cancel: CancellationToken,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tokio::spawn(accept_all(Listener::Tcp(listener), runtime, cancel));
    Ok(address)
}

/// Serves on a Unix socket that only root may use until `cancel`.
pub fn on_socket(path: &Path, runtime: Arc<Runtime>, cancel: CancellationToken) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    tokio::spawn(accept_all(Listener::Unix(listener), runtime, cancel));
    Ok(())
}

async fn accept_all(listener: Listener, runtime: Arc<Runtime>, cancel: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
        // Cancel-safe: a connection that is not taken stays in the kernel's queue.
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok(stream) = accepted else {
            // Out of file descriptors, most likely: give others time to close theirs.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let runtime = Arc::clone(&runtime);
        tokio::spawn(async move {
            let _counted = permit;
            let service =
                service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request, &runtime))));
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_DEADLINE)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a scrape broke");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_files_threads_and_cpu_time() {
        let process = Process::default();
        process.read();
        assert!(process.memory.get() > 1 << 20 && process.files.get() > 2 && process.threads.get() >= 1);
        let before = process.cpu.get();
        process.read();
        assert!(process.cpu.get() >= before, "a counter never goes back");
    }
}

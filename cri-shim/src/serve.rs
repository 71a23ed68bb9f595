//! Builds the parts, joins them, serves the socket, and drains on SIGTERM or SIGINT. Containers are left running.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use cri_shim_api::v1::image_service_server::ImageServiceServer;
use cri_shim_api::v1::runtime_service_server::RuntimeServiceServer;
use cri_shim_streaming::server::Server;
use futures::StreamExt;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

use crate::attach::Attached;
use crate::authority::Tolerant;
use crate::config::Config;
use crate::containerd::Client;
use crate::exec::{Executor, Streamer};
use crate::host::memory;
use crate::images::ImageStore;
use crate::runtime::Runtime;
use crate::service::Service;
use crate::telemetry::rpc::Watch;
use crate::{images, network, recovery, telemetry};

/// How long requests under way may go on after a signal.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a socket may go on accepting after its server has ended.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at it.
const PREDECESSOR_PAUSE: Duration = Duration::from_millis(20);
/// Largest request: a pod's configuration with its annotations is far below.
const MAX_REQUEST: usize = 16 << 20;

/// Runs until a signal.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "keelson-cri must run as root: it makes namespaces and mounts"
    );
    let cancel = CancellationToken::new();
    // Bound first: a second server on the same socket must not touch anything.
    let listener = listen(&config.listen).await?;
    let _claimed = claim(&config).await?;
    let client = Client::new(&config.containerd_socket, &config.containerd_namespace)?;
    let images = ImageStore::new(client.clone(), config.image_places(), config.images.clone());
    let executor = Executor::new(client.clone(), &config.state_dir);
    let runtime = Runtime::open(&config, client, images.clone(), cancel.clone()).await?;
    let streamer = Arc::new(Streamer::new(executor.clone(), Arc::new(Attached(Arc::clone(&runtime)))));
    let address = (config.streaming.address, config.streaming.port).into();
    let (streaming, urls) = Server::bind(address, streamer)
        .await
        .with_context(|| format!("cannot listen on streaming address {address}"))?;
    tokio::spawn(streaming.serve(cancel.clone()));
    let supervisor = tokio::spawn(recovery::supervise(Arc::clone(&runtime), cancel.clone()));
    tokio::spawn(sweep_images(Arc::clone(&runtime), images.clone(), config.images.progress_deadline()));
    tokio::spawn(end_old_execs(Arc::clone(&runtime), executor.clone()));
    tokio::spawn(pay_detachments(Arc::clone(&runtime)));
    tokio::spawn(keep_table(Arc::clone(&runtime), cancel.clone()));

    tokio::spawn(memory::keep_small(cancel.clone()));
    serve_metrics(&config, &runtime, &cancel).await?;
    tracing::info!(socket = %config.listen.display(), "serving CRI v1");
    let service = Service::new(runtime, executor, urls, cancel.clone());
    let connections = UnixListenerStream::new(listener).map(|stream| stream.map(Tolerant::new));
    let server = tonic::transport::Server::builder()
        .layer(Watch)
        .add_service(RuntimeServiceServer::new(service).max_decoding_message_size(MAX_REQUEST))
        .add_service(
            ImageServiceServer::new(images::Service::new(images)).max_decoding_message_size(MAX_REQUEST),
        )
        .serve_with_incoming_shutdown(connections, cancel.clone().cancelled_owned());
    let mut server = tokio::spawn(server);
    // Cancel-safe: a server that ended is looked at, a signal is kept by its stream.
    tokio::select! {
        ended = &mut server => ended?.context("the CRI server failed")?,
        signal = asked_to_stop() => {
            tracing::info!(signal = signal?, "stopping; containers go on");
            remove_sockets(&config);
            cancel.cancel();
            if tokio::time::timeout(DRAIN, server).await.is_err() {
                tracing::warn!("requests under way were cut off");
            }
        }
    }
    cancel.cancel();
    supervisor.await.context("the supervisor of containerd failed")?;
    Ok(())
}

/// What pulls of an earlier server began; the kubelet has had time to ask for them again, and they went on from there.
async fn sweep_images(runtime: Arc<Runtime>, images: ImageStore, patience: Duration) {
    until_recovered(&runtime).await;
    tokio::time::sleep(patience).await;
    if let Err(error) = images.sweep().await {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "leases of dead pulls stay until they expire"
        );
    }
}

/// Serves what Prometheus reads, where that is wanted.
async fn serve_metrics(
    config: &Config,
    runtime: &Arc<Runtime>,
    cancel: &CancellationToken,
) -> anyhow::Result<()> {
    if let Some(port) = config.metrics.port {
        let address = (config.metrics.address, port).into();
        let bound = telemetry::serve::on_address(address, Arc::clone(runtime), cancel.clone()).await;
        let bound = bound.with_context(|| format!("cannot listen on metrics address {address}"))?;
        tracing::info!(address = %bound, "serving metrics");
    }
    if let Some(path) = &config.metrics.socket {
        telemetry::serve::on_socket(path, Arc::clone(runtime), cancel.clone())
            .with_context(|| format!("cannot listen on metrics socket {}", path.display()))?;
        tracing::info!(socket = %path.display(), "serving metrics");
    }
    Ok(())
}

/// Processes that an earlier server ran for clients that are gone; containerd must be there to end them.
async fn end_old_execs(runtime: Arc<Runtime>, executor: Executor) {
    until_recovered(&runtime).await;
    executor.recover().await;
}

/// What the pod network still holds of sandboxes that are gone.
async fn pay_detachments(runtime: Arc<Runtime>) {
    until_recovered(&runtime).await;
    runtime.pay_detachments().await;
}

/// The rules of our plugins, whoever flushes them.
async fn keep_table(runtime: Arc<Runtime>, cancel: CancellationToken) {
    until_recovered(&runtime).await;
    network::keep_table(runtime, cancel).await;
}

/// Waits for the recovery, however late containerd comes.
async fn until_recovered(runtime: &Runtime) {
    while runtime.recovered().await.is_err() {}
}

/// Listens, waiting a moment for a server that was just killed: a process it was making holds the socket until it notices.
async fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let begun = tokio::time::Instant::now();
    while UnixStream::connect(path).is_ok() && begun.elapsed() < PREDECESSOR_PATIENCE {
        tokio::time::sleep(PREDECESSOR_PAUSE).await;
    }
    bind(path)
}

/// Holds the directories as long as what is returned lives: two servers with the same ones, on two sockets, would take each
/// other's pods and pulls for their own.
async fn claim(config: &Config) -> anyhow::Result<Vec<Flock<File>>> {
    let mut claimed = Vec::new();
    let mut seen = BTreeSet::new();
    for (field, directory) in [("stateDir", &config.state_dir), ("rootDir", &config.root_dir)] {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("{field}: cannot make {}", directory.display()))?;
        if !seen.insert(directory.canonicalize()?) {
            continue;
        }
        let path = directory.join("lock");
        let begun = tokio::time::Instant::now();
        // For root alone: whoever can open it could hold it.
        let mut file = File::options().create(true).append(true).mode(0o600).open(&path)?;
        let lock = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                // As with the socket: a process that a killed server was making.
                Err((same, Errno::EAGAIN)) if begun.elapsed() < PREDECESSOR_PATIENCE => {
                    file = same;
                    tokio::time::sleep(PREDECESSOR_PAUSE).await;
                }
                Err((_, Errno::EAGAIN)) => {
                    anyhow::bail!("{field}: another server works with {}", directory.display())
                }
                Err((_, error)) => {
                    return Err(error).with_context(|| format!("{field}: cannot lock {}", path.display()));
                }
            }
        };
        claimed.push(lock);
    }
    Ok(claimed)
}

/// Listens on a socket that only root may use, in place of one that nobody listens on any more.
fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    if let Ok(metadata) = path.symlink_metadata() {
        anyhow::ensure!(metadata.file_type().is_socket(), "{} exists and is no socket", path.display());
        anyhow::ensure!(UnixStream::connect(path).is_err(), "another server listens on {}", path.display());
        std::fs::remove_file(path).with_context(|| format!("cannot replace {}", path.display()))?;
    }
    // Nobody can connect between binding and the mode: a fresh socket accepts nothing before it is polled, and its
    // directory is root's.
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", path.display()))?;
    Ok(listener)
}

/// While they are still listened on: what is in their place later may be a successor's.
fn remove_sockets(config: &Config) {
    for path in [Some(&config.listen), config.metrics.socket.as_ref()].into_iter().flatten() {
        if let Err(error) = std::fs::remove_file(path) {
            tracing::warn!(socket = %path.display(), %error, "the socket stays");
        }
    }
}

async fn asked_to_stop() -> anyhow::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Cancel-safe: signals are kept by their streams.
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

//! The kubelet API (:10250): logs, exec, attach, port-forward, pods, statistics and metrics over TLS.
//!
//! Input: HTTP requests of clients with a certificate of the client CA; pods through [`PodLookup`]; the CRI. Output:
//! what kubectl, the API server and metrics-server read. Streams are relayed to the runtime's streaming server as raw
//! bytes; this module never looks inside them and changes no pod. Nothing is served without a client certificate, but for
//! what `readOnlyPort` tells everybody where it is configured.
//!
//! Bounds: [`MAX_CONNECTIONS`] at a time, and beside them [`MAX_READ_ONLY`] in the clear; further ones wait in the listen queue; a handshake has [`HANDSHAKE_DEADLINE`].

mod auth;
mod cadvisor;
mod certificate;
mod configz;
mod driver_volumes;
mod logs;
mod metrics;
mod node_logs;
mod pod_summary;
mod reply;
mod routes;
mod sizes;
mod streams;
mod summary;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use cri_shim_api::v1::image_service_client::ImageServiceClient;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{debug, info, warn};

use self::auth::Identity;
pub use self::certificate::Serving;
pub use self::driver_volumes::DriverVolumes;
use self::routes::Api;
use crate::config::{AgentConfig, TlsRules};
use crate::contracts::PodLookup;
use crate::probes::counters::ProbeCounters;
use crate::runtime::pulls::PullCounters;

/// Connections served at a time.
const MAX_CONNECTIONS: usize = 512;
/// Of those in the clear, which anybody may open: they take nothing away from the others.
const MAX_READ_ONLY: usize = 64;
/// How long a TLS handshake may take.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// What the server is told.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Serving certificate.
    pub serving: Serving,
    /// CA of client certificates, PEM; empty: no client is known.
    pub client_ca_file: PathBuf,
    /// Node name, for statistics.
    pub node_name: String,
    /// The kubelet's root directory, whose file system is the node's.
    pub root_dir: PathBuf,
    /// Directory of the pods' logs.
    pub pod_logs_dir: PathBuf,
    /// The cgroup of all pods.
    pub pods_cgroup: String,
    /// The runtime's socket, whose process is the runtime.
    pub runtime_socket: PathBuf,
    /// Where the runtime's images are asked for.
    pub images: Option<ImageServiceClient<Channel>>,
    /// Volumes of drivers.
    pub volumes: DriverVolumes,
    /// Answer to `/configz`.
    pub configz: Value,
    /// Logs, exec and their like are served.
    pub debugging: bool,
    /// What else is served, and how.
    pub settings: ServerSettings,
    /// Answer to `/metrics/probes`.
    pub probes: Arc<ProbeCounters>,
    /// What was asked for of images.
    pub pulls: Arc<PullCounters>,
}

/// Switches of the server.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools, reason = "the switches are KubeletConfiguration's")]
pub struct ServerSettings {
    /// The kubelet API is served.
    pub secure: bool,
    /// How its connections are protected.
    pub tls: TlsRules,
    /// Where pods and figures are told to everybody.
    pub read_only: Option<SocketAddr>,
    /// `/logs/` is served.
    pub system_logs: bool,
    /// … and asks the node's services.
    pub log_query: bool,
    /// The node's logs.
    pub log_root: PathBuf,
    /// `/debug/pprof/` would be served if there were one.
    pub profiling: bool,
    /// `/debug/flags/v` is served.
    pub debug_flags: bool,
    /// How old sizes of volumes may be.
    pub sizes_age: Duration,
}

impl ServerSettings {
    fn new(config: &AgentConfig) -> Self {
        let serving = &config.serving;
        Self {
            secure: serving.enable_server,
            tls: serving.tls(),
            read_only: (serving.read_only_port != 0)
                .then(|| SocketAddr::new(config.address, serving.read_only_port)),
            system_logs: serving.enable_system_log_handler,
            log_query: serving.enable_system_log_query,
            profiling: serving.enable_profiling_handler,
            debug_flags: serving.enable_debug_flags_handler,
            sizes_age: config.clients.volume_stats_agg_period.0,
            ..Self::default()
        }
    }
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            secure: true,
            tls: TlsRules::default(),
            read_only: None,
            system_logs: true,
            log_query: false,
            log_root: PathBuf::from("/var/log"),
            profiling: true,
            debug_flags: true,
            sizes_age: Duration::from_secs(60),
        }
    }
}

impl ServerConfig {
    /// The server's part of the agent's configuration.
    pub fn new(config: &AgentConfig, serving: Serving, probes: Arc<ProbeCounters>) -> Self {
        Self {
            listen: SocketAddr::new(config.address, config.port),
            serving,
            client_ca_file: config.authentication.x509.client_ca_file.clone(),
            node_name: config.keelson.node_name.clone(),
            root_dir: config.keelson.root_dir.clone(),
            pod_logs_dir: config.pod_logs_dir.clone(),
            pods_cgroup: config.pods_cgroup(),
            runtime_socket: config.runtime_socket(),
            images: None,
            volumes: DriverVolumes::default(),
            configz: configz::configz(config),
            debugging: config.enable_debugging_handlers,
            settings: ServerSettings::new(config),
            probes,
            pulls: Arc::default(),
        }
    }
}

/// Serves until `cancel`. Fails at once when an address is taken or a certificate cannot be read.
pub async fn serve(
    config: ServerConfig,
    state: Arc<dyn PodLookup>,
    runtime: RuntimeServiceClient<Channel>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let mut listeners = Vec::new();
    if config.settings.secure {
        let tls = tls::server_config(config.serving.clone(), &config.client_ca_file, &config.settings.tls)
            .context("cannot set up TLS of the kubelet API")?;
        let door = Door::Tls(TlsAcceptor::from(Arc::new(tls)));
        listeners.push((listen(config.listen, "kubelet API").await?, door));
        info!(address = %config.listen, "kubelet API is served");
    }
    if let Some(address) = config.settings.read_only {
        listeners.push((listen(address, "read-only kubelet API").await?, Door::ReadOnly));
        info!(%address, "read-only kubelet API is served");
    }
    let api = Arc::new(Api::new(config, state, runtime));
    let loops = listeners
        .into_iter()
        .map(|(listener, door)| accept(listener, door, Arc::clone(&api), cancel.clone()));
    // Nothing to serve is nothing to end for.
    tokio::try_join!(futures::future::try_join_all(loops), async {
        cancel.cancelled().await;
        Ok(())
    })?;
    Ok(())
}

async fn listen(address: SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} for the {what}"))
}

/// How connections come in.
#[derive(Clone)]
enum Door {
    /// With TLS; who the client is, its certificate tells.
    Tls(TlsAcceptor),
    /// In the clear, for whoever comes; little is told there.
    ReadOnly,
}

async fn accept(
    listener: TcpListener,
    door: Door,
    api: Arc<Api>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let slots = Arc::new(Semaphore::new(match door {
        Door::Tls(_) => MAX_CONNECTIONS,
        Door::ReadOnly => MAX_READ_ONLY,
    }));
    loop {
        let slot = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            // Cancel-safe: a waiter that is dropped gives its place back. The semaphore is never closed.
            slot = Arc::clone(&slots).acquire_owned() => slot?,
        };
        let accepted = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            // Cancel-safe: a connection is either returned or still in the queue.
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "cannot accept a connection to the kubelet API");
                // Out of descriptors, mostly: the next attempt would fail at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (api, door, cancel) = (Arc::clone(&api), door.clone(), cancel.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                outcome = connection(stream, door, api) => {
                    if let Err(error) = outcome {
                        debug!(%peer, %error, "kubelet API connection ended");
                    }
                }
            }
            drop(slot);
        });
    }
}

async fn connection(
    stream: TcpStream,
    door: Door,
    api: Arc<Api>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    let Door::Tls(acceptor) = door else {
        let service = service_fn(move |request| {
            let api = Arc::clone(&api);
            async move { Ok::<_, std::convert::Infallible>(api.handle_read_only(request).await) }
        });
        return auto::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service)
            .await;
    };
    let stream = tokio::time::timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream)).await??;
    let identity =
        stream.get_ref().1.peer_certificates().and_then(|chain| Identity::of(chain.first()?)).map(Arc::new);
    let service = service_fn(move |request| {
        let (api, identity) = (Arc::clone(&api), identity.clone());
        async move { Ok::<_, std::convert::Infallible>(api.handle(request, identity.as_deref()).await) }
    });
    auto::Builder::new(TokioExecutor::new())
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .await
}

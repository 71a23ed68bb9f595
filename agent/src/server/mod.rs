//! The kubelet API (:10250): logs, exec, attach, port-forward, pods, statistics and metrics over TLS.
//!
//! Input: HTTP requests of clients with a certificate of the client CA; pods through [`PodLookup`]; the CRI. Output:
//! what kubectl, the API server and metrics-server read. Streams are relayed to the runtime's streaming server as raw
//! bytes; this module never looks inside them and changes no pod. Nothing is served without a client certificate.
//!
//! Bounds: [`MAX_CONNECTIONS`] at a time, further ones wait in the listen queue; a handshake has [`HANDSHAKE_DEADLINE`].

mod auth;
mod cadvisor;
mod certificate;
mod driver_volumes;
mod logs;
mod metrics;
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
use serde_json::{Value, json};
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
use crate::config::AgentConfig;
use crate::contracts::PodLookup;
use crate::probes::counters::ProbeCounters;

/// Connections served at a time.
const MAX_CONNECTIONS: usize = 512;
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
    /// Answer to `/metrics/probes`.
    pub probes: Arc<ProbeCounters>,
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
            configz: configz(config),
            debugging: config.enable_debugging_handlers,
            probes,
        }
    }
}

/// Serves until `cancel`. Fails at once when the address is taken or a certificate cannot be read.
pub async fn serve(
    config: ServerConfig,
    state: Arc<dyn PodLookup>,
    runtime: RuntimeServiceClient<Channel>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let tls = tls::server_config(config.serving.clone(), &config.client_ca_file)
        .context("cannot set up TLS of the kubelet API")?;
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {} for the kubelet API", config.listen))?;
    info!(address = %config.listen, "kubelet API is served");
    let api = Arc::new(Api::new(config, state, runtime));
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
        let (api, acceptor, cancel) = (Arc::clone(&api), acceptor.clone(), cancel.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                outcome = connection(stream, acceptor, api) => {
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
    acceptor: TlsAcceptor,
    api: Arc<Api>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
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

/// The settings in effect, as `/configz` shows them.
fn configz(config: &AgentConfig) -> Value {
    json!({"kubeletconfig": {
        "address": config.address,
        "port": config.port,
        "healthzPort": config.healthz_port,
        "containerRuntimeEndpoint": config.container_runtime_endpoint,
        "cgroupRoot": config.cgroup_root,
        "cgroupDriver": config.cgroup_driver,
        "clusterDomain": config.cluster_domain,
        "clusterDNS": config.cluster_dns,
        "allowedUnsafeSysctls": config.allowed_unsafe_sysctls,
        "cpuManagerPolicy": config.cpu_manager_policy,
        "seccompDefault": config.seccomp_default,
        "maxPods": config.max_pods,
        "podPidsLimit": config.pod_pids_limit,
        "cpuCFSQuota": config.cpu_cfs_quota,
        "podLogsDir": config.pod_logs_dir,
        "resolvConf": config.resolv_conf,
        "nodeLeaseDurationSeconds": config.node_lease_duration_seconds,
        "systemReserved": config.system_reserved,
        "kubeReserved": config.kube_reserved,
        "staticPodPath": config.static_pod_path,
        "containerLogMaxSize": config.container_log_max_size,
        "containerLogMaxFiles": config.container_log_max_files,
        "imageGCHighThresholdPercent": config.image_gc_high_threshold_percent,
        "imageGCLowThresholdPercent": config.image_gc_low_threshold_percent,
        "evictionHard": config.eviction_hard,
        "evictionSoft": config.eviction_soft,
        "enableDebuggingHandlers": config.enable_debugging_handlers,
    }})
}

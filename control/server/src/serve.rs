//! The listener: TCP, TLS with optional client certificates, HTTP/1.1 and HTTP/2, and an orderly end.
//!
//! [`Server::start`] fails with one clear error where something is missing; [`Server::run`] serves until cancelled, then ends watches, lets
//! running requests finish within [`DRAIN`], and returns.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use control_store::{Store, StoreError, Watch};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use rustls::{
    RootCertStore, ServerConfig as TlsConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::allocator::Allocator,
    api::Api,
    auth::{
        authn,
        tokens::{TokenAuthority, TokenError},
    },
    bootstrap,
    cache::WatchCache,
    config::{Credentials, ServerConfig},
    housekeeping,
    metrics::Metrics,
    pipeline::Pipeline,
    port_holder,
    random::Random,
    relay::KubeletClient,
};

/// How long a client may take for the TLS handshake and for the head of a request.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long running requests may take to finish when the server stops.
const DRAIN: Duration = Duration::from_secs(10);
/// Open connections; more wait in the listener's backlog.
const CONNECTIONS: usize = 4096;
/// Receive window of an HTTP/2 stream: bodies are small.
const STREAM_WINDOW: u32 = 256 << 10;
/// What may wait to be sent on an HTTP/2 stream.
const SEND_BUFFER: usize = 64 << 10;

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken or not ours.
    #[error("listen on {address}{}", holder.as_ref().map_or(String::new(), |holder| format!(", which {holder} holds")))]
    Listen {
        /// The configured address.
        address: SocketAddr,
        /// The process that listens there, where it can be found.
        holder: Option<String>,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A certificate or key is not PEM.
    #[error("read a certificate or key")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// The TLS library refuses a certificate or key.
    #[error("set up TLS")]
    Tls(#[source] rustls::Error),
    /// No certificate can be an authority for clients.
    #[error("set up client certificates")]
    ClientAuthority(#[source] rustls::server::VerifierBuilderError),
    /// The service account key cannot be used.
    #[error("set up service account tokens")]
    Tokens(#[source] TokenError),
    /// The store cannot be read.
    #[error("read the store")]
    Store(#[source] StoreError),
    /// The built-in objects cannot be made.
    #[error("create the built-in objects: {0}")]
    Bootstrap(String),
}

/// A server that is ready to run.
pub struct Server {
    api: Arc<Api>,
    listener: TcpListener,
    tls: TlsAcceptor,
    feed: Box<dyn Watch>,
}

impl Server {
    /// Bind the port, load the cache, prepare everything.
    pub async fn start(
        mut config: ServerConfig,
        credentials: &Credentials,
        store: Arc<dyn Store>,
    ) -> Result<Self, ServeError> {
        let address = config.listen;
        let listener = TcpListener::bind(address).await.map_err(|source| listen_error(address, source))?;
        config.listen = listener.local_addr().map_err(|source| listen_error(address, source))?;
        let tls = TlsAcceptor::from(Arc::new(tls_config(credentials)?));
        let kubelets = KubeletClient::new(credentials)?;
        let tokens = TokenAuthority::new(&credentials.service_account_key_pem).map_err(ServeError::Tokens)?;
        let (cache, feed) = WatchCache::load(Arc::clone(&store)).await.map_err(ServeError::Store)?;
        let allocator = Allocator::new(config.service_range, config.node_ports.clone());
        adopt_services(&cache, &allocator);
        let api = Api {
            config,
            store,
            cache,
            allocator,
            tokens,
            kubelets,
            metrics: Metrics::default(),
            random: Random::default(),
            ready: false.into(),
            shutdown: CancellationToken::new(),
        };
        Ok(Self { api: Arc::new(api), listener, tls, feed })
    }

    /// The address that is served, with the port that was chosen where 0 was configured.
    pub fn local_address(&self) -> SocketAddr {
        self.api.config.listen
    }

    /// Serve until cancelled.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), ServeError> {
        let Self { api, listener, tls, feed } = self;
        let stop = api.shutdown.clone();
        let follow = {
            let (api, stop) = (Arc::clone(&api), CancellationToken::new());
            let stopped = stop.clone();
            (tokio::spawn(async move { api.cache.follow(feed, stopped).await }), stop)
        };
        let (mut followed, stop_following) = follow;
        let upkeep = tokio::spawn(housekeeping::run(Arc::clone(&api), stop.clone()));
        let accept = accept_loop(Arc::clone(&api), listener, tls);
        let ready = async {
            bootstrap::run(&api).await.map_err(|error| ServeError::Bootstrap(error.to_string()))?;
            api.ready.store(true, std::sync::atomic::Ordering::Release);
            tracing::info!(address = %api.config.listen, revision = %api.cache.revision(), "serving the Kubernetes API");
            cancel.cancelled().await;
            Ok(())
        };
        let drain = {
            let stop = stop.clone();
            async move {
                let graceful = accept.await;
                if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
                    tracing::warn!("some connections did not finish in time and are cut");
                }
                drop(stop);
            }
        };
        let draining = tokio::spawn(drain);
        // Cancel safe: whichever ends first ends the server.
        let outcome = tokio::select! {
            outcome = ready => outcome,
            followed = &mut followed => match followed {
                Ok(Err(error)) => Err(ServeError::Store(error)),
                _ => Ok(()),
            },
        };
        api.ready.store(false, std::sync::atomic::Ordering::Release);
        stop.cancel();
        // The connections are finished before the cache stops following, so that running requests still see their writes.
        let drained = draining.await;
        stop_following.cancel();
        if drained.is_err() || upkeep.await.is_err() {
            tracing::error!("a server task ended abnormally");
        }
        outcome
    }
}

/// Accept until shutdown; returns what waits for the open connections.
async fn accept_loop(api: Arc<Api>, listener: TcpListener, tls: TlsAcceptor) -> GracefulShutdown {
    let stop = api.shutdown.clone();
    let pipeline = Arc::new(Pipeline::new(api));
    let graceful = GracefulShutdown::new();
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return graceful };
        // Cancel safe: a connection not yet accepted stays in the backlog.
        let accepted = tokio::select! {
            () = stop.cancelled() => return graceful,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (pipeline, tls, watcher) = (Arc::clone(&pipeline), tls.clone(), graceful.watcher());
                tokio::spawn(async move {
                    serve_connection(pipeline, tls, stream, watcher).await;
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely: give open connections time to end.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(
    pipeline: Arc<Pipeline>,
    tls: TlsAcceptor,
    stream: TcpStream,
    watcher: hyper_util::server::graceful::Watcher,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let stream = match tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%error, "TLS handshake failed");
            return;
        }
        Err(_elapsed) => return,
    };
    let certificates = stream.get_ref().1.peer_certificates();
    let user = certificates.and_then(|chain| chain.first()).and_then(authn::certificate_user).map(Arc::new);
    let service = service_fn(move |request| {
        let (pipeline, user) = (Arc::clone(&pipeline), user.clone());
        async move { pipeline.handle(user.as_deref(), request).await }
    });
    let builder = http_builder();
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "connection ended");
    }
}

fn http_builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(120))
        .max_buf_size(SEND_BUFFER);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(4 * STREAM_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(1000)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

fn tls_config(credentials: &Credentials) -> Result<TlsConfig, ServeError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(credentials.authority_pem.as_bytes()) {
        roots.add(certificate.map_err(ServeError::Pem)?).map_err(ServeError::Tls)?;
    }
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
        .allow_unauthenticated()
        .build()
        .map_err(ServeError::ClientAuthority)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(credentials.serving.certificate_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(ServeError::Pem)?;
    let key =
        PrivateKeyDer::from_pem_slice(credentials.serving.key_pem.as_bytes()).map_err(ServeError::Pem)?;
    let mut config = TlsConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(ServeError::Tls)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn adopt_services(cache: &WatchCache, allocator: &Allocator) {
    let services = control_api::kinds::find("", "v1", "services").and_then(|info| cache.resource(info));
    for service in services.map(|services| services.snapshot(None, |_| true).objects).unwrap_or_default() {
        match service.value() {
            Ok(value) => allocator.adopt(&value),
            Err(error) => tracing::error!(key = %service.key, %error, "a Service does not decode"),
        }
    }
}

fn listen_error(address: SocketAddr, source: std::io::Error) -> ServeError {
    let taken = source.kind() == std::io::ErrorKind::AddrInUse;
    let holder = if taken { port_holder::find(address.port()) } else { None };
    ServeError::Listen { address, holder, source }
}

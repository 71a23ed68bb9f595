//! A server in a temporary directory and clients with certificates of its authority.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use control_server::{
    Credentials, Server, ServerConfig,
    pki::{Authority, Identity, LeafRequest, Usage},
};
use control_store::{RedbOptions, RedbStore, Store};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinHandle};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;

/// Nothing a test waits for takes longer.
const DEADLINE: Duration = Duration::from_secs(20);

/// A running server.
pub(crate) struct Cluster {
    directory: tempfile::TempDir,
    authority: Authority,
    address: SocketAddr,
    pub(crate) store: Arc<dyn Store>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        // Another test of this process may have installed it already.
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    async fn start_in(directory: tempfile::TempDir) -> Self {
        let now = jiff::Timestamp::now();
        let authority = Authority::load_or_create(directory.path(), now).unwrap();
        let store: Arc<dyn Store> =
            Arc::new(RedbStore::open(&RedbOptions::new(directory.path().join("store.redb"))).unwrap());
        let config = ServerConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise_address: "10.0.0.1".parse().unwrap(),
            service_range: "10.96.0.0/12".parse().unwrap(),
            node_ports: 30000..=32767,
        };
        let credentials = credentials(directory.path(), &authority, now);
        let server = Server::start(config, &credentials, Arc::clone(&store)).await.unwrap();
        let (address, cancel) = (server.local_address(), CancellationToken::new());
        let task = tokio::spawn({
            let cancel = cancel.clone();
            async move { server.run(cancel).await.unwrap() }
        });
        let cluster = Self { directory, authority, address, store, cancel, task };
        let admin = cluster.admin();
        wait_for(|| async { (admin.get("/readyz").await.0 == 200).then_some(()) }).await;
        admin
            .create(
                "/api/v1/namespaces/default/serviceaccounts",
                &serde_json::json!({"metadata": {"name": "default"}}),
            )
            .await;
        cluster
    }

    /// Stop in order and start again on the same files.
    pub(crate) async fn restart(self) -> Self {
        let Self { directory, store, cancel, task, .. } = self;
        cancel.cancel();
        task.await.unwrap();
        store.close().await;
        drop(store);
        Self::start_in(directory).await
    }

    /// Stop in order.
    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap();
        self.store.close().await;
    }

    pub(crate) fn admin(&self) -> Client {
        self.client("kubernetes-admin", "system:masters")
    }

    pub(crate) fn node(&self, name: &str) -> Client {
        self.client(&format!("system:node:{name}"), "system:nodes")
    }

    pub(crate) fn client(&self, user: &str, group: &str) -> Client {
        let request = LeafRequest {
            common_name: user.to_owned(),
            organization: Some(group.to_owned()),
            usage: Usage::Client,
            names: Vec::new(),
        };
        let identity = self.authority.issue(&request, jiff::Timestamp::now()).unwrap();
        self.client_with(Some(&identity), None)
    }

    /// What a kubelet serves with: its own certificate, and only for clients of the authority.
    pub(crate) fn kubelet_tls(&self) -> TlsAcceptor {
        let request = LeafRequest {
            common_name: "system:node:a".to_owned(),
            organization: None,
            usage: Usage::Server,
            names: vec!["127.0.0.1".to_owned()],
        };
        let identity = self.authority.issue(&request, jiff::Timestamp::now()).unwrap();
        let verifier = WebPkiClientVerifier::builder(Arc::new(self.roots())).build().unwrap();
        let config = rustls::ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap(),
            )
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.authority.certificate_pem().as_bytes()).unwrap())
            .unwrap();
        roots
    }

    pub(crate) fn bearer(&self, token: &str) -> Client {
        self.client_with(None, Some(token.to_owned()))
    }

    pub(crate) fn nobody(&self) -> Client {
        self.client_with(None, None)
    }

    fn client_with(&self, identity: Option<&Identity>, token: Option<String>) -> Client {
        let builder = ClientConfig::builder().with_root_certificates(self.roots());
        let config = match identity {
            Some(identity) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap(),
                )
                .unwrap(),
            None => builder.with_no_client_auth(),
        };
        Client { address: self.address, tls: TlsConnector::from(Arc::new(config)), token }
    }
}

fn credentials(directory: &Path, authority: &Authority, now: jiff::Timestamp) -> Credentials {
    let issue = |name: &str, usage, names: &[&str]| {
        let request = LeafRequest {
            common_name: name.to_owned(),
            organization: None,
            usage,
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        authority.issue(&request, now).unwrap()
    };
    let key = directory.join("sa.key");
    if !key.exists() {
        std::fs::write(&key, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
    }
    Credentials {
        authority_pem: authority.certificate_pem().to_owned(),
        serving: issue("kube-apiserver", Usage::Server, &["127.0.0.1"]),
        kubelet_client: issue("kubelet-client", Usage::Client, &[]),
        service_account_key_pem: std::fs::read_to_string(key).unwrap(),
    }
}

/// Speaks to the server, one connection per request.
#[derive(Clone)]
pub(crate) struct Client {
    address: SocketAddr,
    tls: TlsConnector,
    token: Option<String>,
}

/// Status code and decoded body.
pub(crate) type Answer = (u16, Value);

impl Client {
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> (StatusCode, HeaderMap, Incoming) {
        let exchange = async {
            let stream = self.connect().await;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
            if let Some(token) = &self.token {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let response = sender.send_request(request.body(Full::new(body.into())).unwrap()).await.unwrap();
            let (parts, body) = response.into_parts();
            (parts.status, parts.headers, body)
        };
        tokio::time::timeout(DEADLINE, exchange).await.unwrap()
    }

    /// A bare TLS connection, for protocols that are spoken by hand.
    pub(crate) async fn connect(&self) -> TlsStream<TcpStream> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        self.tls.connect(name, stream).await.unwrap()
    }

    async fn answer(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Bytes) -> Answer {
        let (status, _, body) = self.send(method, path, headers, body).await;
        let bytes = body.collect().await.unwrap().to_bytes();
        let value = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        (status.as_u16(), value)
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.answer(Method::GET, path, &[], Bytes::new()).await
    }

    pub(crate) async fn get_as(&self, path: &str, accept: &str) -> Answer {
        self.answer(Method::GET, path, &[("accept", accept)], Bytes::new()).await
    }

    pub(crate) async fn post(&self, path: &str, object: &Value) -> Answer {
        let headers = [("content-type", "application/json")];
        self.answer(Method::POST, path, &headers, object.to_string().into()).await
    }

    /// Create an object that must be accepted, or be there already.
    pub(crate) async fn create(&self, path: &str, object: &Value) -> Value {
        let (code, created) = self.post(path, object).await;
        assert!(code == 201 || created["reason"] == "AlreadyExists", "{code} {created}");
        created
    }

    pub(crate) async fn put(&self, path: &str, object: &Value) -> Answer {
        let headers = [("content-type", "application/json")];
        self.answer(Method::PUT, path, &headers, object.to_string().into()).await
    }

    /// `kind` is `json`, `merge` or `strategic-merge`.
    pub(crate) async fn patch(&self, path: &str, kind: &str, patch: &Value) -> Answer {
        let media_type = format!("application/{kind}-patch+json");
        self.answer(Method::PATCH, path, &[("content-type", &media_type)], patch.to_string().into()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.answer(Method::DELETE, path, &[], Bytes::new()).await
    }

    pub(crate) async fn watch(&self, path: &str) -> Events {
        let (status, _, body) = self.send(Method::GET, path, &[], Bytes::new()).await;
        assert_eq!(status, 200);
        Events { body, pending: BytesMut::new() }
    }
}

/// The events of a watch.
pub(crate) struct Events {
    body: Incoming,
    pending: BytesMut,
}

impl Events {
    /// The next event, or `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line = self.pending.split_to(end + 1);
                let event: Value = serde_json::from_slice(&line).unwrap();
                return Some((event["type"].as_str().unwrap().to_owned(), event["object"].clone()));
            }
            let frame = tokio::time::timeout(DEADLINE, self.body.frame()).await.unwrap()?;
            self.pending.extend_from_slice(&frame.unwrap().into_data().unwrap());
        }
    }

    /// Type and name of the next event.
    pub(crate) async fn next_name(&mut self) -> (String, String) {
        let (kind, object) = self.next().await.unwrap();
        (kind, object["metadata"]["name"].as_str().unwrap_or_default().to_owned())
    }
}

/// Wait until `check` gives something.
pub(crate) async fn wait_for<T, F: Future<Output = Option<T>>>(check: impl Fn() -> F) -> T {
    let wait = async {
        loop {
            if let Some(found) = check().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.unwrap()
}

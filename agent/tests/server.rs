//! The kubelet API over real TLS connections: who is let in, and what plain requests get.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use keelson_agent::config::TlsRules;
use keelson_agent::contracts::{ContainerRef, LookupError, PodLookup};
use keelson_agent::server::{ServerConfig, ServerSettings, Serving, serve};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

/// One pod with one container, which has ended and whose log is a file.
struct OnePod {
    log: PathBuf,
}

impl PodLookup for OnePod {
    fn pods(&self) -> Vec<Arc<Pod>> {
        let pod = json!({"metadata": {"name": "web", "namespace": "ns"}, "status": {"phase": "Running"}});
        vec![Arc::new(serde_json::from_value(pod).unwrap())]
    }

    fn container(
        &self,
        ns: &str,
        pod: &str,
        _uid: Option<&str>,
        container: &str,
    ) -> Result<ContainerRef, LookupError> {
        let (namespace, pod, container) = (ns.to_owned(), pod.to_owned(), container.to_owned());
        match (pod.as_str(), container.as_str()) {
            ("web", "nginx") => Ok(ContainerRef {
                id: "c1".to_owned(),
                pod_uid: "u1".to_owned(),
                log_path: self.log.clone(),
                running: false,
            }),
            ("web", _) => Err(LookupError::ContainerNotFound { pod, container }),
            _ => Err(LookupError::PodNotFound { namespace, pod }),
        }
    }

    fn previous_container(
        &self,
        _: &str,
        pod: &str,
        _: Option<&str>,
        c: &str,
    ) -> Result<ContainerRef, LookupError> {
        Err(LookupError::NoPrevious { pod: pod.to_owned(), container: c.to_owned() })
    }

    fn sandbox(&self, _: &str, pod: &str, _: Option<&str>) -> Result<String, LookupError> {
        Err(LookupError::NotRunning { pod: pod.to_owned() })
    }
}

/// A CA, and certificates that it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, user: &str, group: &str, host: Option<&str>) -> (CertificateDer<'static>, KeyPair) {
        let mut params =
            CertificateParams::new(host.map(str::to_owned).into_iter().collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, user);
        params.distinguished_name.push(DnType::OrganizationName, group);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().der().clone(), key)
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    address: SocketAddr,
    authority: Authority,
    cancel: CancellationToken,
}

impl Bench {
    async fn start() -> Self {
        Self::with(true, ServerSettings::default()).await
    }

    async fn with(debugging: bool, settings: ServerSettings) -> Self {
        // Whoever comes second finds it installed, by another test of this process.
        drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let (certificate, key) = authority.issue("system:node:n1", "system:nodes", Some("localhost"));
        write(dir.path(), "ca.crt", &authority.0.pem());
        write(dir.path(), "kubelet.crt", &pem("CERTIFICATE", &certificate));
        write(dir.path(), "kubelet.key", &key.serialize_pem());
        write(dir.path(), "0.log", "2026-01-01T00:00:00Z stdout F hello\n");
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let config = ServerConfig {
            listen: free,
            serving: Serving::from_files(&dir.path().join("kubelet.crt"), &dir.path().join("kubelet.key"))
                .unwrap(),
            client_ca_file: dir.path().join("ca.crt"),
            node_name: "n1".to_owned(),
            root_dir: dir.path().to_owned(),
            pod_logs_dir: dir.path().to_owned(),
            pods_cgroup: "/kubepods".to_owned(),
            runtime_socket: dir.path().join("cri.sock"),
            images: None,
            volumes: keelson_agent::server::DriverVolumes::default(),
            configz: json!({"kubeletconfig": {}}),
            debugging,
            settings,
            probes: Arc::default(),
            pulls: Arc::default(),
        };
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let cancel = CancellationToken::new();
        let state = Arc::new(OnePod { log: dir.path().join("0.log") });
        tokio::spawn(serve(config, state, RuntimeServiceClient::new(channel), cancel.clone()));
        Self { _dir: dir, address: free, authority, cancel }
    }

    /// Status and body of a GET by a client with this certificate, if any.
    async fn get(&self, client: Option<(&str, &str)>, path: &str) -> (StatusCode, String) {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.0.der().clone()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots);
        let config = match client.map(|(user, group)| self.authority.issue(user, group, None)) {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
                config.with_client_auth_cert(vec![certificate], key).unwrap()
            }
        };
        let stream = self.connect().await;
        let name = ServerName::try_from("localhost").unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get(path).header("host", "localhost").body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// Connects once the server listens.
    async fn connect(&self) -> TcpStream {
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            match TcpStream::connect(self.address).await {
                Ok(stream) => return stream,
                Err(error) => assert!(tokio::time::Instant::now() < end, "{error}"),
            }
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn write(dir: &Path, name: &str, text: &str) {
    std::fs::write(dir.join(name), text).unwrap();
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}

#[tokio::test]
async fn only_masters_and_the_api_server_are_let_in() {
    let bench = Bench::start().await;
    assert_eq!(bench.get(None, "/healthz").await, (StatusCode::UNAUTHORIZED, "Unauthorized".to_owned()));
    let node = Some(("system:node:n1", "system:nodes"));
    let forbidden = "Forbidden (user=system:node:n1, verb=get, resource=nodes, subresource(s)=[pods])";
    assert_eq!(bench.get(node, "/pods").await, (StatusCode::FORBIDDEN, forbidden.to_owned()));
    let admin = Some(("kubernetes-admin", "system:masters"));
    assert_eq!(bench.get(admin, "/healthz").await, (StatusCode::OK, "ok".to_owned()));
    let api_server = Some(("kube-apiserver-kubelet-client", "other"));
    let (status, body) = bench.get(api_server, "/pods").await;
    assert_eq!(status, StatusCode::OK);
    assert!(body.contains("\"PodList\"") && body.contains("\"web\""), "{body}");
}

#[tokio::test]
async fn logs_and_mistakes_have_their_answers() {
    let bench = Bench::start().await;
    let admin = Some(("kubernetes-admin", "system:masters"));
    let get = |path: &'static str| bench.get(admin, path);
    assert_eq!(get("/containerLogs/ns/web/nginx?follow=true").await, (StatusCode::OK, "hello\n".to_owned()));
    let stamped = "2026-01-01T00:00:00Z hello\n".to_owned();
    assert_eq!(get("/containerLogs/ns/web/nginx?timestamps=true").await, (StatusCode::OK, stamped));
    let missing = "container \"x\" is not valid for pod \"web\"".to_owned();
    assert_eq!(get("/containerLogs/ns/web/x").await, (StatusCode::NOT_FOUND, missing));
    assert_eq!(get("/containerLogs/ns/web/nginx?previous=true").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(get("/containerLogs/ns/web/nginx?tailLines=x").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(get("/exec/ns/web/nginx?command=ls").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(get("/portForward/ns/web").await.0, StatusCode::NOT_FOUND);
    assert_eq!(get("/nonsense").await.0, StatusCode::NOT_FOUND);
    assert!(get("/metrics").await.1.contains("kubelet_running_pods 1\n"));
    assert!(
        get("/metrics/resource").await.1.contains("resource_scrape_error 1\n"),
        "no runtime answers here"
    );
}

#[tokio::test]
async fn metrics_are_told_even_when_the_runtime_is_away() {
    let bench = Bench::start().await;
    let admin = Some(("kubernetes-admin", "system:masters"));
    let (status, cadvisor) = bench.get(admin, "/metrics/cadvisor").await;
    assert_eq!(status, StatusCode::OK);
    assert!(
        cadvisor.contains("machine_cpu_cores ") && cadvisor.ends_with("container_scrape_error 1\n"),
        "{cadvisor}"
    );
    let (status, probes) = bench.get(admin, "/metrics/probes").await;
    assert_eq!(status, StatusCode::OK);
    assert!(probes.contains("# TYPE prober_probe_total counter\n"), "{probes}");
}

#[tokio::test]
async fn debugging_can_be_switched_off() {
    let bench = Bench::with(false, ServerSettings::default()).await;
    let admin = Some(("kubernetes-admin", "system:masters"));
    for path in [
        "/containerLogs/ns/web/nginx",
        "/configz",
        "/runningpods/",
        "/exec/ns/web/nginx?command=ls",
        "/logs/",
    ] {
        let disabled = (StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.".to_owned());
        assert_eq!(bench.get(admin, path).await, disabled, "{path}");
    }
    assert_eq!(bench.get(admin, "/pods").await.0, StatusCode::OK);
}

#[tokio::test]
async fn the_nodes_logs_are_shown_unless_that_is_off() {
    let logs = tempfile::tempdir().unwrap();
    std::fs::create_dir(logs.path().join("pods")).unwrap();
    write(logs.path(), "daemon.log", "hello\n");
    let settings = ServerSettings { log_root: logs.path().to_owned(), ..ServerSettings::default() };
    let bench = Bench::with(true, settings.clone()).await;
    let admin = Some(("kubernetes-admin", "system:masters"));
    assert_eq!(bench.get(admin, "/logs/daemon.log").await, (StatusCode::OK, "hello\n".to_owned()));
    let (status, listing) = bench.get(admin, "/logs/").await;
    assert!(status == StatusCode::OK && listing.contains("<a href=\"pods/\">pods/</a>"), "{listing}");
    assert_eq!(bench.get(admin, "/logs").await.0, StatusCode::MOVED_PERMANENTLY);
    assert_eq!(bench.get(admin, "/logs/%2e%2e/passwd").await.0, StatusCode::NOT_FOUND);
    assert_eq!(bench.get(None, "/logs/").await.0, StatusCode::UNAUTHORIZED);
    let off = ServerSettings { system_logs: false, profiling: false, debug_flags: false, ..settings };
    let bench = Bench::with(true, off).await;
    for (path, message) in [
        ("/logs/", "logs endpoint is disabled."),
        ("/debug/pprof/heap", "profiling endpoint is disabled."),
        ("/debug/flags/v", "flags endpoint is disabled."),
    ] {
        assert_eq!(bench.get(admin, path).await, (StatusCode::METHOD_NOT_ALLOWED, message.to_owned()));
    }
}

#[tokio::test]
async fn the_read_only_port_tells_everybody_a_little() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let settings = ServerSettings { secure: false, read_only: Some(free), ..ServerSettings::default() };
    let mut bench = Bench::with(true, settings).await;
    bench.address = free;
    let get = async |path: &str| {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(bench.connect().await)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get(path).header("host", "localhost").body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    };
    assert_eq!(get("/healthz").await.0, StatusCode::OK);
    assert!(get("/pods").await.1.starts_with(b"{"));
    assert_eq!(get("/metrics").await.0, StatusCode::OK);
    for path in ["/containerLogs/ns/web/nginx", "/exec/ns/web/nginx?command=ls", "/configz", "/logs/"] {
        assert_eq!(get(path).await.0, StatusCode::METHOD_NOT_ALLOWED, "{path}");
    }
}

#[tokio::test]
async fn a_minimum_of_tls_1_3_refuses_1_2() {
    let tls = TlsRules { only_13: true, ..TlsRules::default() };
    let bench = Bench::with(true, ServerSettings { tls, ..ServerSettings::default() }).await;
    let mut roots = RootCertStore::empty();
    roots.add(bench.authority.0.der().clone()).unwrap();
    let old = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS12])
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let refused = TlsConnector::from(Arc::new(old)).connect(name, bench.connect().await).await;
    assert!(refused.is_err(), "TLS 1.2 is too old");
    assert_eq!(bench.get(None, "/healthz").await.0, StatusCode::UNAUTHORIZED, "1.3 is not");
}

//! A node's certificates against a control plane in this process: joining by a token, serving, renewal.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use control_manager::{ManagerConfig, SigningAuthority};
use control_server::pki::{Authority, Identity, LeafRequest, Usage, render_kubeconfig};
use control_server::{Credentials as ServerCredentials, Server, ServerConfig};
use control_store::{RedbOptions, RedbStore, Store};
use k8s_openapi::api::core::v1::{Node, Secret};
use keelson_agent::certificates::{self, Credentials};
use keelson_agent::config::AgentConfig;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Nothing here takes longer, on the slowest machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// API server and controllers.
struct ControlPlane {
    authority: Authority,
    endpoint: String,
    admin: Client,
    cancel: CancellationToken,
    store: Arc<dyn Store>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

fn issue(authority: &Authority, name: &str, group: &str, usage: Usage) -> Identity {
    let request = LeafRequest {
        common_name: name.to_owned(),
        organization: Some(group.to_owned()),
        usage,
        names: vec!["127.0.0.1".to_owned()],
    };
    authority.issue(&request, jiff::Timestamp::now()).unwrap()
}

impl ControlPlane {
    async fn start(directory: &Path) -> Self {
        let authority = Authority::load_or_create(directory, jiff::Timestamp::now()).unwrap();
        let store: Arc<dyn Store> =
            Arc::new(RedbStore::open(&RedbOptions::new(directory.join("store.redb"))).unwrap());
        let settings = ServerConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise_address: "10.0.0.1".parse().unwrap(),
            service_range: "10.96.0.0/12".parse().unwrap(),
            node_ports: 30000..=32767,
        };
        let credentials = ServerCredentials {
            authority_pem: authority.certificate_pem().to_owned(),
            serving: issue(&authority, "kube-apiserver", "none", Usage::Server),
            kubelet_client: issue(&authority, "kubelet-client", "none", Usage::Client),
            service_account_key_pem: KeyPair::generate().unwrap().serialize_pem(),
        };
        let server = Server::start(settings, &credentials, Arc::clone(&store)).await.unwrap();
        let endpoint = format!("https://127.0.0.1:{}", server.local_address().port());
        let cancel = CancellationToken::new();
        let stop = cancel.clone();
        let serving = tokio::spawn(async move { server.run(stop).await.unwrap() });
        let identity = issue(&authority, "admin", "system:masters", Usage::Client);
        let kubeconfig = render_kubeconfig("c", &endpoint, authority.certificate_pem(), "admin", &identity);
        let admin = client(&Kubeconfig::from_yaml(&kubeconfig).unwrap()).await;
        let manager = ManagerConfig {
            signing: Some(SigningAuthority {
                certificate_pem: authority.identity().certificate_pem.clone(),
                key_pem: authority.identity().key_pem.clone(),
            }),
            ..ManagerConfig::default()
        };
        let (controlled, stop) = (admin.clone(), cancel.clone());
        let managing =
            tokio::spawn(async move { control_manager::run(controlled, manager, stop).await.unwrap() });
        Self { authority, endpoint, admin, cancel, store, tasks: vec![serving, managing] }
    }

    async fn stop(self) {
        self.cancel.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
        self.store.close().await;
    }
}

async fn client(kubeconfig: &Kubeconfig) -> Client {
    let config = Config::from_custom_kubeconfig(kubeconfig.clone(), &KubeConfigOptions::default()).await;
    Client::try_from(config.unwrap()).unwrap()
}

/// The agent's configuration and its bootstrap kubeconfig.
fn agent_files(directory: &Path, plane: &ControlPlane) -> AgentConfig {
    let at = |name: &str| directory.join(name);
    let authority = STANDARD.encode(plane.authority.certificate_pem());
    let bootstrap = json!({
        "clusters": [{"name": "c", "cluster": {"server": plane.endpoint, "certificate-authority-data": authority}}],
        "users": [{"name": "u", "user": {"token": "abcdef.0123456789abcdef"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    });
    std::fs::write(at("bootstrap"), bootstrap.to_string()).unwrap();
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "rotateCertificates": true,
        "serverTLSBootstrap": true,
        "keelson": {
            "nodeName": "a",
            "nodeIP": "127.0.0.1",
            "kubeconfig": at("kubeconfig"),
            "bootstrapKubeconfig": at("bootstrap"),
            "rootDir": at("root"),
        },
    });
    std::fs::write(at("agent.yaml"), config.to_string()).unwrap();
    AgentConfig::load(&at("agent.yaml")).unwrap()
}

async fn add_token(admin: &Client) {
    let secret: Secret = serde_json::from_value(json!({
        "metadata": {"name": "bootstrap-token-abcdef"},
        "type": "bootstrap.kubernetes.io/token",
        "stringData": {"token-id": "abcdef", "token-secret": "0123456789abcdef", "usage-bootstrap-authentication": "true"},
    }))
    .unwrap();
    let secrets: Api<Secret> = Api::namespaced(admin.clone(), "kube-system");
    eventually("the namespace takes the token", || async {
        secrets.create(&PostParams::default(), &secret).await.is_ok()
    })
    .await;
}

async fn eventually<F: Future<Output = bool>>(what: &str, look: impl Fn() -> F) {
    let begin = Instant::now();
    while !look().await {
        assert!(begin.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Days that the first certificate of a file is still valid.
fn days_left(file: &Path) -> i64 {
    let Ok(text) = std::fs::read(file) else { return -1 };
    let der = CertificateDer::from_pem_slice(&text).unwrap();
    let (_, certificate) = X509Certificate::from_der(&der).unwrap();
    (certificate.validity().not_after.timestamp() - jiff::Timestamp::now().as_second()) / 86_400
}

/// Puts a client certificate that has a day of its ninety left where the agent keeps its own.
fn nearly_over(plane: &ControlPlane, pki: &Path) {
    let identity = plane.authority.identity();
    let issuer =
        Issuer::from_ca_cert_pem(&identity.certificate_pem, KeyPair::from_pem(&identity.key_pem).unwrap())
            .unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, "system:node:a");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap();
    let at = |seconds: u64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds);
    params.not_before = at(now - 89 * 86_400);
    params.not_after = at(now + 86_400);
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let (file, link) =
        (pki.join("kubelet-client-2020-01-01-00-00-00.pem"), pki.join("kubelet-client-current.pem"));
    std::fs::write(&file, format!("{}{}", certificate.pem(), key.serialize_pem())).unwrap();
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(file.file_name().unwrap(), &link).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_serves_and_renews() {
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
    let directory = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(directory.path()).await;
    let config = agent_files(directory.path(), &plane);
    let pki: PathBuf = directory.path().join("root/pki");
    let client_link = pki.join("kubelet-client-current.pem");
    let cancel = CancellationToken::new();

    // The token comes after the node has begun to ask.
    let joining = {
        let (config, cancel) = (config.clone(), cancel.clone());
        tokio::spawn(async move { certificates::join(&config, &cancel).await })
    };
    eventually("a key is kept", || async { pki.join("kubelet-client.key.tmp").exists() }).await;
    add_token(&plane.admin).await;
    tokio::time::timeout(DEADLINE, joining).await.unwrap().unwrap().unwrap();
    assert!(std::fs::read_link(&client_link).unwrap().to_str().unwrap().starts_with("kubelet-client-2"));
    assert!(!pki.join("kubelet-client.key.tmp").exists(), "nothing is left over");
    let kubeconfig = std::fs::read_to_string(directory.path().join("kubeconfig")).unwrap();
    assert!(
        kubeconfig.contains("kubelet-client-current.pem") && !kubeconfig.contains("token"),
        "{kubeconfig}"
    );
    let issued = std::fs::read(&client_link).unwrap();
    certificates::join(&config, &cancel).await.unwrap();
    assert_eq!(std::fs::read(&client_link).unwrap(), issued, "a second start asks for nothing");

    // It is the node now, and gets a serving certificate for the address that it tells.
    let credentials = Credentials::load(&config).await.unwrap();
    let nodes: Api<Node> = Api::all(credentials.client());
    let node = serde_json::from_value(json!({"metadata": {"name": "a"}})).unwrap();
    nodes.create(&PostParams::default(), &node).await.unwrap();
    let served = certificates::serving(&config, &credentials.client(), &cancel).unwrap();
    let first = served.certificate.current().cert[0].to_vec();
    let following = tokio::spawn(served.follow);
    let address = json!({"status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}});
    nodes.patch_status("a", &PatchParams::default(), &Patch::Merge(address)).await.unwrap();
    let serving = served.certificate.clone();
    eventually("the issued certificate is served", || async { serving.current().cert[0].to_vec() != first })
        .await;
    let now_served = serving.current().cert[0].to_vec();
    let (_, certificate) = X509Certificate::from_der(&now_served).unwrap();
    assert!(certificate.issuer().to_string().contains("keelson-ca"), "{}", certificate.issuer());
    assert!(pki.join("kubelet-server-current.pem").exists());
    let again = certificates::serving(&config, &credentials.client(), &cancel).unwrap();
    assert_eq!(
        again.certificate.current().cert[0].to_vec(),
        now_served,
        "after a restart it is there at once"
    );

    // A certificate that is nearly over is renewed, and requests go on with the new one.
    nearly_over(&plane, &pki);
    credentials.reload().await.unwrap();
    let renewing = tokio::spawn(certificates::renew_client(
        Arc::new(config.clone()),
        credentials.clone(),
        cancel.clone(),
    ));
    eventually("the certificate is renewed", || async { days_left(&client_link) > 300 }).await;
    nodes.list(&ListParams::default()).await.unwrap();
    cancel.cancel();
    renewing.await.unwrap();
    following.await.unwrap();
    plane.stop().await;
}

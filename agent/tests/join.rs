//! A node's certificates against a control plane in this process: joining by a token, serving, renewal.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

mod plane;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::{Node, Secret};
use keelson_agent::certificates::{self, Credentials};
use keelson_agent::config::AgentConfig;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use plane::{ControlPlane, DEADLINE, eventually};

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

//! How a node gets its certificates: by a bootstrap token first, by the certificate it has then.

use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::CertificateSigningRequest,
        core::v1::{Node, Secret},
    },
};
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use serde_json::{Value, json};

use crate::harness::{Cluster, base64_of, eventually};

const TOKEN: &str = "abcdef.0123456789abcdef";

fn body(key: &KeyPair, common_name: &str, names: &[&str]) -> ByteString {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).expect("names are valid");
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, common_name);
    let request = params.serialize_request(key).expect("signs");
    ByteString(request.pem().expect("is text").into_bytes())
}

async fn ask(
    client: &Client,
    name: &str,
    signer: &str,
    usage: &str,
    body: &ByteString,
) -> Api<CertificateSigningRequest> {
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let request = json!({
        "metadata": {"name": name},
        "spec": {"signerName": format!("kubernetes.io/{signer}"), "request": body,
            "usages": ["digital signature", usage], "expirationSeconds": 3600, "username": "system:admin"},
    });
    let request = serde_json::from_value(request).expect("is a request");
    requests.create(&PostParams::default(), &request).await.expect("creates");
    requests
}

async fn issued(requests: &Api<CertificateSigningRequest>, name: &str) -> String {
    eventually("the certificate", || async {
        let request = requests.get(name).await.map_err(|error| error.to_string())?;
        let certificate = request.status.as_ref().and_then(|status| status.certificate.as_ref());
        match certificate {
            Some(certificate) => Ok(String::from_utf8_lossy(&certificate.0).into_owned()),
            None => Err(format!("{:?}", request.status)),
        }
    })
    .await
}

async fn add_token(cluster: &Cluster) {
    let secret: Secret = serde_json::from_value(json!({
        "metadata": {"name": "bootstrap-token-abcdef"},
        "type": "bootstrap.kubernetes.io/token",
        "stringData": {"token-id": "abcdef", "token-secret": "0123456789abcdef", "usage-bootstrap-authentication": "true"},
    }))
    .expect("is a Secret");
    cluster.api::<Secret>("kube-system").create(&PostParams::default(), &secret).await.expect("creates");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_by_a_token_and_serves_under_its_own_names() {
    let cluster = Cluster::start().await;
    let token = json!({"token": TOKEN});
    let stranger = cluster.client_as(&token).await;
    let all: Api<CertificateSigningRequest> = Api::all(stranger);
    assert!(all.list(&ListParams::default()).await.is_err(), "there is no such token yet");
    add_token(&cluster).await;
    let newcomer = cluster.client_as(&token).await;
    let known: Api<CertificateSigningRequest> = Api::all(newcomer.clone());
    eventually("the token to be known", || async {
        known.list(&ListParams::default()).await.map(|_| ()).map_err(|error| error.to_string())
    })
    .await;
    let nodes: Api<Node> = Api::all(newcomer.clone());
    assert!(nodes.list(&ListParams::default()).await.is_err(), "a token is for certificates only");

    let key = KeyPair::generate().expect("generates");
    let signer = "kube-apiserver-client-kubelet";
    let requests = ask(&newcomer, "client", signer, "client auth", &body(&key, "system:node:a", &[])).await;
    let stored = requests.get("client").await.expect("is there");
    assert_eq!(stored.spec.username.as_deref(), Some("system:bootstrap:abcdef"), "whoever it says it is");
    let certificate = issued(&requests, "client").await;
    let user = json!({"client-certificate-data": base64_of(&certificate), "client-key-data": base64_of(&key.serialize_pem())});
    let node = cluster.client_as(&user).await;

    let nodes: Api<Node> = Api::all(node.clone());
    let object: Node = serde_json::from_value(json!({"metadata": {"name": "a"}})).expect("is a Node");
    nodes.create(&PostParams::default(), &object).await.expect("is the node a");
    let serving = "kubelet-serving";
    let names = body(&key, "system:node:a", &["a", "10.0.0.7"]);
    let requests = ask(&node, "serving", serving, "server auth", &names).await;
    let other = body(&key, "system:node:a", &["kubernetes.default.svc"]);
    ask(&node, "foreign", serving, "server auth", &other).await;
    let addresses = json!({"status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.7"}]}});
    nodes
        .patch_status("a", &PatchParams::default(), &Patch::Merge(addresses))
        .await
        .expect("tells its address");
    assert!(issued(&requests, "serving").await.starts_with("-----BEGIN CERTIFICATE-----"));
    let foreign = requests.get("foreign").await.expect("is there");
    assert!(
        foreign.status.is_none_or(|status| status.conditions.is_none()),
        "not the node's name: nobody approves it"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_gets_a_certificate_when_somebody_approves() {
    let cluster = Cluster::start().await;
    let key = KeyPair::generate().expect("generates");
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "jane");
    let request = params.serialize_request(&key).expect("signs").pem().expect("is text");
    let body = ByteString(request.into_bytes());
    let requests = ask(&cluster.client, "jane", "kube-apiserver-client", "client auth", &body).await;
    let approve = |name: &'static str| {
        let requests = requests.clone();
        async move {
            let conditions =
                json!([{"type": "Approved", "status": "True", "reason": "KubectlApprove", "message": "yes"}]);
            let patch: Patch<Value> = Patch::Merge(json!({"status": {"conditions": conditions}}));
            requests
                .patch_subresource("approval", name, &PatchParams::default(), &patch)
                .await
                .expect("approves");
        }
    };
    approve("jane").await;
    assert!(issued(&requests, "jane").await.contains("BEGIN CERTIFICATE"));

    let pem = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n";
    let nonsense = ByteString(pem.as_bytes().to_vec());
    ask(&cluster.client, "nonsense", "kube-apiserver-client", "client auth", &nonsense).await;
    approve("nonsense").await;
    eventually("the reason why it fails", || async {
        let request = requests.get("nonsense").await.map_err(|error| error.to_string())?;
        let conditions = request.status.and_then(|status| status.conditions).unwrap_or_default();
        let failed = conditions.iter().find(|condition| condition.type_ == "Failed");
        match failed.and_then(|condition| condition.reason.as_deref()) {
            Some("SignerValidationFailure") => Ok(()),
            other => Err(format!("{other:?} of {conditions:?}")),
        }
    })
    .await;
    cluster.stop().await;
}

//! One certificate from the API server: key, request, wait.
//!
//! The key is on disk before the request is sent, and the request is named after it: an agent that ends while it waits goes
//! on waiting for the same request when it is back.

use std::time::Duration;

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestSpec, CertificateSigningRequestStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData as _};
use sha2::{Digest as _, Sha256};
use tracing::{info, warn};

use super::store::Store;
use crate::files;

/// Deadline of one call.
const CALL: Duration = Duration::from_secs(30);
/// Longest wait for somebody who approves, until it is said again.
const ANSWER: Duration = Duration::from_secs(15 * 60);
/// Who signs certificates of the API's clients.
pub(super) const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Who signs certificates of the kubelet API.
pub(super) const SERVING_SIGNER: &str = "kubernetes.io/kubelet-serving";

/// What is asked for.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// The node.
    pub(super) node_name: String,
    /// The signer.
    pub(super) signer: &'static str,
    /// DNS names and addresses; none for a client.
    pub(super) names: Vec<String>,
}

/// Asks for a certificate, waits until it is issued, and keeps it.
pub(super) async fn obtain(client: &Client, wanted: &Wanted, store: &Store) -> anyhow::Result<()> {
    let key = pending_key(store).context("a key for the certificate cannot be kept")?;
    let certificate = match issued(client, wanted, &key).await {
        Ok(certificate) => certificate,
        Err(Failure::Refused(why)) => {
            // The same request would be refused again.
            std::fs::remove_file(store.pending_key_path()).context("the refused key cannot be removed")?;
            bail!(why)
        }
        Err(Failure::Other(error)) => return Err(error),
    };
    let pem = format!("{}\n{}", certificate.trim_end(), key.serialize_pem());
    crate::server::Serving::from_pem(&pem).context("the issued certificate does not fit its key")?;
    store.save(&pem, Timestamp::now()).context("the issued certificate cannot be kept")
}

enum Failure {
    Refused(String),
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// The key of a request that was not answered yet, else a new one.
fn pending_key(store: &Store) -> anyhow::Result<KeyPair> {
    let path = store.pending_key_path();
    if let Some(key) = files::read(&path)?.and_then(|pem| KeyPair::from_pem(&pem).ok()) {
        return Ok(key);
    }
    let key = KeyPair::generate()?;
    files::write_private(&path, &key.serialize_pem())?;
    Ok(key)
}

async fn issued(client: &Client, wanted: &Wanted, key: &KeyPair) -> Result<String, Failure> {
    let request = request(wanted, key).context("the certificate request cannot be made")?;
    let name = request.metadata.name.clone().unwrap_or_default();
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let params = PostParams::default();
    let created = tokio::time::timeout(CALL, api.create(&params, &request)).await;
    match created.context("the API server did not answer the certificate request in time")? {
        Ok(_) => info!(request = %name, signer = wanted.signer, "certificate requested"),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            info!(request = %name, signer = wanted.signer, "certificate had been requested");
        }
        Err(error) => {
            let error = anyhow::Error::new(error);
            return Err(Failure::Other(
                error.context("the API server does not take the certificate request"),
            ));
        }
    }
    loop {
        let answered = kube::runtime::wait::await_condition(
            api.clone(),
            &name,
            |request: Option<&CertificateSigningRequest>| {
                request.is_none_or(|request| answer(request).is_some())
            },
        );
        let Ok(seen) = tokio::time::timeout(ANSWER, answered).await else {
            warn!(request = %name, "nobody has answered the certificate request: kubectl certificate approve {name}");
            continue;
        };
        let seen = seen.context("the certificate request cannot be watched")?;
        return match seen.as_ref().and_then(answer) {
            Some(Ok(certificate)) => Ok(certificate),
            Some(Err(why)) => Err(Failure::Refused(format!("certificate request {name} was refused: {why}"))),
            None => Err(Failure::Refused(format!("certificate request {name} is gone"))),
        };
    }
}

/// The certificate, or why there will be none; `None` while it is open.
fn answer(request: &CertificateSigningRequest) -> Option<Result<String, String>> {
    let CertificateSigningRequestStatus { certificate, conditions } = request.status.clone()?;
    if let Some(certificate) = certificate.filter(|certificate| !certificate.0.is_empty()) {
        return Some(
            String::from_utf8(certificate.0).map_err(|_no_text| "the certificate is not PEM".to_owned()),
        );
    }
    let refusal = conditions
        .into_iter()
        .flatten()
        .find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed"))?;
    let (reason, message) = (refusal.reason.unwrap_or_default(), refusal.message.unwrap_or_default());
    Some(Err(format!("{} {reason}: {message}", refusal.type_)))
}

fn request(wanted: &Wanted, key: &KeyPair) -> anyhow::Result<CertificateSigningRequest> {
    let user = format!("system:node:{}", wanted.node_name);
    let mut params = CertificateParams::new(wanted.names.clone())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, user);
    let body = params.serialize_request(key)?.pem()?;
    let serves = wanted.signer == SERVING_SIGNER;
    let usage = if serves { "server auth" } else { "client auth" };
    let prefix = if serves { "csr" } else { "node-csr" };
    let mut hash = Sha256::new();
    for part in [wanted.node_name.as_bytes(), wanted.signer.as_bytes(), wanted.names.join(",").as_bytes()] {
        hash.update(part);
        hash.update([0]);
    }
    hash.update(key.der_bytes());
    let digest = hash.finalize().iter().take(16).fold(0_u128, |sum, byte| (sum << 8) | u128::from(*byte));
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(format!("{prefix}-{digest:032x}")), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(body.into_bytes()),
            signer_name: wanted.signer.to_owned(),
            usages: Some(vec!["digital signature".to_owned(), usage.to_owned()]),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_named_after_its_key() {
        let key = KeyPair::generate().unwrap();
        let wanted = Wanted { node_name: "a".to_owned(), signer: CLIENT_SIGNER, names: Vec::new() };
        let first = request(&wanted, &key).unwrap().metadata.name.unwrap();
        assert_eq!(request(&wanted, &key).unwrap().metadata.name.unwrap(), first);
        assert!(first.starts_with("node-csr-") && first.len() == 41, "{first}");
        let other = request(&wanted, &KeyPair::generate().unwrap()).unwrap().metadata.name.unwrap();
        assert_ne!(other, first);
        let serving = Wanted { signer: SERVING_SIGNER, names: vec!["a".to_owned()], ..wanted };
        let serving = request(&serving, &key).unwrap();
        assert!(serving.metadata.name.unwrap().starts_with("csr-"));
        assert_eq!(serving.spec.usages.unwrap(), ["digital signature", "server auth"]);
    }
}

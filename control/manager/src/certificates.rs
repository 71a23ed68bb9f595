//! Approves and signs certificate requests of nodes, signs what users had approved, and forgets old requests: carries out
//! `control_decide::certificates`.
//!
//! The only place where the manager holds a key. A request that cannot be read, or breaks its signer's rules, fails with the
//! reason in its status; it harms no other.

use std::{sync::Arc, time::Duration};

use control_decide::certificates::{
    CLIENT, NODE_CLIENT, NODE_SERVING, Profile, Subject, Verdict, forgotten_at, has_condition, is_pending,
    is_to_be_signed, judge, node_of, profile,
};
use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use rcgen::{
    CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::{Map, Value, json};
use x509_parser::{certification_request::X509CertificationRequest, pem::parse_x509_pem, prelude::FromDer};

use crate::{
    config::{Controller, ManagerError, SigningAuthority},
    context::{Context, now, wait},
    informer::Key,
    queue::Queue,
    write::{WriteError, call, delete, guarded},
};

/// Valid from a little earlier, so that a clock that is behind accepts it.
const BACKDATE_SECONDS: i64 = 300;

/// The authority that signs.
pub(crate) struct Signer {
    issuer: Issuer<'static, KeyPair>,
}

impl Signer {
    /// From the authority's files.
    pub(crate) fn new(authority: &SigningAuthority) -> Result<Self, ManagerError> {
        let key = KeyPair::from_pem(&authority.key_pem).map_err(ManagerError::Signer)?;
        let issuer =
            Issuer::from_ca_cert_pem(&authority.certificate_pem, key).map_err(ManagerError::Signer)?;
        Ok(Signer { issuer })
    }

    /// The certificate in PEM.
    fn sign(&self, body: Body, profile: &Profile, now: Timestamp) -> Result<String, rcgen::Error> {
        let Body { mut signable, .. } = body;
        let params = &mut signable.params;
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if profile.key_encipherment {
            params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
        }
        params.extended_key_usages.clear();
        if profile.client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        if profile.server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let at = |seconds: i64| {
            let since_epoch = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
            rcgen::date_time_ymd(1970, 1, 1) + since_epoch
        };
        params.not_before = at(now.as_second() - BACKDATE_SECONDS);
        params.not_after = at(now.as_second() + profile.seconds);
        Ok(signable.signed_by(&self.issuer)?.pem())
    }
}

/// A request's body, read.
struct Body {
    subject: Subject,
    signable: CertificateSigningRequestParams,
}

/// Reads the body and checks that it was signed with the key that it is about.
fn read(request: &ByteString) -> Result<Body, String> {
    let (_, pem) = parse_x509_pem(&request.0).map_err(|error| format!("the request is not PEM: {error}"))?;
    let (_, parsed) = X509CertificationRequest::from_der(&pem.contents)
        .map_err(|error| format!("the request is not PKCS#10: {error}"))?;
    let name = &parsed.certification_request_info.subject;
    if name.iter().any(|part| part.iter().count() != 1) {
        return Err("each part of the subject must have one value".to_owned());
    }
    let texts = |values: Vec<&str>| values.into_iter().map(str::to_owned).collect::<Vec<_>>();
    let organizations = texts(name.iter_organization().filter_map(|value| value.as_str().ok()).collect());
    let common_names = texts(name.iter_common_name().filter_map(|value| value.as_str().ok()).collect());
    let [common_name] = common_names.as_slice() else {
        return Err("the subject must have one common name".to_owned());
    };
    // What signs keeps one value of each kind: none may get lost unseen.
    if organizations.len() > 1 {
        return Err("more than one organization is not supported".to_owned());
    }
    let signable = CertificateSigningRequestParams::from_der(&pem.contents.as_slice().into())
        .map_err(|error| format!("the request cannot be used: {error}"))?;
    let mut subject = Subject { common_name: common_name.clone(), organizations, ..Subject::default() };
    for alternative in &signable.params.subject_alt_names {
        match alternative {
            SanType::DnsName(name) => subject.dns_names.push(name.as_str().to_owned()),
            SanType::IpAddress(address) => subject.addresses.push(*address),
            _ => subject.has_other_names = true,
        }
    }
    Ok(Body { subject, signable })
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>, signer: Signer) {
    let queue = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.certificate_requests.on_change(move |change| queue.add(change.key()));
    }
    {
        // A serving certificate waits until its node has told its addresses.
        let (queue, requests) = (Arc::clone(&queue), Arc::clone(&context.certificate_requests));
        context.nodes.on_change(move |change| {
            let node = change.key().name;
            let asked_by_it = |request: &CertificateSigningRequest| {
                let asker = request.spec.username.as_deref().unwrap_or_default();
                is_pending(request) && asker.strip_prefix("system:node:") == Some(node.as_str())
            };
            let waiting = requests.all().into_iter().filter(|request| asked_by_it(request));
            queue.add_all(waiting.map(|request| Key::of(&request.metadata)));
        });
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.certificate_requests.wait_until_synced().await;
            context.nodes.wait_until_synced().await;
        }
    };
    let (shared, signer) = (Arc::clone(context), Arc::new(signer));
    context.work(Controller::Certificates, &queue, 1, ready, move |key| {
        let (context, signer) = (Arc::clone(&shared), Arc::clone(&signer));
        async move { reconcile(&context, &signer, &key).await }
    });
}

async fn reconcile(context: &Context, signer: &Signer, key: &Key) -> Result<Option<Duration>, WriteError> {
    let Some(request) = context.certificate_requests.get(key) else { return Ok(None) };
    let api: Api<CertificateSigningRequest> = Api::all(context.client.clone());
    let forgotten = forgotten_at(&request);
    if forgotten <= now() {
        let uid = request.metadata.uid.as_deref().unwrap_or_default();
        delete(&api, "CertificateSigningRequest", key, uid, DeleteParams::default()).await?;
        return Ok(None);
    }
    let until_forgotten = Some(wait(forgotten.duration_since(now())));
    let ours = matches!(request.spec.signer_name.as_str(), NODE_CLIENT | NODE_SERVING | CLIENT);
    if !ours {
        return Ok(until_forgotten);
    }
    if is_pending(&request) {
        approve(context, &api, key, &request).await?;
    } else if is_to_be_signed(&request) {
        issue(&api, signer, key, &request).await?;
    }
    Ok(until_forgotten)
}

/// Approves a request that may be; one that waits for its node comes again with the node's next change.
async fn approve(
    context: &Context,
    api: &Api<CertificateSigningRequest>,
    key: &Key,
    request: &CertificateSigningRequest,
) -> Result<(), WriteError> {
    // What cannot be read is for people to look at; it fails when somebody approves it.
    let Ok(Body { subject, .. }) = read(&request.spec.request) else { return Ok(()) };
    let node = node_of(&subject).and_then(|name| context.nodes.get(&Key::new("", name)));
    match judge(request, &subject, node.as_deref()) {
        Verdict::Leave => {}
        Verdict::Wait(why) => tracing::info!(request = %key, %why, "certificate request waits"),
        Verdict::Approve(message) => {
            let approved = condition("Approved", "AutoApproved", message);
            write(api, "approval", key, request, Some(approved), None).await?;
            tracing::info!(request = %key, subject = %subject.common_name, "certificate request approved");
        }
    }
    Ok(())
}

async fn issue(
    api: &Api<CertificateSigningRequest>,
    signer: &Signer,
    key: &Key,
    request: &CertificateSigningRequest,
) -> Result<(), WriteError> {
    let signed = read(&request.spec.request).and_then(|body| {
        let profile = profile(request, &body.subject)?;
        signer.sign(body, &profile, now()).map_err(|error| error.to_string())
    });
    match signed {
        Ok(certificate) => {
            write(api, "status", key, request, None, Some(certificate)).await?;
            tracing::info!(request = %key, signer = %request.spec.signer_name, "certificate issued");
        }
        Err(why) => {
            tracing::warn!(request = %key, %why, "certificate request fails");
            let failed = condition("Failed", "SignerValidationFailure", &why);
            write(api, "status", key, request, Some(failed), None).await?;
        }
    }
    Ok(())
}

fn condition(kind: &str, reason: &str, message: &str) -> CertificateSigningRequestCondition {
    let time = Timestamp::from_second(now().as_second()).map(Time).ok();
    CertificateSigningRequestCondition {
        type_: kind.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_update_time: time.clone(),
        last_transition_time: time,
    }
}

/// Adds a condition or the certificate through a subresource, if the request is still as it was read.
async fn write(
    api: &Api<CertificateSigningRequest>,
    subresource: &str,
    key: &Key,
    request: &CertificateSigningRequest,
    condition: Option<CertificateSigningRequestCondition>,
    certificate: Option<String>,
) -> Result<(), WriteError> {
    let mut status = Map::new();
    if let Some(condition) = condition {
        debug_assert!(!has_condition(request, &condition.type_), "is added once");
        let known = request.status.as_ref().and_then(|status| status.conditions.clone());
        let all: Vec<_> = known.into_iter().flatten().chain([condition]).collect();
        status.insert("conditions".to_owned(), json!(all));
    }
    if let Some(certificate) = certificate {
        status.insert("certificate".to_owned(), json!(ByteString(certificate.into_bytes())));
    }
    let patch = Map::from_iter([("status".to_owned(), Value::Object(status))]);
    let patch = Patch::Merge(guarded(request.metadata.resource_version.as_deref(), patch));
    let params = PatchParams::default();
    let sending = async { api.patch_subresource(subresource, &key.name, &params, &patch).await };
    call(|| format!("write the {subresource} of CertificateSigningRequest {key}"), sending).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType};

    use super::*;

    fn request(organizations: &[&str], names: &[&str]) -> ByteString {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for organization in organizations {
            params.distinguished_name.push(DnType::OrganizationName, *organization);
        }
        params.distinguished_name.push(DnType::CommonName, "system:node:a");
        ByteString(params.serialize_request(&key).unwrap().pem().unwrap().into_bytes())
    }

    #[test]
    fn a_body_is_read_and_signed_as_the_profile_says() {
        let authority = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate_pem = params.self_signed(&authority).unwrap().pem();
        let signer =
            Signer::new(&SigningAuthority { certificate_pem, key_pem: authority.serialize_pem() }).unwrap();
        let body = read(&request(&["system:nodes"], &["a", "10.0.0.1"])).unwrap();
        assert_eq!(body.subject.common_name, "system:node:a");
        assert_eq!(body.subject.organizations, ["system:nodes"]);
        assert_eq!(body.subject.dns_names, ["a"]);
        assert_eq!(body.subject.addresses, ["10.0.0.1".parse::<std::net::IpAddr>().unwrap()]);
        let profile = Profile { client: false, server: true, key_encipherment: true, seconds: 3600 };
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        let signed = signer.sign(body, &profile, now).unwrap();
        let (_, pem) = parse_x509_pem(signed.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let validity = certificate.validity();
        assert_eq!(validity.not_after.timestamp(), now.as_second() + 3600);
        assert_eq!(validity.not_before.timestamp(), now.as_second() - BACKDATE_SECONDS);
        let usage = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.server_auth && !usage.client_auth);
        assert!(!certificate.is_ca());
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        let refused = |body: &str| read(&ByteString(body.as_bytes().to_vec())).err().unwrap();
        assert!(refused("").contains("not PEM"));
        assert!(
            refused("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")
                .contains("PKCS#10")
        );
    }
}

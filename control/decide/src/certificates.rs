//! Certificates for nodes and for users: who gets one without being asked, what a signer puts its name to, and when a
//! request is forgotten.
//!
//! Input: a CertificateSigningRequest, what its PKCS#10 body says ([`Subject`]), and the node it is about. Output: a verdict,
//! a profile to sign with, or a time. Parses no certificates and holds no keys.
//!
//! Upstream's rules: <https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/#kubernetes-signers>

use std::{collections::BTreeSet, net::IpAddr};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{certificates::v1::CertificateSigningRequest, core::v1::Node};

use crate::object;

/// Client certificates of nodes.
pub const NODE_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Serving certificates of nodes.
pub const NODE_SERVING: &str = "kubernetes.io/kubelet-serving";
/// Client certificates of anybody else: signed when somebody approved them.
pub const CLIENT: &str = "kubernetes.io/kube-apiserver-client";

const NODES: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";
const BOOTSTRAPPERS: &str = "system:bootstrappers";
const MASTERS: &str = "system:masters";

/// The life of a certificate where the request names none, and the longest.
const MOST_SECONDS: i64 = 365 * 86_400;
/// The shortest life.
const LEAST_SECONDS: i64 = 600;
/// An answered request is kept for so long.
const KEEP_ANSWERED: SignedDuration = SignedDuration::from_hours(1);
/// One that nobody answers is kept for so long.
const KEEP_PENDING: SignedDuration = SignedDuration::from_hours(24);

/// What the body of a request asks to be certified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// Common name.
    pub common_name: String,
    /// Organizations: groups.
    pub organizations: Vec<String>,
    /// DNS names.
    pub dns_names: Vec<String>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether it has names of another kind (mail, URI).
    pub has_other_names: bool,
}

/// What becomes of a request that nobody has answered yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Approved, with this message.
    Approve(&'static str),
    /// Not yet: the node is not known, or has not told this address.
    Wait(String),
    /// Somebody else's business.
    Leave,
}

/// Extended usages of what is signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// For clients.
    pub client: bool,
    /// For servers.
    pub server: bool,
    /// Whether keys may be encrypted with it (RSA).
    pub key_encipherment: bool,
    /// Life in seconds.
    pub seconds: i64,
}

/// Whether the request has a condition.
pub fn has_condition(request: &CertificateSigningRequest, kind: &str) -> bool {
    let conditions = request.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == kind)
}

/// Whether nobody has approved or denied it.
pub fn is_pending(request: &CertificateSigningRequest) -> bool {
    !has_condition(request, "Approved")
        && !has_condition(request, "Denied")
        && !has_condition(request, "Failed")
}

/// Whether it is to be signed now, as far as conditions go.
pub fn is_to_be_signed(request: &CertificateSigningRequest) -> bool {
    let issued = request.status.as_ref().and_then(|status| status.certificate.as_ref());
    has_condition(request, "Approved")
        && !has_condition(request, "Denied")
        && !has_condition(request, "Failed")
        && issued.is_none_or(|certificate| certificate.0.is_empty())
}

/// The node that a request is about, by its common name.
pub fn node_of(subject: &Subject) -> Option<&str> {
    subject.common_name.strip_prefix(NODE_PREFIX).filter(|name| !name.is_empty())
}

/// Whether a pending request is approved without anybody being asked. `node` is the one of [`node_of`].
pub fn judge(request: &CertificateSigningRequest, subject: &Subject, node: Option<&Node>) -> Verdict {
    let signer = request.spec.signer_name.as_str();
    if !matches!(signer, NODE_CLIENT | NODE_SERVING) || profile(request, subject).is_err() {
        return Verdict::Leave;
    }
    let asker = request.spec.username.as_deref().unwrap_or_default();
    let is_in = |group: &str| request.spec.groups.iter().flatten().any(|held| held == group);
    let is_itself = asker == subject.common_name && is_in(NODES);
    match signer {
        NODE_CLIENT if is_itself => {
            Verdict::Approve("Auto approving self kubelet client certificate after SubjectAccessReview.")
        }
        NODE_CLIENT if is_in(BOOTSTRAPPERS) || is_in(MASTERS) => {
            Verdict::Approve("Auto approving kubelet client certificate after SubjectAccessReview.")
        }
        NODE_SERVING if is_itself => match foreign_name(subject, node) {
            None => {
                Verdict::Approve("Auto approving kubelet serving certificate: all names are the node's own.")
            }
            Some(why) => Verdict::Wait(why),
        },
        _ => Verdict::Leave,
    }
}

/// What in the subject is not known to be the node's.
fn foreign_name(subject: &Subject, node: Option<&Node>) -> Option<String> {
    let name = node_of(subject).unwrap_or_default();
    let Some(node) = node else { return Some(format!("node {name:?} is not known")) };
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let mut names = BTreeSet::from([name]);
    let mut known = BTreeSet::new();
    for address in addresses {
        names.insert(address.address.as_str());
        known.extend(address.address.parse::<IpAddr>().ok());
    }
    if let Some(foreign) = subject.dns_names.iter().find(|found| !names.contains(found.as_str())) {
        return Some(format!("node {name:?} has no name {foreign:?}"));
    }
    let foreign = subject.addresses.iter().find(|address| !known.contains(address));
    foreign.map(|address| format!("node {name:?} has no address {address}"))
}

/// What to sign an approved request with; the reason why it cannot be signed.
pub fn profile(request: &CertificateSigningRequest, subject: &Subject) -> Result<Profile, String> {
    let usages: BTreeSet<&str> = request.spec.usages.iter().flatten().map(String::as_str).collect();
    let (role, is_node) = match request.spec.signer_name.as_str() {
        NODE_CLIENT => ("client auth", true),
        NODE_SERVING => ("server auth", true),
        CLIENT => ("client auth", false),
        other => return Err(format!("signer {other:?} is not known here")),
    };
    let allowed = BTreeSet::from([role, "digital signature", "key encipherment"]);
    if !usages.contains(role) || !usages.is_subset(&allowed) {
        return Err(format!("usages must be of: {}", allowed.into_iter().collect::<Vec<_>>().join(", ")));
    }
    if is_node {
        check_node(request.spec.signer_name == NODE_SERVING, subject)?;
    }
    if subject.organizations.iter().any(|group| group == MASTERS) {
        return Err(format!("organization must not be {MASTERS}"));
    }
    let asked = request.spec.expiration_seconds.map_or(MOST_SECONDS, i64::from);
    Ok(Profile {
        client: role == "client auth",
        server: role == "server auth",
        key_encipherment: usages.contains("key encipherment"),
        seconds: asked.clamp(LEAST_SECONDS, MOST_SECONDS),
    })
}

fn check_node(serves: bool, subject: &Subject) -> Result<(), String> {
    if subject.organizations != [NODES] {
        return Err(format!("organization must be {NODES}"));
    }
    if node_of(subject).is_none() {
        return Err(format!("common name must be {NODE_PREFIX}<name of the node>"));
    }
    let named = !subject.dns_names.is_empty() || !subject.addresses.is_empty();
    match (serves, named, subject.has_other_names) {
        (true, true, false) | (false, false, false) => Ok(()),
        (true, false, _) => Err("at least one DNS name or address is required".to_owned()),
        (true, true, true) => Err("only DNS names and addresses are allowed".to_owned()),
        (false, _, _) => Err("subject alternative names are not allowed".to_owned()),
    }
}

/// When the request is to be deleted.
pub fn forgotten_at(request: &CertificateSigningRequest) -> Timestamp {
    let created = object::created(&request.metadata);
    let conditions = request.status.as_ref().and_then(|status| status.conditions.as_ref());
    let answered = conditions
        .into_iter()
        .flatten()
        .filter(|condition| matches!(condition.type_.as_str(), "Approved" | "Denied" | "Failed"))
        .map(|condition| condition.last_update_time.as_ref().map_or(created, |time| time.0))
        .max();
    let (from, kept) = answered.map_or((created, KEEP_PENDING), |at| (at, KEEP_ANSWERED));
    from.checked_add(kept).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::{
            certificates::v1::{
                CertificateSigningRequestCondition, CertificateSigningRequestSpec,
                CertificateSigningRequestStatus,
            },
            core::v1::{NodeAddress, NodeStatus},
        },
        apimachinery::pkg::apis::meta::v1::Time,
    };

    use super::*;

    fn request(signer: &str, asker: &str, group: &str, usages: &[&str]) -> CertificateSigningRequest {
        CertificateSigningRequest {
            spec: CertificateSigningRequestSpec {
                signer_name: signer.to_owned(),
                username: Some(asker.to_owned()),
                groups: Some(vec![group.to_owned(), "system:authenticated".to_owned()]),
                usages: Some(usages.iter().map(|usage| (*usage).to_owned()).collect()),
                ..CertificateSigningRequestSpec::default()
            },
            ..CertificateSigningRequest::default()
        }
    }

    fn node_client(asker: &str, group: &str) -> CertificateSigningRequest {
        request(NODE_CLIENT, asker, group, &["digital signature", "client auth"])
    }

    fn node_serving(asker: &str) -> CertificateSigningRequest {
        request(NODE_SERVING, asker, NODES, &["digital signature", "key encipherment", "server auth"])
    }

    fn subject(common_name: &str) -> Subject {
        Subject {
            common_name: common_name.to_owned(),
            organizations: vec![NODES.to_owned()],
            ..Subject::default()
        }
    }

    fn serving_subject(dns: &str, address: &str) -> Subject {
        Subject {
            dns_names: vec![dns.to_owned()],
            addresses: vec![address.parse().unwrap()],
            ..subject("system:node:a")
        }
    }

    fn node(addresses: &[(&str, &str)]) -> Node {
        let addresses = addresses
            .iter()
            .map(|(kind, address)| NodeAddress { type_: (*kind).to_owned(), address: (*address).to_owned() });
        Node {
            status: Some(NodeStatus { addresses: Some(addresses.collect()), ..NodeStatus::default() }),
            ..Node::default()
        }
    }

    #[test]
    fn newcomers_and_nodes_get_client_certificates_for_nodes_only() {
        let approved = |request: &CertificateSigningRequest, subject: &Subject| {
            matches!(judge(request, subject, None), Verdict::Approve(_))
        };
        let newcomer = node_client("system:bootstrap:abcdef", BOOTSTRAPPERS);
        assert!(approved(&newcomer, &subject("system:node:a")));
        assert!(approved(&node_client("system:node:a", NODES), &subject("system:node:a")));
        assert!(!approved(&node_client("system:node:b", NODES), &subject("system:node:a")), "another's name");
        assert!(!approved(&node_client("jane", "developers"), &subject("system:node:a")));
        assert!(!approved(&newcomer, &subject("jane")));
        let master = Subject { organizations: vec![MASTERS.to_owned()], ..subject("system:node:a") };
        assert!(!approved(&newcomer, &master));
        assert!(!approved(&newcomer, &serving_subject("a", "10.0.0.1")), "names have no place in it");
        let server =
            request(NODE_CLIENT, "system:bootstrap:abcdef", BOOTSTRAPPERS, &["server auth", "client auth"]);
        assert!(!approved(&server, &subject("system:node:a")));
    }

    #[test]
    fn a_node_serves_under_its_own_names_only() {
        let known = node(&[("InternalIP", "10.0.0.1"), ("Hostname", "a.example")]);
        let (mine, asked) = (node_serving("system:node:a"), serving_subject("a", "10.0.0.1"));
        assert!(matches!(judge(&mine, &asked, Some(&known)), Verdict::Approve(_)));
        assert!(matches!(
            judge(&mine, &serving_subject("a.example", "10.0.0.1"), Some(&known)),
            Verdict::Approve(_)
        ));
        let waits =
            |subject: &Subject, node: Option<&Node>| matches!(judge(&mine, subject, node), Verdict::Wait(_));
        assert!(waits(&asked, None), "a node nobody has seen");
        assert!(waits(&serving_subject("a", "10.0.0.2"), Some(&known)));
        assert!(waits(&serving_subject("kubernetes.default", "10.0.0.1"), Some(&known)));
        assert_eq!(judge(&node_serving("system:node:b"), &asked, Some(&known)), Verdict::Leave);
    }

    #[test]
    fn what_is_signed_lives_as_long_as_asked_within_bounds() {
        let life = |seconds: Option<i32>| {
            let mut request = node_client("system:node:a", NODES);
            request.spec.expiration_seconds = seconds;
            profile(&request, &subject("system:node:a")).unwrap().seconds
        };
        assert_eq!((life(None), life(Some(3600)), life(Some(1))), (MOST_SECONDS, 3600, LEAST_SECONDS));
        assert_eq!(life(Some(i32::MAX)), MOST_SECONDS);
        let user = Subject { organizations: vec!["developers".to_owned()], ..subject("jane") };
        let asked = request(CLIENT, "jane", "developers", &["client auth"]);
        assert!(profile(&asked, &user).unwrap().client);
        assert_eq!(judge(&asked, &user, None), Verdict::Leave, "a user waits for somebody to approve");
        let master = Subject { organizations: vec![MASTERS.to_owned()], ..user };
        assert!(profile(&asked, &master).is_err());
    }

    #[test]
    fn requests_are_forgotten() {
        let mut request = node_client("system:node:a", NODES);
        let at = |text: &str| -> Timestamp { text.parse().unwrap() };
        request.metadata.creation_timestamp = Some(Time(at("2026-01-02T00:00:00Z")));
        assert_eq!(forgotten_at(&request), at("2026-01-03T00:00:00Z"));
        assert!(is_pending(&request));
        let approved = CertificateSigningRequestCondition {
            type_: "Approved".to_owned(),
            status: "True".to_owned(),
            last_update_time: Some(Time(at("2026-01-02T05:00:00Z"))),
            ..CertificateSigningRequestCondition::default()
        };
        request.status = Some(CertificateSigningRequestStatus {
            conditions: Some(vec![approved]),
            ..CertificateSigningRequestStatus::default()
        });
        assert_eq!(forgotten_at(&request), at("2026-01-02T06:00:00Z"));
        assert!(is_to_be_signed(&request) && !is_pending(&request));
    }
}

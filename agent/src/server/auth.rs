//! Who a client is, by its certificate, and whether it may use the kubelet API.

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The group that may do everything.
const MASTERS: &str = "system:masters";
/// The name the API server uses towards kubelets.
const API_SERVER: &str = "kube-apiserver-kubelet-client";

/// A client's name and groups, from a verified certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// Common name.
    pub(super) user: String,
    /// Organizations.
    groups: Vec<String>,
}

impl Identity {
    /// The subject of a certificate that TLS has verified; `None` without a common name.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let subject = certificate.subject();
        let user = subject.iter_common_name().find_map(|name| name.as_str().ok())?.to_owned();
        let groups =
            subject.iter_organization().filter_map(|name| name.as_str().ok()).map(str::to_owned).collect();
        Some(Self { user, groups })
    }

    /// Whether this client may use the API; all of it or nothing.
    pub(super) fn is_allowed(&self) -> bool {
        self.user == API_SERVER || self.groups.iter().any(|group| group == MASTERS)
    }
}

/// The subresource of `nodes` that a path stands for, as upstream's authorizer names it in its message.
pub(super) fn subresource(path: &str) -> &'static str {
    match path.split('/').nth(1).unwrap_or_default() {
        "stats" => "stats",
        "metrics" => "metrics",
        "logs" => "log",
        "spec" => "spec",
        "healthz" => "healthz",
        "configz" => "configz",
        "pods" | "runningpods" => "pods",
        _ => "proxy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_api_server_and_masters() {
        let identity = |user: &str, groups: &[&str]| Identity {
            user: user.to_owned(),
            groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        };
        assert!(identity("kubernetes-admin", &["system:masters"]).is_allowed());
        assert!(identity("kube-apiserver-kubelet-client", &[]).is_allowed());
        assert!(!identity("system:node:a", &["system:nodes"]).is_allowed());
    }
}

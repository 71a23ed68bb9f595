//! Kubeconfig files with everything embedded. Pure text.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::Identity;

/// A kubeconfig for one user of one cluster.
pub fn render(cluster: &str, server: &str, authority_pem: &str, user: &str, identity: &Identity) -> String {
    let encode = |pem: &str| STANDARD.encode(pem);
    format!(
        "apiVersion: v1\n\
         kind: Config\n\
         clusters:\n\
         - name: {cluster}\n  \
           cluster:\n    \
             server: {server}\n    \
             certificate-authority-data: {authority}\n\
         users:\n\
         - name: {user}\n  \
           user:\n    \
             client-certificate-data: {certificate}\n    \
             client-key-data: {key}\n\
         contexts:\n\
         - name: {user}@{cluster}\n  \
           context:\n    \
             cluster: {cluster}\n    \
             user: {user}\n\
         current-context: {user}@{cluster}\n\
         preferences: {{}}\n",
        authority = encode(authority_pem),
        certificate = encode(&identity.certificate_pem),
        key = encode(&identity.key_pem),
    )
}

//! Registry credentials from `imagePullSecrets`. Pure.

use std::fmt::Write as _;

use agent_core::pulls::{PullSecret, repository};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cri_shim_api::v1::AuthConfig;
use k8s_openapi::api::core::v1::Secret;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// What a registry may be shown, and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Credential {
    /// For the runtime.
    pub auth: AuthConfig,
    /// The secret that has it.
    pub source: PullSecret,
}

/// A docker `config.json`.
#[derive(Debug, Default, Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: std::collections::BTreeMap<String, DockerAuth>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default)]
    email: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
}

/// Credentials in `secrets` for `image`, the most specific registry entry first.
pub fn credentials(image: &str, secrets: &[std::sync::Arc<Secret>]) -> Vec<Credential> {
    let repository = repository(image);
    let mut found: Vec<(usize, Credential)> = Vec::new();
    for secret in secrets {
        for (server, auth) in entries(secret) {
            let pattern = normalized(&server);
            if matches(&pattern, &repository) {
                found.push((pattern.len(), credential(secret, &server, auth)));
            }
        }
    }
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    found.into_iter().map(|(_, credential)| credential).collect()
}

fn credential(secret: &Secret, server: &str, auth: DockerAuth) -> Credential {
    let email = auth.email.clone();
    let auth = auth_config(server, auth);
    let metadata = &secret.metadata;
    let source = PullSecret {
        uid: metadata.uid.clone().unwrap_or_default(),
        namespace: metadata.namespace.clone().unwrap_or_default(),
        name: metadata.name.clone().unwrap_or_default(),
        credential_hash: hash(&auth, &email),
    };
    Credential { auth, source }
}

/// What upstream hashes, in its order.
#[derive(Serialize)]
struct Hashed<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    username: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    password: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    email: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    identitytoken: &'a str,
}

/// SHA-256 of the credentials' JSON as Go writes it, in hex: a kubelet that comes before or after finds the same.
fn hash(auth: &AuthConfig, email: &str) -> String {
    let (username, password) = (auth.username.as_str(), auth.password.as_str());
    let hashed = Hashed { username, password, email, identitytoken: &auth.identity_token };
    let json = serde_json::to_string(&hashed).expect("text has no form that JSON lacks");
    let mut escaped = String::with_capacity(json.len());
    for char in json.chars() {
        match char {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                write!(escaped, "\\u{:04x}", u32::from(char)).expect("writing to a string cannot fail");
            }
            other => escaped.push(other),
        }
    }
    sha256(&escaped)
}

/// SHA-256 of a text, in hex.
pub(super) fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("writing to a string cannot fail");
        hex
    })
}

fn entries(secret: &Secret) -> Vec<(String, DockerAuth)> {
    let data = secret.data.as_ref();
    let field = |key: &str| data.and_then(|data| data.get(key)).map(|bytes| bytes.0.as_slice());
    if let Some(bytes) = field(".dockerconfigjson") {
        let config: DockerConfig = serde_json::from_slice(bytes).unwrap_or_default();
        return config.auths.into_iter().collect();
    }
    let legacy: Option<std::collections::BTreeMap<String, DockerAuth>> =
        field(".dockercfg").and_then(|bytes| serde_json::from_slice(bytes).ok());
    legacy.unwrap_or_default().into_iter().collect()
}

fn auth_config(server: &str, auth: DockerAuth) -> AuthConfig {
    let decoded = STANDARD.decode(&auth.auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let (username, password) = match decoded.as_deref().and_then(|pair| pair.split_once(':')) {
        Some((username, password)) if auth.username.is_empty() => (username.to_owned(), password.to_owned()),
        _ => (auth.username, auth.password),
    };
    AuthConfig {
        username,
        password,
        identity_token: auth.identity_token,
        server_address: server.to_owned(),
        ..AuthConfig::default()
    }
}

/// The name under which runtimes list an image: `nginx` → `docker.io/library/nginx:latest`.
pub fn full_reference(image: &str) -> String {
    let repository = repository(image);
    if let Some((_, digest)) = image.split_once('@') {
        return format!("{repository}@{digest}");
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    let tag = last.split_once(':').map_or("latest", |(_, tag)| tag);
    format!("{repository}:{tag}")
}

fn normalized(server: &str) -> String {
    let bare = server.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let bare = bare.strip_suffix("/v1").or_else(|| bare.strip_suffix("/v2")).unwrap_or(bare);
    if bare == "index.docker.io" { "docker.io".to_owned() } else { bare.to_owned() }
}

fn matches(pattern: &str, repository: &str) -> bool {
    repository.strip_prefix(pattern).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_registry_wins() {
        let json = serde_json::json!({"auths": {
            "https://index.docker.io/v1/": {"auth": STANDARD.encode("hub:1")},
            "r.example:5000": {"username": "all", "password": "2"},
            "r.example:5000/team": {"username": "team", "password": "3"}}});
        let secret: Secret = serde_json::from_value(serde_json::json!({
            "data": {".dockerconfigjson": STANDARD.encode(json.to_string())}}))
        .expect("a secret");
        let secrets = [std::sync::Arc::new(secret)];
        let users = |image: &str| -> Vec<String> {
            credentials(image, &secrets).into_iter().map(|found| found.auth.username).collect()
        };
        assert_eq!(users("nginx:1.17"), ["hub"]);
        assert_eq!(users("r.example:5000/team/app@sha256:00"), ["team", "all"]);
        assert!(users("quay.io/a/b").is_empty());
    }

    /// Values that Go's `json.Marshal` and SHA-256 give.
    #[test]
    fn hashes_are_upstreams() {
        let auth = |username: &str, password: &str| AuthConfig {
            username: username.to_owned(),
            password: password.to_owned(),
            server_address: "not hashed".to_owned(),
            ..AuthConfig::default()
        };
        assert_eq!(hash(&auth("u", "p"), ""), sha256(r#"{"username":"u","password":"p"}"#));
        let told = sha256(r#"{"username":"u","password":"a\u003c\u003e\u0026\"é","email":"e"}"#);
        assert_eq!(hash(&auth("u", "a<>&\"é"), "e"), told);
        assert_eq!(
            hash(&auth("", ""), ""),
            "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        );
    }
}

//! Registry credentials from `imagePullSecrets`. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cri_shim_api::v1::AuthConfig;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;

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
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
}

/// Credentials in `secrets` for `image`, the most specific registry entry first.
pub fn credentials(image: &str, secrets: &[std::sync::Arc<Secret>]) -> Vec<AuthConfig> {
    let repository = repository(image);
    let mut found: Vec<(usize, AuthConfig)> = Vec::new();
    for (server, auth) in secrets.iter().flat_map(|secret| entries(secret)) {
        let pattern = normalized(&server);
        if matches(&pattern, &repository) {
            found.push((pattern.len(), auth_config(&server, auth)));
        }
    }
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    found.into_iter().map(|(_, auth)| auth).collect()
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

/// `nginx:1` → `docker.io/library/nginx`; `r.example:5000/a/b@sha256:…` → `r.example:5000/a/b`.
fn repository(image: &str) -> String {
    let without_digest = image.split('@').next().unwrap_or(image);
    let (path, last) = match without_digest.rsplit_once('/') {
        Some((path, last)) => (Some(path), last),
        None => (None, without_digest),
    };
    let name = last.split(':').next().unwrap_or(last);
    let full = path.map_or_else(|| name.to_owned(), |path| format!("{path}/{name}"));
    match full.split_once('/') {
        None => format!("docker.io/library/{full}"),
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => full,
        Some(_) => format!("docker.io/{full}"),
    }
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
            credentials(image, &secrets).into_iter().map(|auth| auth.username).collect()
        };
        assert_eq!(users("nginx:1.17"), ["hub"]);
        assert_eq!(users("r.example:5000/team/app@sha256:00"), ["team", "all"]);
        assert!(users("quay.io/a/b").is_empty());
    }
}

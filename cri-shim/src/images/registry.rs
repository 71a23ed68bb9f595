//! Client of the OCI distribution API: manifests and blobs of one repository, from the first of its hosts that has them.
//!
//! Input: a normalised [`Reference`], the [`Host`]s to ask in order, credentials. Output: manifests, checked against
//! their digest, and blobs as open responses that the caller streams. It holds no layer in memory and writes nothing.
//! Specification: <https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md>.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use http::{HeaderValue, StatusCode, header};
use reqwest::Response;
use tokio::sync::{Mutex, OnceCell};

use super::auth::{self, Credentials};
use super::digest;
use super::hosts::Host;
use super::reference::Reference;

/// Most bytes of a manifest, an index or an image configuration.
pub const MAX_DOCUMENT: usize = 8 << 20;

/// How long a registry may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);

/// How long a transfer may stand still before it counts as broken.
const STALL_DEADLINE: Duration = Duration::from_secs(60);

/// What manifests we can read, in the order we would like them.
const ACCEPT_MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// One repository on its hosts, for the time of one pull.
pub struct Registry {
    reference: Reference,
    hosts: Vec<HostClient>,
    credentials: Option<Credentials>,
}

/// A manifest or an index as a registry served it.
pub struct Document {
    /// `sha256:` and the hash of `bytes`.
    pub digest: String,
    /// The `Content-Type`, without parameters.
    pub media_type: String,
    /// The exact bytes.
    pub bytes: Vec<u8>,
}

/// Why one host did not give what was asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The host does not have it.
    #[error("not found")]
    NotFound,
    /// The host answered with an error.
    #[error("{0}")]
    Answered(StatusCode),
    /// The host wants authentication that failed.
    #[error("authentication failed")]
    Auth(#[source] auth::AuthError),
    /// The host wants credentials, or other ones.
    #[error("access denied ({0})")]
    Denied(StatusCode),
    /// The connection failed or stood still.
    #[error("the request failed")]
    Transport(#[source] reqwest::Error),
    /// Its TLS or header settings cannot be used.
    #[error("its configuration cannot be used: {0}")]
    Configuration(String),
    /// The answer's bytes are not those the digest promises.
    #[error("it sent other content ({got}) than asked for ({wanted})")]
    Digest {
        /// The digest asked for.
        wanted: String,
        /// The digest of what came.
        got: String,
    },
    /// A blob is shorter or longer than its descriptor says.
    #[error("it sent another length than the promised {wanted} bytes")]
    Length {
        /// The promised length.
        wanted: u64,
    },
    /// A blob's bytes do not hash to its digest.
    #[error("it sent other content than {digest}")]
    Content {
        /// The digest asked for.
        digest: String,
    },
    /// The answer is too long for a manifest.
    #[error("its answer is longer than {MAX_DOCUMENT} bytes")]
    TooLong,
}

/// Why no host gave what was asked: each host with its answer.
#[derive(Debug)]
pub struct FetchError {
    answers: Vec<(String, HostError)>,
}

impl FetchError {
    /// Every host that was asked knows nothing of it, so that asking again is useless.
    pub fn is_not_found(&self) -> bool {
        !self.answers.is_empty() && self.answers.iter().all(|(_, error)| matches!(error, HostError::NotFound))
    }

    /// A host refused for want of (other) credentials.
    pub fn is_denied(&self) -> bool {
        self.answers.iter().any(|(_, error)| matches!(error, HostError::Denied(_) | HostError::Auth(_)))
    }

    /// No host was allowed to serve it.
    pub fn nobody() -> Self {
        Self { answers: Vec::new() }
    }

    /// The answer of one host.
    pub fn of(host: &str, error: HostError) -> Self {
        Self { answers: vec![(host.to_owned(), error)] }
    }

    /// Adds what a further host said.
    pub fn and(mut self, mut other: Self) -> Self {
        self.answers.append(&mut other.answers);
        self
    }
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_not_found() {
            let hosts: Vec<_> = self.answers.iter().map(|(host, _)| host.as_str()).collect();
            return write!(f, "not found (asked {})", hosts.join(", "));
        }
        if self.answers.is_empty() {
            return f.write_str("no configured host may serve it");
        }
        for (index, (host, error)) in self.answers.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{host}: {}", chain(error))?;
        }
        Ok(())
    }
}

impl std::error::Error for FetchError {}

/// An error and its causes in one line, without those that only repeat what was said.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = cause.source();
    }
    text
}

struct HostClient {
    host: Host,
    client: OnceCell<reqwest::Client>,
    authorization: Mutex<Option<HeaderValue>>,
}

impl Registry {
    /// Prepares to ask `hosts`; nothing is sent yet.
    pub fn new(reference: Reference, hosts: Vec<Host>, credentials: Option<Credentials>) -> Self {
        let hosts = hosts
            .into_iter()
            .map(|host| HostClient { host, client: OnceCell::new(), authorization: Mutex::new(None) })
            .collect();
        Self { reference, hosts, credentials }
    }

    /// Fetches the manifest or index that `version` (a tag or a digest) names.
    pub async fn manifest(&self, version: &str) -> Result<Document, FetchError> {
        let wanted = version.starts_with("sha256:").then_some(version);
        let path = format!("manifests/{version}");
        let may_serve = |host: &Host| if wanted.is_some() { host.pull } else { host.resolve };
        self.document(&path, wanted, Some(ACCEPT_MANIFESTS), may_serve).await
    }

    /// Fetches a small blob whole, such as an image configuration.
    pub async fn small_blob(&self, digest: &str) -> Result<Document, FetchError> {
        self.document(&format!("blobs/{digest}"), Some(digest), None, |host| host.pull).await
    }

    /// How many hosts there are; [`Registry::blob`] takes an index below it.
    pub fn host_count(&self) -> usize {
        self.hosts.len()
    }

    /// Opens a blob on one host, from `offset` on where the host can. The flag tells whether it starts at `offset`.
    pub async fn blob(
        &self,
        index: usize,
        digest: &str,
        offset: u64,
    ) -> Result<(Response, bool), FetchError> {
        let host = &self.hosts[index];
        let failed = |error| FetchError::of(&host.host.origin, error);
        if !host.host.pull {
            return Err(FetchError::nobody());
        }
        let range = (offset > 0).then(|| format!("bytes={offset}-"));
        let response =
            self.get(host, &format!("blobs/{digest}"), None, range.as_deref()).await.map_err(failed)?;
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        Ok((response, partial || offset == 0))
    }

    /// Names the host of an index, for messages.
    pub fn host_name(&self, index: usize) -> &str {
        &self.hosts[index].host.origin
    }

    async fn document(
        &self,
        path: &str,
        wanted: Option<&str>,
        accept: Option<&str>,
        may_serve: impl Fn(&Host) -> bool,
    ) -> Result<Document, FetchError> {
        let mut failures = FetchError::nobody();
        for host in self.hosts.iter().filter(|host| may_serve(&host.host)) {
            match self.document_from(host, path, wanted, accept).await {
                Ok(document) => return Ok(document),
                Err(error) => failures = failures.and(FetchError::of(&host.host.origin, error)),
            }
        }
        Err(failures)
    }

    async fn document_from(
        &self,
        host: &HostClient,
        path: &str,
        wanted: Option<&str>,
        accept: Option<&str>,
    ) -> Result<Document, HostError> {
        let mut response = self.get(host, path, accept, None).await?;
        let text = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let media_type = text(header::CONTENT_TYPE.as_str()).unwrap_or_default();
        let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
        let promised = text("docker-content-digest").filter(|digest| digest.starts_with("sha256:"));
        let wanted = wanted.or(promised).map(str::to_owned);
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(HostError::Transport)? {
            if bytes.len() + chunk.len() > MAX_DOCUMENT {
                return Err(HostError::TooLong);
            }
            bytes.extend_from_slice(&chunk);
        }
        let got = digest::of(&bytes);
        match wanted {
            Some(wanted) if wanted != got => Err(HostError::Digest { wanted, got }),
            _ => Ok(Document { digest: got, media_type, bytes }),
        }
    }

    async fn get(
        &self,
        host: &HostClient,
        path: &str,
        accept: Option<&str>,
        range: Option<&str>,
    ) -> Result<Response, HostError> {
        let client = host.client.get_or_try_init(|| build_client(&host.host)).await?;
        let query =
            if host.host.mirror { format!("?ns={}", self.reference.registry()) } else { String::new() };
        let repository = self.reference.repository();
        let url = format!("{}{}/{repository}/{path}{query}", host.host.origin, host.host.api_path);
        let known = host.authorization.lock().await.clone();
        let send = async |authorization: Option<HeaderValue>| {
            let mut request = client.get(&url);
            let fields = [(header::ACCEPT, accept), (header::RANGE, range)];
            for (name, value) in fields.into_iter().filter_map(|(name, value)| Some((name, value?))) {
                request = request.header(name, value);
            }
            if let Some(authorization) = authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            request.send().await.map_err(HostError::Transport)
        };
        let mut response = send(known).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let challenges = response.headers().get_all(header::WWW_AUTHENTICATE).into_iter();
            let challenges: Vec<_> =
                challenges.filter_map(|value| Some(value.to_str().ok()?.to_owned())).collect();
            let scope = format!("repository:{repository}:pull");
            let answer = auth::answer(client, &challenges, &scope, self.credentials.as_ref()).await;
            let authorization = answer.map_err(HostError::Auth)?;
            *host.authorization.lock().await = Some(authorization.clone());
            response = send(Some(authorization)).await?;
        }
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::NOT_FOUND => Err(HostError::NotFound),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Err(HostError::Denied(status)),
            status => Err(HostError::Answered(status)),
        }
    }
}

async fn build_client(host: &Host) -> Result<reqwest::Client, HostError> {
    let host = host.clone();
    // Certificates are read from files, and the system's own are many.
    let built = tokio::task::spawn_blocking(move || client_for(&host)).await;
    built.map_err(|lost| HostError::Configuration(lost.to_string()))?
}

fn client_for(host: &Host) -> Result<reqwest::Client, HostError> {
    let wrong = |error: &dyn std::error::Error| HostError::Configuration(chain(error));
    let mut headers = http::HeaderMap::new();
    for (name, value) in &host.headers {
        let name = http::HeaderName::try_from(name.as_str()).map_err(|error| wrong(&error))?;
        headers.append(name, HeaderValue::from_str(value).map_err(|error| wrong(&error))?);
    }
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("keelson-cri/", env!("CARGO_PKG_VERSION")))
        .default_headers(headers)
        .connect_timeout(CONNECT_DEADLINE)
        .read_timeout(STALL_DEADLINE)
        .pool_max_idle_per_host(2);
    let mut authorities = Vec::new();
    for file in &host.ca_files {
        let parsed = reqwest::Certificate::from_pem_bundle(&read(file)?).map_err(|error| wrong(&error))?;
        authorities.extend(parsed);
    }
    if host.origin.starts_with("http://") {
        // The system's certificates are neither needed nor loaded: a host without any can still use such a mirror.
        builder = builder.tls_certs_only(authorities);
    } else if host.skip_verify {
        builder = builder.tls_certs_only(authorities).tls_danger_accept_invalid_certs(true);
    } else {
        builder = builder.tls_certs_merge(authorities);
    }
    if let Some((certificate, key)) = &host.client_files {
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        builder = builder.identity(reqwest::Identity::from_pem(&pem).map_err(|error| wrong(&error))?);
    }
    if is_loopback(&host.origin) {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| wrong(&error))
}

fn read(path: &Path) -> Result<Vec<u8>, HostError> {
    std::fs::read(path).map_err(|error| HostError::Configuration(format!("{}: {error}", path.display())))
}

fn is_loopback(origin: &str) -> bool {
    let host =
        origin.parse::<http::Uri>().ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_every_host_asked() {
        let both = FetchError::of("http://a", HostError::NotFound)
            .and(FetchError::of("https://b", HostError::NotFound));
        assert!(both.is_not_found());
        assert_eq!(both.to_string(), "not found (asked http://a, https://b)");
        let mixed = FetchError::of("http://a", HostError::NotFound)
            .and(FetchError::of("https://b", HostError::Denied(StatusCode::FORBIDDEN)));
        assert!(!mixed.is_not_found() && mixed.is_denied());
        assert_eq!(mixed.to_string(), "http://a: not found; https://b: access denied (403 Forbidden)");
    }
}

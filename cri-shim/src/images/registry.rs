//! Client of the OCI distribution API: manifests and blobs of one repository, from the first of its hosts that has them.
//!
//! Input: a normalised [`Reference`], the [`Host`]s to ask in order, credentials. Output: manifests, checked against
//! their digest, and blobs as open responses that the caller streams. It holds no layer in memory and writes nothing.
//! Specification: <https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md>.

use http::{HeaderValue, StatusCode, header};
use reqwest::Response;

use super::auth::Credentials;
use super::digest;
pub use super::fetch_error::{FetchError, HostError, chain};
use super::hostclient::{Ask, HostClient};
use super::hosts::Host;
use super::reference::Reference;

/// Most bytes of a manifest, an index or an image configuration.
pub const MAX_DOCUMENT: usize = 8 << 20;

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

impl Registry {
    /// Prepares to ask `hosts`; nothing is sent yet.
    pub fn new(reference: Reference, hosts: Vec<Host>, credentials: Option<Credentials>) -> Self {
        Self { reference, hosts: hosts.into_iter().map(HostClient::new).collect(), credentials }
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

    /// Opens a blob on one host, from `offset` on where the host can; tells the offset it really begins at.
    pub async fn blob(&self, index: usize, digest: &str, offset: u64) -> Result<(Response, u64), FetchError> {
        let host = &self.hosts[index];
        if !host.host.pull {
            return Err(FetchError::nobody());
        }
        let response = host.get(self.ask(&format!("blobs/{digest}"), None, offset)).await;
        let response = response.map_err(|error| FetchError::of(&host.host.origin, error))?;
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        let told =
            response.headers().get(header::CONTENT_RANGE).and_then(|value| range_start(value.to_str().ok()?));
        let from = if partial { told.unwrap_or(offset) } else { 0 };
        Ok((response, from))
    }

    /// Names the host of an index, for messages.
    pub fn host_name(&self, index: usize) -> &str {
        &self.hosts[index].host.origin
    }

    fn ask<'a>(&'a self, path: &'a str, accept: Option<&'a str>, offset: u64) -> Ask<'a> {
        Ask {
            registry: self.reference.registry(),
            repository: self.reference.repository(),
            path,
            accept,
            offset,
            credentials: self.credentials.as_ref(),
        }
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
        let mut response = host.get(self.ask(path, accept, 0)).await?;
        let text = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let media_type = text(header::CONTENT_TYPE.as_str()).unwrap_or_default();
        let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
        let promised = text("docker-content-digest").filter(|digest| digest.starts_with("sha256:"));
        let wanted = wanted.or(promised).map(str::to_owned);
        if response.content_length().is_some_and(|length| length > MAX_DOCUMENT as u64) {
            return Err(HostError::TooLong);
        }
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
}

/// The first byte of a `Content-Range`, `bytes 5-9/10`.
pub fn range_start(text: &str) -> Option<u64> {
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_tells_where_it_begins() {
        assert_eq!(range_start("bytes 5-9/10"), Some(5));
        assert_eq!(range_start("bytes */10"), None);
        assert_eq!(range_start("5-9"), None);
    }
}

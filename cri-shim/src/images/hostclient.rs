//! HTTP to one registry host: TLS, authentication, redirects and retries.
//!
//! Input: a [`Host`] and a path below its API. Output: an open response with a good status. Redirects are followed by
//! hand: at most [`MAX_REDIRECTS`], never from https to http, and neither the `Authorization` nor the headers configured for
//! a host are shown to another. What a host says with 429 or 5xx, and a broken connection, is tried again after a pause.

use std::path::Path;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use reqwest::{Client, Response, Url};
use serde::Deserialize;
use tokio::sync::{Mutex, OnceCell};

use super::auth::{self, Credentials};
use super::fetch_error::{HostError, chain};
use super::hosts::Host;

/// Redirects followed on one request.
pub const MAX_REDIRECTS: usize = 10;

/// How long a registry may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);

/// How long a transfer may stand still before it counts as broken.
const STALL_DEADLINE: Duration = Duration::from_secs(60);

/// Tries of one request, and the pause before the second; it doubles with each.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);

/// A registry that asks for a longer pause is not waited for: the kubelet comes back by itself.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Most bytes of an error's explanation that are read.
const MAX_EXPLANATION: usize = 8 * 1024;

/// A host with its connections and its token.
pub struct HostClient {
    /// The host's settings.
    pub host: Host,
    client: OnceCell<Client>,
    authorization: Mutex<Option<HeaderValue>>,
}

/// One request.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    /// Registry the image is named after, which mirrors are told.
    pub registry: &'a str,
    /// Repository.
    pub repository: &'a str,
    /// Path below the repository.
    pub path: &'a str,
    /// Types wanted.
    pub accept: Option<&'a str>,
    /// First byte wanted.
    pub offset: u64,
    /// What the caller knows.
    pub credentials: Option<&'a Credentials>,
}

impl HostClient {
    /// A client of `host`; nothing is opened yet.
    pub fn new(host: Host) -> Self {
        Self { host, client: OnceCell::new(), authorization: Mutex::new(None) }
    }

    /// Sends a request until it is answered for good.
    pub async fn get(&self, ask: Ask<'_>) -> Result<Response, HostError> {
        let mut attempt = 1;
        loop {
            let error = match self.get_once(ask).await {
                Err(error) => error,
                answer => return answer,
            };
            let pause = error.retry_after().unwrap_or(PAUSE * 2_u32.pow(attempt - 1));
            if attempt == TRIES || !error.is_transient() || pause > LONGEST_PAUSE {
                return Err(error);
            }
            let text = chain(&error);
            tracing::info!(host = self.host.origin, error = text, attempt, ?pause, "asking a registry again");
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }

    async fn get_once(&self, ask: Ask<'_>) -> Result<Response, HostError> {
        let client = self.client.get_or_try_init(|| build(&self.host)).await?;
        let Host { origin, api_path, mirror, .. } = &self.host;
        let query = if *mirror { format!("?ns={}", ask.registry) } else { String::new() };
        let url = format!("{origin}{api_path}/{}/{}{query}", ask.repository, ask.path);
        let url = Url::parse(&url).map_err(|error| HostError::Configuration(format!("{url}: {error}")))?;
        let own = own_headers(&self.host)?;
        let known = self.authorization.lock().await.clone();
        let (mut response, mut at_home) = follow(client, &url, ask, &own, known.as_ref()).await?;
        if response.status() == StatusCode::UNAUTHORIZED && at_home {
            let challenges = response.headers().get_all(header::WWW_AUTHENTICATE).into_iter();
            let challenges: Vec<_> =
                challenges.filter_map(|value| Some(value.to_str().ok()?.to_owned())).collect();
            let scope = format!("repository:{}:pull", ask.repository);
            let answer = auth::answer(client, &challenges, &scope, ask.credentials).await;
            let authorization = answer.map_err(HostError::Auth)?;
            *self.authorization.lock().await = Some(authorization.clone());
            (response, at_home) = follow(client, &url, ask, &own, Some(&authorization)).await?;
        }
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::NOT_FOUND => Err(HostError::NotFound),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                if at_home {
                    *self.authorization.lock().await = None;
                }
                Err(HostError::Denied { status, detail: explanation(response).await })
            }
            status => {
                let retry_after = retry_after(response.headers());
                Err(HostError::Answered { status, retry_after, detail: explanation(response).await })
            }
        }
    }
}

/// Follows redirects; the flag tells whether the answer is from the host that was asked.
async fn follow(
    client: &Client,
    first: &Url,
    ask: Ask<'_>,
    own: &HeaderMap,
    authorization: Option<&HeaderValue>,
) -> Result<(Response, bool), HostError> {
    let mut url = first.clone();
    for _ in 0..=MAX_REDIRECTS {
        let at_home = url.origin() == first.origin();
        let mut request = client.get(url.clone());
        if let Some(accept) = ask.accept {
            request = request.header(header::ACCEPT, accept);
        }
        if ask.offset > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", ask.offset));
        }
        if at_home {
            request = request.headers(own.clone());
            if let Some(authorization) = authorization {
                request = request.header(header::AUTHORIZATION, authorization.clone());
            }
        }
        let response = request.send().await.map_err(HostError::Transport)?;
        let next = response.headers().get(header::LOCATION).filter(|_| response.status().is_redirection());
        let Some(next) = next else { return Ok((response, at_home)) };
        let next = next.to_str().ok().and_then(|next| url.join(next).ok());
        let next = next.filter(|next| matches!(next.scheme(), "http" | "https"));
        let next = next.ok_or_else(|| HostError::Redirect("to no usable address".to_owned()))?;
        if url.scheme() == "https" && next.scheme() == "http" {
            return Err(HostError::Redirect(format!("from https to plain http ({})", authority(&next))));
        }
        url = next;
    }
    Err(HostError::Redirect(format!("more than {MAX_REDIRECTS} times, last to {}", authority(&url))))
}

/// Without path and query, which may hold a signature.
fn authority(url: &Url) -> String {
    url.origin().ascii_serialization()
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    Duration::try_from(at.duration_since(jiff::Timestamp::now())).ok()
}

async fn explanation(mut response: Response) -> String {
    let mut bytes = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_EXPLANATION {
            return String::new();
        }
    }
    explain(&bytes)
}

/// What the distribution API's error document says: code and message of each error, in one line.
pub fn explain(bytes: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Document {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(document) = serde_json::from_slice::<Document>(bytes) else { return String::new() };
    let each = document.errors.iter().take(3).map(|one| format!("{}: {}", one.code, one.message));
    let text = each.collect::<Vec<_>>().join("; ");
    let plain = text.chars().map(|letter| if letter.is_control() { ' ' } else { letter });
    let short: String = plain.take(300).collect();
    if short.is_empty() { short } else { format!(" ({short})") }
}

fn own_headers(host: &Host) -> Result<HeaderMap, HostError> {
    let wrong = |error: &dyn std::error::Error| HostError::Configuration(chain(error));
    let mut headers = HeaderMap::new();
    for (name, value) in &host.headers {
        let name = http::HeaderName::try_from(name.as_str()).map_err(|error| wrong(&error))?;
        let mut value = HeaderValue::from_str(value).map_err(|error| wrong(&error))?;
        value.set_sensitive(true);
        headers.append(name, value);
    }
    Ok(headers)
}

async fn build(host: &Host) -> Result<Client, HostError> {
    let host = host.clone();
    // Certificates are read from files, and the system's own are many.
    let built = tokio::task::spawn_blocking(move || client_for(&host)).await;
    built.map_err(|lost| HostError::Configuration(lost.to_string()))?
}

fn client_for(host: &Host) -> Result<Client, HostError> {
    let wrong = |error: &dyn std::error::Error| HostError::Configuration(chain(error));
    let mut builder = Client::builder()
        .user_agent(concat!("keelson-cri/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_DEADLINE)
        .read_timeout(STALL_DEADLINE)
        .pool_max_idle_per_host(2);
    let mut authorities = Vec::new();
    for file in &host.ca_files {
        let parsed = reqwest::Certificate::from_pem_bundle(&read(file)?).map_err(|error| wrong(&error))?;
        if parsed.is_empty() {
            return Err(HostError::Configuration(format!(
                "{}: it holds no certificate (PEM)",
                file.display()
            )));
        }
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
    fn a_pause_is_read_in_both_forms() {
        let headers = |text: &str| {
            HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_str(text).expect("a value"))])
        };
        assert_eq!(retry_after(&headers("7")), Some(Duration::from_secs(7)));
        assert!(retry_after(&headers("Fri, 31 Dec 2100 23:59:59 GMT")).expect("a date") > LONGEST_PAUSE);
        assert_eq!(retry_after(&headers("Fri, 31 Dec 1999 23:59:59 GMT")), None, "the past needs no pause");
        assert_eq!(retry_after(&headers("soon")), None);
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn an_authority_without_a_certificate_is_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        let file = dir.path().join("hosts.toml");
        std::fs::write(dir.path().join("ca.pem"), "root:x:0:0").expect("written");
        let hosts = super::super::hosts::parse("ca = \"ca.pem\"", &file, "r.example").expect("parsed");
        let told = client_for(&hosts[0]).map(drop).expect_err("refused").to_string();
        assert!(told.contains("ca.pem") && told.contains("no certificate"), "{told}");
    }

    #[test]
    fn a_registrys_explanation_is_kept_short_and_plain() {
        let text = br#"{"errors":[{"code":"TOOMANYREQUESTS","message":"pull rate\nlimit"}]}"#;
        assert_eq!(explain(text), " (TOOMANYREQUESTS: pull rate limit)");
        assert_eq!(explain(b"<html>"), "");
        let long = format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "x".repeat(5000));
        assert!(explain(long.as_bytes()).len() < 320);
    }
}

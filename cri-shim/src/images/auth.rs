//! Registry authentication: reads a `WWW-Authenticate` challenge and turns credentials into an `Authorization` value.
//!
//! Input: the challenge and, where the caller has any, [`Credentials`]. Output: the header to repeat the request with.
//! Follows <https://distribution.github.io/distribution/spec/auth/token/>. It keeps no secret longer than one pull
//! and never logs one.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use serde::Deserialize;

/// Most bytes of a token server's answer.
const MAX_TOKEN_ANSWER: usize = 1 << 20;

/// What a caller may know about a registry. Empty means anonymous.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// User name, beside `password`.
    pub username: String,
    /// Password, beside `username`.
    pub password: String,
    /// A refresh token, to be exchanged for an access token.
    pub identity_token: String,
    /// An access token to present as it is.
    pub registry_token: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Why no `Authorization` could be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The registry wants a scheme other than Basic or Bearer, or names no token server.
    #[error("the registry asks for authentication in a way that is not understood: {0:?}")]
    Challenge(String),
    /// The registry wants a user name and a password, and there are none.
    #[error("the registry asks for a user name and a password")]
    NoCredentials,
    /// The token server could not be reached.
    #[error("cannot ask token server {realm}")]
    Unreachable {
        /// The token server's address.
        realm: String,
        /// What went wrong.
        #[source]
        source: reqwest::Error,
    },
    /// The token server refused.
    #[error("token server {realm} answered {status}")]
    Refused {
        /// The token server's address.
        realm: String,
        /// Its answer.
        status: http::StatusCode,
    },
    /// The token server's answer holds no token.
    #[error("token server {0} gave no usable token")]
    NoToken(String),
}

impl AuthError {
    /// The token server may well answer a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { source, .. } => !source.is_connect() && !source.is_builder(),
            Self::Refused { status, .. } => {
                status.is_server_error() || *status == http::StatusCode::TOO_MANY_REQUESTS
            }
            _ => false,
        }
    }
}

/// One parsed `WWW-Authenticate` challenge.
#[derive(Debug, PartialEq, Eq)]
pub struct Challenge {
    scheme: String,
    parameters: BTreeMap<String, String>,
}

impl Challenge {
    /// Reads the first challenge of a header value; parameters may be quoted and may hold commas.
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, mut rest) = match header.trim().split_once(' ') {
            Some((scheme, rest)) => (scheme, rest.trim_start()),
            None => (header.trim(), ""),
        };
        if scheme.is_empty() {
            return None;
        }
        let mut parameters = BTreeMap::new();
        while let Some((name, after)) = rest.split_once('=') {
            let name = name.trim_matches([' ', ',']).to_ascii_lowercase();
            let (value, remaining) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(',').unwrap_or((after, "")),
            };
            parameters.insert(name, value.trim().to_owned());
            rest = remaining.trim_start_matches([',', ' ']);
        }
        Some(Self { scheme: scheme.to_ascii_lowercase(), parameters })
    }
}

/// Answers the challenges of a 401; `scope` is asked for where the registry names none.
pub async fn answer(
    client: &reqwest::Client,
    challenges: &[String],
    scope: &str,
    credentials: Option<&Credentials>,
) -> Result<HeaderValue, AuthError> {
    let parsed: Vec<_> = challenges.iter().filter_map(|header| Challenge::parse(header)).collect();
    if let Some(bearer) = parsed.iter().find(|challenge| challenge.scheme == "bearer") {
        let token = match credentials {
            Some(Credentials { registry_token, .. }) if !registry_token.is_empty() => registry_token.clone(),
            _ => token(client, bearer, scope, credentials).await?,
        };
        return secret(&format!("Bearer {token}"));
    }
    if parsed.iter().any(|challenge| challenge.scheme == "basic") {
        return credentials.and_then(basic).ok_or(AuthError::NoCredentials);
    }
    Err(AuthError::Challenge(challenges.join(", ")))
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

async fn token(
    client: &reqwest::Client,
    challenge: &Challenge,
    scope: &str,
    credentials: Option<&Credentials>,
) -> Result<String, AuthError> {
    let realm = challenge
        .parameters
        .get("realm")
        .ok_or_else(|| AuthError::Challenge("Bearer without realm".into()))?;
    let mut fields = vec![("scope", challenge.parameters.get("scope").map_or(scope, String::as_str))];
    if let Some(service) = challenge.parameters.get("service") {
        fields.push(("service", service));
    }
    let request = match credentials {
        Some(Credentials { identity_token, .. }) if !identity_token.is_empty() => {
            fields.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "keelson-cri"),
                ("refresh_token", identity_token),
            ]);
            client
                .post(realm)
                .header(http::header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form_encoded(&fields))
        }
        _ => {
            let separator = if realm.contains('?') { '&' } else { '?' };
            let request = client.get(format!("{realm}{separator}{}", form_encoded(&fields)));
            match credentials.and_then(basic) {
                Some(authorization) => request.header(http::header::AUTHORIZATION, authorization),
                None => request,
            }
        }
    };
    let unreachable = |source| AuthError::Unreachable { realm: realm.clone(), source };
    let mut response = request.send().await.map_err(unreachable)?;
    if !response.status().is_success() {
        return Err(AuthError::Refused { realm: realm.clone(), status: response.status() });
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_TOKEN_ANSWER {
            return Err(AuthError::NoToken(realm.clone()));
        }
    }
    serde_json::from_slice::<TokenAnswer>(&body)
        .ok()
        .and_then(|answer| answer.token.or(answer.access_token))
        .filter(|token| !token.is_empty())
        .ok_or_else(|| AuthError::NoToken(realm.clone()))
}

fn basic(credentials: &Credentials) -> Option<HeaderValue> {
    if credentials.username.is_empty() && credentials.password.is_empty() {
        return None;
    }
    let pair = STANDARD.encode(format!("{}:{}", credentials.username, credentials.password));
    secret(&format!("Basic {pair}")).ok()
}

fn secret(text: &str) -> Result<HeaderValue, AuthError> {
    let mut value = HeaderValue::from_str(text)
        .map_err(|_invalid| AuthError::NoToken("(not a header value)".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// `application/x-www-form-urlencoded`, also valid as a query.
fn form_encoded(fields: &[(&str, &str)]) -> String {
    let mut encoded = String::new();
    for (name, value) in fields {
        if !encoded.is_empty() {
            encoded.push('&');
        }
        encoded.push_str(name);
        encoded.push('=');
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    encoded.push(char::from(byte));
                }
                _ => {
                    let hex =
                        |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or('0').to_ascii_uppercase();
                    encoded.extend(['%', hex(byte >> 4), hex(byte & 0xf)]);
                }
            }
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_challenges() {
        let header = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let challenge = Challenge::parse(header).expect("parsed");
        assert_eq!(challenge.scheme, "bearer");
        assert_eq!(challenge.parameters["scope"], "repository:a/b:pull,push");
        assert_eq!(challenge.parameters["service"], "registry.docker.io");
        assert_eq!(
            Challenge::parse("Basic realm=x, charset=utf-8").expect("parsed").parameters["charset"],
            "utf-8"
        );
        assert_eq!(Challenge::parse("  "), None);
        assert_eq!(Challenge::parse("Bearer realm=\"unclosed"), None);
    }

    #[test]
    fn encodes_forms() {
        let encoded = form_encoded(&[("scope", "repository:a/b:pull"), ("service", "x y")]);
        assert_eq!(encoded, "scope=repository%3Aa%2Fb%3Apull&service=x%20y");
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let credentials =
            Credentials { username: "u".into(), password: "hidden".into(), ..Credentials::default() };
        assert!(!format!("{credentials:?} {:?}", basic(&credentials)).contains("hidden"));
        assert_eq!(basic(&credentials).expect("made"), "Basic dTpoaWRkZW4=");
    }
}

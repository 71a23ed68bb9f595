//! Why a registry did not give what was asked: one error per host, and all of them together.

use std::fmt;
use std::time::Duration;

use http::StatusCode;

use super::auth;
use super::registry::MAX_DOCUMENT;

/// Why one host did not give what was asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The host does not have it.
    #[error("not found")]
    NotFound,
    /// The host answered with an error.
    #[error("{status}{detail}")]
    Answered {
        /// Its status.
        status: StatusCode,
        /// The pause it asks for.
        retry_after: Option<Duration>,
        /// What it says about it, in brackets.
        detail: String,
    },
    /// The host wants authentication that failed.
    #[error("authentication failed")]
    Auth(#[source] auth::AuthError),
    /// The host wants credentials, or other ones.
    #[error("access denied ({status}){detail}")]
    Denied {
        /// Its status.
        status: StatusCode,
        /// What it says about it, in brackets.
        detail: String,
    },
    /// The connection failed or stood still.
    #[error("the request failed")]
    Transport(#[source] reqwest::Error),
    /// It sends us somewhere we do not go.
    #[error("it redirects {0}")]
    Redirect(String),
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

impl HostError {
    /// The same request may well be answered a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Answered { status, .. } => {
                *status == StatusCode::TOO_MANY_REQUESTS
                    || *status == StatusCode::REQUEST_TIMEOUT
                    || (status.is_server_error() && *status != StatusCode::NOT_IMPLEMENTED)
            }
            // Nobody listens, the name is unknown, the certificate is wrong: that does not change in seconds.
            Self::Transport(error) => !error.is_connect() && !error.is_builder(),
            Self::Auth(error) => error.is_transient(),
            _ => false,
        }
    }

    /// The pause that the host asks for.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Answered { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
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
        self.answers.iter().any(|(_, error)| matches!(error, HostError::Denied { .. } | HostError::Auth(_)))
    }

    /// A host sent something else than it should have.
    pub fn is_other_content(&self) -> bool {
        let other = |error: &HostError| {
            matches!(error, HostError::Digest { .. } | HostError::Length { .. } | HostError::Content { .. })
        };
        self.answers.iter().any(|(_, error)| other(error))
    }

    /// A host sent more than is taken.
    pub fn is_too_long(&self) -> bool {
        self.answers.iter().any(|(_, error)| matches!(error, HostError::TooLong))
    }

    /// Hosts were only reached to be sent somewhere else, or their settings in `hosts.toml` cannot be used.
    pub fn is_misconfigured(&self) -> bool {
        let wrong = |error: &HostError| matches!(error, HostError::Redirect(_) | HostError::Configuration(_));
        !self.answers.is_empty() && self.answers.iter().all(|(_, error)| wrong(error))
    }

    /// A transfer that broke off, as opposed to one that was answered.
    pub fn is_worth_another_try(&self) -> bool {
        let broken = |error: &HostError| match error {
            HostError::Transport(error) => !error.is_connect(),
            HostError::Length { .. } => true,
            _ => false,
        };
        self.answers.iter().any(|(_, error)| broken(error))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_every_host_asked() {
        let both = FetchError::of("http://a", HostError::NotFound)
            .and(FetchError::of("https://b", HostError::NotFound));
        assert!(both.is_not_found());
        assert_eq!(both.to_string(), "not found (asked http://a, https://b)");
        let denied = HostError::Denied { status: StatusCode::FORBIDDEN, detail: String::new() };
        let mixed = FetchError::of("http://a", HostError::NotFound).and(FetchError::of("https://b", denied));
        assert!(!mixed.is_not_found() && mixed.is_denied());
        assert_eq!(mixed.to_string(), "http://a: not found; https://b: access denied (403 Forbidden)");
    }
}

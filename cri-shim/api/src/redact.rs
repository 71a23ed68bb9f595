//! `Debug` of the messages that carry credentials: field names stay, secrets do not reach a log.

use std::fmt;

use crate::v1::AuthConfig;

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |secret: &str| if secret.is_empty() { "" } else { "(redacted)" };
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("password", &shown(&self.password))
            .field("auth", &shown(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &shown(&self.identity_token))
            .field("registry_token", &shown(&self.registry_token))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use crate::v1::{AuthConfig, PullImageRequest};

    #[test]
    fn debug_of_a_pull_shows_no_secret() {
        let auth = AuthConfig {
            username: "robot".into(),
            password: "p4ss".into(),
            identity_token: "t0ken".into(),
            ..AuthConfig::default()
        };
        let text = format!("{:?}", PullImageRequest { auth: Some(auth), ..PullImageRequest::default() });
        assert!(text.contains("robot"), "{text}");
        assert!(!text.contains("p4ss") && !text.contains("t0ken"), "{text}");
    }
}

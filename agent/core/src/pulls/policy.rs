//! `imagePullCredentialsVerificationPolicy`, and names of images as it compares them.

use std::collections::BTreeSet;

/// Whose credentials are verified when an image is on the node already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    /// Nobody's.
    NeverVerify,
    /// Of those that the agent pulled.
    NeverVerifyPreloadedImages,
    /// Of all but these.
    NeverVerifyAllowlistedImages(Allowlist),
    /// Of all.
    AlwaysVerify,
}

impl Policy {
    /// Whether credentials are verified for an image of this repository; `pulled_here`: the agent pulled it.
    pub fn verifies(&self, repository: &str, pulled_here: bool) -> bool {
        match self {
            Self::NeverVerify => false,
            Self::NeverVerifyPreloadedImages => pulled_here,
            Self::NeverVerifyAllowlistedImages(list) => !list.has(repository),
            Self::AlwaysVerify => true,
        }
    }
}

/// `preloadedImagesVerificationAllowlist`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowlist {
    names: BTreeSet<String>,
    /// Each ends with a `/`.
    prefixes: Vec<String>,
}

impl Allowlist {
    /// The list, or what is wrong with its first pattern that cannot be one.
    pub fn parse(patterns: &[String]) -> Result<Self, String> {
        let mut list = Self::default();
        for pattern in patterns {
            let (name, is_prefix) = match pattern.strip_suffix('*') {
                Some(prefix) if prefix.ends_with('/') => (prefix, true),
                _ => (pattern.as_str(), false),
            };
            if let Some(problem) = problem_of(pattern, name, is_prefix) {
                return Err(format!("{problem}: {pattern:?}"));
            }
            if is_prefix {
                list.prefixes.push(name.to_owned());
            } else {
                list.names.insert(name.to_owned());
            }
        }
        Ok(list)
    }

    fn has(&self, repository: &str) -> bool {
        self.names.contains(repository) || self.prefixes.iter().any(|prefix| repository.starts_with(prefix))
    }
}

/// What is wrong with a pattern whose name, or the beginning of one, this is.
fn problem_of(pattern: &str, name: &str, is_prefix: bool) -> Option<&'static str> {
    if pattern.trim() != pattern {
        Some("leading/trailing spaces are not allowed")
    } else if name.is_empty() {
        Some("the supplied pattern is too short")
    } else if name.contains('*') {
        Some("not a valid wildcard pattern, only patterns ending with '/*' are allowed")
    } else if name == "/" {
        Some("at least registry hostname is required")
    } else if name.contains(char::is_whitespace) {
        Some("failed to parse as an image name")
    } else if !is_prefix && repository(name) != name {
        Some("expected the whole name of a repository, as docker.io/library/nginx, without tag and digest")
    } else {
        None
    }
}

/// The repository of an image: `nginx:1` → `docker.io/library/nginx`; `r.example:5000/a/b@sha256:…` → `r.example:5000/a/b`.
pub fn repository(image: &str) -> String {
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

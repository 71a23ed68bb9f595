//! Image references: the names people write (`nginx`, `quay.io/a/b:1@sha256:…`) and the one form everything else uses.
//!
//! Input: text. Output: a [`Reference`] in normal form, with docker.io's defaults filled in as docker and containerd
//! do (`nginx` is `docker.io/library/nginx:latest`; a tag beside a digest is dropped). It does no IO.

use std::fmt;

/// Longest repository name (registry and path) that registries accept.
const MAX_NAME: usize = 255;

/// Longest tag that registries accept.
const MAX_TAG: usize = 128;

/// An image reference in normal form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    version: Version,
}

/// What picks one image of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Version {
    Tag(String),
    Digest(String),
}

/// Why a text is no image reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing was given.
    #[error("the image reference is empty")]
    Empty,
    /// The repository breaks the grammar.
    #[error(
        "invalid image reference {0:?}: repository name must be lowercase letters, digits and . _ - between slashes"
    )]
    Repository(String),
    /// The registry is no host or host:port.
    #[error("invalid image reference {0:?}: the registry must be a host name with an optional port")]
    Registry(String),
    /// The tag breaks the grammar.
    #[error("invalid image reference {0:?}: a tag is up to 128 letters, digits and . _ -")]
    Tag(String),
    /// The digest breaks the grammar.
    #[error("invalid image reference {0:?}: a digest is sha256: and 64 hexadecimal digits")]
    Digest(String),
    /// The name is too long.
    #[error("invalid image reference: the repository name is longer than {MAX_NAME} bytes")]
    TooLong,
}

impl Reference {
    /// Parses and normalises `text`.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) if is_digest(digest) => (rest, Some(digest)),
            Some(_) => return Err(ReferenceError::Digest(text.to_owned())),
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(ReferenceError::Tag(text.to_owned()));
        }
        let (registry, path) = split_registry(name);
        if !is_registry(registry) {
            return Err(ReferenceError::Registry(text.to_owned()));
        }
        if path.is_empty() || !path.split('/').all(is_component) {
            return Err(ReferenceError::Repository(text.to_owned()));
        }
        let repository = match registry {
            "docker.io" if !path.contains('/') => format!("library/{path}"),
            _ => path.to_owned(),
        };
        if registry.len() + 1 + repository.len() > MAX_NAME {
            return Err(ReferenceError::TooLong);
        }
        let version = match digest {
            Some(digest) => Version::Digest(digest.to_owned()),
            None => Version::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Self { registry: registry.to_owned(), repository, version })
    }

    /// The registry's host and port, `docker.io` for Docker Hub.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository's path below the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// What a registry's manifest request ends with: the tag or the digest.
    pub fn version(&self) -> &str {
        match &self.version {
            Version::Tag(text) | Version::Digest(text) => text,
        }
    }

    /// The digest, when the reference is pinned to one.
    pub fn digest(&self) -> Option<&str> {
        match &self.version {
            Version::Digest(digest) => Some(digest),
            Version::Tag(_) => None,
        }
    }

    /// The same repository with `tag`, when that can be one.
    pub fn with_tag(&self, tag: &str) -> Option<Self> {
        is_tag(tag).then(|| Self { version: Version::Tag(tag.to_owned()), ..self.clone() })
    }

    /// The same repository, pinned to `digest`.
    pub fn with_digest(&self, digest: &str) -> Self {
        Self { version: Version::Digest(digest.to_owned()), ..self.clone() }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (separator, version) = match &self.version {
            Version::Tag(tag) => (':', tag),
            Version::Digest(digest) => ('@', digest),
        };
        write!(f, "{}/{}{separator}{version}", self.registry, self.repository)
    }
}

/// Tells whether `text` is a digest this project can verify.
pub fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64 && is_lower_hex(hex))
}

/// Turns an image id, with or without `sha256:` and possibly shortened to no less than 12 digits, into a digest prefix.
pub fn id_prefix(text: &str) -> Option<String> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    let plausible = (12..=64).contains(&hex.len()) && is_lower_hex(hex);
    plausible.then(|| format!("sha256:{hex}"))
}

fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some(("index.docker.io", path)) => ("docker.io", path),
        Some((first, path)) if looks_like_host(first) => (first, path),
        _ => ("docker.io", name),
    }
}

fn looks_like_host(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn is_registry(registry: &str) -> bool {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (registry, None),
    };
    let host_ok = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        }),
    };
    host_ok && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

/// Alphanumeric runs joined by one `.`, one or two `_`, or any number of `-`.
fn is_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let edges_ok =
        bytes.first().copied().is_some_and(alphanumeric) && bytes.last().copied().is_some_and(alphanumeric);
    edges_ok
        && component
            .split(|character: char| character.is_ascii_lowercase() || character.is_ascii_digit())
            .all(|joint| matches!(joint, "" | "." | "_" | "__") || joint.bytes().all(|byte| byte == b'-'))
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_text_is_refused_or_has_a_normal_form(text in "\\PC{0,80}", likely in "[a-zA-Z0-9./:@_-]{0,80}") {
            for text in [text, likely] {
                id_prefix(&text);
                if let Ok(reference) = Reference::parse(&text) {
                    let written = reference.to_string();
                    let again = Reference::parse(&written);
                    prop_assert!(again.is_ok(), "{text} became {written}");
                    prop_assert_eq!(again.map(|again| again.to_string()).ok(), Some(written));
                }
            }
        }

        #[test]
        fn the_parts_of_a_name_are_found(
            host in "[a-z]{1,8}\\.[a-z]{2,3}(:[1-9][0-9]{1,3})?",
            path in "[a-z0-9]{1,8}(/[a-z0-9]{1,8}){0,3}",
            tag in "[A-Za-z0-9_][A-Za-z0-9._-]{0,20}",
            digest in "[0-9a-f]{64}",
        ) {
            let tagged = Reference::parse(&format!("{host}/{path}:{tag}")).unwrap();
            prop_assert_eq!((tagged.registry(), tagged.repository(), tagged.version()), (host.as_str(), path.as_str(), tag.as_str()));
            prop_assert_eq!(tagged.digest(), None);
            let digest = format!("sha256:{digest}");
            let pinned = Reference::parse(&format!("{host}/{path}@{digest}")).unwrap();
            prop_assert_eq!((pinned.registry(), pinned.repository(), pinned.digest()), (host.as_str(), path.as_str(), Some(digest.as_str())));
            prop_assert_eq!(pinned.version(), digest);
        }
    }

    const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn normalises_as_docker_does() {
        let pinned = format!("nginx:1.17@{DIGEST}");
        let pinned_normal = format!("docker.io/library/nginx@{DIGEST}");
        let cases = [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.17.9", "docker.io/library/nginx:1.17.9"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
            ("docker.io/nginx:1", "docker.io/library/nginx:1"),
            ("bitnami/redis", "docker.io/bitnami/redis:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/a/b__c:v1", "localhost:5000/a/b__c:v1"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            (pinned.as_str(), pinned_normal.as_str()),
        ];
        for (text, normal) in cases {
            assert_eq!(
                Reference::parse(text).map(|reference| reference.to_string()),
                Ok(normal.to_owned()),
                "{text}"
            );
            assert_eq!(
                Reference::parse(normal).map(|reference| reference.to_string()),
                Ok(normal.to_owned())
            );
        }
    }

    #[test]
    fn refuses_what_no_registry_accepts() {
        for text in [
            "",
            "Nginx",
            "a//b",
            "nginx:",
            "nginx:-x",
            "nginx@sha256:12",
            "a/.b",
            "a/b-",
            "x y",
            "a_.b",
            "h:99999/x",
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
        assert!(Reference::parse(&format!("a/{}", "b".repeat(300))).is_err());
    }

    #[test]
    fn ids_may_be_short_but_not_names() {
        assert_eq!(id_prefix("0123456789ab").as_deref(), Some("sha256:0123456789ab"));
        assert_eq!(id_prefix(DIGEST).as_deref(), Some(DIGEST));
        assert_eq!(id_prefix("nginx"), None);
        assert_eq!(id_prefix("abc"), None);
    }
}

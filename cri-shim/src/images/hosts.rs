//! Which hosts serve a registry's images: containerd's `certs.d/<registry>/hosts.toml`, with its mirrors and TLS settings.
//!
//! Input: the configuration directory and a registry's name. Output: [`Host`]s in the order to ask them, the registry's
//! own server last. Files are read anew for each pull, so that a change needs no restart. It opens no connection.
//! Layout and meaning: <https://github.com/containerd/containerd/blob/v1.6.20/docs/hosts.md>.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// One place to ask for manifests and blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "independent settings of the file, by its names")]
pub struct Host {
    /// Scheme, host and port, `https://registry-1.docker.io`.
    pub origin: String,
    /// Where the distribution API begins below the origin, normally `/v2`.
    pub api_path: String,
    /// May turn a tag into a digest.
    pub resolve: bool,
    /// May serve manifests and blobs.
    pub pull: bool,
    /// Accept any certificate.
    pub skip_verify: bool,
    /// Certificate authorities to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Client certificate and key, or one file with both.
    pub client_files: Option<(PathBuf, Option<PathBuf>)>,
    /// Headers to send with each request.
    pub headers: Vec<(String, String)>,
    /// A mirror of another registry, which is told in the query which one (`ns=`).
    pub mirror: bool,
}

/// Why a registry's configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// The file exists but cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML of the documented form.
    #[error("cannot understand {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A client certificate without its key, or the other way round.
    #[error("{} needs {} beside it", path.display(), missing.display())]
    Unpaired {
        /// The file there is.
        path: PathBuf,
        /// The file there is not.
        missing: PathBuf,
    },
    /// A capability that nobody knows.
    #[error("{path}: capability {capability:?} is unknown: expected pull, resolve or push")]
    Capability {
        /// The file.
        path: PathBuf,
        /// The offending text.
        capability: String,
    },
    /// A host is no URL.
    #[error("{path}: {url:?} is not an http or https URL of a host")]
    Url {
        /// The file.
        path: PathBuf,
        /// The offending text.
        url: String,
    },
}

/// Reads the hosts of `registry` from `config_dir`; without a configuration it is the registry itself.
pub fn load(config_dir: &Path, registry: &str) -> Result<Vec<Host>, HostsError> {
    for directory in candidates(config_dir, registry) {
        let path = directory.join("hosts.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => return parse(&text, &path, registry),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(HostsError::Read { path, source }),
        }
        if directory.is_dir() {
            let (ca_files, client_files) = docker_style(&directory)?;
            let own = own_server(registry);
            // Certificates for a registry on the loopback say that it is no plain one.
            let origin = if ca_files.is_empty() && client_files.is_none() {
                own.origin
            } else {
                own.origin.replacen("http://", "https://", 1)
            };
            return Ok(vec![Host { origin, ca_files, client_files, ..own }]);
        }
    }
    Ok(vec![own_server(registry)])
}

#[derive(Default, Deserialize)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    own: Settings,
}

#[derive(Clone, Default, Deserialize)]
struct Settings {
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    #[serde(default)]
    header: std::collections::BTreeMap<String, OneOrMany>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Client {
    File(String),
    /// Certificate and key pairs; the first is used.
    Pairs(Vec<OneOrMany>),
}

fn candidates(config_dir: &Path, registry: &str) -> Vec<PathBuf> {
    let mut names = vec![registry.to_owned()];
    if let Some((host, port)) = registry.rsplit_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    names.push("_default".to_owned());
    names.into_iter().map(|name| config_dir.join(name)).collect()
}

/// The hosts that the text of a `hosts.toml` at `path` names, the registry itself last.
pub fn parse(text: &str, path: &Path, registry: &str) -> Result<Vec<Host>, HostsError> {
    let wrong = |source| HostsError::Parse { path: path.to_owned(), source: Box::new(source) };
    let file: File = toml::from_str(text).map_err(wrong)?;
    tell_unknown(text, path);
    check(&file.own, path)?;
    let mut hosts = Vec::new();
    for (url, settings) in file.host {
        let settings: Settings = settings.try_into().map_err(wrong)?;
        check(&settings, path)?;
        hosts.push(host(&url, settings, path, true)?);
    }
    let own = match &file.server {
        Some(server) => host(server, file.own, path, false)?,
        None => Host { ..with_settings(own_server(registry), file.own, path) },
    };
    let is_other = own.origin != own_server(registry).origin;
    hosts.push(Host { mirror: is_other, ..own });
    Ok(hosts)
}

/// A mirror whose capability is mistyped would never be asked.
fn check(settings: &Settings, path: &Path) -> Result<(), HostsError> {
    let unknown = settings
        .capabilities
        .iter()
        .flatten()
        .find(|capability| !["pull", "resolve", "push"].contains(&capability.as_str()));
    unknown.map_or(Ok(()), |capability| {
        Err(HostsError::Capability { path: path.to_owned(), capability: capability.clone() })
    })
}

/// Keys that are not known, as containerd's parser ignores them; they may be a later containerd's.
fn tell_unknown(text: &str, path: &Path) {
    for key in unknown_keys(text) {
        tracing::warn!(file = %path.display(), key, "unknown key is ignored");
    }
}

fn unknown_keys(text: &str) -> Vec<String> {
    const KNOWN: [&str; 6] = ["capabilities", "skip_verify", "override_path", "ca", "client", "header"];
    let Ok(file) = text.parse::<toml::Table>() else { return Vec::new() };
    let is_known = |key: &str| KNOWN.contains(&key);
    let top =
        file.keys().filter(|key| !is_known(key) && !["server", "host"].contains(&key.as_str())).cloned();
    let hosts = file.get("host").and_then(toml::Value::as_table).into_iter().flatten();
    let below = hosts.flat_map(|(url, settings)| {
        let keys = settings.as_table().into_iter().flat_map(toml::Table::keys);
        keys.filter(|key| !is_known(key)).map(move |key| format!("host.\"{url}\".{key}"))
    });
    top.chain(below).collect()
}

fn host(url: &str, settings: Settings, path: &Path, mirror: bool) -> Result<Host, HostsError> {
    let bad = || HostsError::Url { path: path.to_owned(), url: url.to_owned() };
    let full = if url.contains("://") { url.to_owned() } else { format!("{}://{url}", scheme_of(url)) };
    let uri: http::Uri = full.parse().map_err(|_invalid| bad())?;
    let scheme = uri.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https")).ok_or_else(bad)?;
    let authority = uri.authority().ok_or_else(bad)?;
    let given = uri.path().trim_end_matches('/');
    let api_path = match given {
        _ if settings.override_path => given.to_owned(),
        _ if given.ends_with("/v2") => given.to_owned(),
        _ => format!("{given}/v2"),
    };
    let bare = Host { origin: format!("{scheme}://{authority}"), api_path, mirror, ..own_server("") };
    Ok(with_settings(bare, settings, path))
}

fn with_settings(bare: Host, settings: Settings, path: &Path) -> Host {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let may = |what: &str| settings.capabilities.as_ref().is_none_or(|all| all.iter().any(|one| one == what));
    let (resolve, pull) = (may("resolve"), may("pull"));
    let absolute = |file: String| directory.join(file);
    let client_files = match settings.client {
        Some(Client::File(file)) => Some((absolute(file), None)),
        Some(Client::Pairs(pairs)) => pairs.into_iter().next().and_then(|pair| {
            let mut files = pair.into_vec().into_iter().map(absolute);
            files.next().map(|certificate| (certificate, files.next()))
        }),
        None => None,
    };
    let headers = settings
        .header
        .into_iter()
        .flat_map(|(name, values)| values.into_vec().into_iter().map(move |value| (name.clone(), value)));
    Host {
        resolve,
        pull,
        skip_verify: settings.skip_verify,
        ca_files: settings
            .ca
            .map(OneOrMany::into_vec)
            .unwrap_or_default()
            .into_iter()
            .map(absolute)
            .collect(),
        client_files,
        headers: headers.collect(),
        ..bare
    }
}

/// The registry's own server. A registry on the loopback speaks plain HTTP unless its configuration says otherwise.
fn own_server(registry: &str) -> Host {
    let server = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    Host {
        origin: format!("{}://{server}", scheme_of(server)),
        api_path: "/v2".to_owned(),
        resolve: true,
        pull: true,
        skip_verify: false,
        ca_files: Vec::new(),
        client_files: None,
        headers: Vec::new(),
        mirror: false,
    }
}

fn scheme_of(host: &str) -> &'static str {
    let name = host.split('/').next().unwrap_or(host);
    let name = name
        .strip_prefix('[')
        .and_then(|rest| rest.split(']').next())
        .unwrap_or_else(|| name.rsplit_once(':').map_or(name, |(name, _port)| name));
    let loopback = name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    if loopback || name == "localhost" { "http" } else { "https" }
}

/// Certificate authorities and the client's certificate with its key.
type Certificates = (Vec<PathBuf>, Option<(PathBuf, Option<PathBuf>)>);

/// Docker's older layout: every `*.crt` is a certificate authority, a `*.cert` with its `*.key` the client's certificate.
fn docker_style(directory: &Path) -> Result<Certificates, HostsError> {
    let failed = |source| HostsError::Read { path: directory.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        files.push(entry.map_err(failed)?.path());
    }
    files.sort();
    let of = |kind: &'static str| {
        files.iter().filter(move |path| path.extension().is_some_and(|one| one == kind)).cloned()
    };
    let mut client = None;
    for (certificate, other) in
        of("cert").map(|path| (path.clone(), "key")).chain(of("key").map(|path| (path.clone(), "cert")))
    {
        let pair = certificate.with_extension(other);
        if !files.contains(&pair) {
            return Err(HostsError::Unpaired { path: certificate, missing: pair });
        }
        client = client.or(Some((certificate, Some(pair))));
    }
    Ok((of("crt").collect(), client))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(text: &str, registry: &str) -> Vec<Host> {
        parse(text, Path::new("/certs.d/r/hosts.toml"), registry).expect("valid")
    }

    #[test]
    fn mirrors_come_in_file_order_and_the_server_last() {
        let text = r#"
            server = "https://registry-1.docker.io"
            [host."http://127.0.0.1:5000"]
              capabilities = ["pull", "resolve"]
            [host."https://a.example/prefix"]
              capabilities = ["pull"]
              skip_verify = true
              ca = ["ca.pem", "/etc/other.pem"]
              client = [["c.pem", "k.pem"]]
              [host."https://a.example/prefix".header]
                x-team = ["a", "b"]
        "#;
        let hosts = hosts(text, "docker.io");
        let origins: Vec<_> = hosts.iter().map(|host| format!("{}{}", host.origin, host.api_path)).collect();
        assert_eq!(
            origins,
            ["http://127.0.0.1:5000/v2", "https://a.example/prefix/v2", "https://registry-1.docker.io/v2"]
        );
        assert!(hosts[0].resolve && hosts[0].mirror && !hosts[2].mirror);
        let second = &hosts[1];
        assert!(second.pull && !second.resolve && second.skip_verify);
        assert_eq!(second.ca_files, [Path::new("/certs.d/r/ca.pem"), Path::new("/etc/other.pem")]);
        assert_eq!(second.client_files, Some(("/certs.d/r/c.pem".into(), Some("/certs.d/r/k.pem".into()))));
        assert_eq!(second.headers.len(), 2);
    }

    #[test]
    fn the_path_can_be_overridden() {
        let hosts = hosts("[host.\"https://m.example/v2/proxy/\"]\noverride_path = true\n", "quay.io");
        assert_eq!(hosts[0].api_path, "/v2/proxy");
        assert_eq!(hosts[1].origin, "https://quay.io");
    }

    #[test]
    fn another_server_is_told_which_registry_it_stands_for() {
        let hosts = hosts("server = \"http://127.0.0.1:5000\"\n", "docker.io");
        assert_eq!(hosts.len(), 1);
        assert!(hosts[0].mirror && hosts[0].origin == "http://127.0.0.1:5000");
    }

    #[test]
    fn without_configuration_it_is_the_registry_itself() {
        let empty = Path::new("/nonexistent/certs.d");
        assert_eq!(load(empty, "docker.io").expect("default")[0].origin, "https://registry-1.docker.io");
        assert_eq!(load(empty, "localhost:5000").expect("default")[0].origin, "http://localhost:5000");
        assert_eq!(load(empty, "[::1]:5000").expect("default")[0].origin, "http://[::1]:5000");
    }

    #[test]
    fn directories_with_ports_and_the_default_are_found() {
        let dir = tempfile::tempdir().expect("temp dir");
        for (name, server) in [("r.example_5000_", "https://one"), ("_default", "https://two")] {
            std::fs::create_dir(dir.path().join(name)).expect("create");
            std::fs::write(dir.path().join(name).join("hosts.toml"), format!("server = \"{server}\""))
                .expect("write");
        }
        assert_eq!(load(dir.path(), "r.example:5000").expect("loaded")[0].origin, "https://one");
        assert_eq!(load(dir.path(), "else.example").expect("loaded")[0].origin, "https://two");
    }

    #[test]
    fn dockers_files_are_taken_in_pairs() {
        let dir = tempfile::tempdir().expect("temp dir");
        let registry = dir.path().join("r.example");
        std::fs::create_dir(&registry).expect("made");
        for name in ["b.crt", "a.crt", "client.cert", "client.key", "readme.txt"] {
            std::fs::write(registry.join(name), "").expect("written");
        }
        let hosts = load(dir.path(), "r.example").expect("loaded");
        assert_eq!(hosts[0].ca_files, [registry.join("a.crt"), registry.join("b.crt")]);
        let pair = (registry.join("client.cert"), Some(registry.join("client.key")));
        assert_eq!(hosts[0].client_files, Some(pair));
        std::fs::remove_file(registry.join("client.key")).expect("removed");
        let error = load(dir.path(), "r.example").expect_err("refused").to_string();
        assert!(error.contains("client.cert") && error.contains("client.key"), "{error}");
    }

    #[test]
    fn mistakes_name_the_file() {
        let wrong = parse("server = 3", Path::new("/c/hosts.toml"), "x.io").expect_err("refused");
        assert!(wrong.to_string().contains("/c/hosts.toml"));
        let wrong = parse("[host.\"ftp://x\"]", Path::new("/c/hosts.toml"), "x.io").expect_err("refused");
        assert!(wrong.to_string().contains("ftp://x"));
        for text in
            ["capabilities = [\"fly\"]", "[host.\"https://m.example\"]\ncapabilities = [\"pull\", \"fly\"]"]
        {
            let wrong = parse(text, Path::new("/c/hosts.toml"), "x.io").expect_err("refused").to_string();
            assert!(wrong.contains("/c/hosts.toml") && wrong.contains("\"fly\""), "{wrong}");
        }
    }

    #[test]
    fn keys_that_nobody_knows_are_told() {
        let text = "server = \"https://a\"\nskip_verfy = true\n[host.\"https://m\"]\ncapabilites = [\"pull\"]\nca = \"x\"\n";
        assert_eq!(unknown_keys(text), ["skip_verfy", "host.\"https://m\".capabilites"]);
    }
}

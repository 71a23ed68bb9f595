//! How a configuration comes about: the file, drop-ins over it, the command line over both, and what only the machine knows.
//!
//! Drop-ins are the `*.conf` files of a directory and those below it, in the order of their names; each is a
//! KubeletConfiguration that is merged as a JSON merge patch (RFC 7386), as upstream. Reads files, changes nothing.

use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};

use serde_norway::{Mapping, Value};

use super::{AgentConfig, known};

/// Fields whose zero (`0`, `0s`, empty or null) stands for the default, as upstream, and in files that tools write.
const ZERO_IS_DEFAULT: &[&str] = &[
    "address",
    "cgroupDriver",
    "cgroupRoot",
    "configMapAndSecretChangeDetectionStrategy",
    "containerLogMaxSize",
    "containerRuntimeEndpoint",
    "contentType",
    "cpuManagerReconcilePeriod",
    "eventBurst",
    "evictionPressureTransitionPeriod",
    "fileCheckFrequency",
    "hairpinMode",
    "healthzBindAddress",
    "httpCheckFrequency",
    "imagePullCredentialsVerificationPolicy",
    "imageMinimumGCAge",
    "kubeAPIBurst",
    "maxOpenFiles",
    "maxPods",
    "memoryReservationPolicy",
    "nodeLeaseDurationSeconds",
    "nodeStatusReportFrequency",
    "nodeStatusUpdateFrequency",
    "podLogsDir",
    "port",
    "registryBurst",
    "runtimeRequestTimeout",
    "streamingConnectionIdleTimeout",
    "syncFrequency",
    "volumePluginDir",
    "volumeStatsAggPeriod",
];
/// Fields without which nothing can be parsed.
const REQUIRED: [&str; 3] = ["apiVersion", "kind", "keelson"];
/// Where the node's address is looked for: no packet is sent there.
const FAR_AWAY: (IpAddr, u16) = (IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), 9);

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {path}")]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Not YAML, a wrong type, or an unknown field.
    #[error("configuration {path}{}", field.as_deref().map(|name| format!(", field {name}")).unwrap_or_default())]
    Parse {
        /// File.
        path: PathBuf,
        /// The field that cannot be read, where that is known.
        field: Option<String>,
        /// Cause, naming the field.
        #[source]
        source: serde_norway::Error,
    },
    /// Values that parse and cannot work.
    #[error("configuration {path}: {}", problems.join("; "))]
    Invalid {
        /// File.
        path: PathBuf,
        /// One sentence each.
        problems: Vec<String>,
    },
}

/// A field that is known and changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// Its name.
    pub field: String,
    /// Why that is.
    pub reason: String,
}

/// Where a configuration comes from.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// The file.
    pub file: PathBuf,
    /// Directory of drop-ins.
    pub drop_ins: Option<PathBuf>,
    /// What the command line says, in the form of the file: it counts more than all files.
    pub overrides: Mapping,
}

impl AgentConfig {
    /// Reads, parses and checks `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::load_from(&Source { file: path.to_owned(), ..Source::default() })
    }

    /// Reads, merges, completes and checks.
    pub fn load_from(source: &Source) -> Result<Self, ConfigError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Read { path: path.to_owned(), source })
        };
        let text = read(&source.file)?;
        let mut document = mapping(&source.file, &text)?;
        if let Some(dir) = &source.drop_ins {
            let files = drop_ins(dir).map_err(|source| ConfigError::Read { path: dir.clone(), source })?;
            for file in files {
                let part = mapping(&file, &read(&file)?)?;
                check_kind(&file, &part)?;
                merge(&mut document, part);
            }
        }
        override_with(&mut document, source.overrides.clone());
        complete(&mut document);
        Self::of_document(&source.file, document, &text)
    }

    /// Parses and checks `text`; `path` is for messages only.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::of_document(path, mapping(path, text)?, text)
    }

    /// `text` is what the document was read from: errors tell its lines where nothing was changed since.
    fn of_document(path: &Path, mut document: Mapping, text: &str) -> Result<Self, ConfigError> {
        let refused = |field, source| ConfigError::Parse { path: path.to_owned(), field, source };
        let given = document.clone();
        drop_zeros(&mut document);
        let unchanged = mapping(path, text).is_ok_and(|read| read == document);
        let parsed = if unchanged {
            serde_norway::from_str(text)
        } else {
            // By way of text, in which a number may stand where a string is wanted.
            serde_norway::to_string(&document).and_then(|text| serde_norway::from_str(&text))
        };
        let mut config: Self = parsed.map_err(|error| refused(culprit(&document), error))?;
        config.ignored = ignored(&config, &given);
        let problems = config.problems();
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Invalid { path: path.to_owned(), problems })
        }
    }
}

fn mapping(path: &Path, text: &str) -> Result<Mapping, ConfigError> {
    serde_norway::from_str(text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        field: None,
        source,
    })
}

/// A drop-in says what it is, as every configuration.
fn check_kind(path: &Path, document: &Mapping) -> Result<(), ConfigError> {
    let text = |field: &str| document.get(field).and_then(Value::as_str).unwrap_or_default();
    let (version, kind) = (text("apiVersion"), text("kind"));
    if version == "kubelet.config.k8s.io/v1beta1" && kind == "KubeletConfiguration" {
        return Ok(());
    }
    let problem =
        format!("expected kubelet.config.k8s.io/v1beta1 KubeletConfiguration, found {version} {kind}");
    Err(ConfigError::Invalid { path: path.to_owned(), problems: vec![problem] })
}

/// Files that end in `.conf`, by name; directories in between.
fn drop_ins(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut entries = std::fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<PathBuf>, _>>()?;
    entries.sort();
    let mut files = Vec::new();
    for path in entries {
        // A link to a directory is not entered, as upstream.
        if std::fs::symlink_metadata(&path)?.is_dir() {
            files.extend(drop_ins(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "conf") {
            files.push(path);
        }
    }
    Ok(files)
}

/// Merges as RFC 7386 has it: mappings into each other, null removes, all else replaces.
fn merge(document: &mut Mapping, part: Mapping) {
    for (key, value) in part {
        match (document.get_mut(&key), value) {
            (_, Value::Null) => {
                document.shift_remove(&key);
            }
            (Some(Value::Mapping(inner)), Value::Mapping(part)) => merge(inner, part),
            (_, Value::Mapping(part)) => {
                let mut inner = Mapping::new();
                merge(&mut inner, part);
                document.insert(key, Value::Mapping(inner));
            }
            (_, value) => {
                document.insert(key, value);
            }
        }
    }
}

/// Sections that flags say a part of; in all other fields a flag's value takes the place of the file's.
const IN_PARTS: [&str; 5] = ["authentication", "authorization", "featureGates", "keelson", "logging"];

/// What the command line says counts more than all files.
fn override_with(document: &mut Mapping, overrides: Mapping) {
    for (field, _) in &overrides {
        if !field.as_str().is_some_and(|name| IN_PARTS.contains(&name)) {
            document.shift_remove(field);
        }
    }
    merge(document, overrides);
}

/// Puts in what a stock file does not say and the machine knows: the node's name and its address.
fn complete(document: &mut Mapping) {
    let section = document.entry("keelson".into()).or_insert_with(|| Value::Mapping(Mapping::new()));
    let Value::Mapping(section) = section else { return };
    if !section.contains_key("nodeName")
        && let Ok(name) = nix::unistd::gethostname()
    {
        section.insert("nodeName".into(), name.to_string_lossy().trim().to_lowercase().into());
    }
    if !section.contains_key("nodeIP")
        && let Some(address) = own_address()
    {
        section.insert("nodeIP".into(), address.to_string().into());
    }
}

/// The address that packets to far away leave with.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    socket.connect(FAR_AWAY).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Leaves out what stands for the default.
fn drop_zeros(document: &mut Mapping) {
    let is_zero = |value: &Value| match value {
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s"),
        Value::Number(number) => number.as_u64() == Some(0),
        _ => false,
    };
    document.retain(|key, value| {
        let name = key.as_str().unwrap_or_default();
        !(value.is_null() || (ZERO_IS_DEFAULT.contains(&name) && is_zero(value)))
    });
}

/// The field that spoils the document, where it does so by itself.
fn culprit(document: &Mapping) -> Option<String> {
    let base: Mapping = document
        .iter()
        .filter(|(key, _)| key.as_str().is_some_and(|name| REQUIRED.contains(&name)))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let parses = |document: &Mapping| {
        let text = serde_norway::to_string(document);
        text.is_ok_and(|text| serde_norway::from_str::<AgentConfig>(&text).is_ok())
    };
    if !parses(&base) {
        return None;
    }
    let others = document.iter().filter(|(key, _)| !base.contains_key(*key));
    let spoils = |(key, value): &(&Value, &Value)| {
        let mut one = base.clone();
        one.insert((*key).clone(), (*value).clone());
        !parses(&one)
    };
    let (key, _) = others.into_iter().find(spoils)?;
    key.as_str().map(str::to_owned)
}

/// Fields of the file that change nothing, and why.
fn ignored(config: &AgentConfig, given: &Mapping) -> Vec<Ignored> {
    let entry = |field: &str, reason: &str| Ignored { field: field.to_owned(), reason: reason.to_owned() };
    let plain = known::INERT.iter().filter(|(field, _)| given.contains_key(*field));
    let mut ignored: Vec<Ignored> = plain.map(|(field, reason)| entry(field, reason)).collect();
    let clients = &config.clients;
    if clients.config_map_and_secret_change_detection_strategy != "Watch" {
        let reason = "they are always watched, and a change is seen at once";
        ignored.push(entry("configMapAndSecretChangeDetectionStrategy", reason));
    }
    let idle = config.idle_gates();
    if !idle.is_empty() {
        ignored.push(entry("featureGates", &format!("nothing here depends on {}", idle.join(", "))));
    }
    let missing = config.serving.missing_suites();
    if !missing.is_empty() {
        ignored.push(entry("tlsCipherSuites", &format!("there are no {}", missing.join(", "))));
    }
    ignored
}

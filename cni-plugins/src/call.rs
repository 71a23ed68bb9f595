//! One call as the runtime makes it: the `CNI_*` variables and the object on standard input.
//!
//! Checks what every plugin needs checked; what is in the object beyond name and version is for the
//! plugin itself ([`Call::parse`]).

mod blame;
pub(crate) mod keys;

use std::{env, io::Read, path::PathBuf};

use cni_plugins_host::netns;
use cni_plugins_types::{
    CniResult, ErrorCode, Version,
    config::{is_interface_name, is_name},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{failure::Failure, plugins::Plugin};

/// Bound of the object on standard input; a GC list for thousands of pods fits many times.
const MAX_INPUT: u64 = 16 << 20;
/// Bound of a network's name and of a container id: both become part of one file name.
const MAX_NAME: usize = 100;
/// Keys whose values are objects.
const SECTIONS: [&str; 3] = ["runtimeConfig", "ipam", "dns"];
/// Bound of a container id.
const MAX_CONTAINER_ID: usize = 128;

/// What the runtime wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// Attach.
    Add,
    /// Detach; always succeeds when nothing is left.
    Del,
    /// Compare with `prevResult`.
    Check,
    /// Remove all but the valid attachments.
    Gc,
    /// Say whether ADD could work.
    Status,
    /// Say which versions are supported.
    Version,
}

impl Command {
    /// The value of `CNI_COMMAND`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Gc => "GC",
            Command::Status => "STATUS",
            Command::Version => "VERSION",
        }
    }

    /// Whether it only takes away. Of a configuration such a call reads what it needs, and refuses nothing else: the list may
    /// have been edited, or the plugins exchanged for newer ones, since the pod was attached, and a pod whose DEL is refused
    /// can never be taken down.
    pub(crate) fn takes_away(self) -> bool {
        matches!(self, Command::Del | Command::Gc)
    }
}

/// A read and checked call.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// `CNI_COMMAND`.
    pub(crate) command: Command,
    /// `CNI_CONTAINERID`; empty for GC, STATUS and VERSION.
    pub(crate) container_id: String,
    /// `CNI_NETNS`; may be empty for DEL.
    pub(crate) netns: PathBuf,
    /// `CNI_IFNAME`; empty for GC, STATUS and VERSION.
    pub(crate) ifname: String,
    /// `CNI_ARGS`, split at `;` and `=`.
    pub(crate) args: Vec<(String, String)>,
    /// `CNI_PATH`, split at `:`.
    pub(crate) path: Vec<PathBuf>,
    /// `name` of the object.
    pub(crate) network: String,
    /// `cniVersion` of the object.
    pub(crate) cni_version: Version,
    /// The whole object.
    pub(crate) config: Value,
}

/// An attachment that GC must keep.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
pub(crate) struct Attachment {
    /// Container id.
    #[serde(rename = "containerID")]
    pub(crate) container_id: String,
    /// Interface name.
    pub(crate) ifname: String,
}

/// A call whose object was read, before it is checked: what a log line needs also when it is refused.
pub(crate) struct RawCall {
    command: Command,
    config: Value,
}

impl RawCall {
    /// Reads the environment and standard input.
    pub(crate) fn read() -> Result<Self, Failure> {
        let command = read_command()?;
        let mut input = Vec::new();
        std::io::stdin()
            .take(MAX_INPUT + 1)
            .read_to_end(&mut input)
            .map_err(|error| Failure::io("read the configuration from standard input", &error))?;
        if u64::try_from(input.len()).is_ok_and(|len| len > MAX_INPUT) {
            return Err(Failure::new(ErrorCode::Decode, "the configuration is larger than 16 MiB"));
        }
        if command == Command::Version && input.iter().all(u8::is_ascii_whitespace) {
            // Runtimes of before 0.4.0 send nothing.
            return Ok(Self { command, config: Value::Null });
        }
        let mut config: Value = serde_json::from_slice(&input).map_err(|error| {
            Failure::new(ErrorCode::Decode, format!("cannot decode the configuration: {error}"))
        })?;
        if !config.is_object() {
            return Err(Failure::new(ErrorCode::Decode, "the configuration is not a JSON object"));
        }
        keys::fold(&mut config);
        Ok(Self { command, config })
    }

    /// A string of the object.
    pub(crate) fn string(&self, key: &str) -> Option<&str> {
        self.config.get(key).and_then(Value::as_str)
    }

    /// What was asked for.
    pub(crate) fn command(&self) -> Command {
        self.command
    }

    /// The version the answer is to be written in; our newest when the call names none that we know.
    pub(crate) fn answer_version(&self) -> Version {
        self.string("cniVersion").and_then(|text| text.parse().ok()).unwrap_or_default()
    }

    /// The call, if it is as the specification wants it.
    pub(crate) fn check(self) -> Result<Call, Failure> {
        let version_asked = parse_version(&self.config);
        let call = Call {
            command: self.command,
            container_id: variable("CNI_CONTAINERID"),
            netns: variable("CNI_NETNS").into(),
            ifname: variable("CNI_IFNAME"),
            args: parse_args(&variable("CNI_ARGS"), self.command)?,
            path: variable("CNI_PATH").split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect(),
            network: self.string("name").unwrap_or_default().to_owned(),
            cni_version: version_asked?,
            config: self.config,
        };
        call.check()?;
        Ok(call)
    }
}

impl Call {
    /// The object as a plugin's own type; the error names the field.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_value(self.config.clone()).map_err(|error| {
            let field = blame::field::<T>(&self.config, &error.to_string());
            Failure::config(format!("{field}{error} (in the configuration of network {:?})", self.network))
        })
    }

    /// Refuses `CNI_NETNS` that is the namespace of this process, unless `CNI_NETNS_OVERRIDE` allows it, as the reference
    /// plugins have it.
    pub(crate) fn refuse_own_namespace(&self) -> Result<(), Failure> {
        let allowed = || matches!(variable("CNI_NETNS_OVERRIDE").to_ascii_lowercase().as_str(), "1" | "true");
        let is_own = |own| netns::identity(&self.netns).is_ok_and(|there| there == own);
        if matches!(self.command, Command::Add | Command::Check)
            && is_own(netns::own_identity()?)
            && !allowed()
        {
            return Err(Failure::environment(format!(
                "CNI_NETNS: {} is the host's own network namespace, not a pod's",
                self.netns.display()
            )));
        }
        Ok(())
    }

    /// The attachments GC must keep.
    pub(crate) fn valid_attachments(&self) -> Result<Vec<Attachment>, Failure> {
        match self.config.get("cni.dev/valid-attachments") {
            // Without a list everything would be stale.
            None | Some(Value::Null) => Err(Failure::config("cni.dev/valid-attachments is missing")),
            Some(list) => serde_json::from_value(list.clone())
                .map_err(|error| Failure::config(format!("invalid cni.dev/valid-attachments: {error}"))),
        }
    }

    /// The result of the plugins before, in whatever version it is.
    pub(crate) fn prev_result(&self) -> Result<Option<CniResult>, Failure> {
        let value = match self.config.get("prevResult") {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        if let Some(version) = value.get("cniVersion") {
            let known = version.as_str().unwrap_or_default().parse::<Version>();
            known.map_err(|error| {
                Failure::new(ErrorCode::IncompatibleVersion, format!("prevResult: {error}"))
            })?;
        }
        CniResult::from_value(value.clone(), self.cni_version).map(Some).map_err(|error| {
            let field = blame::field::<CniResult>(value, &error.to_string());
            let field = if field.is_empty() { ": ".to_owned() } else { format!(".{field}") };
            Failure::new(ErrorCode::Decode, format!("prevResult{field}{error}"))
        })
    }

    /// The result of the plugins before, which this plugin cannot do without.
    pub(crate) fn require_prev_result(&self) -> Result<CniResult, Failure> {
        self.prev_result()?.ok_or_else(|| {
            Failure::config(format!(
                "prevResult is missing: {} needs the result of ADD by the plugins before it in the list",
                self.config["type"].as_str().unwrap_or("this plugin")
            ))
        })
    }

    /// A value of `CNI_ARGS`.
    pub(crate) fn arg(&self, key: &str) -> Option<&str> {
        self.args.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// A value of the object's `args.cni`.
    pub(crate) fn cni_arg(&self, key: &str) -> Option<&Value> {
        self.config.get("args").and_then(|args| args.get("cni")).and_then(|cni| cni.get(key))
    }

    /// Namespace and name of the pod, where the runtime tells.
    pub(crate) fn pod(&self) -> Option<String> {
        let namespace = self.arg("K8S_POD_NAMESPACE").filter(|text| !text.is_empty())?;
        let name = self.arg("K8S_POD_NAME").filter(|text| !text.is_empty())?;
        Some(format!("{namespace}/{name}"))
    }

    fn check(&self) -> Result<(), Failure> {
        let is_known = match self.command {
            Command::Check => self.cni_version.has_check(),
            Command::Gc | Command::Status => self.cni_version.has_gc_and_status(),
            Command::Add | Command::Del | Command::Version => true,
        };
        if !is_known {
            return Err(Failure::new(
                ErrorCode::IncompatibleVersion,
                format!("cniVersion {} has no {}", self.cni_version, self.command.as_str()),
            ));
        }
        if !is_name(&self.network) || self.network.len() > MAX_NAME {
            return Err(Failure::config(format!(
                "name {:?} is missing or not of letters, digits, '_', '.', '-', or longer than {MAX_NAME}",
                self.network
            )));
        }
        self.check_sections()?;
        if matches!(self.command, Command::Gc | Command::Status) {
            return Ok(());
        }
        if !is_name(&self.container_id) || self.container_id.len() > MAX_CONTAINER_ID {
            return Err(Failure::environment(format!(
                "CNI_CONTAINERID is missing or invalid: {:?}",
                self.container_id
            )));
        }
        // Names that are refused now were taken once.
        let was_taken =
            || self.command == Command::Del && !self.ifname.starts_with('.') && is_file_name(&self.ifname);
        if !is_interface_name(&self.ifname) && !was_taken() {
            return Err(Failure::environment(format!(
                "CNI_IFNAME is missing or not an interface name: {:?}",
                self.ifname
            )));
        }
        if self.netns.as_os_str().is_empty() && self.command != Command::Del {
            return Err(Failure::environment("CNI_NETNS is missing"));
        }
        Ok(())
    }
}

impl Call {
    /// What every plugin's object may have.
    fn check_sections(&self) -> Result<(), Failure> {
        if self.command.takes_away() {
            return Ok(());
        }
        for key in SECTIONS {
            if self.config.get(key).is_some_and(|section| !section.is_object()) {
                return Err(Failure::config(format!("{key}: is not an object")));
            }
        }
        let ipam = &self.config["ipam"];
        let ours = ipam["type"].as_str().is_some_and(|kind| Plugin::named(kind).is_some());
        let data_dir = ("ipam.dataDir", ipam.get("dataDir").filter(|_| ours));
        let own = ["stateDir", "logFile"].map(|key| (key, self.config.get(key)));
        for (key, value) in own.into_iter().chain([data_dir]) {
            let Some(value) = value else { continue };
            if !value.as_str().is_some_and(|path| path.is_empty() || path.starts_with('/')) {
                return Err(Failure::config(format!("{key}: {value} is not an absolute path")));
            }
        }
        Ok(())
    }
}

/// The answer to VERSION, in the version it was asked in.
pub(crate) fn version_answer(asked: Version) -> Value {
    json!({"cniVersion": asked, "supportedVersions": Version::ALL})
}

fn read_command() -> Result<Command, Failure> {
    use Command::{Add, Check, Del, Gc, Status, Version};
    let text = variable("CNI_COMMAND");
    [Add, Del, Check, Gc, Status, Version]
        .into_iter()
        .find(|command| command.as_str() == text)
        .ok_or_else(|| Failure::environment(format!("CNI_COMMAND is missing or unknown: {text:?}")))
}

fn parse_version(config: &Value) -> Result<Version, Failure> {
    match config.get("cniVersion") {
        None => Err(Failure::new(ErrorCode::IncompatibleVersion, "cniVersion is missing")),
        Some(Value::String(version)) => {
            version.parse().map_err(|error: cni_plugins_types::version::UnsupportedVersion| {
                Failure::new(ErrorCode::IncompatibleVersion, error.to_string())
            })
        }
        Some(other) => Err(Failure::new(
            ErrorCode::IncompatibleVersion,
            format!("cniVersion: {other} is no version: expected a string such as \"1.1.0\""),
        )),
    }
}

fn parse_args(text: &str, command: Command) -> Result<Vec<(String, String)>, Failure> {
    let pairs = text.split(';').filter(|pair| !pair.is_empty());
    pairs
        .filter(|pair| !command.takes_away() || pair.contains('='))
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
            None => Err(Failure::environment(format!("CNI_ARGS: {pair:?} is not KEY=VALUE"))),
        })
        .collect()
}

/// Whether a record's file can be named by it, and it fits an interface.
fn is_file_name(text: &str) -> bool {
    (1..=15).contains(&text.len()) && !text.contains(|c: char| c == '/' || c.is_control())
}

/// A variable as text; absent is empty, as the specification treats both alike.
fn variable(name: &str) -> String {
    env::var_os(name).unwrap_or_default().to_string_lossy().into_owned()
}

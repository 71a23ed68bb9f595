//! One call as the runtime makes it: the `CNI_*` variables and the object on standard input.
//!
//! Checks what every plugin needs checked; what is in the object beyond name and version is for the
//! plugin itself ([`Call::parse`]).

use std::{env, io::Read, path::PathBuf};

use cni_plugins_types::{
    ErrorCode, Version,
    config::{is_interface_name, is_name},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::failure::Failure;

/// Bound of the object on standard input; a GC list for thousands of pods fits many times.
const MAX_INPUT: u64 = 16 << 20;

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
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
pub(crate) struct Attachment {
    /// Container id.
    #[serde(rename = "containerID")]
    pub(crate) container_id: String,
    /// Interface name.
    pub(crate) ifname: String,
}

impl Call {
    /// Reads the environment and standard input.
    pub(crate) fn read() -> Result<Self, Failure> {
        let command = read_command()?;
        if command == Command::Version {
            return Ok(Self::version());
        }
        let mut input = Vec::new();
        std::io::stdin()
            .take(MAX_INPUT)
            .read_to_end(&mut input)
            .map_err(|error| Failure::io("read standard input", &error))?;
        let config: Value = serde_json::from_slice(&input).map_err(|error| {
            Failure::new(ErrorCode::Decode, format!("cannot decode the configuration: {error}"))
        })?;
        let call = Self {
            command,
            container_id: variable("CNI_CONTAINERID"),
            netns: variable("CNI_NETNS").into(),
            ifname: variable("CNI_IFNAME"),
            args: parse_args(&variable("CNI_ARGS")),
            path: variable("CNI_PATH").split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect(),
            network: config["name"].as_str().unwrap_or_default().to_owned(),
            cni_version: parse_version(&config)?,
            config,
        };
        call.check()?;
        Ok(call)
    }

    /// The object as a plugin's own type.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_value(self.config.clone()).map_err(|error| {
            Failure::config(format!("invalid network configuration {:?}: {error}", self.network))
        })
    }

    /// The attachments GC must keep.
    pub(crate) fn valid_attachments(&self) -> Result<Vec<Attachment>, Failure> {
        match self.config.get("cni.dev/valid-attachments") {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(list) => serde_json::from_value(list.clone())
                .map_err(|error| Failure::config(format!("invalid cni.dev/valid-attachments: {error}"))),
        }
    }

    fn version() -> Self {
        Self {
            command: Command::Version,
            container_id: String::new(),
            netns: PathBuf::new(),
            ifname: String::new(),
            args: Vec::new(),
            path: Vec::new(),
            network: String::new(),
            cni_version: Version::default(),
            config: Value::Null,
        }
    }

    fn check(&self) -> Result<(), Failure> {
        if !is_name(&self.network) {
            return Err(Failure::config(format!("invalid network name {:?}", self.network)));
        }
        if matches!(self.command, Command::Gc | Command::Status) {
            return Ok(());
        }
        if !is_name(&self.container_id) || self.container_id.len() > 128 {
            return Err(Failure::environment(format!(
                "CNI_CONTAINERID is missing or invalid: {:?}",
                self.container_id
            )));
        }
        if !is_interface_name(&self.ifname) {
            return Err(Failure::environment(format!("CNI_IFNAME is missing or invalid: {:?}", self.ifname)));
        }
        if self.netns.as_os_str().is_empty() && self.command != Command::Del {
            return Err(Failure::environment("CNI_NETNS is missing"));
        }
        Ok(())
    }
}

/// The answer to VERSION.
pub(crate) fn version_answer() -> Value {
    json!({"cniVersion": Version::default(), "supportedVersions": Version::ALL})
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
    config["cniVersion"].as_str().unwrap_or_default().parse().map_err(
        |error: cni_plugins_types::version::UnsupportedVersion| {
            Failure::new(ErrorCode::IncompatibleVersion, error.to_string())
        },
    )
}

fn parse_args(text: &str) -> Vec<(String, String)> {
    text.split(';')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// A variable as text; absent is empty, as the specification treats both alike.
fn variable(name: &str) -> String {
    env::var_os(name).unwrap_or_default().to_string_lossy().into_owned()
}

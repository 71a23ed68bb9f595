//! Network configuration: a list of plugins, and the object handed to each plugin on standard input.
//!
//! Input: the text of a `.conflist` or `.conf` file. Output: [`NetworkConfigList`], and from it
//! [`NetworkConfigList::plugin_input`]. Plugin-specific keys are carried untouched.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    result::CniResult,
    version::{UnsupportedVersion, Version},
};

/// A parsed list, ready to be invoked.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkConfigList {
    /// Name of the network, unique on the node.
    pub name: String,
    /// Version all plugins are asked for.
    pub cni_version: Version,
    /// Whether CHECK must not be called.
    pub disable_check: bool,
    /// Whether GC must not be called.
    pub disable_gc: bool,
    /// At least one plugin, in order of ADD.
    pub plugins: Vec<PluginConfig>,
    /// The text it was parsed from; what a result cache stores.
    pub source: String,
}

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct PluginConfig {
    /// Name of the executable.
    pub kind: String,
    /// Capabilities the plugin declares, so that the runtime passes them in `runtimeConfig`.
    pub capabilities: BTreeMap<String, bool>,
    raw: Map<String, Value>,
}

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or a known key of the wrong type.
    #[error("cannot decode network configuration")]
    Decode(#[source] serde_json::Error),
    /// `name` is missing or has characters a file name cannot have.
    #[error("network name {0:?} is missing or not of letters, digits, '_', '.', '-'")]
    Name(String),
    /// No version in `cniVersion` or `cniVersions` is supported.
    #[error(transparent)]
    Version(#[from] UnsupportedVersion),
    /// `plugins` is missing or empty.
    #[error("network {0:?} has no plugins")]
    NoPlugins(String),
    /// A plugin has no `type`, or one that is a path.
    #[error("plugin {index} of network {network:?} has the invalid type {kind:?}")]
    PluginType {
        /// Name of the network.
        network: String,
        /// Position in the list.
        index: usize,
        /// The value found.
        kind: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListHead {
    #[serde(default)]
    name: String,
    #[serde(default)]
    cni_version: Option<String>,
    #[serde(default)]
    cni_versions: Vec<String>,
    #[serde(default)]
    disable_check: bool,
    #[serde(default, rename = "disableGC")]
    disable_gc: bool,
    #[serde(default)]
    plugins: Option<Vec<Map<String, Value>>>,
}

impl NetworkConfigList {
    /// Parses a list, or a single plugin's configuration as a list of one.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let whole: Map<String, Value> = serde_json::from_str(text).map_err(ConfigError::Decode)?;
        let head: ListHead =
            serde_json::from_value(Value::Object(whole.clone())).map_err(ConfigError::Decode)?;
        if !is_name(&head.name) {
            return Err(ConfigError::Name(head.name));
        }
        let cni_version = choose_version(&head)?;
        let raws = match head.plugins {
            Some(plugins) => plugins,
            None if whole.contains_key("type") => vec![whole],
            None => Vec::new(),
        };
        if raws.is_empty() {
            return Err(ConfigError::NoPlugins(head.name));
        }
        let plugins = raws
            .into_iter()
            .enumerate()
            .map(|(index, raw)| PluginConfig::new(&head.name, index, raw))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            name: head.name,
            cni_version,
            disable_check: head.disable_check,
            disable_gc: head.disable_gc,
            plugins,
            source: text.to_owned(),
        })
    }

    /// The object for `plugin` on its standard input: its own keys, the list's name and version,
    /// those `capability_args` the plugin declares, and the result of the plugin before it.
    pub fn plugin_input(
        &self,
        plugin: &PluginConfig,
        capability_args: &BTreeMap<String, Value>,
        prev_result: Option<&CniResult>,
    ) -> Map<String, Value> {
        let mut input = plugin.raw.clone();
        input.insert("name".to_owned(), self.name.clone().into());
        input.insert("cniVersion".to_owned(), self.cni_version.as_str().into());
        let runtime_config: Map<String, Value> = capability_args
            .iter()
            .filter(|(name, _)| plugin.capabilities.get(*name).copied().unwrap_or(false))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !runtime_config.is_empty() {
            input.insert("runtimeConfig".to_owned(), runtime_config.into());
        }
        if let Some(result) = prev_result {
            input.insert("prevResult".to_owned(), result.to_value(self.cni_version));
        }
        input
    }
}

impl PluginConfig {
    fn new(network: &str, index: usize, raw: Map<String, Value>) -> Result<Self, ConfigError> {
        let kind = raw.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        if !is_plugin_type(&kind) {
            return Err(ConfigError::PluginType { network: network.to_owned(), index, kind });
        }
        let capabilities = match raw.get("capabilities") {
            Some(value) => serde_json::from_value(value.clone()).map_err(ConfigError::Decode)?,
            None => BTreeMap::new(),
        };
        Ok(Self { kind, capabilities, raw })
    }
}

fn choose_version(head: &ListHead) -> Result<Version, UnsupportedVersion> {
    let offered = head.cni_versions.iter().filter_map(|text| text.parse::<Version>().ok()).max();
    match (offered, &head.cni_version) {
        (Some(version), _) => Ok(version),
        (None, Some(text)) => text.parse(),
        (None, None) => Err(UnsupportedVersion(head.cni_versions.join(", "))),
    }
}

/// Whether `text` may be a network name or container id: it becomes part of file names.
pub fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Whether `text` may be an interface name, by the kernel's and the specification's rules.
pub fn is_interface_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 15
        && text != "."
        && text != ".."
        // Names of directories of sysctls that hold for all links, and for links to come.
        && text != "all"
        && text != "default"
        // The kernel replaces `%d` by a number.
        && !text.contains(|c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control())
}

/// Whether `text` may be a plugin's type: the name of a file in a directory of plugins, never a path out of it.
pub fn is_plugin_type(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && !text.contains(|c: char| matches!(c, '/' | '\\') || c.is_control())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const LIST: &str = r#"{"cniVersion":"1.1.0","name":"net","plugins":[
        {"type":"keelson-bridge","bridge":"b0","ipam":{"type":"keelson-ipam"}},
        {"type":"keelson-portmap","capabilities":{"portMappings":true}}]}"#;

    #[test]
    fn each_plugin_gets_its_keys_and_the_lists() {
        let list = NetworkConfigList::parse(LIST).unwrap();
        let args = BTreeMap::from([("portMappings".to_owned(), json!([{"hostPort": 80}]))]);
        let first = list.plugin_input(&list.plugins[0], &args, None);
        assert_eq!(first["bridge"], "b0");
        assert_eq!(first["name"], "net");
        assert!(!first.contains_key("runtimeConfig") && !first.contains_key("prevResult"));
        let second = list.plugin_input(&list.plugins[1], &args, Some(&CniResult::default()));
        assert_eq!(second["runtimeConfig"], json!({"portMappings": [{"hostPort": 80}]}));
        assert_eq!(second["prevResult"]["cniVersion"], "1.1.0");
    }

    #[test]
    fn names_that_the_kernel_would_change_are_no_interface_names() {
        for name in ["eth0", "veth94ba9041008", "br-1.7", "a_b"] {
            assert!(is_interface_name(name), "{name}");
        }
        let bad =
            ["", ".", "..", "eth%d", "a%", "all", "default", "a/b", "a:1", "a b", "a\0", "sixteen-letters-"];
        for name in bad {
            assert!(!is_interface_name(name), "{name}");
        }
    }

    #[test]
    fn a_type_is_no_path() {
        assert!(is_plugin_type("host-local") && is_plugin_type("my.plugin"));
        for kind in ["", ".", "..", "/bin/true", "../bin/x", "a\\b", "a\0"] {
            assert!(!is_plugin_type(kind), "{kind}");
        }
    }

    #[test]
    fn a_single_plugin_file_is_a_list_of_one() {
        let list = NetworkConfigList::parse(r#"{"cniVersion":"0.4.0","name":"n","type":"ptp"}"#).unwrap();
        assert_eq!((list.plugins.len(), list.plugins[0].kind.as_str()), (1, "ptp"));
    }

    #[test]
    fn highest_common_version_of_several_is_taken() {
        let text = r#"{"cniVersions":["0.4.0","1.0.0","9.9.9"],"cniVersion":"0.4.0","name":"n","type":"x"}"#;
        assert_eq!(NetworkConfigList::parse(text).unwrap().cni_version, Version::V1_0_0);
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            (r#"{"cniVersion":"1.1.0","name":"../x","type":"p"}"#, "network name \"../x\""),
            (r#"{"cniVersion":"7","name":"n","type":"p"}"#, "unsupported cniVersion \"7\""),
            (r#"{"cniVersion":"1.1.0","name":"n","plugins":[]}"#, "network \"n\" has no plugins"),
            (r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"../sh"}]}"#, "invalid type \"../sh\""),
            (r#"{"name":"n""#, "cannot decode"),
        ];
        for (text, message) in cases {
            let error = NetworkConfigList::parse(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}

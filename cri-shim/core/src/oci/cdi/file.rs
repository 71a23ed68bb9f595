//! The form of a CDI file (YAML or JSON) and what makes one valid.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A file: devices of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct File {
    /// The version of the specification it follows.
    pub cdi_version: String,
    /// `vendor/class`.
    pub kind: String,
    /// For people.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Its devices.
    #[serde(default)]
    pub devices: Vec<Device>,
    /// What every container with one of its devices gets.
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// Its name, unique in its kind.
    pub name: String,
    /// For people.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// What a container with it gets.
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

/// What is added to a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ContainerEdits {
    /// `NAME=value` pairs.
    #[serde(default)]
    pub env: Vec<String>,
    /// Device nodes.
    #[serde(default)]
    pub device_nodes: Vec<DeviceNode>,
    /// Network devices to move in; not offered.
    #[serde(default)]
    pub net_devices: Vec<serde_json::Value>,
    /// Programs to run on the node.
    #[serde(default)]
    pub hooks: Vec<Hook>,
    /// Mounts.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Cache and bandwidth classes; told and ignored.
    #[serde(default)]
    pub intel_rdt: Option<serde_json::Value>,
    /// Groups of the first process.
    #[serde(default, rename = "additionalGids")]
    pub additional_gids: Vec<u32>,
}

/// A device node. What is absent is as it is on the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceNode {
    /// Path in the container.
    pub path: String,
    /// Path on the node; the same when absent.
    #[serde(default)]
    pub host_path: String,
    /// `b`, `c`, `u` (as `c`) or `p`.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Major number.
    #[serde(default)]
    pub major: Option<i64>,
    /// Minor number.
    #[serde(default)]
    pub minor: Option<i64>,
    /// Permission bits.
    #[serde(default)]
    pub file_mode: Option<u32>,
    /// Some of `rwm`; all of them when absent.
    #[serde(default)]
    pub permissions: String,
    /// Owner.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Group.
    #[serde(default)]
    pub gid: Option<u32>,
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    /// Path on the node.
    pub host_path: String,
    /// Path in the container.
    pub container_path: String,
    /// Kind of file system, when it is no bind mount.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Mount options.
    #[serde(default)]
    pub options: Vec<String>,
}

/// A program of the node that runs at a moment of the container's life.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// The moment, as the runtime specification calls it.
    pub hook_name: String,
    /// The program.
    pub path: String,
    /// Its arguments with its own name.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its environment.
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds it may take.
    #[serde(default)]
    pub timeout: Option<i64>,
}

/// The moments a hook can run at.
const HOOK_NAMES: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

impl File {
    /// Checks everything that does not depend on the node; the error says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        check_version(&self.cdi_version)?;
        let (vendor, class) =
            self.kind.split_once('/').ok_or_else(|| format!("kind {:?} is no vendor/class", self.kind))?;
        check_name("vendor", vendor, "-_.", false)?;
        check_name("class", class, "-_.", false)?;
        if self.devices.is_empty() {
            return Err("it has no devices".to_owned());
        }
        self.container_edits.check()?;
        for (index, device) in self.devices.iter().enumerate() {
            check_name("device", &device.name, "-_.:", true)?;
            if self.devices.iter().skip(index + 1).any(|other| other.name == device.name) {
                return Err(format!("device {:?} is there twice", device.name));
            }
            if device.container_edits == ContainerEdits::default() {
                return Err(format!("device {:?} has no containerEdits", device.name));
            }
            device.container_edits.check().map_err(|why| format!("device {:?}: {why}", device.name))?;
        }
        Ok(())
    }
}

impl ContainerEdits {
    fn check(&self) -> Result<(), String> {
        for pair in &self.env {
            if pair.split_once('=').is_none_or(|(name, _)| name.is_empty()) || pair.contains('\0') {
                return Err(format!("env {pair:?} is no NAME=value"));
            }
        }
        for node in &self.device_nodes {
            node.check()?;
        }
        for mount in &self.mounts {
            absolute("mounts.containerPath", &mount.container_path)?;
            if mount.host_path.is_empty() || mount.host_path.contains('\0') {
                return Err(format!("mounts.hostPath {:?} is no path", mount.host_path));
            }
        }
        for hook in &self.hooks {
            absolute("hooks.path", &hook.path)?;
            if !HOOK_NAMES.contains(&hook.hook_name.as_str()) {
                return Err(format!("hook {:?} is unknown", hook.hook_name));
            }
        }
        Ok(())
    }
}

impl DeviceNode {
    fn check(&self) -> Result<(), String> {
        absolute("deviceNodes.path", &self.path)?;
        if !self.host_path.is_empty() {
            absolute("deviceNodes.hostPath", &self.host_path)?;
        }
        if !["", "b", "c", "u", "p"].contains(&self.kind.as_str()) {
            return Err(format!("deviceNodes.type {:?} is none of b, c, u, p", self.kind));
        }
        if !self.permissions.chars().all(|letter| "rwm".contains(letter)) {
            return Err(format!("deviceNodes.permissions {:?} is not made of r, w, m", self.permissions));
        }
        Ok(())
    }
}

fn absolute(what: &str, path: &str) -> Result<(), String> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    Err(format!("{what} {path:?} is not an absolute path"))
}

fn check_version(version: &str) -> Result<(), String> {
    let parts: Option<Vec<u32>> =
        version.trim_start_matches('v').split('.').map(|part| part.parse().ok()).collect();
    match parts.as_deref() {
        Some([0, 1..=8, _] | [1, 0..=1, _]) => Ok(()),
        _ => Err(format!("cdiVersion {version:?} is not one of 0.1.0 to 1.1.x")),
    }
}

fn check_name(what: &str, name: &str, inner: &str, may_begin_with_digit: bool) -> Result<(), String> {
    let plain = |letter: char| letter.is_ascii_alphanumeric();
    let begins =
        |letter: char| if may_begin_with_digit { plain(letter) } else { letter.is_ascii_alphabetic() };
    let good = name.starts_with(begins)
        && name.ends_with(plain)
        && name.chars().all(|letter| plain(letter) || inner.contains(letter));
    if good { Ok(()) } else { Err(format!("{what} name {name:?} is not valid")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file(change: impl FnOnce(&mut serde_json::Value)) -> Result<(), String> {
        let mut text = json!({
            "cdiVersion": "0.6.0",
            "kind": "vendor.com/gpu",
            "devices": [{ "name": "0", "containerEdits": { "env": ["A=b"] } }],
        });
        change(&mut text);
        let file: File = serde_json::from_value(text).map_err(|error| error.to_string())?;
        file.check()
    }

    #[test]
    fn a_valid_file_of_each_version() {
        for version in ["0.3.0", "0.5.0", "0.8.0", "1.0.0", "1.1.0"] {
            file(|text| text["cdiVersion"] = json!(version)).unwrap();
        }
    }

    #[test]
    fn what_is_wrong_is_told() {
        let edits =
            |edits: serde_json::Value| file(|text| text["devices"][0]["containerEdits"] = edits).unwrap_err();
        let cases = [
            (file(|text| text["cdiVersion"] = json!("2.0.0")).unwrap_err(), "cdiVersion \"2.0.0\""),
            (file(|text| text["cdiVersion"] = json!("x")).unwrap_err(), "cdiVersion \"x\""),
            (file(|text| text["kind"] = json!("gpu")).unwrap_err(), "kind \"gpu\""),
            (file(|text| text["kind"] = json!("1v/gpu")).unwrap_err(), "vendor name"),
            (file(|text| text["devices"] = json!([])).unwrap_err(), "no devices"),
            (file(|text| text["surprise"] = json!(1)).unwrap_err(), "surprise"),
            (file(|text| text["devices"][0]["name"] = json!("a/b")).unwrap_err(), "device name"),
            (edits(json!({})), "no containerEdits"),
            (edits(json!({ "env": ["A"] })), "no NAME=value"),
            (edits(json!({ "deviceNodes": [{ "path": "dev/x" }] })), "not an absolute path"),
            (edits(json!({ "deviceNodes": [{ "path": "/dev/x", "permissions": "rx" }] })), "made of r, w, m"),
            (edits(json!({ "deviceNodes": [{ "path": "/dev/x", "type": "q" }] })), "deviceNodes.type"),
            (edits(json!({ "hooks": [{ "hookName": "later", "path": "/x" }] })), "hook \"later\""),
        ];
        for (error, words) in cases {
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
    }
}

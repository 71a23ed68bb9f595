//! Container Device Interface: reads the files that describe vendors' devices and completes them from the node.

use std::path::{Path, PathBuf};

use cri_shim_api::v1::ContainerConfig;
use cri_shim_core::oci::SpecError;
use cri_shim_core::oci::cdi::{self, Edits, File, Registry};
use cri_shim_core::oci::devices::{HostDevice, from_cdi};

use crate::error::RuntimeError;
use crate::host::{devices, files};

/// Largest file that is read.
const FILE_LIMIT: u64 = 4 << 20;

/// What the devices that a container asks for add to it, and their nodes. Blocks. Files are read anew each time: they
/// change whenever a driver or a device plugin does.
pub fn gather(
    config: &ContainerConfig,
    directories: &[PathBuf],
) -> Result<(Edits, Vec<HostDevice>), RuntimeError> {
    let names = cdi::wanted(
        config.cdi_devices.iter().map(|device| device.name.as_str()),
        config.annotations.iter().map(|(key, value)| (key.as_str(), value.as_str())),
    );
    if names.is_empty() {
        return Ok((Edits::default(), Vec::new()));
    }
    let edits = load(directories)?.resolve(&names).map_err(SpecError::from)?;
    for device in &edits.ignored_rdt {
        tracing::warn!(device, "the Intel RDT class of this CDI device is ignored: it is not offered");
    }
    let mut nodes = Vec::new();
    for node in &edits.device_nodes {
        let host = if node.host_path.is_empty() { &node.path } else { &node.host_path };
        // A device that its file describes whole need not be there yet.
        let described = devices::describe(Path::new(host)).ok().flatten();
        nodes.push(from_cdi(node, described.as_ref())?);
    }
    Ok((edits, nodes))
}

/// Every file of the directories; a later directory has priority.
fn load(directories: &[PathBuf]) -> Result<Registry, RuntimeError> {
    let mut registry = Registry::default();
    for (priority, directory) in directories.iter().enumerate() {
        let mut names = files::names_in(directory)?;
        names.sort();
        for name in names {
            let path = directory.join(&name);
            let known = path.extension().is_some_and(|extension| extension == "json" || extension == "yaml");
            if !known || name.starts_with('.') {
                continue;
            }
            let shown = path.to_string_lossy();
            match read(&path) {
                Ok(file) => registry.add(priority, &shown, file),
                Err(why) => registry.add_broken(&shown, &why),
            }
        }
    }
    Ok(registry)
}

fn read(path: &Path) -> Result<File, String> {
    let metadata = path.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() || metadata.len() > FILE_LIMIT {
        return Err(format!("is no file of at most {FILE_LIMIT} bytes"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    // JSON is YAML as well.
    serde_norway::from_str(&text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cri_shim_api::v1::CdiDevice;

    #[test]
    fn devices_come_from_yaml_and_json_and_from_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let yaml = "cdiVersion: 0.6.0\nkind: v.com/null\ndevices:\n- name: a\n  containerEdits:\n    \
                    env: [ONE=1]\n    deviceNodes: [{path: /dev/mine, hostPath: /dev/null}]\n";
        std::fs::write(dir.path().join("null.yaml"), yaml).unwrap();
        let json = r#"{"cdiVersion":"1.0.0","kind":"v.com/env","devices":[{"name":"b","containerEdits":{"env":["TWO=2"]}}]}"#;
        std::fs::write(dir.path().join("env.json"), json).unwrap();
        std::fs::write(dir.path().join("bad.yaml"), "devices: 3").unwrap();
        std::fs::write(dir.path().join("note.txt"), "not CDI").unwrap();
        let directories = [PathBuf::from("/no/such/directory"), dir.path().to_owned()];
        let mut config = ContainerConfig {
            cdi_devices: vec![CdiDevice { name: "v.com/null=a".into() }],
            annotations: [("cdi.k8s.io/x".to_owned(), "v.com/env=b".to_owned())].into(),
            ..ContainerConfig::default()
        };
        let (edits, nodes) = gather(&config, &directories).unwrap();
        assert_eq!(edits.env, ["ONE=1", "TWO=2"]);
        assert_eq!((nodes[0].path.as_str(), nodes[0].major, nodes[0].minor), ("/dev/mine", 1, 3));
        config.cdi_devices[0].name = "v.com/null=z".into();
        let error = gather(&config, &directories).unwrap_err().to_string();
        assert!(error.contains("v.com/null=z") && error.contains("bad.yaml"), "{error}");
    }
}

//! All files together: which device a name means, and what the named devices add up to.

use std::collections::BTreeMap;

use super::file::{ContainerEdits, DeviceNode, File, Hook, Mount};

/// A device that cannot be given.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CdiError {
    /// Not of the form `vendor/class=name`.
    #[error("CDI_devices: {0:?} is not a qualified device name (vendor/class=name)")]
    Name(String),
    /// No file describes it.
    #[error("CDI_devices: no file describes device {name:?}{}", unread(.broken))]
    Unknown {
        /// The device.
        name: String,
        /// Files that could not be used, with the reason.
        broken: Vec<String>,
    },
    /// Two files of one directory describe it.
    #[error("CDI_devices: device {name:?} is described by both {one} and {other}")]
    Conflict {
        /// The device.
        name: String,
        /// A file.
        one: String,
        /// Another file.
        other: String,
    },
    /// It wants something that this runtime does not offer.
    #[error("CDI_devices: device {name:?} wants {what}, which this runtime does not offer")]
    Unsupported {
        /// The device.
        name: String,
        /// What it wants.
        what: &'static str,
    },
}

fn unread(broken: &[String]) -> String {
    if broken.is_empty() { String::new() } else { format!(" (unusable: {})", broken.join("; ")) }
}

/// What the wanted devices add to a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    /// `NAME=value` pairs.
    pub env: Vec<String>,
    /// Device nodes.
    pub device_nodes: Vec<DeviceNode>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Programs to run on the node.
    pub hooks: Vec<Hook>,
    /// Groups of the first process.
    pub additional_gids: Vec<u32>,
    /// Devices whose Intel RDT classes are ignored.
    pub ignored_rdt: Vec<String>,
}

impl Edits {
    fn add(&mut self, name: &str, edits: &ContainerEdits) -> Result<(), CdiError> {
        if !edits.net_devices.is_empty() {
            return Err(CdiError::Unsupported { name: name.to_owned(), what: "network devices" });
        }
        if edits.intel_rdt.is_some() {
            self.ignored_rdt.push(name.to_owned());
        }
        self.env.extend_from_slice(&edits.env);
        self.device_nodes.extend_from_slice(&edits.device_nodes);
        self.mounts.extend_from_slice(&edits.mounts);
        self.hooks.extend_from_slice(&edits.hooks);
        // 0 would give root's group to everybody; the specification says to ignore it.
        self.additional_gids.extend(edits.additional_gids.iter().filter(|gid| **gid != 0));
        Ok(())
    }
}

#[derive(Debug)]
struct Entry {
    priority: usize,
    file: usize,
    device: usize,
    rival: Option<usize>,
}

/// The devices of every file.
#[derive(Debug, Default)]
pub struct Registry {
    files: Vec<(String, File)>,
    devices: BTreeMap<String, Entry>,
    broken: Vec<String>,
}

impl Registry {
    /// Adds a file found at `path`. Files of directories with a higher priority win over others.
    pub fn add(&mut self, priority: usize, path: &str, file: File) {
        if let Err(why) = file.check() {
            self.add_broken(path, &why);
            return;
        }
        let index = self.files.len();
        for (device, known) in file.devices.iter().enumerate() {
            let name = format!("{}={}", file.kind, known.name);
            let new = Entry { priority, file: index, device, rival: None };
            match self.devices.get_mut(&name) {
                Some(old) if old.priority > priority => {}
                Some(old) if old.priority == priority => old.rival = Some(index),
                _ => {
                    self.devices.insert(name, new);
                }
            }
        }
        self.files.push((path.to_owned(), file));
    }

    /// Notes a file that cannot be used.
    pub fn add_broken(&mut self, path: &str, why: &str) {
        self.broken.push(format!("{path}: {why}"));
    }

    /// What the devices of these names add, those of their files once each.
    pub fn resolve(&self, names: &[String]) -> Result<Edits, CdiError> {
        let mut edits = Edits::default();
        let mut files_used = Vec::new();
        for name in names {
            let qualified =
                name.split_once('=').is_some_and(|(kind, device)| kind.contains('/') && !device.is_empty());
            if !qualified {
                return Err(CdiError::Name(name.clone()));
            }
            let entry = self
                .devices
                .get(name)
                .ok_or_else(|| CdiError::Unknown { name: name.clone(), broken: self.broken.clone() })?;
            if let Some(rival) = entry.rival {
                let (one, other) = (self.files[entry.file].0.clone(), self.files[rival].0.clone());
                return Err(CdiError::Conflict { name: name.clone(), one, other });
            }
            let file = &self.files[entry.file].1;
            if !files_used.contains(&entry.file) {
                files_used.push(entry.file);
                edits.add(name, &file.container_edits)?;
            }
            edits.add(name, &file.devices[entry.device].container_edits)?;
        }
        Ok(edits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file(kind: &str, value: &str) -> File {
        serde_json::from_value(json!({
            "cdiVersion": "0.7.0",
            "kind": kind,
            "containerEdits": { "env": [format!("ALL={value}")], "additionalGids": [0, 44] },
            "devices": [
                { "name": "a", "containerEdits": { "env": [format!("A={value}")] } },
                { "name": "b", "containerEdits": { "env": [format!("B={value}")], "intelRdt": { "closID": "x" } } },
            ],
        }))
        .unwrap()
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn edits_of_the_file_come_once_and_before_those_of_its_devices() {
        let mut registry = Registry::default();
        registry.add(0, "/etc/cdi/v.json", file("v.com/gpu", "1"));
        let edits = registry.resolve(&names(&["v.com/gpu=a", "v.com/gpu=b"])).unwrap();
        assert_eq!(edits.env, ["ALL=1", "A=1", "B=1"]);
        assert_eq!(edits.additional_gids, [44]);
        assert_eq!(edits.ignored_rdt, ["v.com/gpu=b"]);
    }

    #[test]
    fn a_later_directory_wins_and_equals_conflict() {
        let mut registry = Registry::default();
        registry.add(1, "/var/run/cdi/v.json", file("v.com/gpu", "run"));
        registry.add(0, "/etc/cdi/v.json", file("v.com/gpu", "etc"));
        assert_eq!(registry.resolve(&names(&["v.com/gpu=a"])).unwrap().env, ["ALL=run", "A=run"]);
        registry.add(1, "/var/run/cdi/w.json", file("v.com/gpu", "other"));
        let error = registry.resolve(&names(&["v.com/gpu=a"])).unwrap_err().to_string();
        assert!(error.contains("/var/run/cdi/v.json and /var/run/cdi/w.json"), "{error}");
    }

    #[test]
    fn an_unknown_device_is_named_with_the_files_that_could_have_had_it() {
        let mut registry = Registry::default();
        registry.add_broken("/etc/cdi/x.yaml", "no map");
        let error = registry.resolve(&names(&["v.com/gpu=z"])).unwrap_err().to_string();
        assert_eq!(
            error,
            "CDI_devices: no file describes device \"v.com/gpu=z\" (unusable: /etc/cdi/x.yaml: no map)"
        );
        for name in ["gpu", "gpu=0", "v.com/gpu="] {
            assert_eq!(registry.resolve(&names(&[name])), Err(CdiError::Name(name.to_owned())));
        }
    }

    #[test]
    fn names_come_from_the_field_and_from_annotations_once() {
        let annotations = [("cdi.k8s.io/x", "v/g=1, v/g=2"), ("other", "v/g=3")];
        let all = super::super::wanted(["v/g=1"].into_iter(), annotations.into_iter());
        assert_eq!(all, ["v/g=1", "v/g=2"]);
    }
}

//! Where a container's cgroup is, written the way each driver wants it.
//!
//! The kubelet names a pod's cgroup as a path (driver cgroupfs) or as a slice of systemd's (driver systemd, always with
//! all of its dashes: `kubepods-burstable-pod1.slice` lies below `kubepods.slice/kubepods-burstable.slice`).

use std::path::{Component, Path};

/// Prefix of the scopes that systemd keeps our containers in. Programs that tell containers of Kubernetes by their cgroup
/// know this one.
const SCOPE_PREFIX: &str = "cri-containerd";
/// The slice of a pod that names none.
const DEFAULT_SLICE: &str = "system.slice";

/// Who makes cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Driver {
    /// The runtime itself, as directories.
    #[default]
    Cgroupfs,
    /// systemd, asked over its bus.
    Systemd,
}

/// One cgroup, for those who make it and those who read its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// `linux.cgroupsPath` of the OCI specification.
    pub for_runtime: String,
    /// The directory below each controller's mount, with a leading slash.
    pub directory: String,
}

/// A parent that names no cgroup.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadParent {
    /// systemd could not have named it.
    #[error(
        "cgroup_parent {0:?} is no slice; with the systemd cgroup driver it must be one, like kubepods.slice"
    )]
    NotASlice(String),
    /// It could lead out of the hierarchy.
    #[error("cgroup_parent {0:?} leads upwards")]
    LeadsUp(String),
}

impl Driver {
    /// The cgroup of `id` below `parent`, the directory or slice CRI gave; `fallback` serves a pod without one.
    pub fn place(self, parent: &str, id: &str, fallback: &str) -> Result<Place, BadParent> {
        match self {
            Self::Cgroupfs => {
                let parent = if parent.is_empty() { fallback } else { parent };
                if Path::new(parent).components().any(|part| part == Component::ParentDir) {
                    return Err(BadParent::LeadsUp(parent.to_owned()));
                }
                let path = Path::new("/").join(parent).join(id).to_string_lossy().into_owned();
                Ok(Place { for_runtime: path.clone(), directory: path })
            }
            Self::Systemd => {
                let slice = slice_of(parent)?;
                let directory = format!("{}/{SCOPE_PREFIX}-{id}.scope", expanded(slice)?);
                Ok(Place { for_runtime: format!("{slice}:{SCOPE_PREFIX}:{id}"), directory })
            }
        }
    }

    /// The directory of the pod's own cgroup below each controller's mount; nothing when it has none.
    pub fn pod_directory(self, parent: &str) -> Option<String> {
        match self {
            _ if parent.is_empty() => None,
            Self::Cgroupfs => Some(Path::new("/").join(parent).to_string_lossy().into_owned()),
            Self::Systemd => slice_of(parent).and_then(expanded).ok(),
        }
    }
}

/// The slice's own name: a kubelet may give it with its whole path.
fn slice_of(parent: &str) -> Result<&str, BadParent> {
    if parent.is_empty() {
        return Ok(DEFAULT_SLICE);
    }
    match parent.trim_end_matches('/').rsplit('/').next() {
        Some(name) if name.strip_suffix(".slice").is_some_and(|stem| !stem.is_empty()) => Ok(name),
        _ => Err(BadParent::NotASlice(parent.to_owned())),
    }
}

/// The directory of a slice: every dash of its name is a level.
fn expanded(slice: &str) -> Result<String, BadParent> {
    let stem = slice.trim_end_matches(".slice");
    if stem == "-" {
        return Ok(String::new());
    }
    let (mut path, mut name) = (String::new(), String::new());
    for part in stem.split('-') {
        if part.is_empty() {
            return Err(BadParent::NotASlice(slice.to_owned()));
        }
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        path.push('/');
        path.push_str(&name);
        path.push_str(".slice");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_joined() {
        let cases =
            [("/kubepods/pod1", "/kubepods/pod1/c1"), ("kubepods", "/kubepods/c1"), ("", "/keelson/c1")];
        for (parent, wanted) in cases {
            let place = Driver::Cgroupfs.place(parent, "c1", "keelson").unwrap();
            assert_eq!((place.for_runtime.as_str(), place.directory.as_str()), (wanted, wanted));
        }
        for parent in ["..", "/../etc", "kubepods/../..", "/kubepods/.."] {
            let refused = Driver::Cgroupfs.place(parent, "c1", "keelson").unwrap_err().to_string();
            assert!(refused.contains(parent) && refused.contains("leads upwards"), "{refused}");
        }
        assert_eq!(Driver::Cgroupfs.pod_directory("kubepods/pod1").unwrap(), "/kubepods/pod1");
        assert_eq!(Driver::Cgroupfs.pod_directory(""), None);
    }

    #[test]
    fn slices_become_scopes_and_their_directories() {
        let full = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice";
        let place = Driver::Systemd.place(full, "c1", "keelson").unwrap();
        assert_eq!(place.for_runtime, "kubepods-besteffort-pod1_2.slice:cri-containerd:c1");
        assert_eq!(place.directory, format!("{full}/cri-containerd-c1.scope"));
        assert_eq!(
            Driver::Systemd.place("test.slice", "c1", "").unwrap().for_runtime,
            "test.slice:cri-containerd:c1"
        );
        assert_eq!(
            Driver::Systemd.place("", "c1", "keelson").unwrap().directory,
            "/system.slice/cri-containerd-c1.scope"
        );
        assert_eq!(Driver::Systemd.pod_directory("kubepods-besteffort-pod1_2.slice").unwrap(), full);
        assert_eq!(Driver::Systemd.place("-.slice", "c1", "").unwrap().directory, "/cri-containerd-c1.scope");
    }

    #[test]
    fn what_is_no_slice_is_refused_by_name() {
        for parent in ["/kubepods/pod1", ".slice", "a--b.slice", "-a.slice"] {
            assert!(
                Driver::Systemd.place(parent, "c1", "").unwrap_err().to_string().contains("slice"),
                "{parent}"
            );
        }
    }
}

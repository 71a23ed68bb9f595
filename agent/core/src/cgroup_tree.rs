//! Where the cgroups of all pods, of a class and of a pod are, by the driver that makes them. Pure.
//!
//! With `cgroupfs` they are directories, with `systemd` its slices: a slice's name has the names of all above it, with
//! dashes between them, and its directory lies below theirs. Both forms are upstream's.

use crate::qos::QosClass;

/// Who makes cgroups: `cgroupDriver`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The agent, as directories.
    #[default]
    Cgroupfs,
    /// systemd, as slices.
    Systemd,
}

/// The pods' part of the hierarchies. All paths are relative to a hierarchy's root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CgroupTree {
    root: String,
    driver: CgroupDriver,
}

impl CgroupTree {
    /// Below `root`, which is absolute; `/` is the hierarchies' own.
    pub fn new(root: &str, driver: CgroupDriver) -> Self {
        Self { root: root.trim_end_matches('/').to_owned(), driver }
    }

    /// Who makes them.
    pub fn driver(&self) -> CgroupDriver {
        self.driver
    }

    /// The cgroup of all pods.
    pub fn pods(&self) -> String {
        self.path(&[])
    }

    /// The cgroup of a class; that of Guaranteed pods is the one of all.
    pub fn class(&self, class: QosClass) -> String {
        self.path(&class_names(class))
    }

    /// The cgroup of a pod.
    pub fn pod(&self, class: QosClass, uid: &str) -> String {
        let name = format!("pod{uid}");
        let mut names = class_names(class);
        names.push(&name);
        self.path(&names)
    }

    /// The uid of the pod whose cgroup has this directory name in its class's.
    pub fn uid(&self, class: QosClass, directory: &str) -> Option<String> {
        match self.driver {
            CgroupDriver::Cgroupfs => directory.strip_prefix("pod").map(str::to_owned),
            CgroupDriver::Systemd => {
                let class = self.class(class);
                let above = class.rsplit('/').next()?.strip_suffix(SLICE)?;
                let name = directory.strip_suffix(SLICE)?.strip_prefix(above)?.strip_prefix("-pod")?;
                // A uid has no underscores of its own.
                Some(name.replace('_', "-"))
            }
        }
    }

    fn path(&self, below: &[&str]) -> String {
        let names = self.root.split('/').filter(|name| !name.is_empty());
        let names = names.chain(["kubepods"]).chain(below.iter().copied());
        let (mut path, mut slice) = (String::new(), String::new());
        for name in names {
            path.push('/');
            match self.driver {
                CgroupDriver::Cgroupfs => path.push_str(name),
                CgroupDriver::Systemd => {
                    if !slice.is_empty() {
                        slice.push('-');
                    }
                    // A dash would be another level.
                    slice.push_str(&name.replace('-', "_"));
                    path.push_str(&slice);
                    path.push_str(SLICE);
                }
            }
        }
        path
    }
}

const SLICE: &str = ".slice";

fn class_names(class: QosClass) -> Vec<&'static str> {
    match class {
        QosClass::Guaranteed => Vec::new(),
        QosClass::Burstable => vec!["burstable"],
        QosClass::BestEffort => vec!["besteffort"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_cgroupfs() {
        let tree = CgroupTree::new("/keelson/up/", CgroupDriver::Cgroupfs);
        assert_eq!(tree.pods(), "/keelson/up/kubepods");
        assert_eq!(tree.pod(QosClass::Burstable, "a-b"), "/keelson/up/kubepods/burstable/poda-b");
        assert_eq!(tree.pod(QosClass::Guaranteed, "a-b"), "/keelson/up/kubepods/poda-b");
        assert_eq!(tree.uid(QosClass::Burstable, "poda-b").as_deref(), Some("a-b"));
        assert_eq!(CgroupTree::new("/", CgroupDriver::Cgroupfs).pods(), "/kubepods");
    }

    #[test]
    fn slices_are_nested_and_named_after_all_above_them() {
        let tree = CgroupTree::new("/", CgroupDriver::Systemd);
        assert_eq!(tree.pods(), "/kubepods.slice");
        assert_eq!(tree.class(QosClass::BestEffort), "/kubepods.slice/kubepods-besteffort.slice");
        assert_eq!(
            tree.pod(QosClass::Burstable, "1-2"),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"
        );
        let tree = CgroupTree::new("/my-node", CgroupDriver::Systemd);
        assert_eq!(
            tree.pod(QosClass::Guaranteed, "1-2"),
            "/my_node.slice/my_node-kubepods.slice/my_node-kubepods-pod1_2.slice"
        );
        assert_eq!(tree.uid(QosClass::Guaranteed, "my_node-kubepods-pod1_2.slice").as_deref(), Some("1-2"));
    }

    #[test]
    fn a_class_s_slice_is_no_pod_s() {
        let tree = CgroupTree::new("/", CgroupDriver::Systemd);
        assert_eq!(tree.uid(QosClass::Guaranteed, "kubepods-burstable.slice"), None);
        assert_eq!(tree.uid(QosClass::Guaranteed, "cri-containerd-1.scope"), None);
        assert_eq!(tree.uid(QosClass::Burstable, "kubepods-pod1.slice"), None);
    }
}

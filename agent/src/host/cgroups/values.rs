//! What a pod's values are called in each interface, and how they are written.

use std::io;
use std::sync::Mutex;
use std::sync::PoisonError;

use agent_core::qos::{PodCgroup, shares, weight_from_shares};
use tracing::warn;

use super::hierarchy::{Hierarchy, Version};
use crate::config::ReservedCgroup;

/// One value and its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    controller: &'static str,
    /// File and text on v1, written in order.
    v1: Vec<(&'static str, String)>,
    /// File and text on v2.
    v2: (&'static str, String),
}

impl Setting {
    /// Whether it is written there.
    pub(super) fn is_for(&self, hierarchy: &Hierarchy) -> bool {
        hierarchy.has(self.controller)
    }
}

/// The cpu weight alone.
pub(super) fn shares_setting(shares: u64) -> Setting {
    Setting {
        controller: "cpu",
        v1: vec![("cpu.shares", shares.to_string())],
        v2: ("cpu.weight", weight_from_shares(shares).to_string()),
    }
}

/// The memory limit alone; without one it is lifted.
pub(super) fn memory_setting(limit: Option<u64>) -> Setting {
    Setting {
        controller: "memory",
        v1: vec![("memory.limit_in_bytes", limit.map_or("-1".to_owned(), |bytes| bytes.to_string()))],
        v2: ("memory.max", limit.map_or("max".to_owned(), |bytes| bytes.to_string())),
    }
}

/// What is reserved, as limits; what is not named stays as it is.
pub(super) fn reserved_settings(cgroup: &ReservedCgroup) -> Vec<Setting> {
    let cpu = cgroup.milli_cpu.map(|milli| shares_setting(shares(i64::try_from(milli).unwrap_or(i64::MAX))));
    let memory = cgroup.memory.map(|bytes| memory_setting(Some(bytes)));
    let pids = cgroup.pids.map(|pids| Setting {
        controller: "pids",
        v1: vec![("pids.max", pids.to_string())],
        v2: ("pids.max", pids.to_string()),
    });
    cpu.into_iter().chain(memory).chain(pids).collect()
}

/// All values of a pod; absent ones are written as unlimited, so that an update can lift a limit.
pub(super) fn pod_settings(cgroup: &PodCgroup) -> Vec<Setting> {
    let or_max = |value: Option<u64>| value.map_or("max".to_owned(), |value| value.to_string());
    let quota = match cgroup.cpu_quota {
        Some((quota, period)) => Setting {
            controller: "cpu",
            v1: vec![("cpu.cfs_period_us", period.to_string()), ("cpu.cfs_quota_us", quota.to_string())],
            v2: ("cpu.max", format!("{quota} {period}")),
        },
        None => Setting {
            controller: "cpu",
            v1: vec![("cpu.cfs_quota_us", "-1".to_owned())],
            v2: ("cpu.max", "max".to_owned()),
        },
    };
    let memory = memory_setting(cgroup.memory_max);
    let pids = Setting {
        controller: "pids",
        v1: vec![("pids.max", or_max(cgroup.pids_max))],
        v2: ("pids.max", or_max(cgroup.pids_max)),
    };
    vec![shares_setting(cgroup.cpu_shares), quota, memory, pids]
}

/// Writes the settings whose controllers `hierarchy` has. What the host does not permit is logged once per file and
/// left out: the pod then runs without that limit, which is better than not at all.
pub(super) fn apply(hierarchy: &Hierarchy, path: &str, settings: &[Setting]) -> io::Result<()> {
    let dir = hierarchy.dir(path);
    for setting in settings.iter().filter(|setting| setting.is_for(hierarchy)) {
        let files: &[(&str, String)] = match hierarchy.version {
            Version::V1 => &setting.v1,
            Version::V2 => std::slice::from_ref(&setting.v2),
        };
        for (file, text) in files {
            match std::fs::write(dir.join(file), text) {
                Ok(()) => {}
                Err(error) if is_not_permitted(&error) => warn_once(file, &error),
                Err(error) => return Err(io::Error::new(error.kind(), format!("{file} = {text}: {error}"))),
            }
        }
    }
    Ok(())
}

/// No privilege, or a kernel without this file (CFS bandwidth is optional).
fn is_not_permitted(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound)
}

/// Tells once per file what this host refuses.
pub(super) fn warn_once(file: &'static str, error: &io::Error) {
    static WARNED: Mutex<Vec<&str>> = Mutex::new(Vec::new());
    let mut warned = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
    if !warned.contains(&file) {
        warned.push(file);
        warn!(file, %error, "this host does not allow the cgroup limit; pods run without it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(quota: Option<(u64, u64)>, memory: Option<u64>) -> PodCgroup {
        PodCgroup {
            path: "/kubepods/podx".to_owned(),
            cpu_shares: 512,
            cpu_quota: quota,
            memory_max: memory,
            pids_max: None,
        }
    }

    #[test]
    fn limits_have_the_names_of_each_interface() {
        let settings = pod_settings(&pod(Some((50_000, 100_000)), Some(1 << 20)));
        let v2: Vec<_> =
            settings.iter().map(|setting| format!("{}={}", setting.v2.0, setting.v2.1)).collect();
        assert_eq!(v2, ["cpu.weight=20", "cpu.max=50000 100000", "memory.max=1048576", "pids.max=max"]);
        let v1: Vec<_> = settings
            .iter()
            .flat_map(|setting| &setting.v1)
            .map(|(file, text)| format!("{file}={text}"))
            .collect();
        assert_eq!(
            v1,
            [
                "cpu.shares=512",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "memory.limit_in_bytes=1048576",
                "pids.max=max"
            ]
        );
    }

    #[test]
    fn reservations_are_limits_of_what_they_name() {
        let cgroup = ReservedCgroup {
            whose: crate::config::Reserved::Kube,
            path: "/kube.slice".to_owned(),
            milli_cpu: Some(500),
            memory: Some(1 << 20),
            pids: None,
        };
        let written: Vec<String> = reserved_settings(&cgroup)
            .iter()
            .map(|setting| format!("{}={}", setting.v2.0, setting.v2.1))
            .collect();
        assert_eq!(written, ["cpu.weight=20", "memory.max=1048576"]);
    }

    #[test]
    fn absent_limits_are_lifted() {
        let settings = pod_settings(&pod(None, None));
        assert_eq!(settings[1].v1, [("cpu.cfs_quota_us", "-1".to_owned())]);
        assert_eq!(settings[2].v2, ("memory.max", "max".to_owned()));
        assert_eq!(settings[2].v1, [("memory.limit_in_bytes", "-1".to_owned())]);
    }
}

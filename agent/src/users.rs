//! Ranges of user and group ids for pods with `hostUsers: false`.
//!
//! Each such pod has one range of the node's ids, which its containers see as 0 and up; no two pods share an id. The ranges lie
//! where `/etc/subuid` and `/etc/subgid` say for the user `kubelet`, else behind the first one. A pod's range is in
//! `<podDir>/userns`, as a kubelet writes it, before its sandbox is made, and goes with the directory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, ensure};
use cri_shim_api::v1;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::config::AgentConfig;
use crate::files;

/// In a pod's directory.
const FILE: &str = "userns";
/// Whose subordinate ids they are.
const USER: &str = "kubelet";

/// Who has which ids.
#[derive(Debug)]
pub struct UserRanges {
    pods: PathBuf,
    /// Ids of one pod.
    length: u32,
    /// Where they may lie.
    room: Range<u32>,
    taken: Mutex<BTreeMap<String, Range<u32>>>,
}

/// The file's form: <https://github.com/kubernetes/enhancements/tree/master/keps/sig-node/127-user-namespaces>.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

/// Whether the pod has users of its own.
pub fn wants(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| spec.host_users == Some(false))
}

impl UserRanges {
    /// By the configuration and the node's files, with what earlier agents gave away. Blocks.
    pub fn load(config: &AgentConfig) -> anyhow::Result<Self> {
        let of = |file: &str| files::read(Path::new(file)).with_context(|| format!("cannot read {file}"));
        let (users, groups) = (of("/etc/subuid")?, of("/etc/subgid")?);
        let length = config.user_namespaces.ids_per_pod;
        let room = room(users.as_deref(), groups.as_deref(), length, config.max_pods)?;
        let pods = config.keelson.root_dir.join("pods");
        let taken = Mutex::new(recorded(&pods));
        Ok(Self { pods, length, room, taken })
    }

    /// Gives the pod a range, if it wants one: the same as before, or the first that is free, written down.
    pub async fn promise(&self, pod: &Pod) -> Result<(), String> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        if !wants(pod) || self.taken().contains_key(&uid) {
            return Ok(());
        }
        let range = {
            let mut taken = self.taken();
            let range = self.free(&taken).ok_or_else(|| {
                format!(
                    "no range of {} user ids is free in {}-{}",
                    self.length, self.room.start, self.room.end
                )
            })?;
            taken.insert(uid.clone(), range.clone());
            range
        };
        let path = self.pods.join(&uid).join(FILE);
        let text = serde_json::to_string(&Record::of(&range)).map_err(|error| error.to_string())?;
        let written = tokio::task::spawn_blocking(move || files::write_private(&path, &text)).await;
        let written = written.map_err(std::io::Error::other).and_then(|written| written);
        written.map_err(|error| {
            self.release(&uid);
            format!("the pod's range of user ids cannot be written down: {error}")
        })
    }

    /// The pod's user namespace, if it has one.
    pub fn of(&self, pod: &Pod) -> Option<v1::UserNamespace> {
        let range = self.taken().get(pod.metadata.uid.as_deref()?).filter(|_| wants(pod)).cloned()?;
        let mapping =
            v1::IdMapping { host_id: range.start, container_id: 0, length: range.end - range.start };
        let (uids, gids) = (vec![mapping], vec![mapping]);
        Some(v1::UserNamespace { mode: v1::NamespaceMode::Pod as i32, uids, gids })
    }

    /// The pod is over.
    pub fn release(&self, pod_uid: &str) {
        self.taken().remove(pod_uid);
    }

    fn free(&self, taken: &BTreeMap<String, Range<u32>>) -> Option<Range<u32>> {
        let mut start = self.room.start;
        loop {
            let end = start.checked_add(self.length).filter(|end| *end <= self.room.end)?;
            let range = start..end;
            // Ranges of an earlier configuration may be of another length.
            match taken.values().find(|other| other.start < range.end && range.start < other.end) {
                None => return Some(range),
                Some(other) => start = other.end.checked_next_multiple_of(self.length)?,
            }
        }
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<String, Range<u32>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Record {
    fn of(range: &Range<u32>) -> Self {
        let all = vec![Mapping { host_id: range.start, container_id: 0, length: range.end - range.start }];
        Self { uid_mappings: all.clone(), gid_mappings: all }
    }

    /// Nothing where it is not one range for both.
    fn range(&self) -> Option<Range<u32>> {
        let ([user], [group]) = (&self.uid_mappings[..], &self.gid_mappings[..]) else { return None };
        let same = user.host_id == group.host_id && user.length == group.length;
        let end = user.host_id.checked_add(user.length)?;
        (same && user.length > 0 && user.container_id == 0 && group.container_id == 0)
            .then_some(user.host_id..end)
    }
}

/// The ranges of pods on disk.
fn recorded(pods: &Path) -> BTreeMap<String, Range<u32>> {
    let mut taken = BTreeMap::new();
    for entry in std::fs::read_dir(pods).into_iter().flatten().flatten() {
        let path = entry.path().join(FILE);
        let text = match files::read(&path) {
            Ok(Some(text)) => text,
            Ok(None) => continue,
            Err(error) => {
                warn!(path = %path.display(), %error, "a pod's range of user ids cannot be read");
                continue;
            }
        };
        if let Some(range) = serde_json::from_str::<Record>(&text).ok().and_then(|record| record.range()) {
            taken.insert(entry.file_name().to_string_lossy().into_owned(), range);
        } else {
            warn!(path = %path.display(), "not a range of user ids");
        }
    }
    taken
}

/// Where ranges may lie.
fn room(users: Option<&str>, groups: Option<&str>, length: u32, max_pods: u32) -> anyhow::Result<Range<u32>> {
    let all = length.saturating_mul(max_pods);
    let (users, groups) = (subordinate(users)?, subordinate(groups)?);
    ensure!(
        users == groups,
        "/etc/subuid and /etc/subgid give the user {USER} different ids: they must be the same"
    );
    let Some(room) = users else { return Ok(length..length.saturating_add(all)) };
    ensure!(
        room.start >= length && room.start.is_multiple_of(length),
        "/etc/subuid: the ids of {USER} begin at {}: expected a multiple of userNamespaces.idsPerPod ({length})",
        room.start
    );
    ensure!(
        room.end - room.start >= all,
        "/etc/subuid: {USER} has {} ids: expected {all}, userNamespaces.idsPerPod for each of maxPods",
        room.end - room.start
    );
    Ok(room)
}

/// What a file of subordinate ids (subuid(5)) gives our user.
fn subordinate(text: Option<&str>) -> anyhow::Result<Option<Range<u32>>> {
    let mut found = None;
    for line in text.unwrap_or_default().lines() {
        let Some(rest) = line.strip_prefix(USER).and_then(|rest| rest.strip_prefix(':')) else { continue };
        let range = rest.split_once(':').and_then(|(first, count)| {
            let (first, count): (u32, u32) = (first.trim().parse().ok()?, count.trim().parse().ok()?);
            Some(first..first.checked_add(count)?)
        });
        let range = range.with_context(|| format!("{line:?} is not {USER}:first:count"))?;
        ensure!(found.is_none(), "{USER} has more than one range of subordinate ids: expected one");
        found = Some(range);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(uid: &str) -> Pod {
        serde_json::from_value(
            json!({"metadata": {"uid": uid}, "spec": {"hostUsers": false, "containers": []}}),
        )
        .expect("a pod")
    }

    fn ranges(pods: &Path, count: u32) -> UserRanges {
        let room = room(None, None, 65536, count).expect("room");
        UserRanges { pods: pods.to_owned(), length: 65536, room, taken: Mutex::new(recorded(pods)) }
    }

    #[tokio::test]
    async fn pods_never_share_and_keep_theirs_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let users = ranges(dir.path(), 2);
        let first = |users: &UserRanges, uid: &str| users.of(&pod(uid)).map(|found| found.uids[0].host_id);
        for uid in ["a", "b", "a"] {
            users.promise(&pod(uid)).await.unwrap();
        }
        assert_eq!((first(&users, "a"), first(&users, "b")), (Some(65536), Some(131_072)));
        let told = users.promise(&pod("c")).await.unwrap_err();
        assert!(told.contains("no range of 65536 user ids is free in 65536-196608"), "{told}");
        assert_eq!(first(&users, "c"), None);

        let users = ranges(dir.path(), 2);
        assert_eq!((first(&users, "a"), first(&users, "b")), (Some(65536), Some(131_072)));
        users.release("a");
        users.promise(&pod("c")).await.unwrap();
        assert_eq!(first(&users, "c"), Some(65536));
        let mut of_the_node = pod("d");
        of_the_node.spec.as_mut().unwrap().host_users = None;
        users.promise(&of_the_node).await.unwrap();
        assert_eq!(users.of(&of_the_node), None);
    }

    #[test]
    fn ranges_of_another_length_are_stepped_over() {
        let dir = tempfile::tempdir().unwrap();
        let users = ranges(dir.path(), 4);
        let taken = BTreeMap::from([("x".to_owned(), 65536..65537), ("y".to_owned(), 131_072..300_000)]);
        assert_eq!(users.free(&taken), None, "the last one is begun");
        let taken = BTreeMap::from([("x".to_owned(), 65536..65537)]);
        assert_eq!(users.free(&taken), Some(131_072..196_608));
    }

    #[test]
    fn subordinate_ids_are_the_kubelets() {
        let file = "debian:100000:65536\nkubelet:131072:7208960\n";
        assert_eq!(room(Some(file), Some(file), 65536, 110).unwrap(), 131_072..7_340_032);
        let none = Some("debian:100000:65536\n");
        assert_eq!(room(none, None, 65536, 110).unwrap(), 65536..7_274_496);
        for (users, groups, says) in [
            (file, "kubelet:65536:7208960", "different ids"),
            ("kubelet:100000:7208960", "kubelet:100000:7208960", "multiple of userNamespaces.idsPerPod"),
            ("kubelet:131072:65536", "kubelet:131072:65536", "expected 7208960"),
            ("kubelet:x", "kubelet:x", "is not kubelet:first:count"),
        ] {
            let error = room(Some(users), Some(groups), 65536, 110).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}

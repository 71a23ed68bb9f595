//! Reads one pod from the CRI: its sandboxes and containers as [`ObservedPod`].
//!
//! Ended containers and addresses never change: they are read once and remembered. Termination messages are read from
//! the pod's directory when a container ends.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use agent_core::model::{ObservedContainer, ObservedPod, ObservedSandbox, RunState, StartedAs};
use cri_shim_api::v1;
use jiff::Timestamp;

use super::cri::{Cri, CriError};
use super::labels;

/// Longest termination message of one container.
const MAX_MESSAGE: usize = 4096;
/// With FallbackToLogsOnError: this much of the log's end.
const MAX_LOG_TAIL: usize = 2048;
const MAX_LOG_LINES: usize = 80;

/// Observes one pod.
#[derive(Debug)]
pub struct Observer {
    uid: String,
    pod_dir: PathBuf,
    ended: BTreeMap<String, ObservedContainer>,
    addresses: BTreeMap<String, Vec<String>>,
}

impl Observer {
    /// An observer of the pod with its directory below the root directory.
    pub fn new(uid: &str, pod_dir: PathBuf) -> Self {
        Self { uid: uid.to_owned(), pod_dir, ended: BTreeMap::new(), addresses: BTreeMap::new() }
    }

    /// Everything the CRI has of the pod now.
    pub async fn observe(&mut self, cri: &Cri) -> Result<ObservedPod, CriError> {
        let (sandboxes, containers) =
            tokio::try_join!(cri.list_sandboxes(Some(&self.uid)), cri.list_containers(Some(&self.uid)))?;
        let mut observed = ObservedPod::default();
        // Not every runtime honours the label filter.
        let uid = self.uid.clone();
        let is_ours = |labels: &BTreeMap<String, String>| labels.get(labels::POD_UID) == Some(&uid);
        for sandbox in sandboxes.iter().filter(|sandbox| is_ours(&sandbox.labels)) {
            observed.sandboxes.push(self.sandbox(cri, sandbox).await?);
        }
        for container in containers.iter().filter(|container| is_ours(&container.labels)) {
            observed.containers.extend(self.container(cri, container).await?);
        }
        self.ended.retain(|id, _| observed.containers.iter().any(|container| container.id == *id));
        self.addresses.retain(|id, _| observed.sandboxes.iter().any(|sandbox| sandbox.id == *id));
        observed.sort();
        Ok(observed)
    }

    async fn sandbox(&mut self, cri: &Cri, sandbox: &v1::PodSandbox) -> Result<ObservedSandbox, CriError> {
        let ready = sandbox.state == v1::PodSandboxState::SandboxReady as i32;
        let known = self.addresses.get(&sandbox.id).filter(|ips| !ips.is_empty());
        let ips = match known {
            Some(ips) => ips.clone(),
            None if ready => {
                let ips = cri.sandbox_status(&sandbox.id).await?.map(addresses).unwrap_or_default();
                self.addresses.insert(sandbox.id.clone(), ips.clone());
                ips
            }
            None => Vec::new(),
        };
        Ok(ObservedSandbox {
            id: sandbox.id.clone(),
            attempt: sandbox.metadata.as_ref().map_or(0, |metadata| metadata.attempt),
            ready,
            created_at: nanos(sandbox.created_at),
            ips,
        })
    }

    async fn container(
        &mut self,
        cri: &Cri,
        container: &v1::Container,
    ) -> Result<Option<ObservedContainer>, CriError> {
        if let Some(known) = self.ended.get(&container.id) {
            return Ok(Some(known.clone()));
        }
        let Some(status) = cri.container_status(&container.id).await? else { return Ok(None) };
        let mut observed = convert(&container.pod_sandbox_id, &status);
        if observed.state == RunState::Exited {
            self.add_termination_message(&mut observed, &status).await;
            self.ended.insert(observed.id.clone(), observed.clone());
        }
        Ok(Some(observed))
    }

    async fn add_termination_message(&self, observed: &mut ObservedContainer, status: &v1::ContainerStatus) {
        let file = message_file(&self.pod_dir, &observed.name, observed.attempt);
        let fallback = status.annotations.get(labels::MESSAGE_POLICY).map(String::as_str)
            == Some("FallbackToLogsOnError")
            && observed.exit_code != 0;
        let log = fallback.then(|| PathBuf::from(&observed.log_path));
        let read = tokio::task::spawn_blocking(move || termination_message(&file, log.as_deref()));
        let message = read.await.unwrap_or_default();
        if observed.message.is_empty() {
            observed.message = message;
        } else if !message.is_empty() {
            observed.message = format!("{}: {message}", observed.message);
        }
    }
}

/// The file on the node behind the container's termination message path.
pub fn message_file(pod_dir: &Path, container: &str, attempt: u32) -> PathBuf {
    pod_dir.join("containers").join(container).join(attempt.to_string())
}

fn termination_message(file: &Path, log: Option<&Path>) -> String {
    let message = tail(file, MAX_MESSAGE);
    match log {
        Some(log) if message.is_empty() => log_tail(log),
        _ => message,
    }
}

/// The last `limit` bytes of a file, empty when it cannot be read.
fn tail(path: &Path, limit: usize) -> String {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        let limit = u64::try_from(limit).unwrap_or(u64::MAX);
        file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The last lines of a CRI log without their prefixes.
fn log_tail(path: &Path) -> String {
    let text = tail(path, MAX_LOG_TAIL * 4);
    let lines: Vec<&str> = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
    let start = lines.len().saturating_sub(MAX_LOG_LINES);
    let mut joined = lines.get(start..).unwrap_or_default().join("\n");
    if !joined.is_empty() {
        joined.push('\n');
    }
    let mut cut = joined.len().saturating_sub(MAX_LOG_TAIL);
    while !joined.is_char_boundary(cut) {
        cut += 1;
    }
    joined.split_off(cut)
}

fn convert(sandbox_id: &str, status: &v1::ContainerStatus) -> ObservedContainer {
    let label = |key: &str| status.labels.get(key).cloned().unwrap_or_default();
    let annotation = |key: &str| status.annotations.get(key).cloned().unwrap_or_default();
    let metadata = status.metadata.clone().unwrap_or_default();
    let attempt = annotation(labels::RESTART_COUNT).parse().unwrap_or(metadata.attempt);
    let name = match label(labels::CONTAINER_NAME) {
        name if name.is_empty() => metadata.name,
        name => name,
    };
    ObservedContainer {
        id: status.id.clone(),
        name,
        attempt,
        hash: annotation(labels::CONTAINER_HASH),
        sandbox_id: sandbox_id.to_owned(),
        state: match v1::ContainerState::try_from(status.state) {
            Ok(v1::ContainerState::ContainerCreated) => RunState::Created,
            Ok(v1::ContainerState::ContainerRunning) => RunState::Running,
            Ok(v1::ContainerState::ContainerExited) => RunState::Exited,
            _ => RunState::Unknown,
        },
        image: status.image.as_ref().map(|image| image.image.clone()).unwrap_or_default(),
        image_id: if status.image_ref.is_empty() {
            status.image_id.clone()
        } else {
            status.image_ref.clone()
        },
        created_at: nanos(status.created_at),
        started_at: positive(status.started_at),
        finished_at: positive(status.finished_at),
        exit_code: status.exit_code,
        reason: status.reason.clone(),
        message: status.message.clone(),
        log_path: status.log_path.clone(),
        user: status.user.as_ref().and_then(|user| user.linux.as_ref()).map(|user| StartedAs {
            uid: user.uid,
            gid: user.gid,
            groups: user.supplemental_groups.clone(),
        }),
    }
}

fn addresses(status: v1::PodSandboxStatus) -> Vec<String> {
    let Some(network) = status.network else { return Vec::new() };
    let more = network.additional_ips.into_iter().map(|ip| ip.ip);
    std::iter::once(network.ip).chain(more).filter(|ip| !ip.is_empty()).collect()
}

fn nanos(nanos: i64) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn positive(value: i64) -> Option<Timestamp> {
    (value > 0).then(|| nanos(value))
}

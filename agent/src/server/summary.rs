//! `/stats/summary`: the node's, pods' and containers' use of resources.
//!
//! Containers come from the CRI, the node from the host. Shapes: k8s.io/kubelet pkg/apis/stats/v1alpha1.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cri_shim_api::v1::{
    ContainerStats, FilesystemUsage, ImageFsInfoRequest, ListContainerStatsRequest,
    ListPodSandboxStatsRequest, UInt64Value,
};
use http::StatusCode;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Map, Value, json};

use super::pod_summary::{PodContext, PodFigures, pod_summary};
use super::reply::{self, Reply};
use super::routes::Api;
use crate::host::cgroups;
use crate::host::stats::{self, FsFigures, NodeFigures};
use crate::host::usage::TreeUse;

/// Deadline of the CRI call.
const DEADLINE: Duration = Duration::from_secs(10);
/// Shortest time between two CPU samples that a rate is computed from.
const MIN_SAMPLE: Duration = Duration::from_secs(1);

pub(super) const POD_NAME: &str = "io.kubernetes.pod.name";
pub(super) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub(super) const POD_UID: &str = "io.kubernetes.pod.uid";
pub(super) const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// Remembers a CPU counter, so that the next reading gives a rate.
#[derive(Debug, Default)]
pub(super) struct Sampler(Mutex<Option<Sample>>);

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    used: Duration,
    nano_cores: u64,
}

impl Sampler {
    /// Nanocores used since the last sample that is old enough; 0 at the first.
    fn rate(&self, now: Instant, used: Duration) -> u64 {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = match *last {
            None => 0,
            Some(sample) => {
                let passed = now.saturating_duration_since(sample.at);
                if passed < MIN_SAMPLE {
                    return sample.nano_cores;
                }
                let delta = used.saturating_sub(sample.used).as_nanos() * 1_000_000_000 / passed.as_nanos();
                u64::try_from(delta).unwrap_or(u64::MAX)
            }
        };
        *last = Some(Sample { at: now, used, nano_cores: rate });
        rate
    }
}

/// A container's figures with the names of its pod.
pub(super) struct ContainerFigures {
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) uid: String,
    pub(super) container: String,
    pub(super) stats: ContainerStats,
}

impl ContainerFigures {
    /// CPU time in nanoseconds.
    pub(super) fn cpu_nanos(&self) -> Option<u64> {
        number(self.stats.cpu.as_ref()?.usage_core_nano_seconds.as_ref())
    }

    /// Working set in bytes.
    pub(super) fn working_set(&self) -> Option<u64> {
        number(self.stats.memory.as_ref()?.working_set_bytes.as_ref())
    }

    pub(super) fn new(stats: ContainerStats) -> Option<Self> {
        let attributes = stats.attributes.as_ref()?;
        let label = |name: &str| attributes.labels.get(name).cloned();
        Some(Self {
            namespace: label(POD_NAMESPACE)?,
            pod: label(POD_NAME)?,
            uid: label(POD_UID)?,
            container: label(CONTAINER_NAME)?,
            stats,
        })
    }
}

/// All running containers of pods.
pub(super) async fn containers(api: &Api) -> Result<Vec<ContainerFigures>, tonic::Status> {
    let mut runtime = api.runtime.clone();
    let call = runtime.list_container_stats(ListContainerStatsRequest::default());
    let answer = tokio::time::timeout(DEADLINE, call).await.map_err(|_elapsed| {
        tonic::Status::deadline_exceeded("the container runtime gave no statistics in time")
    })??;
    Ok(answer.into_inner().stats.into_iter().filter_map(ContainerFigures::new).collect())
}

/// The node's figures, read on a thread that may block.
pub(super) async fn node(api: &Api) -> std::io::Result<NodeFigures> {
    let root_dir = api.config.root_dir.clone();
    tokio::task::spawn_blocking(move || stats::read(&root_dir)).await?
}

/// All pods with their running containers, as the runtime tells; those of a runtime that knows containers only are put
/// together from these.
async fn pods(api: &Api) -> Result<Vec<PodFigures>, tonic::Status> {
    let mut runtime = api.runtime.clone();
    let call = runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default());
    let answer = tokio::time::timeout(DEADLINE, call).await.map_err(|_elapsed| {
        tonic::Status::deadline_exceeded("the container runtime gave no statistics in time")
    })?;
    match answer {
        Ok(answer) => Ok(answer.into_inner().stats.into_iter().filter_map(PodFigures::of_sandbox).collect()),
        Err(status) if status.code() == tonic::Code::Unimplemented => {
            Ok(PodFigures::of_containers(containers(api).await?))
        }
        Err(status) => Err(status),
    }
}

/// Answers the request.
pub(super) async fn answer(api: &Api) -> Reply {
    let pods = match pods(api).await {
        Ok(pods) => pods,
        Err(error) => return reply::runtime_error(&error),
    };
    let node = match node(api).await {
        Ok(node) => node,
        Err(error) => return reply::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    };
    let known = api.state.pods();
    let (sizes, volumes) = tokio::join!(api.sizes.of(&known, &api.config), api.config.volumes.of(&known));
    let image_fs = image_fs(api).await;
    let now = Timestamp::now();
    let nano_cores = api.sampler.rate(Instant::now(), node.cpu_used);
    let start_times = start_times(&known);
    let mut node_object = node_summary(&api.config.node_name, &node, nano_cores, now);
    if let Some(fs) = &image_fs {
        node_object["runtime"]["imageFs"] = fs_summary(fs, now);
        node_object["runtime"]["containerFs"] = fs_summary(fs, now);
    }
    node_object["systemContainers"] = system_containers(api, node.boot_time, now).await.into();
    let context = PodContext {
        start_times: &start_times,
        sizes: &sizes,
        volumes: &volumes,
        node_fs: &node.node_fs,
        now,
    };
    let pods: Vec<Value> = pods.iter().map(|pod| pod_summary(pod, &context)).collect();
    reply::json(&json!({"node": node_object, "pods": pods}))
}

/// The file system of the images, where the runtime tells.
async fn image_fs(api: &Api) -> Option<FsFigures> {
    let mut images = api.images.clone()?;
    let call = images.image_fs_info(ImageFsInfoRequest {});
    let answer = tokio::time::timeout(DEADLINE, call).await.ok()?.ok()?.into_inner();
    let path = answer.image_filesystems.into_iter().next()?.fs_id?.mountpoint;
    tokio::task::spawn_blocking(move || stats::file_system(Path::new(&path))).await.ok()?.ok()
}

/// The agent, the runtime and all pods together.
async fn system_containers(api: &Api, boot_time: i64, now: Timestamp) -> Vec<Value> {
    let (socket, cgroup) = (api.config.runtime_socket.clone(), api.config.pods_cgroup.clone());
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let read = tokio::task::spawn_blocking(move || {
        let runtime = stats::peer(&socket).and_then(|pid| stats::process(pid, boot_time));
        (stats::process(own, boot_time), runtime, cgroups::usage::read(&cgroup))
    });
    let Ok((own, runtime, pods)) = read.await else { return Vec::new() };
    let mut containers = Vec::new();
    let processes = [("kubelet", own, &api.own_rate), ("runtime", runtime, &api.runtime_rate)];
    for (name, process, sampler) in processes {
        let Some(process) = process else { continue };
        containers.push(json!({
            "name": name,
            "startTime": Timestamp::from_second(process.started).unwrap_or_default(),
            "cpu": cpu(process.cpu_used, sampler, now),
            "memory": {"time": now, "usageBytes": process.rss, "workingSetBytes": process.rss, "rssBytes": process.rss},
        }));
    }
    let mut together = json!({"name": "pods"});
    if let Some(used) = pods.cpu {
        together["cpu"] = cpu(used, &api.pods_rate, now);
    }
    let mut memory = Map::from_iter([("time".to_owned(), json!(now))]);
    let available = pods.memory_limit.zip(pods.working_set).map(|(limit, used)| limit.saturating_sub(used));
    let figures = [
        ("availableBytes", available),
        ("usageBytes", pods.memory),
        ("workingSetBytes", pods.working_set),
        ("rssBytes", pods.rss),
    ];
    memory.extend(figures.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.into()))));
    together["memory"] = memory.into();
    containers.push(together);
    containers
}

fn cpu(used: Duration, sampler: &Sampler, now: Timestamp) -> Value {
    json!({
        "time": now,
        "usageNanoCores": sampler.rate(Instant::now(), used),
        "usageCoreNanoSeconds": u64::try_from(used.as_nanos()).unwrap_or(u64::MAX),
    })
}

fn node_summary(name: &str, node: &NodeFigures, nano_cores: u64, now: Timestamp) -> Value {
    let memory = &node.memory;
    let mut summary = json!({
        "nodeName": name,
        "startTime": Timestamp::from_second(node.boot_time).unwrap_or_default(),
        "cpu": {
            "time": now,
            "usageNanoCores": nano_cores,
            "usageCoreNanoSeconds": u64::try_from(node.cpu_used.as_nanos()).unwrap_or(u64::MAX),
        },
        "memory": {
            "time": now,
            "availableBytes": memory.available(),
            "usageBytes": memory.usage,
            "workingSetBytes": memory.working_set,
            "rssBytes": memory.rss,
        },
        "swap": {
            "time": now,
            "swapAvailableBytes": memory.swap_free,
            "swapUsageBytes": memory.swap.saturating_sub(memory.swap_free),
        },
        "fs": fs_summary(&node.node_fs, now),
        "runtime": {"imageFs": fs_summary(&node.node_fs, now)},
        "rlimit": {"time": now, "maxpid": node.pids.max, "curproc": node.pids.current},
    });
    if let Some(network) = &node.network {
        summary["network"] = json!({
            "time": now,
            "name": network.name,
            "rxBytes": network.rx_bytes,
            "rxErrors": network.rx_errors,
            "txBytes": network.tx_bytes,
            "txErrors": network.tx_errors,
        });
    }
    summary
}

fn fs_summary(fs: &FsFigures, now: Timestamp) -> Value {
    json!({
        "time": now,
        "availableBytes": fs.available,
        "capacityBytes": fs.capacity,
        "usedBytes": fs.used,
        "inodesFree": fs.inodes_free,
        "inodes": fs.inodes,
        "inodesUsed": fs.inodes.saturating_sub(fs.inodes_free),
    })
}

/// When pods and their containers started, by uid and (for containers) name.
pub(super) fn start_times(pods: &[Arc<Pod>]) -> BTreeMap<(String, String), Timestamp> {
    let mut times = BTreeMap::new();
    for pod in pods {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let Some(status) = &pod.status else { continue };
        if let Some(time) = &status.start_time {
            times.insert((uid.clone(), String::new()), time.0);
        }
        for container in status.container_statuses.iter().chain(&status.init_container_statuses).flatten() {
            let running = container.state.as_ref().and_then(|state| state.running.as_ref());
            if let Some(time) = running.and_then(|running| running.started_at.as_ref()) {
                times.insert((uid.clone(), container.name.clone()), time.0);
            }
        }
    }
    times
}

/// A container's part; its logs where their size is known.
pub(super) fn container_summary(
    container: &ContainerFigures,
    started: Option<&Timestamp>,
    (node_fs, logs): (&FsFigures, Option<&TreeUse>),
    now: Timestamp,
) -> Value {
    let mut summary = Map::new();
    summary.insert("name".to_owned(), container.container.clone().into());
    if let Some(started) = started {
        summary.insert("startTime".to_owned(), started.to_string().into());
    }
    if let Some(cpu) = &container.stats.cpu {
        let figures = [
            ("usageNanoCores", &cpu.usage_nano_cores),
            ("usageCoreNanoSeconds", &cpu.usage_core_nano_seconds),
        ];
        summary.insert("cpu".to_owned(), timed(cpu.timestamp, now, &figures));
    }
    if let Some(memory) = &container.stats.memory {
        let figures = [
            ("availableBytes", &memory.available_bytes),
            ("usageBytes", &memory.usage_bytes),
            ("workingSetBytes", &memory.working_set_bytes),
            ("rssBytes", &memory.rss_bytes),
            ("pageFaults", &memory.page_faults),
            ("majorPageFaults", &memory.major_page_faults),
        ];
        summary.insert("memory".to_owned(), timed(memory.timestamp, now, &figures));
    }
    if let Some(swap) = &container.stats.swap {
        let figures =
            [("swapAvailableBytes", &swap.swap_available_bytes), ("swapUsageBytes", &swap.swap_usage_bytes)];
        summary.insert("swap".to_owned(), timed(swap.timestamp, now, &figures));
    }
    if let Some(layer) = &container.stats.writable_layer {
        summary.insert("rootfs".to_owned(), rootfs(layer, node_fs, now));
    }
    if let Some(logs) = logs {
        summary.insert("logs".to_owned(), used_on_node(logs, node_fs, now));
    }
    Value::Object(summary)
}

fn rootfs(layer: &FilesystemUsage, node_fs: &FsFigures, now: Timestamp) -> Value {
    let mut rootfs =
        timed(layer.timestamp, now, &[("usedBytes", &layer.used_bytes), ("inodesUsed", &layer.inodes_used)]);
    rootfs["availableBytes"] = node_fs.available.into();
    rootfs["capacityBytes"] = node_fs.capacity.into();
    rootfs
}

/// Figures that are there, with the time the runtime took them.
pub(super) fn timed(nanos: i64, now: Timestamp, figures: &[(&str, &Option<UInt64Value>)]) -> Value {
    let time = Timestamp::from_nanosecond(i128::from(nanos)).ok().filter(|_| nanos > 0).unwrap_or(now);
    let mut object = Map::from_iter([("time".to_owned(), Value::from(time.to_string()))]);
    for (name, figure) in figures {
        if let Some(value) = number(figure.as_ref()) {
            object.insert((*name).to_owned(), value.into());
        }
    }
    Value::Object(object)
}

/// A part of the node's file system.
pub(super) fn used_on_node(used: &TreeUse, node_fs: &FsFigures, now: Timestamp) -> Value {
    json!({
        "time": now,
        "availableBytes": node_fs.available,
        "capacityBytes": node_fs.capacity,
        "usedBytes": used.bytes,
        "inodesFree": node_fs.inodes_free,
        "inodes": node_fs.inodes,
        "inodesUsed": used.inodes,
    })
}

pub(super) fn number(value: Option<&UInt64Value>) -> Option<u64> {
    value.map(|value| value.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_need_two_samples_and_time_between() {
        let sampler = Sampler::default();
        let start = Instant::now();
        assert_eq!(sampler.rate(start, Duration::from_secs(10)), 0);
        assert_eq!(sampler.rate(start + Duration::from_secs(2), Duration::from_secs(11)), 500_000_000);
        assert_eq!(sampler.rate(start + Duration::from_millis(2100), Duration::from_secs(20)), 500_000_000);
    }
}

//! A pod's part of `/stats/summary`. Pure.

use std::collections::BTreeMap;

use cri_shim_api::v1::{
    ContainerStats, LinuxPodSandboxStats, NetworkInterfaceUsage, NetworkUsage, PodSandboxStats,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::driver_volumes;
use super::sizes::{PodSizes, VolumeSize};
use super::summary::{
    ContainerFigures, POD_NAME, POD_NAMESPACE, POD_UID, container_summary, number, timed, used_on_node,
};
use crate::contracts::VolumeFigures;
use crate::host::stats::FsFigures;
use crate::host::usage::TreeUse;

/// A pod's figures with its names.
pub(super) struct PodFigures {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) uid: String,
    pub(super) containers: Vec<ContainerFigures>,
    /// Of the whole pod; `None` where the runtime tells of containers only.
    pub(super) sandbox: Option<LinuxPodSandboxStats>,
}

/// What all pods share.
pub(super) struct PodContext<'a> {
    pub(super) start_times: &'a BTreeMap<(String, String), Timestamp>,
    pub(super) sizes: &'a BTreeMap<String, PodSizes>,
    /// Of drivers.
    pub(super) volumes: &'a BTreeMap<String, Vec<VolumeFigures>>,
    pub(super) node_fs: &'a FsFigures,
    pub(super) now: Timestamp,
}

impl PodFigures {
    /// As the runtime tells of a sandbox.
    pub(super) fn of_sandbox(stats: PodSandboxStats) -> Option<Self> {
        let attributes = stats.attributes?;
        let label = |name: &str| attributes.labels.get(name).cloned();
        let mut sandbox = stats.linux.unwrap_or_default();
        let containers = std::mem::take(&mut sandbox.containers);
        Some(Self {
            name: label(POD_NAME)?,
            namespace: label(POD_NAMESPACE)?,
            uid: label(POD_UID)?,
            containers: containers.into_iter().filter_map(ContainerFigures::new).collect(),
            sandbox: Some(sandbox),
        })
    }

    /// Put together from containers.
    pub(super) fn of_containers(containers: Vec<ContainerFigures>) -> Vec<Self> {
        let mut pods: BTreeMap<String, Self> = BTreeMap::new();
        for container in containers {
            let pod = pods.entry(container.uid.clone()).or_insert_with(|| Self {
                name: container.pod.clone(),
                namespace: container.namespace.clone(),
                uid: container.uid.clone(),
                containers: Vec::new(),
                sandbox: None,
            });
            pod.containers.push(container);
        }
        pods.into_values().collect()
    }

    /// The pod's own figure, or the sum of its containers'.
    fn figure(&self, pod: Option<u64>, of: fn(&ContainerStats) -> Option<u64>) -> u64 {
        pod.unwrap_or_else(|| self.containers.iter().filter_map(|container| of(&container.stats)).sum())
    }
}

/// The pod as the endpoint shows it.
pub(super) fn pod_summary(pod: &PodFigures, context: &PodContext<'_>) -> Value {
    let now = context.now;
    let sizes = context.sizes.get(&pod.uid);
    let started = |container: &str| context.start_times.get(&(pod.uid.clone(), container.to_owned()));
    let logs = |container: &str| sizes.and_then(|sizes| sizes.logs.get(container));
    let containers: Vec<Value> = pod
        .containers
        .iter()
        .map(|found| {
            let name = &found.container;
            container_summary(found, started(name), (context.node_fs, logs(name)), now)
        })
        .collect();
    let cpu = pod.sandbox.as_ref().and_then(|sandbox| sandbox.cpu.as_ref());
    let memory = pod.sandbox.as_ref().and_then(|sandbox| sandbox.memory.as_ref());
    let mut summary = json!({
        "podRef": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid},
        "startTime": started(""),
        "containers": containers,
        "cpu": {
            "time": now,
            "usageNanoCores": pod.figure(cpu.and_then(|cpu| number(cpu.usage_nano_cores.as_ref())),
                |stats| number(stats.cpu.as_ref()?.usage_nano_cores.as_ref())),
            "usageCoreNanoSeconds": pod.figure(cpu.and_then(|cpu| number(cpu.usage_core_nano_seconds.as_ref())),
                |stats| number(stats.cpu.as_ref()?.usage_core_nano_seconds.as_ref())),
        },
        "memory": {
            "time": now,
            "usageBytes": pod.figure(memory.and_then(|memory| number(memory.usage_bytes.as_ref())),
                |stats| number(stats.memory.as_ref()?.usage_bytes.as_ref())),
            "workingSetBytes": pod.figure(memory.and_then(|memory| number(memory.working_set_bytes.as_ref())),
                |stats| number(stats.memory.as_ref()?.working_set_bytes.as_ref())),
            "rssBytes": pod.figure(memory.and_then(|memory| number(memory.rss_bytes.as_ref())),
                |stats| number(stats.memory.as_ref()?.rss_bytes.as_ref())),
        },
    });
    if let Some(sandbox) = &pod.sandbox {
        if let Some(network) = &sandbox.network {
            summary["network"] = network_summary(network, now);
        }
        if let Some(count) = sandbox.process.as_ref().and_then(|found| number(found.process_count.as_ref())) {
            summary["process_stats"] = json!({"process_count": count});
        }
    }
    if let Some(sizes) = sizes {
        summary["ephemeral-storage"] = used_on_node(&ephemeral(pod, sizes), context.node_fs, now);
        let of_drivers = context.volumes.get(&pod.uid).into_iter().flatten();
        let own = sizes.volumes.iter().map(|volume| volume_summary(volume, now));
        let all = own.chain(of_drivers.map(|volume| driver_volumes::summary(volume, now)));
        summary["volume"] = all.collect();
    }
    summary
}

/// Writable layers, logs, and the volumes that are on the node's disk.
fn ephemeral(pod: &PodFigures, sizes: &PodSizes) -> TreeUse {
    let mut used = TreeUse::default();
    let mut add = |bytes: u64, inodes: u64| {
        used.bytes = used.bytes.saturating_add(bytes);
        used.inodes = used.inodes.saturating_add(inodes);
    };
    for layer in pod.containers.iter().filter_map(|container| container.stats.writable_layer.as_ref()) {
        add(number(layer.used_bytes.as_ref()).unwrap_or(0), number(layer.inodes_used.as_ref()).unwrap_or(0));
    }
    sizes.logs.values().for_each(|logs| add(logs.bytes, logs.inodes));
    let volumes = sizes.volumes.iter().filter(|volume| volume.on_node_disk);
    volumes.for_each(|volume| add(volume.used.bytes, volume.used.inodes));
    used
}

fn volume_summary(volume: &VolumeSize, now: Timestamp) -> Value {
    let mut summary = used_on_node(&volume.used, &volume.fs, now);
    summary["name"] = volume.name.clone().into();
    summary
}

fn network_summary(network: &NetworkUsage, now: Timestamp) -> Value {
    let interface = |usage: &NetworkInterfaceUsage| {
        let figures = [
            ("rxBytes", &usage.rx_bytes),
            ("rxErrors", &usage.rx_errors),
            ("txBytes", &usage.tx_bytes),
            ("txErrors", &usage.tx_errors),
        ];
        let mut object = timed(network.timestamp, now, &figures);
        object["name"] = usage.name.clone().into();
        object
    };
    let mut summary = network.default_interface.as_ref().map_or_else(|| json!({"time": now}), &interface);
    let without_time = |mut object: Value| {
        if let Some(fields) = object.as_object_mut() {
            fields.remove("time");
        }
        object
    };
    let all = network.default_interface.iter().chain(&network.interfaces);
    let mut seen = std::collections::BTreeSet::new();
    let all: Vec<Value> = all
        .filter(|usage| seen.insert(usage.name.clone()))
        .map(|usage| without_time(interface(usage)))
        .collect();
    summary["interfaces"] = all.into();
    summary
}

#[cfg(test)]
mod tests {
    use cri_shim_api::v1::{
        ContainerAttributes, CpuUsage, FilesystemUsage, PodSandboxAttributes, ProcessUsage, UInt64Value,
    };

    use super::super::summary::CONTAINER_NAME;
    use super::*;

    fn value(value: u64) -> UInt64Value {
        UInt64Value { value }
    }

    fn container(name: &str, nanos: u64) -> ContainerStats {
        let labels = [(POD_NAME, "web"), (POD_NAMESPACE, "ns"), (POD_UID, "u1"), (CONTAINER_NAME, name)];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect();
        let attributes = ContainerAttributes { labels, ..ContainerAttributes::default() };
        let cpu = CpuUsage { usage_core_nano_seconds: Some(value(nanos)), ..CpuUsage::default() };
        let layer = FilesystemUsage {
            used_bytes: Some(value(1000)),
            inodes_used: Some(value(3)),
            ..Default::default()
        };
        ContainerStats {
            attributes: Some(attributes),
            cpu: Some(cpu),
            writable_layer: Some(layer),
            ..ContainerStats::default()
        }
    }

    fn shown(pod: &PodFigures, sizes: &BTreeMap<String, PodSizes>) -> Value {
        let node_fs = FsFigures { capacity: 1 << 30, available: 1 << 20, ..FsFigures::default() };
        let (start_times, volumes) = (BTreeMap::new(), BTreeMap::new());
        let now = Timestamp::UNIX_EPOCH;
        pod_summary(
            pod,
            &PodContext { start_times: &start_times, sizes, volumes: &volumes, node_fs: &node_fs, now },
        )
    }

    #[test]
    fn containers_are_grouped_by_pod_and_summed() {
        let list = [container("a", 1), container("b", 2)].into_iter().filter_map(ContainerFigures::new);
        let pods = PodFigures::of_containers(list.collect());
        assert_eq!(pods.len(), 1);
        let pod = shown(&pods[0], &BTreeMap::new());
        assert_eq!(pod["podRef"]["name"], "web");
        assert_eq!(pod["cpu"]["usageCoreNanoSeconds"], 3);
        assert_eq!(pod["containers"].as_array().unwrap().len(), 2);
        assert!(pod.get("network").is_none() && pod.get("volume").is_none(), "nobody told");
    }

    #[test]
    fn a_pod_tells_of_its_network_processes_and_disk() {
        let eth0 = NetworkInterfaceUsage {
            name: "eth0".to_owned(),
            rx_bytes: Some(value(10)),
            rx_errors: Some(value(0)),
            tx_bytes: Some(value(20)),
            tx_errors: Some(value(1)),
        };
        let linux = LinuxPodSandboxStats {
            cpu: Some(CpuUsage { usage_core_nano_seconds: Some(value(500)), ..CpuUsage::default() }),
            network: Some(NetworkUsage {
                timestamp: 0,
                default_interface: Some(eth0.clone()),
                interfaces: vec![eth0.clone(), NetworkInterfaceUsage { name: "net1".to_owned(), ..eth0 }],
            }),
            process: Some(ProcessUsage { timestamp: 0, process_count: Some(value(7)) }),
            containers: vec![container("a", 1)],
            ..LinuxPodSandboxStats::default()
        };
        let labels = [(POD_NAME, "web"), (POD_NAMESPACE, "ns"), (POD_UID, "u1")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect();
        let attributes = PodSandboxAttributes { labels, ..PodSandboxAttributes::default() };
        let stats =
            PodSandboxStats { attributes: Some(attributes), linux: Some(linux), ..Default::default() };
        let pod = PodFigures::of_sandbox(stats).unwrap();
        let volume = |name: &str, on_node_disk| VolumeSize {
            name: name.to_owned(),
            used: TreeUse { bytes: 50_000, inodes: 2 },
            fs: FsFigures { capacity: 77, ..FsFigures::default() },
            on_node_disk,
        };
        let sizes = PodSizes {
            logs: BTreeMap::from([("a".to_owned(), TreeUse { bytes: 200, inodes: 1 })]),
            volumes: vec![volume("disk", true), volume("memory", false)],
        };
        let pod = shown(&pod, &BTreeMap::from([("u1".to_owned(), sizes)]));
        assert_eq!(pod["cpu"]["usageCoreNanoSeconds"], 500, "the pod's own figure counts");
        assert_eq!((&pod["network"]["name"], &pod["network"]["txErrors"]), (&json!("eth0"), &json!(1)));
        assert_eq!(pod["network"]["interfaces"].as_array().unwrap().len(), 2, "each once");
        assert_eq!(pod["process_stats"]["process_count"], 7);
        assert_eq!(pod["containers"][0]["logs"]["usedBytes"], 200);
        assert_eq!(pod["ephemeral-storage"]["usedBytes"], 1000 + 200 + 50_000);
        assert_eq!(pod["ephemeral-storage"]["inodesUsed"], 3 + 1 + 2);
        let volumes = pod["volume"].as_array().unwrap();
        assert_eq!(
            (volumes.len(), &volumes[1]["name"], &volumes[1]["capacityBytes"]),
            (2, &json!("memory"), &json!(77))
        );
    }
}

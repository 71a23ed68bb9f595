//! Resources, updates, statistics and metrics.

use anyhow::{Context, Result};
use cri_shim_api::v1;

use super::super::case::{Case, case, holds, refused, same, skip};
use super::super::context::{T, resources};

pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let group = "resources";
    all.extend([
        case(group, "the memory limit is in the cgroup", memory),
        case(group, "CPU quota, period and shares are in the cgroup", cpu),
        case(group, "the set of CPUs is in the cgroup", cpuset),
        case(group, "oom_score_adj is the process's", oom_score),
        case(group, "hugepage limits are in the cgroup", hugepages),
        case(group, "the container's cgroup is below the pod's parent", cgroup_parent),
        case(group, "UpdateContainerResources changes limits of a running container", update),
        case(group, "UpdateContainerResources of a created container holds when it starts", update_created),
        case(group, "UpdateContainerResources is told by the status", update_status),
        case(group, "UpdateContainerResources of an unknown container is refused", update_refused),
        case(group, "UpdateContainerResources of an ended container is refused", update_ended),
        case(group, "UpdatePodSandboxResources is accepted, and refused for an unknown sandbox", update_pod),
    ]);
    let group = "stats";
    all.extend([
        case(group, "ContainerStats: attributes, CPU, memory and writable layer", container_stats),
        case(group, "CPU time grows with work", cpu_grows),
        case(group, "the working set follows the memory in use", memory_grows),
        case(group, "the writable layer grows with what is written", layer_grows),
        case(group, "ListContainerStats filters by id, sandbox and labels", list_stats),
        case(group, "ContainerStats of an unknown container is NotFound", unknown_stats),
        case(group, "PodSandboxStats: CPU, memory, network, processes and the containers", pod_stats),
        case(group, "ListPodSandboxStats filters by id", list_pod_stats),
        case(group, "bytes on the network are counted", network_grows),
        case(group, "five ListContainerStats at once", five_lists),
    ]);
    let group = "metrics";
    all.extend([
        case(group, "ListMetricDescriptors names the kubelet's metrics with their labels", descriptors),
        case(group, "ListPodSandboxMetrics gives a running container's, each of a known descriptor", metrics),
    ]);
    let group = "streamed lists";
    all.extend([
        case(group, "StreamPodSandboxes gives what ListPodSandbox gives", stream_sandboxes),
        case(group, "StreamContainers gives what ListContainers gives", stream_containers),
        case(
            group,
            "StreamContainerStats, StreamPodSandboxStats and StreamPodSandboxMetrics answer",
            stream_stats,
        ),
    ]);
    all
}

/// A file of the container's own cgroup, by its name in version 1 (with the controller) and 2.
async fn cgroup_file(t: &T, id: &str, v1: &str, v2: &str) -> Result<String> {
    let file = if t.suite.facts.cgroup2 { v2 } else { v1 };
    t.sh(id, &format!("cat /sys/fs/cgroup/{file}")).await
}

async fn memory(t: T) -> Result<()> {
    let (_, id) = t.idle_with(|config| resources(config).memory_limit_in_bytes = 96 << 20).await?;
    let found = cgroup_file(&t, &id, "memory/memory.limit_in_bytes", "memory.max").await?;
    same("the limit", found, (96_u64 << 20).to_string())
}

async fn cpu(t: T) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            let wanted = resources(config);
            (wanted.cpu_quota, wanted.cpu_period, wanted.cpu_shares) = (20_000, 50_000, 512);
        })
        .await?;
    if t.suite.facts.cgroup2 {
        return same("cpu.max", cgroup_file(&t, &id, "", "cpu.max").await?.as_str(), "20000 50000");
    }
    for (file, wanted) in
        [("cpu.cfs_quota_us", "20000"), ("cpu.cfs_period_us", "50000"), ("cpu.shares", "512")]
    {
        same(file, cgroup_file(&t, &id, &format!("cpu/{file}"), "").await?.as_str(), wanted)?;
    }
    Ok(())
}

async fn cpuset(t: T) -> Result<()> {
    let (_, id) = t.idle_with(|config| resources(config).cpuset_cpus = "0".to_owned()).await?;
    holds("the process", &t.sh(&id, "grep Cpus_allowed_list /proc/1/status").await?, "\t0")
}

async fn oom_score(t: T) -> Result<()> {
    let (_, id) = t.idle_with(|config| resources(config).oom_score_adj = 777).await?;
    same("oom_score_adj", t.sh(&id, "cat /proc/1/oom_score_adj").await?.as_str(), "777")
}

async fn hugepages(t: T) -> Result<()> {
    if !std::path::Path::new("/sys/fs/cgroup/hugetlb").is_dir() && !t.suite.facts.cgroup2 {
        return skip("the host has no hugetlb controller: /sys/fs/cgroup/hugetlb is missing");
    }
    let (_, id) = t
        .idle_with(|config| {
            let limit = v1::HugepageLimit { page_size: "2MB".to_owned(), limit: 4 << 20 };
            resources(config).hugepage_limits = vec![limit];
        })
        .await?;
    let found = cgroup_file(&t, &id, "hugetlb/hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max").await?;
    same("the limit", found, (4 << 20).to_string())
}

async fn cgroup_parent(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    let found = super::sandbox::cgroups_with(&id);
    if found.is_empty() {
        return skip("no cgroup of the container's id is found below /sys/fs/cgroup of this host");
    }
    let parent = pod.config.linux.unwrap_or_default().cgroup_parent;
    for path in found {
        holds("the path", &path.display().to_string(), &parent)?;
    }
    Ok(())
}

async fn update_ended(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell("true")).await?;
    t.exited(&id).await?;
    let limits = v1::LinuxContainerResources { cpu_shares: 512, ..Default::default() };
    refused("an update of an ended container", change(&t, &id, limits).await).map(drop)
}

async fn change(t: &T, id: &str, linux: v1::LinuxContainerResources) -> Result<(), tonic::Status> {
    let request = v1::UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(linux),
        ..v1::UpdateContainerResourcesRequest::default()
    };
    t.rt().update_container_resources(request).await.map(drop)
}

fn new_limits() -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        memory_limit_in_bytes: 128 << 20,
        cpu_shares: 256,
        cpu_quota: 30_000,
        cpu_period: 100_000,
        ..v1::LinuxContainerResources::default()
    }
}

async fn changed(t: &T, id: &str) -> Result<()> {
    let found = cgroup_file(t, id, "memory/memory.limit_in_bytes", "memory.max").await?;
    same("the memory limit", found, (128_u64 << 20).to_string())?;
    let quota = cgroup_file(t, id, "cpu/cpu.cfs_quota_us", "cpu.max").await?;
    same("the CPU quota", quota.split(' ').next(), Some("30000"))
}

async fn update(t: T) -> Result<()> {
    let (_, id) = t.idle_with(|config| resources(config).memory_limit_in_bytes = 64 << 20).await?;
    change(&t, &id, new_limits()).await.context("UpdateContainerResources")?;
    changed(&t, &id).await
}

async fn update_created(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.create(&pod, &t.shell(super::super::context::IDLE)).await?;
    change(&t, &id, new_limits()).await.context("UpdateContainerResources")?;
    t.try_start(&id).await.context("StartContainer")?;
    changed(&t, &id).await
}

async fn update_status(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    change(&t, &id, new_limits()).await.context("UpdateContainerResources")?;
    let linux =
        t.status(&id).await?.resources.and_then(|all| all.linux).context("no resources in the status")?;
    same("memory_limit_in_bytes", linux.memory_limit_in_bytes, 128 << 20)?;
    same("cpu_quota", linux.cpu_quota, 30_000)
}

async fn update_refused(t: T) -> Result<()> {
    refused("an unknown container", change(&t, "nothing", new_limits()).await).map(drop)
}

async fn update_pod(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let request = |id: &str| v1::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id.to_owned(),
        overhead: None,
        resources: Some(new_limits()),
    };
    t.rt().update_pod_sandbox_resources(request(&pod.id)).await.context("UpdatePodSandboxResources")?;
    refused("an unknown sandbox", t.rt().update_pod_sandbox_resources(request("nothing")).await.map(drop))
        .map(drop)
}

async fn stats(t: &T, id: &str) -> Result<v1::ContainerStats> {
    let request = v1::ContainerStatsRequest { container_id: id.to_owned() };
    t.rt().container_stats(request).await.context("ContainerStats")?.into_inner().stats.context("no stats")
}

fn value(found: Option<v1::UInt64Value>) -> u64 {
    found.map_or(0, |value| value.value)
}

async fn container_stats(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let found = t
        .until("every figure is there", || async {
            let found = stats(&t, &id).await?;
            let layer = found.writable_layer.clone().unwrap_or_default();
            let complete = value(found.cpu.unwrap_or_default().usage_core_nano_seconds) > 0
                && value(found.memory.unwrap_or_default().working_set_bytes) > 0
                && layer.inodes_used.is_some()
                && layer.timestamp > 0;
            Ok(complete.then_some(found))
        })
        .await?;
    let attributes = found.attributes.context("no attributes")?;
    same("id", attributes.id, id.clone())?;
    same("metadata", attributes.metadata, t.status(&id).await?.metadata)?;
    let mountpoint = found.writable_layer.unwrap_or_default().fs_id.unwrap_or_default().mountpoint;
    anyhow::ensure!(!mountpoint.is_empty(), "the writable layer has no mount point");
    anyhow::ensure!(found.memory.unwrap_or_default().timestamp > 0, "the memory has no time");
    Ok(())
}

async fn cpu_grows(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let cpu = async || -> Result<u64> {
        Ok(value(stats(&t, &id).await?.cpu.unwrap_or_default().usage_core_nano_seconds))
    };
    let before = cpu().await?;
    t.sh(&id, "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done").await?;
    t.until("the time has grown by 50 ms", || async {
        Ok((cpu().await? >= before + 50_000_000).then_some(()))
    })
    .await
}

async fn memory_grows(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    t.sh(&id, "dd if=/dev/urandom of=/dev/shm/file bs=1M count=20 2>/dev/null").await?;
    t.until("20 MiB are counted", || async {
        let memory = stats(&t, &id).await?.memory.unwrap_or_default();
        Ok((value(memory.usage_bytes) >= 20 << 20 || value(memory.working_set_bytes) >= 20 << 20)
            .then_some(()))
    })
    .await
}

async fn layer_grows(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    t.sh(&id, "dd if=/dev/zero of=/file bs=1M count=5 2>/dev/null").await?;
    t.until("5 MiB are counted", || async {
        let layer = stats(&t, &id).await?.writable_layer.unwrap_or_default();
        Ok((value(layer.used_bytes) >= 5 << 20).then_some(()))
    })
    .await
}

async fn listed(t: &T, filter: v1::ContainerStatsFilter) -> Result<Vec<String>> {
    let request = v1::ListContainerStatsRequest { filter: Some(filter) };
    let answer = t.rt().list_container_stats(request).await.context("ListContainerStats")?.into_inner();
    Ok(answer.stats.into_iter().map(|stats| stats.attributes.unwrap_or_default().id).collect())
}

async fn list_stats(t: T) -> Result<()> {
    let (pod, one) =
        t.idle_with(|config| drop(config.labels.insert("app".to_owned(), "stats".to_owned()))).await?;
    let two = t.launch(&pod, &t.shell(super::super::context::IDLE)).await?;
    let all = v1::ContainerStatsFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() };
    let mut found = listed(&t, all.clone()).await?;
    found.sort();
    let mut both = vec![one.clone(), two.clone()];
    both.sort();
    same("by sandbox", found, both)?;
    let by_id = v1::ContainerStatsFilter { id: two.clone(), ..Default::default() };
    same("by id", listed(&t, by_id).await?, vec![two])?;
    let label_selector = [("app".to_owned(), "stats".to_owned())].into();
    let by_label = v1::ContainerStatsFilter { label_selector, ..all };
    same("by label", listed(&t, by_label).await?, vec![one])
}

async fn unknown_stats(t: T) -> Result<()> {
    let result =
        t.rt().container_stats(v1::ContainerStatsRequest { container_id: "nothing".to_owned() }).await;
    super::super::case::refused_with("ContainerStats", result.map(drop), &[tonic::Code::NotFound]).map(drop)
}

async fn of_pod(t: &T, id: &str) -> Result<v1::LinuxPodSandboxStats> {
    let request = v1::PodSandboxStatsRequest { pod_sandbox_id: id.to_owned() };
    let answer = t.rt().pod_sandbox_stats(request).await.context("PodSandboxStats")?.into_inner();
    answer.stats.context("no stats")?.linux.context("no Linux part")
}

async fn pod_stats(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    t.until("every figure is there", || async {
        let found = of_pod(&t, &pod.id).await?;
        let network = found.network.unwrap_or_default().default_interface.unwrap_or_default();
        let complete = value(found.cpu.unwrap_or_default().usage_core_nano_seconds) > 0
            && value(found.memory.unwrap_or_default().working_set_bytes) > 0
            && network.name == "eth0"
            && value(found.process.unwrap_or_default().process_count) >= 2
            && found
                .containers
                .iter()
                .any(|stats| stats.attributes.as_ref().is_some_and(|known| known.id == id));
        Ok(complete.then_some(()))
    })
    .await
}

async fn list_pod_stats(t: T) -> Result<()> {
    let ((pod, _), _other) = (t.idle().await?, t.idle().await?);
    let filter = v1::PodSandboxStatsFilter { id: pod.id.clone(), ..Default::default() };
    let request = v1::ListPodSandboxStatsRequest { filter: Some(filter) };
    let answer = t.rt().list_pod_sandbox_stats(request).await.context("ListPodSandboxStats")?.into_inner();
    let ids: Vec<_> = answer.stats.into_iter().map(|stats| stats.attributes.unwrap_or_default().id).collect();
    same("ids", ids, vec![pod.id])
}

async fn network_grows(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    let received = async || -> Result<u64> {
        let network = of_pod(&t, &pod.id).await?.network.unwrap_or_default();
        Ok(value(network.default_interface.unwrap_or_default().tx_bytes))
    };
    let before = received().await?;
    // The gateway need not answer.
    t.sh(&id, "ping -c 3 -i 0.2 -s 1000 -W 5 $(ip route | grep default | cut -d' ' -f3); true").await?;
    t.until("3000 bytes are counted", || async { Ok((received().await? >= before + 3000).then_some(())) })
        .await
}

async fn five_lists(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    for found in
        futures::future::try_join_all((0..5).map(|_| listed(&t, v1::ContainerStatsFilter::default()))).await?
    {
        anyhow::ensure!(found.contains(&id), "a list lacks the container");
    }
    Ok(())
}

/// What dashboards of the kubelet's `/metrics/cadvisor` read.
const METRICS: &[&str] = &[
    "container_cpu_usage_seconds_total",
    "container_memory_working_set_bytes",
    "container_memory_usage_bytes",
    "container_memory_rss",
    "container_memory_cache",
    "container_cpu_cfs_throttled_periods_total",
    "container_processes",
    "container_network_receive_bytes_total",
    "container_network_transmit_bytes_total",
    "container_fs_usage_bytes",
    "container_start_time_seconds",
    "container_spec_memory_limit_bytes",
    "container_oom_events_total",
];

async fn known(t: &T) -> Result<Vec<v1::MetricDescriptor>> {
    let request = v1::ListMetricDescriptorsRequest {};
    Ok(t.rt()
        .list_metric_descriptors(request)
        .await
        .context("ListMetricDescriptors")?
        .into_inner()
        .descriptors)
}

async fn descriptors(t: T) -> Result<()> {
    let known = known(&t).await?;
    let missing: Vec<_> =
        METRICS.iter().filter(|name| !known.iter().any(|metric| metric.name == **name)).collect();
    anyhow::ensure!(missing.is_empty(), "not described: {missing:?}");
    for metric in &known {
        anyhow::ensure!(!metric.help.is_empty() && !metric.label_keys.is_empty(), "{metric:?}");
    }
    Ok(())
}

async fn metrics(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    let known = known(&t).await?;
    t.until("the container's metrics are there", || async {
        let request = v1::ListPodSandboxMetricsRequest {};
        let answer =
            t.rt().list_pod_sandbox_metrics(request).await.context("ListPodSandboxMetrics")?.into_inner();
        let Some(ours) = answer.pod_metrics.into_iter().find(|metrics| metrics.pod_sandbox_id == pod.id)
        else {
            return Ok(None);
        };
        let Some(container) = ours.container_metrics.into_iter().find(|metrics| metrics.container_id == id)
        else {
            return Ok(None);
        };
        for metric in ours.metrics.iter().chain(&container.metrics) {
            let descriptor = known.iter().find(|known| known.name == metric.name);
            let descriptor = descriptor.with_context(|| format!("{} is not described", metric.name))?;
            same(&metric.name, metric.label_values.len(), descriptor.label_keys.len())?;
        }
        let names = ["container_cpu_usage_seconds_total", "container_memory_working_set_bytes"];
        Ok(names.iter().all(|name| container.metrics.iter().any(|metric| metric.name == *name)).then_some(()))
    })
    .await
}

async fn stream_sandboxes(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let filter = Some(v1::PodSandboxFilter { id: pod.id.clone(), ..Default::default() });
    let request = v1::StreamPodSandboxesRequest { filter };
    let mut stream = t.rt().stream_pod_sandboxes(request).await.context("StreamPodSandboxes")?.into_inner();
    let mut ids = Vec::new();
    while let Some(message) = stream.message().await.context("StreamPodSandboxes")? {
        ids.extend(message.pod_sandboxes.into_iter().map(|item| item.id));
    }
    same("ids", ids, vec![pod.id])
}

async fn stream_containers(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    let filter = Some(v1::ContainerFilter { pod_sandbox_id: pod.id, ..Default::default() });
    let request = v1::StreamContainersRequest { filter };
    let mut stream = t.rt().stream_containers(request).await.context("StreamContainers")?.into_inner();
    let mut ids = Vec::new();
    while let Some(message) = stream.message().await.context("StreamContainers")? {
        ids.extend(message.containers.into_iter().map(|item| item.id));
    }
    same("ids", ids, vec![id])
}

async fn stream_stats(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    let filter = Some(v1::ContainerStatsFilter { id: id.clone(), ..Default::default() });
    let request = v1::StreamContainerStatsRequest { filter };
    let mut stream =
        t.rt().stream_container_stats(request).await.context("StreamContainerStats")?.into_inner();
    let first = stream.message().await.context("StreamContainerStats")?.context("no container")?;
    same("containers", first.container_stats.len(), 1)?;
    let filter = Some(v1::PodSandboxStatsFilter { id: pod.id.clone(), ..Default::default() });
    let request = v1::StreamPodSandboxStatsRequest { filter };
    let mut stream =
        t.rt().stream_pod_sandbox_stats(request).await.context("StreamPodSandboxStats")?.into_inner();
    let first = stream.message().await.context("StreamPodSandboxStats")?.context("no sandbox")?;
    same("sandboxes", first.pod_sandbox_stats.len(), 1)?;
    let request = v1::StreamPodSandboxMetricsRequest {};
    let mut stream =
        t.rt().stream_pod_sandbox_metrics(request).await.context("StreamPodSandboxMetrics")?.into_inner();
    let mut ids = Vec::new();
    while let Some(message) = stream.message().await.context("StreamPodSandboxMetrics")? {
        ids.extend(message.pod_sandbox_metrics.into_iter().map(|item| item.pod_sandbox_id));
    }
    anyhow::ensure!(ids.contains(&pod.id), "the sandbox has no metrics");
    Ok(())
}

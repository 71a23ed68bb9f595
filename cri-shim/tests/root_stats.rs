//! Figures, metrics and verbose statuses of real containers. Needs root.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{GetImageRequest, Image, UpdateImageRequest};
use cri_shim_api::v1;
use support::cri::{Cri, PATIENCE, shell};
use support::registry::layer;

/// A stand-in that gives the pod an interface whose traffic nobody answers.
const PLUGIN: &str = r#"#!/bin/sh
case "$CNI_COMMAND" in
ADD) : > "DIR/$CNI_CONTAINERID"
  nsenter --net="$CNI_NETNS" ip link add eth0 type veth peer name peer0 >&2
  for link in eth0 peer0; do nsenter --net="$CNI_NETNS" ip link set $link up >&2; done
  nsenter --net="$CNI_NETNS" ip addr add 10.88.0.7/24 dev eth0 >&2
  echo '{"cniVersion":"1.1.0","ips":[{"address":"10.88.0.7/24"}]}' ;;
DEL) rm -f "DIR/$CNI_CONTAINERID" ;;
esac
"#;

async fn stats(cri: &Cri, id: &str) -> v1::ContainerStats {
    let request = v1::ContainerStatsRequest { container_id: id.to_owned() };
    cri.runtime().container_stats(request).await.expect("figures").into_inner().stats.expect("figures")
}

async fn pod_stats(cri: &Cri, id: &str) -> v1::LinuxPodSandboxStats {
    let request = v1::PodSandboxStatsRequest { pod_sandbox_id: id.to_owned() };
    let answer = cri.runtime().pod_sandbox_stats(request).await.expect("figures").into_inner();
    answer.stats.and_then(|stats| stats.linux).expect("figures")
}

fn value(value: Option<v1::UInt64Value>) -> u64 {
    value.map_or(0, |value| value.value)
}

/// Asks until the answer is as wanted.
async fn until<T, F>(what: &str, mut ask: impl FnMut() -> F, wanted: impl Fn(&T) -> bool) -> T
where
    T: std::fmt::Debug,
    F: Future<Output = T>,
{
    let begun = tokio::time::Instant::now();
    loop {
        let answer = ask().await;
        if wanted(&answer) {
            return answer;
        }
        assert!(begun.elapsed() < PATIENCE, "{what} never came: {answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn use_of_cpu_memory_disk_and_network_is_seen() {
    let cri = Cri::start().await;
    let plugin = PLUGIN.replace("DIR", &cri.dir().join("attached").display().to_string());
    std::fs::write(cri.dir().join("bin/stand-in"), plugin).expect("written");
    let pod = cri.pod("figures");
    let sandbox = cri.run(&pod).await.unwrap();
    let script = "/bin/busybox wget -T 1 -q -O - http://10.88.0.99/ & while :; do :; done";
    let busy = cri.script(&sandbox, &pod, "busy", script).await;
    let idle = cri.script(&sandbox, &pod, "idle", "exec sleep 3600").await;

    let first = stats(&cri, &busy).await;
    let cpu = first.cpu.unwrap();
    assert!(value(cpu.usage_nano_cores) > 5_000_000, "the first answer has a rate already: {cpu:?}");
    assert!(value(cpu.usage_core_nano_seconds) > 0);
    assert_eq!(first.attributes.unwrap().metadata.unwrap().name, "busy");
    let memory = first.memory.unwrap();
    assert!(value(memory.working_set_bytes) > 0 && value(memory.usage_bytes) >= value(memory.rss_bytes));
    let rates = until(
        "an idle rate",
        || stats(&cri, &idle),
        |stats| stats.cpu.as_ref().is_some_and(|cpu| value(cpu.usage_nano_cores) < 100_000_000),
    );
    assert!(rates.await.swap.is_some());

    cri.exec(&busy, &["dd", "if=/dev/zero", "of=/file", "bs=1048576", "count=3"]).await;
    let grown = |stats: &v1::ContainerStats| {
        stats.writable_layer.as_ref().is_some_and(|layer| value(layer.used_bytes) >= 3 << 20)
    };
    until("the written file", || stats(&cri, &busy), grown).await;

    let linux = until(
        "sent packets",
        || pod_stats(&cri, &sandbox),
        |linux| {
            let usage = linux.network.as_ref().and_then(|network| network.default_interface.as_ref());
            usage.is_some_and(|usage| value(usage.tx_bytes) > 0)
        },
    );
    let linux = linux.await;
    assert_eq!(linux.network.unwrap().default_interface.unwrap().name, "eth0");
    assert!(value(linux.process.unwrap().process_count) >= 3, "pause, busy and idle");
    let names: BTreeSet<_> = linux
        .containers
        .iter()
        .map(|one| one.attributes.as_ref().unwrap().metadata.as_ref().unwrap().name.as_str())
        .collect();
    assert_eq!(names, BTreeSet::from(["busy", "idle"]));
    let inside: u64 =
        linux.containers.iter().map(|one| value(one.cpu.as_ref().unwrap().usage_core_nano_seconds)).sum();
    assert!(value(linux.cpu.unwrap().usage_core_nano_seconds) >= inside, "a pod is the sum of its parts");

    let filter = v1::ContainerStatsFilter { pod_sandbox_id: "another".into(), ..Default::default() };
    let request = v1::ListContainerStatsRequest { filter: Some(filter) };
    assert!(cri.runtime().list_container_stats(request).await.unwrap().into_inner().stats.is_empty());
    let stop = v1::StopContainerRequest { container_id: idle.clone(), timeout: 0 };
    cri.runtime().stop_container(stop).await.unwrap();
    let ended = stats(&cri, &idle).await;
    assert!(ended.cpu.is_none() && ended.writable_layer.is_some(), "an ended one has but a layer: {ended:?}");
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_complete_and_labelled_as_announced() {
    let cri = Cri::start().await;
    let pod = cri.pod("metrics");
    let sandbox = cri.run(&pod).await.unwrap();
    let mut config = shell("main", "exec sleep 3600");
    let resources = v1::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    config.linux.as_mut().unwrap().resources = Some(resources);
    let id = cri.create(&sandbox, &pod, config).await.unwrap();
    cri.launch(&id).await.unwrap();

    let request = v1::ListMetricDescriptorsRequest {};
    let descriptors = cri.runtime().list_metric_descriptors(request).await.unwrap().into_inner().descriptors;
    assert_eq!(descriptors.len(), 56);
    let request = v1::ListPodSandboxMetricsRequest {};
    let all = cri.runtime().list_pod_sandbox_metrics(request).await.unwrap().into_inner().pod_metrics;
    assert_eq!((all.len(), all[0].pod_sandbox_id.as_str()), (1, sandbox.as_str()));
    assert_eq!(all[0].container_metrics[0].container_id, id);
    let given: Vec<_> = all[0].metrics.iter().chain(&all[0].container_metrics[0].metrics).collect();
    for metric in &given {
        let descriptor = descriptors.iter().find(|one| one.name == metric.name).expect("announced");
        assert_eq!(metric.label_values.len(), descriptor.label_keys.len(), "{}", metric.name);
        let label = |key: &str| {
            let index = descriptor.label_keys.iter().position(|known| known == key).expect("a label");
            metric.label_values[index].as_str()
        };
        assert_eq!((label("namespace"), label("pod")), ("default", "metrics"), "{}", metric.name);
        let container = if metric.name.starts_with("container_network_") { "" } else { "main" };
        assert_eq!(label("container"), container, "{}", metric.name);
    }
    let names: BTreeSet<_> = given.iter().map(|metric| metric.name.as_str()).collect();
    // What depends on the kernel and on what the container did.
    let may_miss = |name: &str| {
        [
            "container_hugetlb",
            "container_pressure",
            "container_blkio",
            "container_fs_reads",
            "container_fs_writes",
        ]
        .iter()
        .any(|start| name.starts_with(start))
    };
    let missing: Vec<_> =
        descriptors.iter().filter(|one| !names.contains(one.name.as_str()) && !may_miss(&one.name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let figure = |name: &str| value(given.iter().find(|metric| metric.name == name).expect("given").value);
    assert_eq!(figure("container_spec_memory_limit_bytes"), 64 << 20);
    assert_eq!(figure("container_spec_cpu_quota"), 50_000);
    assert_eq!(figure("container_processes"), 1);
    assert!(figure("container_fs_limit_bytes") > 0 && figure("container_file_descriptors") > 0);

    let request = v1::StreamPodSandboxMetricsRequest {};
    let mut stream = cri.runtime().stream_pod_sandbox_metrics(request).await.unwrap().into_inner();
    let batch = stream.message().await.unwrap().expect("a message");
    assert_eq!(batch.pod_sandbox_metrics[0].pod_sandbox_id, sandbox);
    assert!(stream.message().await.unwrap().is_none(), "one sandbox, one message");
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verbose_answers_help_a_person() {
    let cri = Cri::start().await;
    let pod = cri.pod("verbose");
    let sandbox = cri.run(&pod).await.unwrap();
    let id = cri.script(&sandbox, &pod, "main", "exec sleep 3600").await;
    let json = |info: &std::collections::BTreeMap<String, String>, key: &str| -> serde_json::Value {
        serde_json::from_str(info.get(key).unwrap_or_else(|| panic!("{key} in {info:?}"))).expect("JSON")
    };
    let request = v1::ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = json(&cri.runtime().container_status(request).await.unwrap().into_inner().info, "info");
    assert!(info["pid"].as_u64().is_some_and(|pid| pid > 1), "{info}");
    assert_eq!(info["sandboxID"], sandbox.as_str());
    assert_eq!(info["runtimeSpec"]["process"]["args"][0], "/bin/sh");
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: true };
    let info = json(&cri.runtime().pod_sandbox_status(request).await.unwrap().into_inner().info, "info");
    assert!(info["netns"].as_str().is_some_and(|netns| !netns.is_empty()), "{info}");
    assert_eq!(info["containers"][0], id.as_str());

    let told = v1::NetworkConfig { pod_cidr: "10.88.0.0/24,fd00::/64".into() };
    let config = v1::RuntimeConfig { network_config: Some(told) };
    let request = v1::UpdateRuntimeConfigRequest { runtime_config: Some(config) };
    cri.runtime().update_runtime_config(request).await.unwrap();
    let wrong = v1::NetworkConfig { pod_cidr: "10.88.0.0/99".into() };
    let config = v1::RuntimeConfig { network_config: Some(wrong) };
    let request = v1::UpdateRuntimeConfigRequest { runtime_config: Some(config) };
    let status = cri.runtime().update_runtime_config(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    let answer = cri.runtime().status(v1::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let config = json(&answer.info, "config");
    assert_eq!(config["podCIDR"], "10.88.0.0/24,fd00::/64");
    assert!(config["stateDir"].as_str().is_some_and(|path| path.ends_with("cri/state")), "{config}");
    assert!(json(&answer.info, "containerd")["version"].is_string());
    assert!(json(&answer.info, "cniconfig")["plugins"].is_array());

    let resources = v1::LinuxContainerResources { cpu_shares: 77, ..Default::default() };
    let request = v1::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: sandbox.clone(),
        resources: Some(resources),
        ..Default::default()
    };
    cri.runtime().update_pod_sandbox_resources(request).await.unwrap();
    let request =
        v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id: "none".into(), ..Default::default() };
    let status = cri.runtime().update_pod_sandbox_resources(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound, "{status}");

    let location = cri.dir().join("checkpoint.tar");
    let request = v1::CheckpointContainerRequest {
        container_id: id,
        location: location.display().to_string(),
        timeout: 30,
    };
    // Nodes without CRIU say so, and why; a node with it makes the file.
    match cri.runtime().checkpoint_container(request).await {
        Ok(_) => assert!(location.is_file()),
        Err(status) => {
            assert_eq!(status.code(), tonic::Code::Unimplemented, "{status}");
            assert!(status.message().starts_with("a checkpoint is not offered: "), "{status}");
        }
    }
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

/// What Prometheus would read.
async fn scrape(cri: &Cri) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream =
        tokio::net::UnixStream::connect(cri.dir().join("metrics.sock")).await.expect("connected");
    let request = b"GET /metrics HTTP/1.1\r\nHost: keelson\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_timed_and_logged_with_their_object() {
    let cri = Cri::start().await;
    let pod = cri.pod("seen");
    let sandbox = cri.run(&pod).await.unwrap();
    let id = cri.script(&sandbox, &pod, "main", "exec sleep 3600").await;
    let stop = v1::ContainerStatusRequest { container_id: "none".into(), verbose: false };
    cri.runtime().container_status(stop).await.unwrap_err();
    cri.exec(&id, &["/bin/echo"]).await;
    let text = scrape(&cri).await;
    for stage in [
        "netns",
        "cni_add",
        "pause",
        "task_create",
        "task_start",
        "exec",
        "pull_resolve",
        "pull",
        "layer_fetch",
        "layer_place",
    ] {
        let name = format!("keelson_cri_stage_duration_seconds_count{{stage=\"{stage}\"}} ");
        let count =
            text.lines().find_map(|line| line.strip_prefix(&name)).and_then(|count| count.parse().ok());
        assert!(count.is_some_and(|count: u32| count > 0), "{stage} is not in {text}");
    }
    for line in [
        "keelson_cri_rpc_total{rpc=\"RunPodSandbox\",code=\"Ok\"} 1",
        "keelson_cri_rpc_total{rpc=\"ContainerStatus\",code=\"NotFound\"} 1",
        "keelson_cri_rpc_duration_seconds_count{rpc=\"StartContainer\"} 1",
        "keelson_cri_stage_duration_seconds_count{stage=\"cni_add\"} 1",
        "keelson_cri_containerd_call_duration_seconds_count{call=\"Snapshots.Prepare\"} 1",
        "keelson_cri_containerd_call_duration_seconds_count{call=\"prepare snapshot\"} ",
        "keelson_cri_sandboxes{state=\"ready\"} 1",
        "keelson_cri_containers{state=\"running\"} 1",
        "keelson_cri_ready 1",
        "keelson_cri_process_resident_memory_bytes ",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    let log = std::fs::read_to_string(cri.dir().join("cri.log")).unwrap();
    let answered = |rpc: &str, object: &str| {
        let line =
            log.lines().find(|line| line.contains(&format!("name=\"{rpc}\"")) && line.contains("answered"));
        let line = line.unwrap_or_else(|| panic!("no outcome of {rpc} in {log}"));
        assert!(line.contains(object) && line.contains("milliseconds="), "{line}");
    };
    answered("RunPodSandbox", &sandbox);
    answered("StartContainer", &id);
    assert!(!log.contains("name=\"ContainerStatus\""), "what is asked all the time is not logged");
    // Work that goes on in a task of its own still belongs to its request.
    for (event, rpc) in [
        ("sandbox is ready", "RunPodSandbox"),
        ("container is started", "StartContainer"),
        ("pulled an image", "PullImage"),
    ] {
        let line = log.lines().find(|line| line.contains(event)).expect("logged");
        assert!(line.contains(&format!("rpc{{name=\"{rpc}\"")), "{line}");
    }
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

/// How often containerd was asked for all its images.
async fn listings(cri: &Cri) -> u64 {
    const NAME: &str = "keelson_cri_containerd_call_duration_seconds_count{call=\"list\"} ";
    let text = scrape(cri).await;
    text.lines().find_map(|line| line.strip_prefix(NAME)).map_or(0, |count| count.parse().expect("a count"))
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_listed_for_a_container_only_after_somebody_changed_one() {
    let cri = Cri::start().await;
    let pod = cri.pod("many");
    let sandbox = cri.run(&pod).await.unwrap();
    cri.push("other", &[layer(&[("etc/other", b"x", 0o644)])], serde_json::json!({})).await;
    cri.create(&sandbox, &pod, shell("first", "true")).await.unwrap();
    let before = listings(&cri).await;
    for name in ["second", "third", "fourth"] {
        cri.create(&sandbox, &pod, shell(name, "true")).await.unwrap();
    }
    assert_eq!(listings(&cri).await, before, "nothing has changed");

    // Somebody else gives the name to the other image.
    let client = keelson_cri::containerd::Client::new(&cri.containerd.socket(), "keelson").unwrap();
    let mut images = ImagesClient::new(client.channel());
    let asked = GetImageRequest { name: "docker.io/library/other:latest".to_owned() };
    let other = images.get(client.request(asked, PATIENCE)).await.unwrap().into_inner().image.unwrap();
    let moved = Image { name: "docker.io/library/busybox:latest".to_owned(), ..other };
    let update = UpdateImageRequest { image: Some(moved), ..UpdateImageRequest::default() };
    images.update(client.request(update, PATIENCE)).await.unwrap();
    let others = cri.pull("other").await;
    // The event that tells of it has no time to keep.
    let begun = tokio::time::Instant::now();
    for number in 0.. {
        let name = format!("later-{number}");
        let id = cri.create(&sandbox, &pod, shell(&name, "true")).await.unwrap();
        if cri.status(&id).await.image_id == others {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "containers are made of the image that had the name before");
    }
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

//! PodSandbox: life cycle, attributes, lists and filters, files that every container gets.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use cri_shim_api::v1::{self, PodSandboxState};

use super::super::case::{Case, case, holds, refused, refused_with, same};
use super::super::context::{Pod, T};

pub(crate) fn cases() -> Vec<Case> {
    let group = "pod sandbox";
    vec![
        case(group, "runs, and is READY with a creation time", runs),
        case(group, "its id is 64 hexadecimal digits", id_form),
        case(group, "stops, and is NOTREADY", stops),
        case(group, "is gone after Remove", removes),
        case(group, "Remove without Stop removes it with its containers", removes_running),
        case(group, "Status returns metadata, labels, annotations and the handler", attributes),
        case(group, "Status returns the namespaces it was asked for", status_namespaces),
        case(group, "Status with verbose gives the pid and the spec", verbose),
        case(group, "List without a filter has it, with state and attributes", list_all),
        case(group, "List by id, by a part of the id, and by an unknown id", list_by_id),
        case(group, "List by state", list_by_state),
        case(group, "List by labels wants all of them", list_by_labels),
        case(group, "Stop ends its containers", stop_ends_containers),
        case(group, "the same metadata again with the next attempt is another sandbox", next_attempt),
        case(group, "the same metadata and attempt while it exists makes no second sandbox", same_attempt),
        case(group, "the name is free again after Remove", name_is_free),
        case(group, "a container cannot be created in a stopped sandbox", no_container_when_stopped),
        case(group, "an unknown runtime handler is refused and named", unknown_handler),
        case(group, "PodSandboxStatus of an unknown id is NotFound", unknown_status),
        case(group, "a configuration without metadata is refused", no_metadata),
        case(group, "ten sandboxes at once", ten_at_once).serial(),
        case(group, "its cgroups are gone after Remove", cgroups_gone),
        case(group, "/dev/shm is a tmpfs of 64 MiB of its own that everybody may write", shared_memory),
    ]
}

async fn runs(t: T) -> Result<()> {
    let before = now();
    let pod = t.sandbox().await?;
    let status = t.pod_status(&pod.id).await?;
    same("state", status.state(), PodSandboxState::SandboxReady)?;
    anyhow::ensure!(
        status.created_at >= before && status.created_at <= now(),
        "created_at {} is not a time in nanoseconds between {before} and now",
        status.created_at
    );
    Ok(())
}

/// Nanoseconds since the epoch.
pub(super) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

async fn id_form(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let hex = pod.id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    anyhow::ensure!(pod.id.len() == 64 && hex, "the id is {:?}", pod.id);
    Ok(())
}

async fn stops(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    same("state", t.pod_status(&pod.id).await?.state(), PodSandboxState::SandboxNotready)
}

async fn removes(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    t.try_remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    refused_with("PodSandboxStatus after Remove", t.try_pod_status(&pod.id).await, &[tonic::Code::NotFound])?;
    same("list", list(&t, v1::PodSandboxFilter { id: pod.id.clone(), ..Default::default() }).await?.len(), 0)
}

async fn removes_running(t: T) -> Result<()> {
    let (pod, container) = t.idle().await?;
    t.try_remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    refused_with("ContainerStatus after", t.try_status(&container).await, &[tonic::Code::NotFound])?;
    refused_with("PodSandboxStatus after", t.try_pod_status(&pod.id).await, &[tonic::Code::NotFound])
        .map(drop)
}

async fn attributes(t: T) -> Result<()> {
    let mut config = t.pod();
    config.labels.insert("app".to_owned(), "web".to_owned());
    config.annotations = BTreeMap::from([("note".to_owned(), "täxt with ümlauts".to_owned())]);
    let pod = t.run(&config).await?;
    let status = t.pod_status(&pod.id).await?;
    same("id", status.id, pod.id)?;
    same("metadata", status.metadata, config.metadata)?;
    same("labels", status.labels, config.labels)?;
    same("annotations", status.annotations, config.annotations)?;
    same("handler", status.runtime_handler, t.suite.handler.clone())
}

async fn status_namespaces(t: T) -> Result<()> {
    let mut config = t.pod();
    let wanted = v1::NamespaceOption {
        network: v1::NamespaceMode::Node.into(),
        pid: v1::NamespaceMode::Pod.into(),
        ipc: v1::NamespaceMode::Node.into(),
        ..v1::NamespaceOption::default()
    };
    // As the kubelet does for the host's network.
    config.hostname = String::new();
    super::super::context::pod_security(&mut config).namespace_options = Some(wanted.clone());
    let pod = t.run(&config).await?;
    let found =
        t.pod_status(&pod.id).await?.linux.and_then(|linux| linux.namespaces).and_then(|all| all.options);
    let found = found.context("no namespaces in the status")?;
    same("network", found.network(), wanted.network())?;
    same("pid", found.pid(), wanted.pid())?;
    same("ipc", found.ipc(), wanted.ipc())
}

async fn verbose(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: pod.id, verbose: true };
    let info = t.rt().pod_sandbox_status(request).await.context("PodSandboxStatus")?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no `info`")?)?;
    anyhow::ensure!(info["pid"].as_i64().is_some_and(|pid| pid > 0), "no pid: {info}");
    anyhow::ensure!(info["config"]["metadata"].is_object(), "no config: {info}");
    Ok(())
}

async fn list(t: &T, filter: v1::PodSandboxFilter) -> Result<Vec<v1::PodSandbox>> {
    let request = v1::ListPodSandboxRequest { filter: Some(filter) };
    Ok(t.rt().list_pod_sandbox(request).await.context("ListPodSandbox")?.into_inner().items)
}

async fn list_all(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let all = t
        .rt()
        .list_pod_sandbox(v1::ListPodSandboxRequest { filter: None })
        .await
        .context("ListPodSandbox")?;
    let all = all.into_inner().items;
    let found = all.into_iter().find(|item| item.id == pod.id).context("it is not listed")?;
    same("state", found.state(), PodSandboxState::SandboxReady)?;
    same("metadata", found.metadata, pod.config.metadata)?;
    same("labels", found.labels, pod.config.labels)?;
    same("created_at", found.created_at, t.pod_status(&pod.id).await?.created_at)?;
    same("handler", found.runtime_handler, t.suite.handler.clone())
}

async fn list_by_id(t: T) -> Result<()> {
    let (one, _other) = (t.sandbox().await?, t.sandbox().await?);
    let by = |id: &str| v1::PodSandboxFilter { id: id.to_owned(), ..Default::default() };
    let ids = |items: Vec<v1::PodSandbox>| items.into_iter().map(|item| item.id).collect::<Vec<_>>();
    same("by id", ids(list(&t, by(&one.id)).await?), vec![one.id.clone()])?;
    same("by a part of the id", ids(list(&t, by(&one.id[..13])).await?), vec![one.id.clone()])?;
    same("by an unknown id", ids(list(&t, by("0123456789abcdef")).await?), Vec::<String>::new())
}

async fn list_by_state(t: T) -> Result<()> {
    let (ready, stopped) = (t.sandbox().await?, t.sandbox().await?);
    t.try_stop_pod(&stopped.id).await.context("StopPodSandbox")?;
    for (state, has, lacks) in [
        (PodSandboxState::SandboxReady, &ready, &stopped),
        (PodSandboxState::SandboxNotready, &stopped, &ready),
    ] {
        let state = Some(v1::PodSandboxStateValue { state: state.into() });
        let items = list(&t, v1::PodSandboxFilter { state, ..Default::default() }).await?;
        anyhow::ensure!(items.iter().any(|item| item.id == has.id), "{state:?} lacks a sandbox");
        anyhow::ensure!(items.iter().all(|item| item.id != lacks.id), "{state:?} has one of the other state");
    }
    Ok(())
}

async fn list_by_labels(t: T) -> Result<()> {
    let mut config = t.pod();
    let uid = config.metadata.clone().unwrap_or_default().uid;
    config.labels.extend([("app".to_owned(), uid.clone()), ("tier".to_owned(), "front".to_owned())]);
    let pod = t.run(&config).await?;
    let count = async |labels: &[(&str, &str)]| -> Result<usize> {
        let label_selector =
            labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let items = list(&t, v1::PodSandboxFilter { label_selector, ..Default::default() }).await?;
        anyhow::ensure!(items.iter().all(|item| item.id == pod.id), "others match too");
        Ok(items.len())
    };
    same("one label", count(&[("app", &uid)]).await?, 1)?;
    same("both labels", count(&[("app", &uid), ("tier", "front")]).await?, 1)?;
    same("one label of another value", count(&[("app", &uid), ("tier", "back")]).await?, 0)
}

async fn stop_ends_containers(t: T) -> Result<()> {
    let (pod, container) = t.idle().await?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    same("state", t.status(&container).await?.state(), v1::ContainerState::ContainerExited)
}

async fn next_attempt(t: T) -> Result<()> {
    let mut config = t.pod();
    let first = t.run(&config).await?;
    config.metadata.get_or_insert_default().attempt = 1;
    let second = t.run(&config).await?;
    anyhow::ensure!(first.id != second.id, "both have one id");
    same("attempt", t.pod_status(&second.id).await?.metadata.unwrap_or_default().attempt, 1)
}

/// The reference refuses (the name is reserved); joining or giving the same sandbox is as good.
async fn same_attempt(t: T) -> Result<()> {
    let config = t.pod();
    let first = t.run(&config).await?;
    if let Ok(second) = t.try_run(&config).await {
        same("the id of the second answer", second.id, first.id.clone())?;
    }
    let uid = config.metadata.unwrap_or_default().uid;
    let items = list(&t, v1::PodSandboxFilter::default()).await?;
    let count =
        items.iter().filter(|item| item.metadata.as_ref().is_some_and(|known| known.uid == uid)).count();
    same("sandboxes of the pod", count, 1)
}

async fn name_is_free(t: T) -> Result<()> {
    let config = t.pod();
    let first = t.run(&config).await?;
    t.try_stop_pod(&first.id).await.context("StopPodSandbox")?;
    t.try_remove_pod(&first.id).await.context("RemovePodSandbox")?;
    let second = t.run(&config).await?;
    anyhow::ensure!(second.id != first.id, "an id came back");
    Ok(())
}

async fn no_container_when_stopped(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    let result = t.try_create(&pod, &t.shell("true")).await;
    refused("CreateContainer in a stopped sandbox", result).map(drop)
}

async fn unknown_handler(t: T) -> Result<()> {
    let status = refused("a handler nobody has", t.try_run_with(&t.pod(), "nobody-has-this").await)?;
    holds("the error", status.message(), "nobody-has-this")
}

async fn unknown_status(t: T) -> Result<()> {
    refused_with("PodSandboxStatus", t.try_pod_status("nothing").await, &[tonic::Code::NotFound]).map(drop)
}

async fn no_metadata(t: T) -> Result<()> {
    let mut config = t.pod();
    config.metadata = None;
    refused("a sandbox without metadata", t.try_run(&config).await.map(|pod| pod.id))?;
    let result = t.rt().run_pod_sandbox(v1::RunPodSandboxRequest::default()).await;
    refused("a request without configuration", result).map(drop)
}

async fn ten_at_once(t: T) -> Result<()> {
    let configs: Vec<_> = (0..10).map(|_| t.pod()).collect();
    let pods: Vec<Pod> = futures::future::try_join_all(configs.iter().map(|config| t.run(config))).await?;
    for pod in &pods {
        same("state", t.pod_status(&pod.id).await?.state(), PodSandboxState::SandboxReady)?;
    }
    futures::future::try_join_all(pods.iter().map(|pod| t.try_stop_pod(&pod.id))).await.context("Stop")?;
    futures::future::try_join_all(pods.iter().map(|pod| t.try_remove_pod(&pod.id)))
        .await
        .context("Remove")?;
    Ok(())
}

async fn shared_memory(t: T) -> Result<()> {
    let script = "grep ' /dev/shm ' /proc/mounts; stat -c %a /dev/shm; df -k /dev/shm | tail -n 1";
    let text = t.output(script, |_| ()).await?;
    let lines: Vec<&str> = text.lines().collect();
    for word in ["tmpfs", "nosuid", "nodev", "noexec"] {
        holds("the mount", lines.first().copied().unwrap_or_default(), word)?;
    }
    same("its mode", lines.get(1).copied(), Some("1777"))?;
    same("its size in KiB", lines.get(2).and_then(|line| line.split_whitespace().nth(1)), Some("65536"))
}

async fn cgroups_gone(t: T) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let found = || cgroups_with(&pod.id).into_iter().chain(cgroups_with(&container)).collect::<Vec<_>>();
    if found().is_empty() {
        return super::super::case::skip("no cgroup of this name is found below /sys/fs/cgroup of this host");
    }
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    t.try_remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    t.until("the cgroups are gone", || async { Ok(found().is_empty().then_some(())) }).await
}

/// Cgroup directories whose name holds `id`, in any hierarchy.
pub(super) fn cgroups_with(id: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let path = entry.path();
                if entry.file_name().to_string_lossy().contains(id) {
                    found.push(path.clone());
                }
                left.push(path);
            }
        }
    }
    found
}

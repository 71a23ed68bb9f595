//! Events, user namespaces, checkpoints, and calls beside each other.

use std::time::Duration;

use anyhow::{Context, Result};
use cri_shim_api::v1::ContainerEventType as Kind;
use cri_shim_api::v1::{self, NamespaceMode};

use super::super::case::{Case, case, holds, refused, same, skip};
use super::super::context::{IDLE, T, pod_security, security};

pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let group = "events";
    all.extend([
        case(group, "a pod's life: created, started, stopped and deleted, of sandbox and container", life),
        case(group, "an event carries the sandbox's and the containers' status", statuses),
        case(group, "two listeners get the same events", two_listeners),
    ]);
    let group = "user namespaces";
    all.extend([
        case(group, "root in the pod is the mapped user on the host", userns_mapped),
        case(group, "the root file system belongs to root inside", userns_rootfs),
        case(group, "host files have their owners mapped or hidden", userns_mount),
        case(group, "all containers of the pod share it", userns_shared),
        case(group, "exec is in it too", userns_exec),
        case(group, "NODE is the host's", userns_node),
        case(group, "more than one mapping is refused", userns_two_mappings),
        case(group, "a container that asks for other mappings than its pod is refused", userns_other),
    ]);
    let group = "checkpoint";
    all.extend([
        case(group, "writes an archive where CRIU is, else says why not", checkpoint),
        case(group, "of a container with a terminal, a volume and the pod's processes", checkpoint_with_all),
    ]);
    let group = "side by side";
    all.extend([
        case(group, "a retried RunPodSandbox after a cancelled one gives a sandbox", cancelled_run),
        case(group, "a retried CreateContainer after a cancelled one gives a container", cancelled_create),
        case(group, "RemovePodSandbox during CreateContainer leaves nothing", remove_during_create),
        case(group, "StopPodSandbox twice at once", stop_pod_at_once),
        case(group, "RemoveContainer twice at once", remove_at_once),
        case(group, "a slow stop of one container does not hold up another", slow_stop),
    ]);
    all
}

/// Events since it was opened.
async fn listen(t: &T) -> Result<tonic::Streaming<v1::ContainerEventResponse>> {
    let answer = t.rt().get_container_events(v1::GetEventsRequest {}).await.context("GetContainerEvents")?;
    Ok(answer.into_inner())
}

/// Reads until `done` says so; only events of these ids are handed on.
async fn collect(
    stream: &mut tonic::Streaming<v1::ContainerEventResponse>,
    ids: &[&str],
    count: usize,
) -> Result<Vec<v1::ContainerEventResponse>> {
    let mut found = Vec::new();
    while found.len() < count {
        let next = tokio::time::timeout(Duration::from_secs(60), stream.message()).await;
        let next = next.map_err(|_elapsed| anyhow::anyhow!("no further event; found {:?}", kinds(&found)))?;
        let event = next.context("GetContainerEvents")?.context("the stream ended")?;
        if ids.contains(&event.container_id.as_str()) {
            found.push(event);
        }
    }
    Ok(found)
}

fn kinds(events: &[v1::ContainerEventResponse]) -> Vec<(String, Kind)> {
    events.iter().map(|event| (event.container_id.clone(), event.container_event_type())).collect()
}

async fn whole_life(t: &T) -> Result<(String, String)> {
    let (pod, id) = t.idle().await?;
    t.stop(&id, 0).await?;
    t.try_remove(&id).await.context("RemoveContainer")?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    t.try_remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    Ok((pod.id, id))
}

async fn life(t: T) -> Result<()> {
    let mut stream = listen(&t).await?;
    let (pod, id) = whole_life(&t).await?;
    let events = collect(&mut stream, &[&pod, &id], 8).await?;
    for (what, wanted) in [("the container", &id), ("the sandbox", &pod)] {
        let order: Vec<_> = events
            .iter()
            .filter(|event| event.container_id == *wanted)
            .map(v1::ContainerEventResponse::container_event_type)
            .collect();
        let all = [
            Kind::ContainerCreatedEvent,
            Kind::ContainerStartedEvent,
            Kind::ContainerStoppedEvent,
            Kind::ContainerDeletedEvent,
        ];
        same(what, order, all.to_vec())?;
    }
    Ok(())
}

async fn statuses(t: T) -> Result<()> {
    let mut stream = listen(&t).await?;
    let (pod, id) = t.idle().await?;
    t.stop(&id, 0).await?;
    let events = collect(&mut stream, &[&id], 3).await?;
    let stopped = events.last().context("no event")?;
    same("the type", stopped.container_event_type(), Kind::ContainerStoppedEvent)?;
    anyhow::ensure!(stopped.created_at > 0, "no time");
    same("the sandbox", stopped.pod_sandbox_status.clone().unwrap_or_default().id, pod.id)?;
    let status =
        stopped.containers_statuses.iter().find(|status| status.id == id).context("no container status")?;
    same("its state", status.state(), v1::ContainerState::ContainerExited)?;
    same("its exit code", status.exit_code, 137)
}

async fn two_listeners(t: T) -> Result<()> {
    let (mut one, mut two) = (listen(&t).await?, listen(&t).await?);
    let (pod, id) = whole_life(&t).await?;
    let first = kinds(&collect(&mut one, &[&pod, &id], 8).await?);
    same("the second listener's", kinds(&collect(&mut two, &[&pod, &id], 8).await?), first)
}

/// First host id of the mapping, and how many.
const HOST_ID: u32 = 1_000_000;
const LENGTH: u32 = 65_536;

fn mapped() -> v1::UserNamespace {
    let mapping = v1::IdMapping { host_id: HOST_ID, container_id: 0, length: LENGTH };
    v1::UserNamespace { mode: NamespaceMode::Pod.into(), uids: vec![mapping], gids: vec![mapping] }
}

async fn userns_pod(t: &T) -> Result<super::super::context::Pod> {
    t.suite.facts.need_userns()?;
    let mut config = t.pod();
    pod_security(&mut config).namespace_options.get_or_insert_default().userns_options = Some(mapped());
    t.run(&config).await
}

fn join(config: &mut v1::ContainerConfig) {
    security(config).namespace_options.get_or_insert_default().userns_options = Some(mapped());
}

async fn userns_mapped(t: T) -> Result<()> {
    let pod = userns_pod(&t).await?;
    let text = t.output_in(&pod, "id -u; cat /proc/self/uid_map /proc/self/gid_map", join).await?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let (host, length) = (HOST_ID.to_string(), LENGTH.to_string());
    same("id and maps", words, vec!["0", "0", &host, &length, "0", &host, &length])
}

async fn userns_rootfs(t: T) -> Result<()> {
    let pod = userns_pod(&t).await?;
    let text = t
        .output_in(&pod, "stat -c %u:%g / /bin/busybox /etc/passwd; touch /new && echo written", join)
        .await?;
    same("the owners", text.as_str(), "0:0\n0:0\n0:0\nwritten\n")
}

async fn userns_mount(t: T) -> Result<()> {
    let pod = userns_pod(&t).await?;
    let host = t.dir.join("host");
    std::fs::create_dir_all(&host)?;
    std::os::unix::fs::chown(&host, Some(HOST_ID), Some(HOST_ID))?;
    let text = t
        .output_in(&pod, "stat -c %u /mnt; touch /mnt/file && echo written", |config| {
            join(config);
            config.mounts = vec![v1::Mount {
                container_path: "/mnt".to_owned(),
                host_path: host.display().to_string(),
                ..v1::Mount::default()
            }];
        })
        .await?;
    same("owner and write", text.as_str(), "0\nwritten\n")
}

async fn userns_shared(t: T) -> Result<()> {
    let pod = userns_pod(&t).await?;
    let script = "readlink /proc/self/ns/user";
    let (one, two) = (t.output_in(&pod, script, join).await?, t.output_in(&pod, script, join).await?);
    same("the second container's", two, one.clone())?;
    let own = std::fs::read_link("/proc/self/ns/user")?.display().to_string();
    anyhow::ensure!(one.trim() != own, "it is the host's");
    Ok(())
}

async fn userns_exec(t: T) -> Result<()> {
    let pod = userns_pod(&t).await?;
    let mut config = t.shell(super::super::context::IDLE);
    join(&mut config);
    let id = t.launch(&pod, &config).await?;
    let text = t.sh(&id, "for p in self 1; do readlink /proc/$p/ns/user; done | uniq | wc -l; id -u").await?;
    same("namespaces and id", text.as_str(), "1\n0")
}

async fn userns_node(t: T) -> Result<()> {
    let text = t.output("readlink /proc/self/ns/user", |_| ()).await?;
    let own = std::fs::read_link("/proc/self/ns/user")?.display().to_string();
    same("the namespace", text.trim(), own.as_str())
}

async fn userns_two_mappings(t: T) -> Result<()> {
    t.suite.facts.need_userns()?;
    let mut config = t.pod();
    let mut wanted = mapped();
    let second = v1::IdMapping { host_id: 3_000_000, container_id: LENGTH, length: 10 };
    wanted.uids.push(second);
    pod_security(&mut config).namespace_options.get_or_insert_default().userns_options = Some(wanted);
    refused("two mappings", t.try_run(&config).await).map(drop)
}

async fn userns_other(t: T) -> Result<()> {
    let pod = userns_pod(&t).await?;
    let mut config = t.shell("true");
    join(&mut config);
    let options = security(&mut config).namespace_options.get_or_insert_default();
    if let Some(first) = options.userns_options.get_or_insert_default().uids.first_mut() {
        first.host_id += LENGTH;
    }
    refused("other mappings", t.try_create(&pod, &config).await).map(drop)
}

async fn checkpoint(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    checkpoint_of(&t, id).await
}

async fn checkpoint_with_all(t: T) -> Result<()> {
    let volume = t.dir.join("volume");
    std::fs::create_dir(&volume)?;
    let mut pod = t.pod();
    let shared = NamespaceMode::Pod.into();
    pod_security(&mut pod).namespace_options.get_or_insert_default().pid = shared;
    let pod = t.run(&pod).await?;
    let mut config = t.shell(IDLE);
    config.tty = true;
    config.stdin = true;
    config.mounts.push(v1::Mount {
        host_path: volume.display().to_string(),
        container_path: "/volume".into(),
        ..v1::Mount::default()
    });
    security(&mut config).namespace_options.get_or_insert_default().pid = shared;
    let id = t.launch(&pod, &config).await?;
    t.sh(&id, "exec 3>/volume/open; echo kept >&3").await?;
    checkpoint_of(&t, id).await
}

async fn checkpoint_of(t: &T, id: String) -> Result<()> {
    t.sh(&id, "echo changed > /changed").await?;
    let location = t.dir.join("checkpoint.tar");
    let request = v1::CheckpointContainerRequest {
        container_id: id.clone(),
        location: location.display().to_string(),
        timeout: 60,
    };
    match t.rt().checkpoint_container(request).await {
        Ok(_) => {
            let file = std::fs::File::open(&location)
                .with_context(|| format!("no archive at {}", location.display()))?;
            let mut names = Vec::new();
            for entry in tar::Archive::new(file).entries()? {
                names.push(entry?.path()?.display().to_string());
            }
            for part in [
                "checkpoint/inventory.img",
                "checkpoint/pages-",
                "spec.dump",
                "config.dump",
                "rootfs-diff.tar",
            ] {
                anyhow::ensure!(names.iter().any(|name| name.contains(part)), "no {part} in {names:?}");
            }
            same("the state afterwards", t.status(&id).await?.state(), v1::ContainerState::ContainerRunning)?;
            same("its file", t.sh(&id, "cat /changed").await?.as_str(), "changed")
        }
        Err(status) => {
            let message = status.message();
            anyhow::ensure!(status.code() == tonic::Code::Unimplemented, "{:?}: {message}", status.code());
            holds("the reason", &message.to_lowercase(), "criu")?;
            skip(format!("refused with a reason, as it should be: {message}"))
        }
    }
}

/// The client goes away while the call runs, as a kubelet does at its deadline, and asks again.
async fn cancelled_run(t: T) -> Result<()> {
    let config = t.pod();
    drop(tokio::time::timeout(Duration::from_millis(20), t.try_run(&config)).await);
    let pod = t
        .until("a retry succeeds", || async {
            match t.try_run(&config).await {
                Ok(pod) => Ok(Some(pod)),
                Err(status) if status.message().contains("reserved") => {
                    // The kubelet would try the next attempt; the promise is that it need not.
                    anyhow::bail!("{}", status.message())
                }
                Err(_) => Ok(None),
            }
        })
        .await?;
    let uid = config.metadata.unwrap_or_default().uid;
    let answer =
        t.rt().list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.context("ListPodSandbox")?;
    let items = answer.into_inner().items;
    for item in items.iter().filter(|item| item.metadata.as_ref().is_some_and(|known| known.uid == uid)) {
        t.remember_sandbox(&item.id);
        same("the only sandbox of the pod", item.id.clone(), pod.id.clone())?;
    }
    Ok(())
}

async fn cancelled_create(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let config = t.shell(super::super::context::IDLE);
    drop(tokio::time::timeout(Duration::from_millis(5), t.try_create(&pod, &config)).await);
    let id = t
        .until("a retry succeeds", || async {
            match t.try_create(&pod, &config).await {
                Ok(id) => Ok(Some(id)),
                Err(status) if status.message().contains("reserved") => anyhow::bail!("{}", status.message()),
                Err(_) => Ok(None),
            }
        })
        .await?;
    t.try_start(&id).await.context("StartContainer")?;
    let filter = v1::ContainerFilter { pod_sandbox_id: pod.id, ..Default::default() };
    same("containers", super::container::list(&t, filter).await?.len(), 1)
}

async fn remove_during_create(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let configs: Vec<_> = (0..3).map(|_| t.shell("true")).collect();
    let creates = futures::future::join_all(configs.iter().map(|config| t.try_create(&pod, config)));
    let (created, removed) = tokio::join!(creates, t.try_remove_pod(&pod.id));
    // A container made in between may make the removal fail; the kubelet asks again.
    if removed.is_err() {
        t.try_remove_pod(&pod.id).await.context("RemovePodSandbox again")?;
    }
    drop(created);
    let filter = v1::ContainerFilter { pod_sandbox_id: pod.id, ..Default::default() };
    t.until("no container is left", || async {
        Ok(super::container::list(&t, filter.clone()).await?.is_empty().then_some(()))
    })
    .await
}

async fn stop_pod_at_once(t: T) -> Result<()> {
    let (pod, _) = t.idle().await?;
    let (one, two) = tokio::join!(t.try_stop_pod(&pod.id), t.try_stop_pod(&pod.id));
    one.context("the first")?;
    two.context("the second")
}

async fn remove_at_once(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let (one, two) = tokio::join!(t.try_remove(&id), t.try_remove(&id));
    anyhow::ensure!(one.is_ok() || two.is_ok(), "both failed: {one:?} {two:?}");
    t.try_remove(&id).await.context("RemoveContainer again")
}

async fn slow_stop(t: T) -> Result<()> {
    let (pod, slow) = t
        .idle_with(|config| config.command[2] = "trap '' TERM; sleep 3600 & wait; sleep 3600".to_owned())
        .await?;
    let other = t.launch(&pod, &t.shell(super::super::context::IDLE)).await?;
    let stopping = tokio::spawn({
        let (t, slow) = (t.clone(), slow.clone());
        async move { t.stop(&slow, 30).await }
    });
    t.stop(&other, 0).await?;
    t.status(&slow).await?;
    same("a command in the one being stopped", t.sh(&slow, "echo alive").await?.as_str(), "alive")?;
    t.stop(&slow, 0).await?;
    stopping.await?
}

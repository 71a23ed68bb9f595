//! Containers: life cycle, attributes, entry-point rules, exits, signals, lists.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use cri_shim_api::v1::{self, ContainerState};

use super::super::case::{Case, case, holds, refused, refused_with, same};
use super::super::context::{T, image_spec, resources, strings};
use super::sandbox::now;

pub(crate) fn cases() -> Vec<Case> {
    let group = "container";
    let mut all = vec![
        case(group, "Create gives an id and the state CREATED", creates),
        case(group, "Start makes it RUNNING, with a start time", starts),
        case(group, "Stop makes it EXITED, with an end time", stops),
        case(group, "is gone after Remove", removes),
        case(group, "Remove of a running container ends it", removes_running),
        case(group, "Remove of a created container", removes_created),
        case(group, "Status returns metadata, image, labels, annotations, log path and mounts", attributes),
        case(group, "Status with verbose gives the pid and the spec", verbose),
        case(group, "Status returns the resources it was made with", status_resources),
        case(group, "Start of a started container is refused", start_twice),
        case(group, "Start of an ended container is refused", start_ended),
        case(group, "the same metadata and attempt while it exists makes no second container", same_attempt),
        case(group, "the name is free again after Remove", name_is_free),
        case(group, "in an unknown sandbox is NotFound", unknown_sandbox),
        case(group, "an unknown image is NotFound and named", unknown_image),
        case(group, "its image may be named by tag, digest, id and the beginning of the id", image_names),
        case(group, "Start in a stopped sandbox is refused", start_in_stopped),
        case(group, "ContainerStatus of an unknown id is NotFound", unknown_status),
        case(group, "Start of an unknown id is NotFound", unknown_start),
        case(group, "List by id, state, sandbox and labels", lists),
        case(group, "the first digits of an id are enough for every call", short_ids),
    ];
    all.extend(exits());
    all.extend(process());
    all
}

fn exits() -> Vec<Case> {
    let group = "container exit";
    vec![
        case(group, "status 0 is Completed", exit_zero),
        case(group, "another status is Error with the code", exit_code),
        case(group, "death by a signal is 128 + signal", exit_signal),
        case(group, "beyond the memory limit it is OOMKilled with 137", oom_killed),
        case(
            group,
            "a command that does not exist fails Start; 128, StartError and a message stay",
            start_error,
        ),
        case(group, "Stop sends SIGTERM and waits", stop_term),
        case(group, "Stop kills what ignores SIGTERM after the timeout", stop_kill),
        case(group, "Stop with timeout 0 kills at once", stop_now),
        case(group, "Stop sends the image's stop signal", stop_image_signal),
        case(group, "Stop sends the stop signal of the configuration", stop_config_signal),
        case(group, "Stop ends all processes of the container", stop_all_processes),
        case(group, "two Stops at once both return", stop_twice_at_once),
    ]
}

fn process() -> Vec<Case> {
    let group = "container process";
    vec![
        case(group, "command and args replace entry point and arguments of the image", command_rules),
        case(
            group,
            "the image's entry point, arguments, directory and environment are the defaults",
            image_defaults,
        ),
        case(group, "working_dir is made when it does not exist", working_dir),
        case(
            group,
            "environment: the configuration wins over the image, HOSTNAME and PATH are there",
            environment,
        ),
        case(
            group,
            "environment: PATH has a default where neither image nor configuration has one",
            default_path,
        ),
        case(group, "an image without a command, and none in the configuration, is refused", no_command),
        case(group, "stdin is closed when it was not asked for", no_stdin),
        case(group, "a terminal: TERM, tty, and one stream", tty),
        case(group, "PID 1 is the command", pid_one),
    ]
}

async fn creates(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let before = now();
    let id = t.create(&pod, &t.shell("true")).await?;
    let status = t.status(&id).await?;
    same("id", status.id.as_str(), id.as_str())?;
    same("state", status.state(), ContainerState::ContainerCreated)?;
    anyhow::ensure!(status.created_at >= before, "created_at is {}", status.created_at);
    same("started_at", status.started_at, 0)?;
    same("finished_at", status.finished_at, 0)
}

async fn starts(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let status = t.status(&id).await?;
    same("state", status.state(), ContainerState::ContainerRunning)?;
    anyhow::ensure!(status.started_at >= status.created_at && status.started_at <= now(), "{status:?}");
    same("finished_at", status.finished_at, 0)
}

async fn stops(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    t.stop(&id, 30).await?;
    let status = t.status(&id).await?;
    same("state", status.state(), ContainerState::ContainerExited)?;
    anyhow::ensure!(status.finished_at >= status.started_at && status.finished_at <= now(), "{status:?}");
    Ok(())
}

async fn short_ids(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    let (short, short_pod) = (&id[..13], &pod.id[..13]);
    same("the container", t.status(short).await?.id, id.clone())?;
    same("the sandbox", t.pod_status(short_pod).await?.id, pod.id.clone())?;
    same("what a command says", t.sh(short, "echo here").await?.as_str(), "here")?;
    t.stop(short, 0).await?;
    same("the state", t.status(&id).await?.state(), ContainerState::ContainerExited)?;
    t.try_remove(short).await.context("RemoveContainer")?;
    refused_with("the removed one", t.try_status(&id).await, &[tonic::Code::NotFound])?;
    t.try_stop_pod(short_pod).await.context("StopPodSandbox")?;
    same("the sandbox's state", t.pod_status(&pod.id).await?.state(), v1::PodSandboxState::SandboxNotready)?;
    t.try_remove_pod(short_pod).await.context("RemovePodSandbox")?;
    refused_with("the removed sandbox", t.try_pod_status(&pod.id).await, &[tonic::Code::NotFound]).map(drop)
}

async fn removes(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    t.stop(&id, 30).await?;
    t.try_remove(&id).await.context("RemoveContainer")?;
    gone(&t, &id).await
}

async fn gone(t: &T, id: &str) -> Result<()> {
    refused_with("ContainerStatus after Remove", t.try_status(id).await, &[tonic::Code::NotFound])?;
    let filter = v1::ContainerFilter { id: id.to_owned(), ..Default::default() };
    same("list", list(t, filter).await?.len(), 0)
}

async fn removes_running(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    t.try_remove(&id).await.context("RemoveContainer")?;
    gone(&t, &id).await
}

async fn removes_created(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.create(&pod, &t.shell("true")).await?;
    t.try_remove(&id).await.context("RemoveContainer")?;
    gone(&t, &id).await
}

async fn attributes(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("sleep 1000");
    config.labels.insert("app".to_owned(), "web".to_owned());
    config.annotations = BTreeMap::from([("note".to_owned(), "kept".to_owned())]);
    let host = t.dir.join("mounted");
    std::fs::create_dir_all(&host)?;
    config.mounts = vec![v1::Mount {
        container_path: "/mnt".to_owned(),
        host_path: host.display().to_string(),
        readonly: true,
        ..v1::Mount::default()
    }];
    let id = t.launch(&pod, &config).await?;
    let status = t.status(&id).await?;
    same("metadata", &status.metadata, &config.metadata)?;
    same("labels", &status.labels, &config.labels)?;
    same("annotations", &status.annotations, &config.annotations)?;
    same("log_path", status.log_path, T::log_file(&pod, &config).display().to_string())?;
    anyhow::ensure!(!status.image_ref.is_empty(), "no image_ref");
    anyhow::ensure!(!status.image.unwrap_or_default().image.is_empty(), "no image");
    let mount = status.mounts.iter().find(|mount| mount.container_path == "/mnt").context("no mount /mnt")?;
    same("host_path", mount.host_path.as_str(), host.display().to_string())?;
    same("readonly", mount.readonly, true)
}

async fn verbose(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let request = v1::ContainerStatusRequest { container_id: id, verbose: true };
    let info = t.rt().container_status(request).await.context("ContainerStatus")?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no `info`")?)?;
    anyhow::ensure!(info["pid"].as_i64().is_some_and(|pid| pid > 0), "no pid: {info}");
    anyhow::ensure!(info["runtimeSpec"]["process"].is_object(), "no runtimeSpec: {info}");
    Ok(())
}

async fn status_resources(t: T) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            let wanted = resources(config);
            (wanted.cpu_period, wanted.cpu_quota, wanted.cpu_shares) = (100_000, 50_000, 512);
            wanted.memory_limit_in_bytes = 64 << 20;
        })
        .await?;
    let linux =
        t.status(&id).await?.resources.and_then(|all| all.linux).context("no resources in the status")?;
    same("cpu_quota", linux.cpu_quota, 50_000)?;
    same("cpu_shares", linux.cpu_shares, 512)?;
    same("memory_limit_in_bytes", linux.memory_limit_in_bytes, 64 << 20)
}

async fn start_twice(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    refused("a second Start", t.try_start(&id).await)?;
    same("state", t.status(&id).await?.state(), ContainerState::ContainerRunning)
}

async fn start_ended(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell("true")).await?;
    t.exited(&id).await?;
    refused("Start of an ended container", t.try_start(&id).await).map(drop)
}

/// The reference refuses (the name is reserved); giving the same container is as good.
async fn same_attempt(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let config = t.shell("true");
    let first = t.create(&pod, &config).await?;
    if let Ok(second) = t.try_create(&pod, &config).await {
        same("the id of the second answer", second, first)?;
    }
    let filter = v1::ContainerFilter { pod_sandbox_id: pod.id, ..Default::default() };
    same("containers", list(&t, filter).await?.len(), 1)
}

async fn name_is_free(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let config = t.shell("true");
    let first = t.create(&pod, &config).await?;
    t.try_remove(&first).await.context("RemoveContainer")?;
    let second = t.create(&pod, &config).await?;
    anyhow::ensure!(first != second, "an id came back");
    Ok(())
}

async fn unknown_sandbox(t: T) -> Result<()> {
    let mut pod = t.sandbox().await?;
    pod.id = "f".repeat(64);
    let result = t.try_create(&pod, &t.shell("true")).await;
    refused_with("a container of an unknown sandbox", result, &[tonic::Code::NotFound]).map(drop)
}

async fn unknown_image(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("true");
    config.image = Some(image_spec("127.0.0.1:1/nobody/has-this:latest"));
    let result = t.try_create(&pod, &config).await;
    let status = refused_with("a container of an unknown image", result, &[tonic::Code::NotFound])?;
    holds("the error", status.message(), "nobody/has-this")
}

async fn image_names(t: T) -> Result<()> {
    let reference = t.suite.catalog.reference("conformance/busybox:1.36")?;
    let id = t.pull(&reference).await?;
    let image = t.image(&reference).await?.context("no status")?;
    let digest = image.repo_digests.first().cloned().context("no digest")?;
    let short = id.strip_prefix("sha256:").context("the id begins with sha256:")?[..12].to_owned();
    let pod = t.sandbox().await?;
    for name in [reference, digest, id.clone(), short] {
        let mut config = t.shell("true");
        config.image = Some(image_spec(&name));
        let container = t.create(&pod, &config).await.with_context(|| format!("by {name}"))?;
        let status = t.status(&container).await?;
        anyhow::ensure!(
            !status.image.unwrap_or_default().image.is_empty(),
            "by {name}: no image in the status"
        );
        // Not in cri-api 0.25.
        anyhow::ensure!(
            [id.as_str(), ""].contains(&status.image_id.as_str()),
            "by {name}: {}",
            status.image_id
        );
    }
    Ok(())
}

async fn start_in_stopped(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.create(&pod, &t.shell("true")).await?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    refused("Start in a stopped sandbox", t.try_start(&id).await).map(drop)
}

async fn unknown_status(t: T) -> Result<()> {
    refused_with("ContainerStatus", t.try_status("nothing").await, &[tonic::Code::NotFound]).map(drop)
}

async fn unknown_start(t: T) -> Result<()> {
    refused_with("StartContainer", t.try_start("nothing").await, &[tonic::Code::NotFound]).map(drop)
}

pub(super) async fn list(t: &T, filter: v1::ContainerFilter) -> Result<Vec<v1::Container>> {
    let request = v1::ListContainersRequest { filter: Some(filter) };
    Ok(t.rt().list_containers(request).await.context("ListContainers")?.into_inner().containers)
}

async fn lists(t: T) -> Result<()> {
    let (pod, running) =
        t.idle_with(|config| drop(config.labels.insert("app".to_owned(), "a".to_owned()))).await?;
    let created = t.create(&pod, &t.shell("true")).await?;
    let ids = |all: Vec<v1::Container>| {
        let mut ids: Vec<String> = all.into_iter().map(|item| item.id).collect();
        ids.sort();
        ids
    };
    let filter = v1::ContainerFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() };
    let mut both = vec![running.clone(), created.clone()];
    both.sort();
    same("by sandbox", ids(list(&t, filter.clone()).await?), both)?;
    let state = |state: ContainerState| Some(v1::ContainerStateValue { state: state.into() });
    let by_state = v1::ContainerFilter { state: state(ContainerState::ContainerRunning), ..filter.clone() };
    same("by state", ids(list(&t, by_state).await?), vec![running.clone()])?;
    let label_selector = BTreeMap::from([("app".to_owned(), "a".to_owned())]);
    let by_label = v1::ContainerFilter { label_selector, ..filter.clone() };
    same("by label", ids(list(&t, by_label).await?), vec![running.clone()])?;
    let by_id = v1::ContainerFilter { id: created[..13].to_owned(), ..Default::default() };
    let found = list(&t, by_id).await?;
    let item = found.first().context("by a part of the id: nothing")?;
    same("pod_sandbox_id", item.pod_sandbox_id.as_str(), pod.id.as_str())?;
    same("state", item.state(), ContainerState::ContainerCreated)?;
    let other = v1::ContainerFilter { id: created, state: state(ContainerState::ContainerExited), ..filter };
    same("by id and another state", list(&t, other).await?.len(), 0)
}

async fn exit_of(t: &T, script: &str) -> Result<v1::ContainerStatus> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell(script)).await?;
    t.exited(&id).await
}

async fn exit_zero(t: T) -> Result<()> {
    let status = exit_of(&t, "exit 0").await?;
    same("exit_code and reason", (status.exit_code, status.reason.as_str()), (0, "Completed"))
}

async fn exit_code(t: T) -> Result<()> {
    let status = exit_of(&t, "exit 42").await?;
    same("exit_code and reason", (status.exit_code, status.reason.as_str()), (42, "Error"))
}

async fn exit_signal(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    // As PID 1 of its namespace a process cannot kill itself, so its namespace is the pod's.
    let mut config = t.shell("kill -9 $$");
    let pids = v1::NamespaceMode::Pod.into();
    super::super::context::security(&mut config).namespace_options.get_or_insert_default().pid = pids;
    let id = t.launch(&pod, &config).await?;
    let status = t.exited(&id).await?;
    same("exit_code and reason", (status.exit_code, status.reason.as_str()), (137, "Error"))
}

async fn oom_killed(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("dd if=/dev/zero of=/dev/null bs=64M count=100");
    resources(&mut config).memory_limit_in_bytes = 16 << 20;
    let id = t.launch(&pod, &config).await?;
    let status = t.exited(&id).await?;
    same("exit_code and reason", (status.exit_code, status.reason.as_str()), (137, "OOMKilled"))
}

async fn start_error(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.container();
    config.command = strings(&["/bin/nobody-has-this"]);
    let id = t.create(&pod, &config).await?;
    let error = refused("Start of a missing command", t.try_start(&id).await)?;
    holds("the error", error.message(), "nobody-has-this")?;
    let status = t.status(&id).await?;
    same("state", status.state(), ContainerState::ContainerExited)?;
    same("exit_code and reason", (status.exit_code, status.reason.as_str()), (128, "StartError"))?;
    holds("message", &status.message, "nobody-has-this")
}

async fn stop_term(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell("trap 'exit 9' TERM; echo ready; sleep 3600 & wait")).await?;
    ready(&t, &id).await?;
    t.stop(&id, 60).await?;
    same("exit_code", t.status(&id).await?.exit_code, 9)
}

/// Waits until a shell has set its traps: it has the `sleep` that follows them.
async fn ready(t: &T, id: &str) -> Result<()> {
    t.until("the script sleeps", || async {
        let found = t.try_exec(id, &["/bin/pidof", "sleep"], 60).await.context("ExecSync")?;
        Ok((found.exit_code == 0).then_some(()))
    })
    .await
}

async fn stop_kill(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell("trap '' TERM; sleep 3600 & wait; sleep 3600")).await?;
    ready(&t, &id).await?;
    let begun = std::time::Instant::now();
    t.stop(&id, 2).await?;
    anyhow::ensure!(begun.elapsed().as_millis() >= 1900, "killed after {:?} instead of 2 s", begun.elapsed());
    same("exit_code", t.status(&id).await?.exit_code, 137)
}

async fn stop_now(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell("trap 'exit 9' TERM; sleep 3600 & wait")).await?;
    ready(&t, &id).await?;
    t.stop(&id, 0).await?;
    same("exit_code", t.status(&id).await?.exit_code, 137)
}

async fn stop_image_signal(t: T) -> Result<()> {
    let image = t.pull(&t.suite.catalog.reference("conformance/settings:latest")?).await?;
    let pod = t.sandbox().await?;
    let mut config = t.container();
    config.image = Some(image_spec(&image));
    let id = t.launch(&pod, &config).await?;
    ready(&t, &id).await?;
    t.stop(&id, 60).await?;
    same("exit_code of the trap for SIGUSR1", t.status(&id).await?.exit_code, 7)
}

async fn stop_config_signal(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("trap 'exit 5' INT; trap 'exit 6' TERM; sleep 3600 & wait");
    config.stop_signal = v1::Signal::Sigint.into();
    let id = t.launch(&pod, &config).await?;
    ready(&t, &id).await?;
    same("stop_signal of the status", t.status(&id).await?.stop_signal(), v1::Signal::Sigint)?;
    t.stop(&id, 60).await?;
    same("exit_code of the trap for SIGINT", t.status(&id).await?.exit_code, 5)
}

async fn stop_all_processes(t: T) -> Result<()> {
    let mut config = t.pod();
    let pids = v1::NamespaceMode::Pod.into();
    super::super::context::pod_security(&mut config).namespace_options.get_or_insert_default().pid = pids;
    let pod = t.run(&config).await?;
    let shared = |script: &str| {
        let mut config = t.shell(script);
        super::super::context::security(&mut config).namespace_options.get_or_insert_default().pid = pids;
        config
    };
    let looker = t.launch(&pod, &shared("sleep 5555")).await?;
    let id = t.launch(&pod, &shared("setsid sleep 4444 & trap 'exit 0' TERM; sleep 3600 & wait")).await?;
    ready(&t, &id).await?;
    t.until("the other process runs", || async {
        Ok(t.sh(&looker, "ps -o args").await?.contains("sleep 4444").then_some(()))
    })
    .await?;
    t.stop(&id, 60).await?;
    t.until("no process of the container is left", || async {
        Ok((!t.sh(&looker, "ps -o args").await?.contains("sleep 4444")).then_some(()))
    })
    .await
}

async fn stop_twice_at_once(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    ready(&t, &id).await?;
    let (one, two) = tokio::join!(t.stop(&id, 60), t.stop(&id, 60));
    one?;
    two?;
    same("state", t.status(&id).await?.state(), ContainerState::ContainerExited)
}

async fn command_rules(t: T) -> Result<()> {
    let image = t.pull(&t.suite.catalog.reference("conformance/settings:latest")?).await?;
    let pod = t.sandbox().await?;
    for (command, args, wanted) in [
        (&["/bin/echo"][..], &["x", "y"][..], "x y"),
        (&["/bin/echo", "only"], &[], "only"),
        (&[], &["1", "2"], "entry:1:2:/work/place:yes:"),
    ] {
        let mut config = t.container();
        config.image = Some(image_spec(&image));
        (config.command, config.args) = (strings(command), strings(args));
        let id = t.launch(&pod, &config).await?;
        let file = T::log_file(&pod, &config);
        let log = t
            .until("there is a line in the log", || async {
                let text = std::fs::read_to_string(&file).unwrap_or_default();
                Ok(text.contains('\n').then_some(text))
            })
            .await?;
        holds("the log", &super::logs::text_of(&log)?, wanted)?;
        t.stop(&id, 0).await?;
    }
    Ok(())
}

async fn image_defaults(t: T) -> Result<()> {
    let image = t.pull(&t.suite.catalog.reference("conformance/settings:latest")?).await?;
    let pod = t.sandbox().await?;
    let mut config = t.container();
    config.image = Some(image_spec(&image));
    let id = t.launch(&pod, &config).await?;
    ready(&t, &id).await?;
    let log = super::logs::text_of(&std::fs::read_to_string(T::log_file(&pod, &config))?)?;
    holds("the log", &log, "entry:first:second:/work/place:yes:\n")?;
    t.stop(&id, 0).await
}

async fn working_dir(t: T) -> Result<()> {
    let text = t.output("pwd", |config| config.working_dir = "/made/for/this".to_owned()).await?;
    same("pwd", text.trim(), "/made/for/this")
}

async fn environment(t: T) -> Result<()> {
    let mut pod = t.pod();
    pod.hostname = "given-name".to_owned();
    let pod = t.run(&pod).await?;
    let text = t
        .output_in(&pod, "env", |config| {
            let pair = |key: &str, value: &str| v1::KeyValue { key: key.to_owned(), value: value.to_owned() };
            config.envs = vec![pair("FROM_IMAGE", "no"), pair("OTHER", "a=b c"), pair("EMPTY", "")];
        })
        .await?;
    let lines: Vec<&str> = text.lines().collect();
    for wanted in ["FROM_IMAGE=no", "OTHER=a=b c", "EMPTY=", "HOSTNAME=given-name", "PATH=/bin:/usr/bin"] {
        anyhow::ensure!(lines.contains(&wanted), "{wanted:?} is not in {lines:?}");
    }
    same("FROM_IMAGE lines", lines.iter().filter(|line| line.starts_with("FROM_IMAGE=")).count(), 1)
}

async fn default_path(t: T) -> Result<()> {
    let image = t.pull(&t.suite.catalog.reference("conformance/bare:latest")?).await?;
    let text = t.output("env", |config| config.image = Some(image_spec(&image))).await?;
    let path = text.lines().find_map(|line| line.strip_prefix("PATH=")).context("there is no PATH")?;
    holds("PATH", path, "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

async fn no_command(t: T) -> Result<()> {
    let image = t.pull(&t.suite.catalog.reference("conformance/bare:latest")?).await?;
    let pod = t.sandbox().await?;
    let mut config = t.container();
    config.image = Some(image_spec(&image));
    let result = match t.try_create(&pod, &config).await {
        Ok(id) => t.try_start(&id).await,
        Err(status) => Err(status),
    };
    refused("a container without a command", result).map(drop)
}

async fn no_stdin(t: T) -> Result<()> {
    let text = t.output("wc -c", |_| ()).await?;
    same("bytes of stdin", text.trim(), "0")
}

async fn tty(t: T) -> Result<()> {
    let script = "test -t 0 && test -t 1 && test -t 2 && echo terminal; echo TERM=$TERM; echo error >&2";
    let pod = t.sandbox().await?;
    let mut config = t.shell(script);
    config.tty = true;
    let id = t.launch(&pod, &config).await?;
    t.exited(&id).await?;
    let text = t.log(&pod, &config).await?;
    for wanted in ["terminal", "TERM=xterm", "error"] {
        holds("the log", &text, wanted)?;
    }
    let raw = std::fs::read_to_string(T::log_file(&pod, &config))?;
    anyhow::ensure!(!raw.contains(" stderr "), "a terminal has one stream: {raw}");
    Ok(())
}

async fn pid_one(t: T) -> Result<()> {
    let text = t.output("echo $$", |_| ()).await?;
    same("the shell's pid", text.trim(), "1")
}

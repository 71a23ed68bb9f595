//! Sandboxes and containers on a real containerd, driven as a kubelet drives them, with `kill -9` in between. Needs root.

mod support;

use cri_shim_api::v1;
use cri_shim_api::v1::{ContainerEventType, ContainerState, PodSandboxState};
use support::cri::{Cri, PATIENCE, shell};

async fn sandbox_status(cri: &Cri, id: &str) -> v1::PodSandboxStatus {
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
    let answer = cri.runtime().pod_sandbox_status(request).await.expect("status");
    answer.into_inner().status.expect("status")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_and_leaves_nothing_behind() {
    let mut cri = Cri::start().await;
    let mut pod = cri.pod("web");
    pod.dns_config = Some(v1::DnsConfig { servers: vec!["10.96.0.10".into()], ..v1::DnsConfig::default() });
    let sandbox = cri.run(&pod).await.unwrap();
    assert_eq!(cri.run(&pod).await.unwrap(), sandbox, "a repeated request gets the same sandbox");
    let status = sandbox_status(&cri, &sandbox).await;
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert_eq!(status.annotations["note"], "kept");
    let network = status.network.unwrap();
    assert_eq!((network.ip.as_str(), network.additional_ips[0].ip.as_str()), ("10.88.0.7", "fd00::7"));

    let mut config = shell("main", "echo out; echo err >&2; exec sleep 3600");
    config.envs = vec![v1::KeyValue { key: "FROM_POD".into(), value: "also".into() }];
    let id = cri.create(&sandbox, &pod, config).await.unwrap();
    assert_eq!(cri.status(&id).await.state(), ContainerState::ContainerCreated);
    cri.launch(&id).await.unwrap();
    let log = cri.log_has("web", "main", "stderr F err").await;
    assert!(log.contains(" stdout F out\n"), "{log}");

    let seen = cri.exec(&id, &["sh", "-c", "hostname; cat /etc/resolv.conf; env; id -G; id -u"]).await;
    let seen = text(&seen.stdout);
    for part in ["web\n", "nameserver 10.96.0.10", "FROM_IMAGE=yes", "FROM_POD=also", "HOSTNAME=web"] {
        assert!(seen.contains(part), "{part:?} is not in {seen}");
    }
    let denied = cri.exec(&id, &["mount", "-t", "tmpfs", "x", "/mnt"]).await;
    assert_ne!(denied.exit_code, 0, "mounting needs a capability");

    let before = cri.status(&id).await;
    cri.restart().await;
    assert_eq!(cri.status(&id).await, before, "a restart changes nothing");
    assert_eq!(sandbox_status(&cri, &sandbox).await.state(), PodSandboxState::SandboxReady);
    assert_eq!(text(&cri.exec(&id, &["echo", "still"]).await.stdout), "still");

    let stop = v1::StopContainerRequest { container_id: id.clone(), timeout: 1 };
    cri.runtime().stop_container(stop).await.unwrap();
    let ended = cri.status(&id).await;
    assert_eq!(
        (ended.state(), ended.exit_code),
        (ContainerState::ContainerExited, 137),
        "sleep is process 1"
    );
    cri.remove(&sandbox).await;
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
    assert_eq!(cri.terminate(), Some(0));
    for socket in ["cri.sock", "metrics.sock"] {
        assert!(!cri.dir().join(socket).exists(), "{socket} is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_with_the_same_directories_is_refused() {
    let cri = Cri::start().await;
    let text = std::fs::read_to_string(cri.dir().join("cri.yaml")).unwrap();
    let other = cri.dir().join("other.yaml");
    let second = || {
        let program = env!("CARGO_BIN_EXE_keelson-cri");
        let output = std::process::Command::new(program).arg("--config").arg(&other).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    std::fs::write(&other, text.replace("cri.sock", "other.sock").replace("metrics.sock", "m.sock")).unwrap();
    let told = second();
    assert!(told.contains("stateDir: another server works with"), "{told}");
    std::fs::write(&other, std::fs::read_to_string(&other).unwrap().replace("cri/state", "cri/state2"))
        .unwrap();
    let told = second();
    assert!(told.contains("rootDir: another server works with"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_told_with_their_reason() {
    let cri = Cri::start().await;
    let pod = cri.pod("ends");
    let sandbox = cri.run(&pod).await.unwrap();
    let mut events = cri.runtime().get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();

    let good = cri.script(&sandbox, &pod, "good", "echo bye").await;
    let ended = cri.ended(&good).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "Completed"));
    assert!(ended.finished_at >= ended.started_at && ended.started_at >= ended.created_at);
    assert!(cri.log_has("ends", "good", "bye").await.contains(" F bye\n"));
    let mut kinds = Vec::new();
    while kinds.last() != Some(&ContainerEventType::ContainerStoppedEvent) {
        let event = tokio::time::timeout(PATIENCE, events.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(event.container_id, good);
        assert_eq!(event.pod_sandbox_status.as_ref().unwrap().id, sandbox);
        kinds.push(event.container_event_type());
    }
    assert_eq!(kinds.first(), Some(&ContainerEventType::ContainerCreatedEvent));

    let bad = cri.script(&sandbox, &pod, "bad", "exit 3").await;
    let ended = cri.ended(&bad).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));

    let mut missing = shell("missing", "");
    missing.command = vec!["/no/such/program".into()];
    let id = cri.create(&sandbox, &pod, missing).await.unwrap();
    let refused = cri.launch(&id).await.unwrap_err();
    assert!(refused.message().contains("/no/such/program"), "{refused}");
    let ended = cri.status(&id).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (128, "StartError"));
    assert!(ended.message.contains("no such file or directory"), "{}", ended.message);

    let mut greedy = shell("greedy", "");
    greedy.command = vec![
        "/bin/busybox".into(),
        "dd".into(),
        "if=/dev/zero".into(),
        "of=/dev/null".into(),
        "bs=200M".into(),
    ];
    greedy.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        ..v1::LinuxContainerResources::default()
    });
    let id = cri.create(&sandbox, &pod, greedy).await.unwrap();
    cri.launch(&id).await.unwrap();
    let ended = cri.ended(&id).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));

    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_while_it_is_away_is_found_out() {
    let mut cri = Cri::start().await;
    let pod = cri.pod("away");
    let sandbox = cri.run(&pod).await.unwrap();
    let mut config = shell("early", "while [ ! -e /go/now ]; do sleep 0.05; done; echo meanwhile; exit 7");
    let signal = cri.dir().join("go");
    config.mounts = vec![v1::Mount {
        container_path: "/go".into(),
        host_path: signal.display().to_string(),
        ..v1::Mount::default()
    }];
    let early = cri.create(&sandbox, &pod, config).await.unwrap();
    cri.launch(&early).await.unwrap();
    let late = cri
        .script(&sandbox, &pod, "late", "i=0; while true; do i=$((i+1)); echo line $i; sleep 0.02; done")
        .await;
    cri.log_has("away", "late", "line 3").await;

    cri.kill();
    std::fs::write(signal.join("now"), b"").unwrap();
    // What an interrupted operation could have left: nothing explains it.
    std::fs::create_dir_all(cri.dir().join("cri/state/sandboxes/orphan/shm")).unwrap();
    std::fs::write(cri.dir().join("cri/netns/cni-orphan"), b"").unwrap();
    let client = keelson_cri::containerd::Client::new(&cri.containerd.socket(), "keelson").unwrap();
    tokio::time::timeout(PATIENCE, client.wait_task(&early, "")).await.unwrap().unwrap();
    cri.start_again().await;

    let ended = cri.ended(&early).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (7, "Error"));
    cri.log_has("away", "early", "meanwhile").await;
    let log = cri.log_has("away", "late", "line 40").await;
    assert!(log.contains("line 20\n"), "output of the time in between is there");
    assert_eq!(cri.status(&late).await.state(), ContainerState::ContainerRunning);
    assert!(!cri.dir().join("cri/state/sandboxes/orphan").exists());
    assert!(!cri.dir().join("cri/netns/cni-orphan").exists());

    cri.containerd.restart();
    cri.answers(&late).await;
    assert_eq!(cri.status(&late).await.state(), ContainerState::ContainerRunning);
    let again = cri.script(&sandbox, &pod, "again", "echo back").await;
    assert_eq!(cri.ended(&again).await.exit_code, 0);
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_name_the_cause() {
    let cri = Cri::start().await;
    std::fs::remove_file(cri.dir().join("net.d/10-test.conflist")).unwrap();
    let pod = cri.pod("refused");
    let begun = tokio::time::Instant::now();
    let refused = loop {
        match cri.run(&pod).await {
            Err(status) => break status,
            Ok(id) => cri.remove(&id).await,
        }
        assert!(begun.elapsed() < PATIENCE, "the lost network is not noticed");
    };
    assert!(refused.message().contains("no network config found"), "{refused}");
    cri.configure_network();
    let sandbox = loop {
        match cri.run(&pod).await {
            Ok(id) => break id,
            Err(status) => assert!(begun.elapsed() < PATIENCE, "{status}"),
        }
    };
    let mut absent = shell("absent", "true");
    absent.image = Some(v1::ImageSpec { image: "nowhere:latest".into(), ..v1::ImageSpec::default() });
    let status = cri.create(&sandbox, &pod, absent).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound, "{status}");
    let mut unknown = shell("unknown", "true");
    unknown.linux.as_mut().unwrap().security_context.as_mut().unwrap().run_as_username = "nobody-here".into();
    let status = cri.create(&sandbox, &pod, unknown).await.unwrap_err();
    assert!(status.message().contains("nobody-here"), "{status}");
    let request = v1::ContainerStatusRequest { container_id: "none".into(), verbose: false };
    assert_eq!(cri.runtime().container_status(request).await.unwrap_err().code(), tonic::Code::NotFound);
    let request = v1::StopContainerRequest { container_id: "none".into(), timeout: 0 };
    cri.runtime().stop_container(request).await.expect("stopping what is not there is fine");
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_figures_and_rotation() {
    let cri = Cri::start().await;
    let pod = cri.pod("figures");
    let sandbox = cri.run(&pod).await.unwrap();
    let script = "i=0; while true; do i=$((i+1)); echo line $i; sleep 0.02; done";
    let id = cri.script(&sandbox, &pod, "busy", script).await;
    cri.log_has("figures", "busy", "line 2").await;

    let limits = v1::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_shares: 512,
        ..Default::default()
    };
    let update = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(limits),
        ..v1::UpdateContainerResourcesRequest::default()
    };
    cri.runtime().update_container_resources(update).await.unwrap();
    let shown = cri.status(&id).await.resources.unwrap().linux.unwrap();
    assert_eq!((shown.memory_limit_in_bytes, shown.cpu_shares), (64 << 20, 512));

    let request = v1::ContainerStatsRequest { container_id: id.clone() };
    let stats = cri.runtime().container_stats(request).await.unwrap().into_inner().stats.unwrap();
    assert_eq!(stats.attributes.unwrap().metadata.unwrap().name, "busy");
    let memory = stats.memory.unwrap();
    assert!(memory.usage_bytes.unwrap().value > 0);
    assert!(memory.available_bytes.unwrap().value <= 64 << 20, "the new limit counts");
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let request = v1::ListPodSandboxStatsRequest::default();
    let all = cri.runtime().list_pod_sandbox_stats(request).await.unwrap().into_inner().stats;
    let linux = all[0].linux.as_ref().unwrap();
    assert!(linux.process.as_ref().unwrap().process_count.unwrap().value >= 2, "pause and the shell");
    assert_eq!(linux.containers.len(), 1);

    let log = cri.dir().join("podlogs/figures/busy.log");
    let rotated = log.with_extension("old");
    std::fs::rename(&log, &rotated).unwrap();
    let request = v1::ReopenContainerLogRequest { container_id: id.clone() };
    cri.runtime().reopen_container_log(request).await.unwrap();
    cri.log_has("figures", "busy", "line").await;
    let number = |text: &str, last: bool| -> u32 {
        let mut numbers = text.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok());
        if last { numbers.next_back().unwrap() } else { numbers.next().unwrap() }
    };
    let before = number(&std::fs::read_to_string(&rotated).unwrap(), true);
    let after = number(&std::fs::read_to_string(&log).unwrap(), false);
    assert_eq!(after, before + 1, "no line is lost or doubled");
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

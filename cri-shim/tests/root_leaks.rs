//! What a failure in the middle must not leave: addresses of sandboxes that never came to be, files of checkpoints that were
//! cut off. Needs root.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cri_shim_api::v1;
use serde_json::json;
use support::cri::{Cri, PATIENCE, shell};

/// As the stand-in of all tests, but detaching fails while the file `no-del` is there.
const PLUGIN: &str = r#"#!/bin/sh
case "$CNI_COMMAND" in
ADD) : > "DIR/attached/$CNI_CONTAINERID"; echo '{"cniVersion":"1.0.0","ips":[{"address":"10.88.0.7/24"}]}' ;;
DEL) if [ -e "DIR/no-del" ]; then echo '{"code":11,"msg":"the address store is away"}'; exit 1; fi
     rm -f "DIR/attached/$CNI_CONTAINERID" ;;
esac
"#;

fn program(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
    // Beside it first: the old one may be running.
    let new = path.with_extension("new");
    std::fs::write(&new, text).expect("written");
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).expect("executable");
    std::fs::rename(new, path).expect("renamed");
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let found = std::fs::read_dir(directory).into_iter().flatten().flatten();
    found.map(|entry| entry.path()).collect()
}

async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = tokio::time::Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_a_sandbox_that_never_was_is_given_back_when_it_can_be() {
    let mut cri = Cri::start().await;
    let dir = cri.dir().to_owned();
    program(&dir.join("bin/stand-in"), &PLUGIN.replace("DIR", &dir.display().to_string()));
    let (attached, debts) = (dir.join("attached"), dir.join("cri/root/journal/detachments"));
    std::fs::write(dir.join("no-del"), "").expect("written");
    // Attaching succeeds; the pause process cannot be made.
    let mut pod = cri.pod("half");
    pod.linux.as_mut().expect("linux").sysctls.insert("net.no.such.parameter".into(), "1".into());
    for _ in 0..2 {
        let refused = cri.run(&pod).await.expect_err("there is no such parameter");
        assert!(refused.message().contains("parameter"), "{refused}");
    }
    let listed = cri.runtime().list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.expect("listed");
    assert!(listed.into_inner().items.is_empty(), "nobody can ask for its end");
    assert_eq!(entries(&attached).len(), 2, "the plugin holds what it gave");
    assert_eq!(entries(&debts).len(), 2, "and that is written down");

    cri.restart().await;
    assert_eq!((entries(&attached).len(), entries(&debts).len()), (2, 2), "also after a restart");
    std::fs::remove_file(dir.join("no-del")).expect("removed");
    wait_until("the addresses are not given back", || entries(&attached).is_empty()).await;
    wait_until("what is done stays written down", || entries(&debts).is_empty()).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_sandbox_that_could_not_be_stopped_at_first_is_told_once() {
    let cri = Cri::start().await;
    let dir = cri.dir().to_owned();
    program(&dir.join("bin/stand-in"), &PLUGIN.replace("DIR", &dir.display().to_string()));
    let pod = cri.pod("stuck");
    let sandbox = cri.run(&pod).await.expect("run");
    let mut events =
        cri.runtime().get_container_events(v1::GetEventsRequest {}).await.expect("followed").into_inner();
    std::fs::write(dir.join("no-del"), "").expect("written");
    let stop = || v1::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    for _ in 0..2 {
        let refused = cri.runtime().stop_pod_sandbox(stop()).await.expect_err("the plugin fails");
        assert!(refused.message().contains("the address store is away"), "{refused}");
    }
    assert_eq!(cri.state_of(&sandbox).await, v1::PodSandboxState::SandboxNotready);
    std::fs::remove_file(dir.join("no-del")).expect("removed");
    cri.remove(&sandbox).await;
    let mut kinds = Vec::new();
    while kinds.last() != Some(&v1::ContainerEventType::ContainerDeletedEvent) {
        let event = tokio::time::timeout(PATIENCE, events.message()).await.expect("in time");
        kinds.push(event.expect("an event").expect("no end").container_event_type());
    }
    let wanted =
        [v1::ContainerEventType::ContainerStoppedEvent, v1::ContainerEventType::ContainerDeletedEvent];
    assert_eq!(kinds, wanted);
    cri.assert_nothing_left().await;
}

/// runc, but a checkpoint hangs, as one of a large container on a slow disk may.
const SLOW_RUNC: &str = r#"#!/bin/sh
for word in "$@"; do
    if [ "$word" = checkpoint ]; then
        echo begun >> "DIR/begun"
        while :; do read -r _ <> "DIR/never"; done
    fi
done
exec runc "$@"
"#;

fn checkpoint(
    cri: &Cri,
    id: &str,
    location: &Path,
    timeout: i64,
) -> tokio::task::JoinHandle<Result<(), tonic::Status>> {
    let mut client = cri.runtime();
    let request = v1::CheckpointContainerRequest {
        container_id: id.to_owned(),
        location: location.display().to_string(),
        timeout,
    };
    tokio::spawn(async move { client.checkpoint_container(request).await.map(drop) })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_hangs_holds_nobody_up_and_leaves_nothing() {
    let mut cri = Cri::start().await;
    let dir = cri.dir().to_owned();
    let here = |text: &str| text.replace("DIR", &dir.display().to_string());
    program(&dir.join("path/criu"), "#!/bin/sh\nexit 0\n");
    program(&dir.join("slow-runc"), &here(SLOW_RUNC));
    nix::unistd::mkfifo(&dir.join("never"), nix::sys::stat::Mode::S_IRWXU).expect("made");
    let handler = json!({ "name": "slow", "kind": "runc", "binary": dir.join("slow-runc") });
    cri.reconfigure(&json!({ "handlers": [handler], "defaultHandler": "slow" })).await;
    let pod = cri.pod("frozen");
    let sandbox = cri.run(&pod).await.expect("run");
    let begun = |count: usize| {
        let text = std::fs::read_to_string(dir.join("begun")).unwrap_or_default();
        text.lines().count() >= count
    };
    let (work, location) = (dir.join("cri/root/checkpoints"), dir.join("kept.tar"));

    // Whoever stops the container is not held up, and who asked for the checkpoint hears of it.
    let id = cri.script(&sandbox, &pod, "stopped", "exec sleep 3600").await;
    let asked = checkpoint(&cri, &id, &location, 0);
    wait_until("no checkpoint begins", || begun(1)).await;
    let behind = checkpoint(&cri, &id, &dir.join("behind.tar"), 0);
    let stop = v1::StopContainerRequest { container_id: id.clone(), timeout: 0 };
    let stopped = tokio::time::timeout(PATIENCE, cri.runtime().stop_container(stop)).await;
    stopped.expect("stopping waits for the checkpoint").expect("stopped");
    let failed = tokio::time::timeout(PATIENCE, asked).await.expect("answered").expect("joined");
    failed.expect_err("there is no checkpoint");
    let failed = tokio::time::timeout(PATIENCE, behind).await.expect("answered").expect("joined");
    failed.expect_err("nor does one begin that waited for its turn");
    assert!(!begun(2), "its program never began");
    assert_eq!(entries(&work), Vec::<PathBuf>::new());

    // Its own deadline ends it, also when nobody waits any more.
    let id = cri.script(&sandbox, &pod, "late", "exec sleep 3600").await;
    let asked = checkpoint(&cri, &id, &location, 2);
    wait_until("no checkpoint begins", || begun(2)).await;
    asked.abort();
    wait_until("its files stay", || entries(&work).is_empty()).await;
    let exec = cri.exec(&id, &["/bin/echo", "on"]).await;
    assert_eq!(exec.stdout, b"on\n", "the container goes on");

    // A crash in the middle.
    let asked = checkpoint(&cri, &id, &location, 600);
    wait_until("no checkpoint begins", || begun(3)).await;
    let part = dir.join("kept.tar.part");
    std::fs::write(&part, "half").expect("written");
    cri.restart().await;
    asked.abort();
    wait_until("its files stay", || entries(&work).is_empty() && !part.exists()).await;
    cri.answers(&id).await;
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_criu_that_hangs_ends_with_its_deadline_a_stop_and_a_restart() {
    let mut cri = Cri::start().await;
    let dir = cri.dir().to_owned();
    let begun = dir.join("begun");
    let criu = format!("#!/bin/sh\n[ $1 = check ] && exit 0\necho >>{}\nexec sleep 3600\n", begun.display());
    program(&dir.join("path/criu"), &criu);
    let pod = cri.pod("frozen");
    let sandbox = cri.run_with(&pod, "keelson").await.expect("run");
    let started = |count: usize| std::fs::read_to_string(&begun).unwrap_or_default().lines().count() >= count;
    let (work, location) = (dir.join("cri/root/checkpoints"), dir.join("kept.tar"));

    let id = cri.script(&sandbox, &pod, "late", "exec sleep 3600").await;
    let asked = checkpoint(&cri, &id, &location, 1);
    let failed = tokio::time::timeout(PATIENCE, asked).await.expect("answered").expect("joined");
    let failed = failed.expect_err("there is no checkpoint");
    assert!(failed.message().contains("not done after 1 s"), "{failed}");
    assert_eq!(entries(&work), Vec::<PathBuf>::new());

    let asked = checkpoint(&cri, &id, &location, 600);
    wait_until("no checkpoint begins", || started(2)).await;
    cri.restart().await;
    asked.abort();
    wait_until("its files stay", || entries(&work).is_empty()).await;
    cri.answers(&id).await;

    let asked = checkpoint(&cri, &id, &location, 600);
    wait_until("no checkpoint begins", || started(3)).await;
    let stop = v1::StopContainerRequest { container_id: id.clone(), timeout: 0 };
    let stopped = tokio::time::timeout(PATIENCE, cri.runtime().stop_container(stop)).await;
    stopped.expect("stopping waits for the checkpoint").expect("stopped");
    let failed = tokio::time::timeout(PATIENCE, asked).await.expect("answered").expect("joined");
    failed.expect_err("there is no checkpoint");
    assert_eq!(entries(&work), Vec::<PathBuf>::new());
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_of_runc_writes_on_while_nobody_reads() {
    let mut cri = Cri::start().await;
    let pod = cri.pod("talker");
    let sandbox = cri.run_with(&pod, "runc").await.expect("run");
    // More than a pipe holds by itself; 100 bytes a line.
    let line = "x".repeat(99);
    let script = format!(
        "echo ready; while [ ! -e /go ]; do sleep 0.05; done; i=0; \
         while [ $i -lt 9000 ]; do echo {line}; i=$((i+1)); done; echo written > /done; exec sleep 3600"
    );
    let id = cri.create(&sandbox, &pod, shell("main", &script)).await.expect("created");
    cri.launch(&id).await.expect("started");
    cri.log_has("talker", "main", "ready\n").await;
    let request = v1::ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = cri.runtime().container_status(request).await.expect("status").into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
    let root = PathBuf::from(format!("/proc/{}/root", info["pid"]));
    cri.kill();
    std::fs::write(root.join("go"), "").expect("written");
    wait_until("the container waits for a reader", || root.join("done").exists()).await;
    cri.start_again().await;
    let path = dir_log(&cri);
    wait_until("lines are lost", || {
        std::fs::read_to_string(&path)
            .unwrap_or_default()
            .lines()
            .filter(|text| text.ends_with(&line))
            .count()
            == 9000
    })
    .await;
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

fn dir_log(cri: &Cri) -> PathBuf {
    cri.dir().join("podlogs/talker/main.log")
}

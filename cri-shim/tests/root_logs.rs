//! Logs that cannot be written, or that nobody writes for a while: no container waits for another's. Needs root.

mod support;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use cri_shim_api::v1;
use cri_shim_api::v1::ContainerState;
use support::cri::{Cri, PATIENCE, shell};
use support::pods::sandboxes;

/// More than pipes and buffers hold: it is written only when somebody takes it.
const LINES: usize = 400_000;

/// A log on a disk that takes nothing at the moment: a FIFO that somebody has open and does not read.
fn slow_disk(path: &Path) -> File {
    std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("made");
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).expect("opened")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_log_stalls_no_other_container() {
    let cri = Cri::start().await;
    for (pod, sandbox) in sandboxes(&cri, "slow", |_| ()).await {
        let name = pod.metadata.as_ref().expect("a name").name.clone();
        let directory = cri.dir().join("podlogs").join(&name);
        let (mut disks, mut stalled) = (Vec::new(), Vec::new());
        for index in 0..4 {
            disks.push(slow_disk(&directory.join(format!("stalled-{index}.log"))));
            // It says when all is said; what its log has not taken keeps it waiting.
            let script = format!("busybox seq 1 {LINES}; echo > /done");
            stalled.push(cri.script(&sandbox, &pod, &format!("stalled-{index}"), &script).await);
        }
        let quick = cri.script(
            &sandbox,
            &pod,
            "quick",
            "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.01; done",
        );
        let quick = quick.await;
        cri.log_has(&name, "quick", "tick 50\n").await;
        // A new one of the same pod, from its start to its end.
        let late = cri.script(&sandbox, &pod, "late", "echo said; exit 4").await;
        assert_eq!(cri.ended(&late).await.exit_code, 4);
        cri.log_has(&name, "late", "F said\n").await;
        // A log is rotated while the others stand still.
        let log = directory.join("quick.log");
        std::fs::rename(&log, directory.join("quick.old")).expect("renamed");
        let reopen = v1::ReopenContainerLogRequest { container_id: quick.clone() };
        cri.runtime().reopen_container_log(reopen).await.expect("reopened");
        cri.log_has(&name, "quick", "tick").await;
        for id in &stalled {
            assert_eq!(cri.status(id).await.state(), ContainerState::ContainerRunning);
            cri.answers(id).await;
            assert_ne!(
                cri.exec(id, &["ls", "/done"]).await.exit_code,
                0,
                "{name}: its output went somewhere"
            );
        }
        // One of them is read at last, and goes on to its end with every line.
        let text = read_all(&mut disks[0]).await;
        let numbers = text.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok());
        assert_eq!(
            numbers.collect::<Vec<usize>>(),
            (1..=LINES).collect::<Vec<_>>(),
            "{name}: lines are lost"
        );
        // The others are stopped and removed although their disk takes nothing.
        for id in &stalled[1..] {
            let stop = v1::StopContainerRequest { container_id: id.clone(), timeout: 0 };
            let stopped = tokio::time::timeout(PATIENCE, async { cri.runtime().stop_container(stop).await });
            stopped.await.unwrap_or_else(|_| panic!("{name}: Stop hangs")).expect("stopped");
            let remove = v1::RemoveContainerRequest { container_id: id.clone() };
            let removed =
                tokio::time::timeout(PATIENCE, async { cri.runtime().remove_container(remove).await });
            removed.await.unwrap_or_else(|_| panic!("{name}: Remove hangs")).expect("removed");
        }
        tokio::time::timeout(PATIENCE, cri.remove(&sandbox)).await.expect("the pod goes");
        drop(disks);
    }
    cri.assert_nothing_left().await;
}

/// Reads a FIFO to the last line.
async fn read_all(disk: &mut File) -> String {
    let (mut text, begun) = (Vec::new(), tokio::time::Instant::now());
    let last = format!(" {LINES}\n").into_bytes();
    while !text.ends_with(&last) {
        let mut buffer = vec![0; 65_536];
        while let Ok(count @ 1..) = disk.read(&mut buffer) {
            text.extend_from_slice(&buffer[..count]);
        }
        let end = String::from_utf8_lossy(&text[text.len().saturating_sub(80)..]).into_owned();
        assert!(begun.elapsed() < PATIENCE, "not at its end: {end:?}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_loses_lines_and_nothing_else() {
    let cri = Cri::start().await;
    for (pod, sandbox) in sandboxes(&cri, "full", |_| ()).await {
        let name = pod.metadata.as_ref().expect("a name").name.clone();
        let directory = cri.dir().join("podlogs").join(&name);
        std::fs::create_dir_all(&directory).expect("made");
        std::os::unix::fs::symlink("/dev/full", directory.join("full.log")).expect("linked");
        let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo line $i; done; exit 9";
        let id = cri.script(&sandbox, &pod, "full", script).await;
        assert_eq!(cri.ended(&id).await.exit_code, 9, "{name}: it is not held up");
        cri.remove(&sandbox).await;
    }
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_while_the_server_is_away_holds_nobody_up() {
    let mut cri = Cri::start().await;
    let pod = cri.pod("away");
    let sandbox = cri.run_with(&pod, "keelson").await.expect("running");
    let wait = "while [ ! -e /go/now ]; do sleep 0.02; done";
    // A mebibyte, sixteen times what a pipe holds.
    let script =
        format!("{wait}; busybox yes 0123456789abcde | head -n 65536; echo > /go/said; exec sleep 3600");
    let go = cri.dir().join("go");
    std::fs::create_dir_all(&go).expect("made");
    let mut config = shell("main", &script);
    config.mounts = vec![support::pods::mount(&go, "/go")];
    let id = cri.create(&sandbox, &pod, config).await.expect("created");
    cri.launch(&id).await.expect("started");
    cri.kill();
    std::fs::write(go.join("now"), "").expect("written");
    let begun = tokio::time::Instant::now();
    while !go.join("said").exists() {
        assert!(begun.elapsed() < PATIENCE, "it waits for somebody to read");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    cri.start_again().await;
    let log = cri.dir().join("podlogs/away/main.log");
    let begun = tokio::time::Instant::now();
    loop {
        let lines = std::fs::read_to_string(&log).expect("a log").lines().count();
        if lines == 65_536 {
            break;
        }
        assert!(lines < 65_536 && begun.elapsed() < PATIENCE, "{lines} lines");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

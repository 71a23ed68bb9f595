//! The shim under a real containerd: the life of containers and exec processes, streams, restarts and deaths. Needs root.

mod support;

use std::fs::File;
use std::io::Write;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;
use support::node::{Node, Wanted, read_fifo};
use support::{PATIENCE, processes_with, wait_for};

async fn text(reader: tokio::task::JoinHandle<String>) -> String {
    tokio::time::timeout(PATIENCE, reader).await.expect("in time").expect("read")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_lives_and_leaves_nothing() {
    let node = Node::start().await;
    let topics = node.topics_until("/tasks/delete").await;
    let (stdout, stderr) = (node.fifo("out"), node.fifo("err"));
    let (out, err) = (read_fifo(&stdout), read_fifo(&stderr));
    let wanted = Wanted { stdout, stderr, ..Wanted::default() };
    let (id, pid) = node.create("echo out; echo err >&2; exit 3", &wanted).await.expect("created");
    assert_eq!(node.state(&id).await.expect("known").status, 1, "created");
    assert_eq!(node.start_process(&id, "").await.expect("started"), pid);
    assert_eq!(node.wait(&id, "").await, 3);
    assert_eq!((text(out).await.as_str(), text(err).await.as_str()), ("out\n", "err\n"));
    let state = node.state(&id).await.expect("known");
    assert_eq!((state.status, state.exit_status), (3, 3), "stopped");
    assert_eq!(node.delete(&id).await.expect("deleted"), 3);
    let topics = tokio::time::timeout(PATIENCE, topics).await.expect("in time").expect("told");
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn input_ends_when_it_is_closed_and_signals_end_what_runs() {
    let node = Node::start().await;
    let (stdin, stdout) = (node.fifo("in"), node.fifo("out"));
    let out = read_fifo(&stdout);
    let wanted = Wanted { stdin: stdin.clone(), stdout, ..Wanted::default() };
    let (id, _) = node.run("cat; exit 7", &wanted).await;
    File::options().write(true).open(&stdin).expect("opened").write_all(b"hello").expect("written");
    let request = containerd_client::services::v1::CloseIoRequest {
        container_id: id.clone(),
        exec_id: String::new(),
        stdin: true,
    };
    let mut request = containerd_client::tonic::Request::new(request);
    request.metadata_mut().insert("containerd-namespace", "shimtest".parse().expect("ascii"));
    node.tasks().close_io(request).await.expect("closed");
    assert_eq!(node.wait(&id, "").await, 7, "the end of its input ends cat");
    assert!(text(out).await.starts_with("hello"));
    node.delete(&id).await.expect("deleted");
    let (id, _) = node.run("exec sleep 3600", &Wanted::default()).await;
    node.kill(&id, "", 9).await.expect("killed");
    assert_eq!(node.wait(&id, "").await, 137);
    let gone = node.kill(&id, "", 9).await.expect_err("it has ended");
    assert_eq!(gone.code(), containerd_client::tonic::Code::NotFound, "{gone}");
    node.delete(&id).await.expect("deleted");
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_start_says_why() {
    let node = Node::start().await;
    let wanted = Wanted {
        adapt: Some(|spec| spec["process"]["args"] = serde_json::json!(["nope"])),
        ..Wanted::default()
    };
    let refused = match node.create("", &wanted).await {
        Err(status) => status,
        Ok((id, _)) => {
            let status = node.start_process(&id, "").await.expect_err("there is no such program");
            node.wait(&id, "").await;
            node.delete(&id).await.expect("deleted");
            status
        }
    };
    assert!(refused.message().contains("executable file not found in $PATH"), "{refused}");
    let wanted = Wanted { stdout: "binary:///bin/logger".to_owned(), ..Wanted::default() };
    let refused = node.create("", &wanted).await.expect_err("no such scheme");
    assert!(refused.message().contains("\"binary\""), "{refused}");
    let (id, _) = node.create("sleep 3600", &Wanted::default()).await.expect("created");
    node.delete(&id).await.expect("one that was never started goes too");
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_shares_one_shim_and_execs_run_in_its_containers() {
    let node = Node::start().await;
    let wanted = Wanted { pod: Some("pod-one"), ..Wanted::default() };
    let (one, _) = node.run("sleep 3600", &wanted).await;
    let (two, _) = node.run("sleep 3600", &wanted).await;
    let (other, _) = node.run("sleep 3600", &Wanted::default()).await;
    assert_eq!(node.shims().len(), 2, "one for the pod, one for the single container");
    let (said, code) =
        node.exec(&two, &["sh", "-c", "echo in $(cat /etc/passwd); exit 5"]).await.expect("run");
    assert_eq!((said.as_str(), code), ("in root:x:0:0::/:/bin/sh\n", 5));
    let refused = node.exec(&two, &["nope"]).await.expect_err("there is no such program");
    assert!(refused.message().contains("executable file not found in $PATH"), "{refused}");
    for id in [&one, &two, &other] {
        node.kill(id, "", 9).await.expect("killed");
        node.wait(id, "").await;
        node.delete(id).await.expect("deleted");
    }
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size_and_carries_both_ways() {
    let node = Node::start().await;
    let (stdin, stdout) = (node.fifo("in"), node.fifo("out"));
    let out = read_fifo(&stdout);
    let wanted = Wanted { stdin: stdin.clone(), stdout, terminal: true, ..Wanted::default() };
    let (id, _) = node.run("read word; stty size; echo got $word", &wanted).await;
    node.resize(&id, 91, 37).await;
    File::options().write(true).open(&stdin).expect("opened").write_all(b"typed\n").expect("written");
    assert_eq!(node.wait(&id, "").await, 0);
    let said = text(out).await;
    assert!(said.contains("37 91\r\n") && said.contains("got typed\r\n"), "{said:?}");
    node.delete(&id).await.expect("deleted");
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_figures_and_freezing() {
    let node = Node::start().await;
    let (id, pid) = node.run("sleep 36421 & sleep 36421", &Wanted::default()).await;
    wait_for("both sleep", || processes_with("sleep\x0036421").len() >= 2);
    let pids = node.pids(&id).await;
    assert!(pids.contains(&pid) && pids.len() >= 2, "{pids:?}");
    let figures = node.metrics(&id).await;
    assert!(figures.type_url.starts_with("io.containerd.cgroups.v"), "{}", figures.type_url);
    if figures.type_url.contains("v1") {
        let figures =
            keelson_shim::proto::metrics::v1::Metrics::decode(figures.value.as_slice()).expect("figures");
        let usage = figures.memory.expect("memory").usage.expect("usage");
        assert_eq!(usage.limit, 64 << 20);
        assert!(figures.pids.expect("pids").current >= 2);
    }
    node.update_memory(&id, 96 << 20).await;
    node.pause(&id).await.expect("paused");
    assert_eq!(node.state(&id).await.expect("known").status, 4, "paused");
    node.resume(&id).await.expect("resumed");
    assert_eq!(node.state(&id).await.expect("known").status, 2, "running");
    node.kill(&id, "", 9).await.expect("killed");
    node.wait(&id, "").await;
    node.delete(&id).await.expect("deleted");
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_containerd_finds_its_containers_and_hears_what_it_missed() {
    let mut node = Node::start().await;
    let (long, pid) = node.run("sleep 3600", &Wanted::default()).await;
    let (short, _) =
        node.run("while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 7", &Wanted::default()).await;
    node.containerd.kill();
    std::fs::write(node.dir().join("rootfs/tmp/go"), "").expect("written");
    let shims = node.shims();
    node.start_containerd().await;
    let state = node.state(&long).await.expect("known");
    assert_eq!((state.status, state.pid), (2, pid));
    assert_eq!(node.wait(&short, "").await, 7);
    assert_eq!(node.shims(), shims, "the same shims");
    node.kill(&long, "", 15).await.expect("signalled");
    node.kill(&long, "", 9).await.expect("killed");
    node.wait(&long, "").await;
    for id in [&long, &short] {
        node.delete(id).await.expect("deleted");
    }
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_shim_takes_its_containers_along_and_leaves_nothing() {
    let node = Node::start().await;
    let own_socket = Some(node.dir().join("shims/own.sock"));
    let wanted = Wanted { pod: Some("pod-dead"), own_socket: own_socket.clone(), ..Wanted::default() };
    let (one, first) = node.run("sleep 3600", &wanted).await;
    let (_two, second) = node.run("sleep 3600", &wanted).await;
    let topics = node.topics_until("/tasks/exit").await;
    for shim in node.shims() {
        kill(Pid::from_raw(shim), Signal::SIGKILL).expect("killed");
    }
    let alive = |pid: u32| {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    };
    wait_for("the containers end", || !alive(first) && !alive(second));
    let topics = tokio::time::timeout(PATIENCE, topics).await.expect("in time").expect("told");
    assert!(topics.contains(&"/tasks/exit".to_owned()), "{topics:?}");
    // containerd forgets the task; deleting it again is harmless.
    drop(node.delete(&one).await);
    wait_for("the socket goes", || own_socket.as_ref().is_none_or(|path| !path.exists()));
    node.assert_clean();
    let (again, _) = node.run("exit 0", &wanted).await;
    assert_eq!(node.wait(&again, "").await, 0, "the pod gets a new shim");
    node.delete(&again).await.expect("deleted");
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_hook_keeps_nothing_of_a_dead_shim_and_is_ended() {
    let node = Node::start().await;
    let own_socket = node.dir().join("shims/slow.sock");
    let wanted = Wanted {
        own_socket: Some(own_socket.clone()),
        adapt: Some(|spec| {
            let hook = serde_json::json!({ "path": "/bin/sleep", "args": ["sleep", "45672"] });
            spec["hooks"] = serde_json::json!({ "poststop": [hook] });
        }),
        ..Wanted::default()
    };
    node.run("sleep 3600", &wanted).await;
    assert_eq!(node.mounted_roots().len(), 1);
    for shim in node.shims() {
        kill(Pid::from_raw(shim), Signal::SIGKILL).expect("killed");
    }
    wait_for("the hook begins", || !processes_with("45672").is_empty());
    assert_eq!(node.mounted_roots(), Vec::<String>::new(), "while the hook runs");
    assert!(!own_socket.exists(), "while the hook runs");
    wait_for("the hook is ended", || processes_with("45672").is_empty());
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_without_a_pid_namespace_end_with_the_first() {
    let node = Node::start().await;
    let wanted = Wanted {
        adapt: Some(|spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
            namespaces.retain(|namespace| namespace["type"] != "pid");
        }),
        ..Wanted::default()
    };
    let (id, _) =
        node.run("setsid sleep 45671 & setsid sh -c 'sleep 45671 & sleep 45671' & sleep 0.3", &wanted).await;
    node.wait(&id, "").await;
    wait_for("the rest ends", || processes_with("45671").is_empty());
    node.delete(&id).await.expect("deleted");
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_by_the_memory_limit_is_told() {
    let node = Node::start().await;
    let topics = node.topics_until("/tasks/exit").await;
    let wanted = Wanted {
        adapt: Some(|spec| {
            spec["linux"]["resources"]["memory"] = serde_json::json!({ "limit": 8 << 20, "swap": 8 << 20 });
        }),
        ..Wanted::default()
    };
    let (id, _) = node.run("x=a; while :; do x=$x$x; done", &wanted).await;
    assert_eq!(node.wait(&id, "").await, 137);
    let topics = tokio::time::timeout(PATIENCE, topics).await.expect("in time").expect("told");
    assert!(topics.contains(&"/tasks/oom".to_owned()), "{topics:?}");
    node.delete(&id).await.expect("deleted");
    node.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_shim_is_small() {
    let node = Node::start().await;
    let own_socket = Some(node.dir().join("shims/own.sock"));
    let stdout = format!("keelson-log://{}", node.dir().join("pod/0.log").display());
    let wanted =
        Wanted { pod: Some("pod-small"), own_socket, stderr: stdout.clone(), stdout, ..Wanted::default() };
    let (id, _) = node.run("echo hello; sleep 3600", &wanted).await;
    node.exec(&id, &["true"]).await.expect("run");
    let shim = *node.shims().first().expect("a shim");
    let figures = || std::fs::read_to_string(format!("/proc/{shim}/smaps_rollup")).expect("figures");
    let figure = |name: &str| -> u64 {
        let figures = figures();
        let line = figures.lines().find(|line| line.starts_with(name)).expect("a line");
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
    };
    let threads = || std::fs::read_dir(format!("/proc/{shim}/task")).expect("threads").count();
    // The main loop, and one that moves the container's output; those that worked end.
    wait_for("the last event is sent", || threads() <= 2);
    // An order of magnitude below Go's shim.
    wait_for("freed memory is given back", || figure("Pss:") < 2 << 10);
    #[allow(clippy::print_stdout, reason = "the figure is the result")]
    {
        println!("shim: PSS {} kB, RSS {} kB, {} threads", figure("Pss:"), figure("Rss:"), threads());
    }
    node.kill(&id, "", 9).await.expect("killed");
    node.wait(&id, "").await;
    node.delete(&id).await.expect("deleted");
    node.assert_clean();
}

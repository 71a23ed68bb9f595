//! The shim's own service: ExecSync with its deadlines, equal confinement, logs that are rotated, attach. Needs root.

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;

use keelson_shim::protocol::{Call, ExecSync, Failed, Kind, Nothing};
use prost::Message;
use support::node::{Node, Wanted};
use support::own::{ask, exec_sync, frame};
use support::{processes_with, wait_for};

/// A node with one container that writes its log through the shim.
struct Own {
    node: Node,
    socket: PathBuf,
    log: PathBuf,
    id: String,
}

impl Own {
    async fn start(script: &str, adapt: Option<fn(&mut serde_json::Value)>) -> Self {
        let node = Node::start().await;
        let (socket, log) = (node.dir().join("shims/own.sock"), node.dir().join("pod/0.log"));
        let stdout = format!("keelson-log://{}", log.display());
        let wanted = Wanted {
            pod: Some("pod-own"),
            own_socket: Some(socket.clone()),
            stderr: stdout.clone(),
            stdout,
            adapt,
            ..Wanted::default()
        };
        let (id, _) = node.run(script, &wanted).await;
        Self { node, socket, log, id }
    }

    fn exec(&self, args: &[&str], timeout_ms: u64) -> support::own::Outcome {
        exec_sync(&self.socket, &self.id, args, timeout_ms)
    }

    async fn end(self) {
        // One that has ended by itself is fine.
        drop(self.node.kill(&self.id, "", 9).await);
        self.node.wait(&self.id, "").await;
        self.node.delete(&self.id).await.expect("deleted");
        self.node.assert_clean();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_give_output_codes_and_reasons() {
    let own = Own::start("sleep 3600", None).await;
    let left = own.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"], 0).expect("run");
    assert_eq!(left, ("out\n".to_owned(), "err\n".to_owned(), 3));
    assert_eq!(own.exec(&["sh", "-c", "kill -9 $$"], 0).expect("run").2, 137);
    let (code, words) = own.exec(&["nope"], 0).expect_err("there is no such program");
    assert_eq!(code, 2);
    assert!(words.contains("executable file not found in $PATH"), "{words}");
    let (code, _) = exec_sync(&own.socket, "nobody", &["true"], 0).expect_err("no such container");
    assert_eq!(code, 5);
    let (out, _, code) = own.exec(&["sh", "-c", "yes | head -c 20000000"], 0).expect("run");
    assert_eq!((out.len(), code), (16 << 20, 0), "more than the limit is dropped");
    // What goes on in the background neither holds the answer up nor is it ended.
    let (out, _, _) = own.exec(&["sh", "-c", "sleep 76511 & echo done"], 0).expect("run");
    assert_eq!(out, "done\n");
    assert_eq!(processes_with("76511").len(), 1);
    own.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_the_whole_tree_and_so_does_a_client_that_leaves() {
    let own = Own::start("sleep 3600", None).await;
    // Forked twice, in sessions of their own, without their parents.
    let script = "(setsid sh -c '(setsid sleep 87655 &); sleep 87655' &); setsid sleep 87655 & sleep 87655";
    let (code, _) = own.exec(&["sh", "-c", script], 1000).expect_err("too late");
    assert_eq!(code, 4, "DeadlineExceeded");
    assert!(processes_with("87655").is_empty(), "all are gone before it is said");
    let args = ["sh", "-c", &script.replace("87655", "87656")].map(str::to_owned).to_vec();
    let client = ask(&own.socket, &own.id, Call::ExecSync(ExecSync { args, timeout_ms: 0 }));
    wait_for("it runs", || processes_with("sleep\x0087656").len() >= 4);
    drop(client);
    wait_for("it ends", || processes_with("87656").is_empty());
    assert_eq!(own.exec(&["echo", "still"], 0).expect("run").0, "still\n");
    own.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_commands_at_once_and_a_clear_word_for_one_too_many() {
    // Where the shim may have many files open, it runs more commands than the others' limit of processes.
    let adapt = |spec: &mut serde_json::Value| spec["linux"]["resources"]["pids"]["limit"] = 1000.into();
    let own = Own::start("sleep 3600", Some(adapt)).await;
    let mut clients = Vec::new();
    let mut refused = Vec::new();
    for _ in 0..600 {
        let args = ["sh", "-c", "echo up; exec sleep 87657"].map(str::to_owned).to_vec();
        let mut client = ask(&own.socket, &own.id, Call::ExecSync(ExecSync { args, timeout_ms: 0 }));
        match frame(&mut client) {
            (Kind::Stdout, _) => clients.push(client),
            (Kind::Failed, bytes) => refused.push(Failed::decode(bytes.as_slice()).expect("a failure")),
            (kind, bytes) => panic!("{kind:?} {}", String::from_utf8_lossy(&bytes)),
        }
    }
    assert!(clients.len() >= 300, "{} run, then {:?}", clients.len(), refused.first());
    wait_for("all of them run", || processes_with("sleep\x0087657").len() == clients.len());
    let words = format!("the pod runs {} commands already", clients.len());
    for failed in &refused {
        assert!(failed.code == 8 && failed.message.contains(&words), "{failed:?}");
    }
    assert!(!refused.is_empty());
    drop(clients);
    wait_for("they end with their clients", || processes_with("87657").is_empty());
    wait_for("there is room again", || own.exec(&["true"], 0).is_ok());
    own.end().await;
}

/// What a process sees of its confinement, by file.
const LOOK: &str = "for f in status limits cgroup mountinfo uid_map gid_map attr/current oom_score_adj; do \
    echo \"=== $f\"; cat /proc/self/$f; done; for n in /proc/self/ns/*; do echo \"=== $n\"; ls -l $n; done; \
    echo === env; tr '\\0' '\\n' < /proc/self/environ; echo === fds; ls /proc/self/fd; echo === cwd; ls -ld /proc/self/cwd; \
    echo === session; cat /proc/self/sessionid";

/// The parts of it that must be equal: not ids and times of the process itself.
fn confinement(text: &str) -> BTreeMap<String, Vec<String>> {
    const OWN: &[&str] = &[
        "Name:",
        "Pid:",
        "Tgid:",
        "PPid:",
        "Ngid:",
        "Vm",
        "Rss",
        "voluntary_ctxt",
        "nonvoluntary_ctxt",
        "NSpid:",
        "NSpgid:",
        "NSsid:",
        "NStgid:",
        "HugetlbPages:",
        "Threads:",
        "State:",
        "SigQ:",
    ];
    let mut parts = BTreeMap::new();
    let mut part = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("=== ") {
            name.clone_into(&mut part);
            parts.insert(part.clone(), Vec::new());
        } else if part != "status" || !OWN.iter().any(|own| line.starts_with(own)) {
            // Dates of links are theirs, targets are ours.
            let shown = line.rsplit_once(" -> ").map_or(line, |(_, target)| target);
            parts.get_mut(&part).expect("begun").push(shown.to_owned());
        }
    }
    parts
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_confined_as_runc_confines_it() {
    let own = Own::start("sleep 3600", None).await;
    let (direct, _, _) = own.exec(&["sh", "-c", LOOK], 0).expect("run");
    let (task, _) = own.node.exec(&own.id, &["sh", "-c", LOOK]).await.expect("run");
    assert_eq!(confinement(&direct), confinement(&task), "both ways into our own container");
    let (theirs, _) = own.node.run("sleep 3600", &Wanted { runc: true, ..Wanted::default() }).await;
    let (runc, _) = own.node.exec(&theirs, &["sh", "-c", LOOK]).await.expect("run");
    let (mut ours, mut runcs) = (confinement(&direct), confinement(&runc));
    assert!(ours.len() >= 12, "{direct}");
    for parts in [&mut ours, &mut runcs] {
        // Names that differ because they are two containers: namespaces, cgroups, mount ids.
        parts.retain(|name, _| !name.starts_with("/proc/self/ns/"));
        for (name, from) in [("cgroup", own.id.as_str()), ("cgroup", theirs.as_str())] {
            for line in parts.get_mut(name).expect("cgroups") {
                *line = line.replace(from, "ID");
            }
        }
        for line in parts.get_mut("mountinfo").expect("mounts") {
            let fields: Vec<&str> = line.split(' ').collect();
            let separator = fields.iter().position(|field| *field == "-").expect("a separator");
            // Root, mount point, options; then type, source and options of the file system.
            let (own, shared) = (&fields[3..6], &fields[separator + 1..]);
            // A masked file is a null device: the container's own with runc, the node's with us.
            let shown = match own[0] {
                "/null" => format!("null at {}", own[1]),
                _ => format!("{} - {}", own.join(" "), shared.join(" ")),
            };
            *line = shown;
        }
        parts.get_mut("mountinfo").expect("mounts").sort();
    }
    for (name, lines) in &ours {
        assert_eq!(Some(lines), runcs.get(name), "{name}");
    }
    own.node.kill(&theirs, "", 9).await.expect("killed");
    own.node.wait(&theirs, "").await;
    own.node.delete(&theirs).await.expect("deleted");
    own.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_log_loses_no_line_and_is_complete_when_the_end_is_told() {
    let script = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done; echo -n end; exit 4";
    let own = Own::start(script, None).await;
    let mut files = Vec::new();
    for number in 0..10 {
        let old = own.log.with_extension(number.to_string());
        std::fs::rename(&own.log, &old).expect("rotated");
        match frame(&mut ask(&own.socket, &own.id, Call::ReopenLog(Nothing {}))) {
            (Kind::Ended, _) => files.push(old),
            (kind, bytes) => panic!("{kind:?} {}", String::from_utf8_lossy(&bytes)),
        }
    }
    assert_eq!(own.node.wait(&own.id, "").await, 4);
    files.push(own.log.clone());
    let text: String = files.iter().map(|file| std::fs::read_to_string(file).expect("a log")).collect();
    let mut lines: Vec<&str> = text.lines().map(|line| line.rsplit(' ').next().expect("content")).collect();
    assert_eq!(lines.pop(), Some("end"));
    assert!(
        lines.iter().enumerate().all(|(number, line)| *line == number.to_string()),
        "lost or out of order"
    );
    assert_eq!(lines.len(), 20000);
    own.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_attaches_sees_what_comes() {
    let own = Own::start("while sleep 0.1; do echo tick; echo tock >&2; done", None).await;
    let mut client = ask(&own.socket, &own.id, Call::Attach(Nothing {}));
    let (mut out, mut err) = (String::new(), String::new());
    while !(out.contains("tick\ntick\n") && err.contains("tock\n")) {
        match frame(&mut client) {
            (Kind::Stdout, bytes) => out.push_str(&String::from_utf8_lossy(&bytes)),
            (Kind::Stderr, bytes) => err.push_str(&String::from_utf8_lossy(&bytes)),
            (kind, bytes) => panic!("{kind:?} {}", String::from_utf8_lossy(&bytes)),
        }
    }
    own.node.kill(&own.id, "", 9).await.expect("killed");
    while !matches!(frame(&mut client), (Kind::Ended, _)) {}
    own.end().await;
}

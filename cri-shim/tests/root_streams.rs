//! Streams over SPDY/3.1 against real containers, tokens, and a hundred clients that vanish. Needs root.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cri_shim_api::v1;
use cri_shim_streaming::spdy::frame::{Decoder, Encoder, Event, Frame};
use futures::StreamExt;
use support::cri::{Cri, PATIENCE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A SPDY client as kubectl and the kubelet are.
struct Spdy {
    stream: TcpStream,
    encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
}

/// The answer to an upgrade, and the connection.
async fn upgrade(url: &str, protocol: &str) -> (TcpStream, String) {
    let rest = url.strip_prefix("http://").expect("http");
    let (host, path) = rest.split_once('/').expect("a path");
    let mut stream = TcpStream::connect(host).await.expect("connected");
    let request = format!(
        "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: {protocol}\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("an answer"));
    }
    (stream, String::from_utf8_lossy(&head).into_owned())
}

impl Spdy {
    async fn connect(url: &str, protocol: &str) -> Self {
        let (stream, head) = upgrade(url, protocol).await;
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        Self { stream, encoder: Encoder::default(), decoder: Decoder::default(), buffer: BytesMut::new() }
    }

    async fn send(&mut self, frame: Frame) {
        let mut wire = BytesMut::new();
        self.encoder.encode(&frame, &mut wire).expect("encoded");
        self.stream.write_all(&wire).await.expect("sent");
    }

    async fn open(&mut self, id: u32, headers: &[(&str, &str)]) {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        self.send(Frame::SynStream { id, headers }).await;
    }

    async fn data(&mut self, id: u32, bytes: &'static [u8], fin: bool) {
        self.send(Frame::Data { id, bytes: Bytes::from_static(bytes), fin }).await;
    }

    /// Reads until all of `ends` have ended, or one stream holds `enough`.
    async fn collect(&mut self, ends: &[u32], enough: Option<&str>) -> BTreeMap<u32, String> {
        let mut texts: BTreeMap<u32, String> = ends.iter().map(|id| (*id, String::new())).collect();
        let mut ended = Vec::new();
        loop {
            while let Some(event) = self.decoder.decode(&mut self.buffer).expect("well formed") {
                if let Event::Data { id, bytes, fin } = event {
                    texts.entry(id).or_default().push_str(&String::from_utf8_lossy(&bytes));
                    if fin {
                        ended.push(id);
                    }
                }
            }
            let full = enough.is_some_and(|enough| texts.values().any(|text| text.contains(enough)));
            if full || (!ends.is_empty() && ends.iter().all(|id| ended.contains(id))) {
                return texts;
            }
            let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await;
            let read = read.unwrap_or_else(|_| panic!("no more after {texts:?}")).expect("read");
            assert!(read > 0, "the server left after {texts:?}");
        }
    }
}

async fn exec_url(cri: &Cri, id: &str, script: &str, tty: bool) -> String {
    let request = v1::ExecRequest {
        container_id: id.to_owned(),
        cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
        ..v1::ExecRequest::default()
    };
    cri.runtime().exec(request).await.expect("a URL").into_inner().url
}

async fn pod(cri: &Cri) -> (String, String) {
    let pod = cri.pod("streams");
    let sandbox = cri.run(&pod).await.expect("running");
    let script = "mkdir -p /www; echo served > /www/x; /bin/busybox httpd -p 8080 -h /www; exec sleep 3600";
    let id = cri.script(&sandbox, &pod, "main", script).await;
    (sandbox, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_spdy_half_closes_resizes_and_tells_the_code() {
    let cri = Cri::start().await;
    let (sandbox, id) = Box::pin(pod(&cri)).await;
    let url = exec_url(&cri, &id, "cat; echo err >&2; exit 5", false).await;
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    for (stream, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
        client.open(stream, &[("streamtype", kind)]).await;
    }
    client.data(3, b"half", false).await;
    client.data(3, b"-closed", true).await;
    let texts = client.collect(&[1, 5, 7], None).await;
    assert_eq!((texts[&5].as_str(), texts[&7].as_str()), ("half-closed", "err\n"));
    let status: serde_json::Value = serde_json::from_str(&texts[&1]).expect("a Status");
    assert_eq!((&status["status"], &status["reason"]), (&"Failure".into(), &"NonZeroExitCode".into()));
    assert_eq!(status["details"]["causes"][0]["message"], "5");

    // The token is worth nothing after that, and no other one ever was.
    let (_, head) = upgrade(&url, "v4.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    let (base, _) = url.rsplit_once('/').expect("a token");
    let (_, head) = upgrade(&format!("{base}/guessed"), "v4.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");

    let script = "until [ \"$(stty size)\" = '37 91' ]; do :; done; echo size=$(stty size | tr ' ' x)";
    let mut client = Spdy::connect(&exec_url(&cri, &id, script, true).await, "v4.channel.k8s.io").await;
    for (stream, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "resize")] {
        client.open(stream, &[("streamtype", kind)]).await;
    }
    client.data(7, b"{\"Width\":91,\"Height\":37}", false).await;
    let texts = client.collect(&[1, 5], None).await;
    assert!(texts[&5].contains("size=37x91"), "{texts:?}");
    assert!(texts[&1].contains("Success"), "{texts:?}");
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forwarded_port_half_closes() {
    let cri = Cri::start().await;
    let (sandbox, id) = Box::pin(pod(&cri)).await;
    cri.answers(&id).await;
    let request = v1::PortForwardRequest { pod_sandbox_id: sandbox.clone(), port: Vec::new() };
    let url = cri.runtime().port_forward(request).await.expect("a URL").into_inner().url;
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    for (stream, kind) in [(1, "error"), (3, "data")] {
        client.open(stream, &[("streamtype", kind), ("port", "8080"), ("requestid", "1")]).await;
    }
    client.data(3, b"GET /x HTTP/1.0\r\n\r\n", true).await;
    let texts = client.collect(&[1, 3], None).await;
    assert!(texts[&3].contains("served"), "{texts:?}");
    assert_eq!(texts[&1], "");
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

/// What a process holds: open files and threads.
fn held(pid: u32) -> (usize, usize) {
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
    (count("fd"), count("task"))
}

/// Which files and threads these are, how often each.
fn listed(pid: u32) -> BTreeMap<String, usize> {
    let mut counted = BTreeMap::new();
    let entries =
        |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).into_iter().flatten().flatten();
    let files = entries("fd").filter_map(|file| std::fs::read_link(file.path()).ok());
    for file in files {
        // A number tells nothing.
        let name = file.display().to_string();
        *counted.entry(name.split(":[").next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    for name in entries("task").filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok()) {
        *counted.entry(format!("thread {}", name.trim())).or_default() += 1;
    }
    counted
}

/// Everything below a directory.
fn below(directory: &Path) -> Vec<String> {
    let mut open = vec![directory.to_owned()];
    let mut found = Vec::new();
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            found.push(path.display().to_string());
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Processes with `marker` among their arguments.
fn marked(marker: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").expect("procfs").flatten();
    let lines = processes.filter_map(|process| {
        let line = std::fs::read(process.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(marker).then(|| format!("{} {line}", process.file_name().display()))
    });
    lines.collect()
}

/// One client that leaves without a word: before its command runs or in the middle of it, with a terminal or without, of an
/// attachment, of a forwarded port, or before it even connects.
async fn vanish(cri: &Cri, sandbox: &str, id: &str, number: usize) {
    match number % 5 {
        kind @ (0 | 1) => {
            // Its input ends with its client; one that went on regardless would be let run.
            let script = "echo ready; cat; sleep 0.45678; exit";
            let mut client =
                Spdy::connect(&exec_url(cri, id, script, kind == 1).await, "v4.channel.k8s.io").await;
            let streams: &[&str] = if kind == 1 {
                &["error", "stdin", "stdout", "resize"]
            } else {
                &["error", "stdin", "stdout", "stderr"]
            };
            for (stream, name) in (1..).step_by(2).zip(streams) {
                client.open(stream, &[("streamtype", name)]).await;
            }
            // Every other one is gone before its command is there.
            if (number / 5).is_multiple_of(2) {
                client.collect(&[], Some("ready")).await;
            }
        }
        2 => {
            let request = v1::AttachRequest {
                container_id: id.to_owned(),
                stdout: true,
                stderr: true,
                ..v1::AttachRequest::default()
            };
            let url = cri.runtime().attach(request).await.expect("a URL").into_inner().url;
            let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
            for (stream, name) in [(1, "error"), (3, "stdout"), (5, "stderr")] {
                client.open(stream, &[("streamtype", name)]).await;
            }
        }
        3 => {
            let request = v1::PortForwardRequest { pod_sandbox_id: sandbox.to_owned(), port: Vec::new() };
            let url = cri.runtime().port_forward(request).await.expect("a URL").into_inner().url;
            let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
            for (stream, kind) in [(1, "error"), (3, "data")] {
                client.open(stream, &[("streamtype", kind), ("port", "8080"), ("requestid", "1")]).await;
            }
            client.data(3, b"GET /x HTTP/1.0\r\n", false).await;
        }
        _ => drop(exec_url(cri, id, "true", false).await),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_clients_that_vanish_leave_nothing() {
    let cri = Cri::start().await;
    let (sandbox, id) = Box::pin(pod(&cri)).await;
    cri.answers(&id).await;
    // One of each first, so that what is made once is there before it is counted.
    for number in 0..5 {
        vanish(&cri, &sandbox, &id, number).await;
    }
    let settled = async |limit: (usize, usize)| {
        let begun = tokio::time::Instant::now();
        loop {
            let (now, left) = (held(cri.pid()), marked("0.45678"));
            if left.is_empty() && now.0 <= limit.0 && now.1 <= limit.1 {
                return;
            }
            assert!(
                begun.elapsed() < 2 * PATIENCE,
                "files and threads {now:?} of {limit:?}: {:?}; processes {left:?}",
                listed(cri.pid())
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // What a command needed is taken away a moment after it ended.
    let cleaned = async || {
        let begun = tokio::time::Instant::now();
        loop {
            let left = below(&cri.dir().join("cri/state/exec"));
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{left:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    settled((usize::MAX, usize::MAX)).await;
    cleaned().await;
    let (files, state) = (held(cri.pid()).0, below(&cri.dir().join("cri/state")));
    let all = futures::stream::iter(0..100).map(|number| vanish(&cri, &sandbox, &id, number));
    all.buffer_unordered(4).collect::<Vec<()>>().await;
    // Threads for blocking work come and go by themselves; what matters is that there are few.
    settled((files + 2, 80)).await;
    cleaned().await;
    assert_eq!(below(&cri.dir().join("cri/state")), state);
    let processes = cri.exec(&id, &["/bin/busybox", "pgrep", "-f", "0.45678"]).await;
    assert_ne!(processes.exit_code, 0, "a command is left: {}", String::from_utf8_lossy(&processes.stdout));
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

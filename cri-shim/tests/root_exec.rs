//! Commands in containers, attach and port-forward through the CRI and its streaming server. Needs root.

mod support;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cri_shim_api::v1;
use cri_shim_streaming::spdy::frame::{Decoder, Encoder, Event, Frame};
use futures::future::BoxFuture;
use futures::{SinkExt, StreamExt};
use support::cri::{Cri, PATIENCE, shell};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use tonic::Code;

/// A pod with one container that runs `script`.
fn pod(script: &str) -> BoxFuture<'_, (Cri, String, String)> {
    Box::pin(async move {
        let cri = Cri::start().await;
        let pod = cri.pod("exec");
        let sandbox = cri.run(&pod).await.expect("running");
        let id = cri.create(&sandbox, &pod, shell("main", script)).await.expect("created");
        cri.launch(&id).await.expect("started");
        (cri, sandbox, id)
    })
}

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|word| (*word).to_owned()).collect()
}

async fn connect(url: &str, protocol: &str) -> WebSocketStream<TcpStream> {
    let rest = url.strip_prefix("http://").expect("http");
    let (host, path) = rest.split_once('/').expect("a path");
    let mut stream = TcpStream::connect(host).await.expect("connected");
    let request = format!(
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("an answer"));
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    WebSocketStream::from_raw_socket(stream, Role::Client, None).await
}

async fn exec(cri: &Cri, id: &str, command: &[&str], tty: bool) -> WebSocketStream<TcpStream> {
    let request = v1::ExecRequest {
        container_id: id.to_owned(),
        cmd: words(command),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
        ..v1::ExecRequest::default()
    };
    let url = cri.runtime().exec(request).await.expect("a URL").into_inner().url;
    connect(&url, "v5.channel.k8s.io").await
}

/// What each channel got until the server closed, or until one held `enough`.
async fn collect(socket: &mut WebSocketStream<TcpStream>, enough: Option<&str>) -> [String; 4] {
    let mut texts = [const { String::new() }; 4];
    loop {
        match tokio::time::timeout(PATIENCE, socket.next()).await.expect("in time") {
            Some(Ok(Message::Binary(bytes))) => {
                texts[usize::from(bytes[0])].push_str(&String::from_utf8_lossy(&bytes[1..]));
                if enough.is_some_and(|enough| texts.iter().any(|text| text.contains(enough))) {
                    return texts;
                }
            }
            Some(Ok(Message::Close(_))) | None => return texts,
            Some(Ok(_)) => {}
            Some(Err(error)) => panic!("{error}, after {texts:?}"),
        }
    }
}

/// Waits until no process has `marker` among its arguments.
async fn wait_until_gone(marker: &str) {
    let begun = tokio::time::Instant::now();
    loop {
        let processes = std::fs::read_dir("/proc").expect("procfs").flatten();
        let found = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
        if !found.map(|line| String::from_utf8_lossy(&line).into_owned()).any(|line| line.contains(marker)) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "a process with {marker} is left");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_sync_gives_output_codes_and_real_deadlines() {
    let (cri, _, id) = pod("sleep 3600").await;
    let left = cri.exec(&id, &["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]).await;
    assert_eq!(
        (left.stdout.as_slice(), left.stderr.as_slice(), left.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 3)
    );
    let cmd = words(&["/bin/sh", "-c", "sleep 87654 & sleep 87654"]);
    let begun = tokio::time::Instant::now();
    let request = v1::ExecSyncRequest { container_id: id.clone(), cmd, timeout: 1 };
    let status = cri.runtime().exec_sync(request).await.expect_err("too late");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    wait_until_gone("87654").await;
    let request = v1::ExecSyncRequest { container_id: id, cmd: words(&["nope"]), timeout: 10 };
    let status = cri.runtime().exec_sync(request).await.expect_err("no such command");
    assert!(status.message().contains("executable file not found in $PATH"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_commands_at_once_do_not_lock_each_other_up() {
    let (cri, _, id) = pod("sleep 3600").await;
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..60 {
        let (mut runtime, cmd) = (cri.runtime(), words(&["/bin/sh", "-c", "echo x; sleep 0.2"]));
        let request = v1::ExecSyncRequest { container_id: id.clone(), cmd, timeout: 60 };
        all.spawn(async move { runtime.exec_sync(request).await });
    }
    while let Some(done) = all.join_next().await {
        let done = done.expect("no panic").expect("in time").into_inner();
        assert_eq!((done.stdout.as_slice(), done.exit_code), (&b"x\n"[..], 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_streams_input_output_size_and_code() {
    let (cri, _, id) = pod("sleep 3600").await;
    let mut socket = exec(&cri, &id, &["/bin/sh", "-c", "cat; echo err >&2; exit 4"], false).await;
    socket.send(Message::binary(&b"\0hello"[..])).await.expect("sent");
    socket.send(Message::binary(&b"\xff\0"[..])).await.expect("sent");
    let texts = collect(&mut socket, None).await;
    assert_eq!((texts[1].as_str(), texts[2].as_str()), ("hello", "err\n"));
    assert!(texts[3].contains(r#"{"message":"4","reason":"ExitCode"}"#), "{}", texts[3]);

    let mut socket = exec(&cri, &id, &["/bin/sh"], true).await;
    socket.send(Message::binary(&b"\x04{\"Width\":91,\"Height\":37}"[..])).await.expect("sent");
    let ask =
        b"\0until [ \"$(stty size)\" = '37 91' ]; do :; done; echo size=$(stty size | tr ' ' x); exit\n";
    socket.send(Message::binary(&ask[..])).await.expect("sent");
    let texts = collect(&mut socket, None).await;
    assert!(texts[1].contains("size=37x91"), "{}", texts[1]);
    assert!(texts[3].contains("Success"), "{}", texts[3]);

    let texts = collect(&mut exec(&cri, &id, &["nope"], false).await, None).await;
    assert!(texts[2].contains("executable file not found in $PATH"), "{texts:?}");
    assert!(texts[3].contains(r#""message":"127""#), "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_needs_no_input() {
    let (cri, _, id) = pod("sleep 3600").await;
    let request = v1::ExecRequest {
        container_id: id.clone(),
        cmd: words(&["/bin/sh", "-c", "test -t 0 && echo terminal; stty size; exit 6"]),
        tty: true,
        stdout: true,
        ..v1::ExecRequest::default()
    };
    let url = cri.runtime().exec(request.clone()).await.expect("a URL").into_inner().url;
    let texts = collect(&mut connect(&url, "v5.channel.k8s.io").await, None).await;
    assert!(texts[1].starts_with("terminal\r\n"), "{texts:?}");
    assert!(texts[3].contains(r#"{"message":"6","reason":"ExitCode"}"#), "{texts:?}");

    // One that reads waits for input that never comes, until its client goes.
    let reads = words(&["/bin/sh", "-c", "echo ready; cat; sleep 0.34567"]);
    let url = cri.runtime().exec(v1::ExecRequest { cmd: reads, ..request.clone() }).await.expect("a URL");
    let mut socket = connect(&url.into_inner().url, "v5.channel.k8s.io").await;
    collect(&mut socket, Some("ready")).await;
    drop(socket);
    wait_until_gone("0.34567").await;
    let wrong = v1::ExecRequest { stderr: true, ..request };
    assert_eq!(cri.runtime().exec(wrong).await.expect_err("refused").code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_client_and_a_killed_server_leave_no_process() {
    let (mut cri, _, id) = pod("sleep 3600").await;
    for tty in [false, true] {
        let script = "echo ready; cat; sleep 0.76543; exit";
        let mut socket = exec(&cri, &id, &["/bin/sh", "-c", script], tty).await;
        collect(&mut socket, Some("ready")).await;
        drop(socket);
        wait_until_gone("0.76543").await;
    }
    let mut socket = exec(&cri, &id, &["/bin/sh", "-c", "echo ready; exec sleep 76543"], false).await;
    collect(&mut socket, Some("ready")).await;
    cri.restart().await;
    wait_until_gone("76543").await;
    assert_eq!(cri.exec(&id, &["/bin/echo", "still"]).await.stdout, b"still\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_shows_what_the_container_says() {
    let (cri, _, id) = pod("while sleep 0.1; do echo tick; done").await;
    let request =
        v1::AttachRequest { container_id: id, stdout: true, stderr: true, ..v1::AttachRequest::default() };
    let url = cri.runtime().attach(request).await.expect("a URL").into_inner().url;
    let texts = collect(&mut connect(&url, "v4.channel.k8s.io").await, Some("tick\ntick\n")).await;
    assert!(texts[1].starts_with("tick\n"), "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_of_the_sandbox_are_reached_and_missing_ones_told() {
    let (cri, sandbox, id) = pod("mkdir -p /www; echo served > /www/x; exec httpd -f -p 8080 -h /www").await;
    // A command can be faster than the server that is about to listen.
    let begun = tokio::time::Instant::now();
    let ask = ["/bin/busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/x"];
    while cri.exec(&id, &ask).await.exit_code != 0 {
        assert!(begun.elapsed() < PATIENCE, "nobody listens");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let request = v1::PortForwardRequest { pod_sandbox_id: sandbox, port: Vec::new() };
    let url = cri.runtime().port_forward(request).await.expect("a URL").into_inner().url;
    let mut socket = connect(&url, "SPDY/3.1+portforward.k8s.io").await;
    let (mut encoder, mut decoder, mut buffer) = (Encoder::default(), Decoder::default(), BytesMut::new());
    // Port 81 first, where nobody listens; its error ends nothing else.
    for (error, port) in [(1, "81"), (5, "8080")] {
        let mut wire = BytesMut::new();
        for (id, kind) in [(error, "error"), (error + 2, "data")] {
            let headers = [("streamtype", kind), ("port", port), ("requestid", port)];
            let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
            encoder.encode(&Frame::SynStream { id, headers }, &mut wire).expect("encoded");
        }
        let bytes = Bytes::from_static(b"GET /x HTTP/1.0\r\n\r\n");
        encoder.encode(&Frame::Data { id: error + 2, bytes, fin: false }, &mut wire).expect("encoded");
        socket.send(Message::binary(wire.freeze())).await.expect("sent");
    }
    let mut texts = [const { String::new() }; 4];
    while !(texts[0].contains("refused") && texts[3].contains("served")) {
        let message = tokio::time::timeout(PATIENCE, socket.next()).await;
        let message = message.unwrap_or_else(|_| panic!("only {texts:?}")).expect("open").expect("a message");
        buffer.extend_from_slice(&message.into_data());
        while let Some(event) = decoder.decode(&mut buffer).expect("well formed") {
            if let Event::Data { id, bytes, .. } = event {
                texts[id as usize / 2].push_str(&String::from_utf8_lossy(&bytes));
            }
        }
    }
}

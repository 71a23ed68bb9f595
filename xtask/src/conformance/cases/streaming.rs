//! Streaming: exec, attach and port-forward over SPDY and WebSocket.

use anyhow::{Context, Result};
use cri_shim_api::v1;
use futures::FutureExt;

use super::super::case::{Case, case, holds, refused, refused_with, same, skip};
use super::super::context::{T, strings};
use super::super::stream::port::Forwarder;
use super::super::stream::{Protocol, Session, Wants, http};

const SPDY: Protocol = Protocol::Spdy;
const OLD_SPDY: [(&str, Protocol); 3] = [
    ("streaming SPDY v3", Protocol::Spdy3),
    ("streaming SPDY v2", Protocol::Spdy2),
    ("streaming SPDY v1", Protocol::Spdy1),
];
const WS4: Protocol = Protocol::WebSocket4;
const WS5: Protocol = Protocol::WebSocket5;

pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (group, protocol) in
        [("streaming SPDY", SPDY), ("streaming WebSocket v4", WS4), ("streaming WebSocket v5", WS5)]
    {
        all.push(case(group, "exec: stdout, stderr and success", move |t| exec_output(t, protocol)));
        all.push(case(group, "exec: the exit code is in the status", move |t| exec_code(t, protocol)));
        all.push(case(group, "exec: 1 MiB of stdout arrives whole", move |t| exec_long(t, protocol)));
        all.push(case(group, "exec: a terminal echoes, and its size follows resize", move |t| {
            exec_tty(t, protocol)
        }));
        all.push(case(group, "exec: a command that does not exist is told in the status", move |t| {
            exec_missing(t, protocol)
        }));
        all.push(case(group, "attach: what the container prints, and what is sent to its stdin", move |t| {
            attach(t, protocol)
        }));
    }
    for (group, protocol) in OLD_SPDY {
        all.push(case(group, "exec: stdin, stdout, stderr, and a failure in words", move |t| {
            exec_words(t, protocol)
        }));
    }
    let base64 = Protocol::WebSocketBase64;
    let group = "streaming WebSocket v4, base64";
    all.push(case(group, "exec: stdout, stderr and success", move |t| exec_output(t, base64)));
    all.push(case(group, "attach: what the container prints, and what is sent to its stdin", move |t| {
        attach(t, base64)
    }));
    for (group, protocol) in [("streaming SPDY", SPDY), ("streaming WebSocket v5", WS5)] {
        all.push(case(group, "exec: a terminal without stdin", move |t| exec_tty_only(t, protocol)));
        all.push(case(group, "attach: the terminal's size follows resize", move |t| {
            attach_resize(t, protocol)
        }));
        all.push(case(
            group,
            "exec: stdin is closed by the client, and the command sees its end",
            move |t| half_close(t, protocol),
        ));
    }
    all.extend(urls());
    all.extend(forwards());
    all
}

fn urls() -> Vec<Case> {
    let group = "streaming";
    vec![
        case(group, "URLs have a host and the path of their kind", url_form),
        case(group, "a URL works once", one_shot),
        case(group, "a URL takes GET as well as POST", get_or_post),
        case(group, "an invented token is refused", invented_token),
        case(group, "Exec with a terminal and stderr is refused", tty_and_stderr),
        case(group, "Exec without any stream is refused", no_stream),
        case(group, "Exec in an unknown container is NotFound", unknown),
        case(group, "Exec in a created container is refused", exec_created),
        case(group, "Attach to an unknown container is NotFound", attach_unknown),
        case(group, "Attach to an ended container is refused", attach_ended),
        case(group, "Attach without any stream, or with a terminal and stderr, is refused", attach_wrong),
        case(group, "attach with stdinOnce: the end of the client's stdin is the container's", stdin_once),
        case(group, "two attached clients both see the output", attach_two),
        case(group, "a client that vanishes leaves no exec process behind", vanished),
        case(group, "exec has the container's user", exec_user),
    ]
}

fn forwards() -> Vec<Case> {
    let group = "port-forward";
    vec![
        case(group, "SPDY: a request and its answer", forward_spdy),
        case(group, "WebSocket tunnel: a request and its answer", forward_tunnel),
        case(group, "several connections on one session", forward_several),
        case(group, "to a server that listens on ::1 only", forward_six),
        case(group, "a port that nobody listens on is told on the error stream", forward_refused),
        case(group, "the client's end of data is passed on", forward_half_close),
        case(group, "a client that ends nothing is let go when the server has closed", forward_silent),
        case(group, "into a pod with the host's network", forward_host),
        case(group, "to an unknown sandbox is NotFound", forward_unknown),
        case(group, "to a stopped sandbox is refused", forward_stopped),
    ]
}

const OUTPUT: Wants = Wants { stdin: false, stdout: true, stderr: true, tty: false };
const ALL: Wants = Wants { stdin: true, stdout: true, stderr: true, tty: false };
const TERMINAL: Wants = Wants { stdin: true, stdout: true, stderr: false, tty: true };
const SILENT_TERMINAL: Wants = Wants { stdin: false, ..TERMINAL };

async fn exec_url(t: &T, id: &str, command: &[&str], wants: Wants) -> Result<String, tonic::Status> {
    let request = v1::ExecRequest {
        container_id: id.to_owned(),
        cmd: strings(command),
        tty: wants.tty,
        stdin: wants.stdin,
        stdout: wants.stdout,
        stderr: wants.stderr,
        ..v1::ExecRequest::default()
    };
    Ok(t.rt().exec(request).await?.into_inner().url)
}

async fn exec(t: &T, id: &str, script: &str, wants: Wants, protocol: Protocol) -> Result<Session> {
    let url = exec_url(t, id, &["/bin/sh", "-c", script], wants).await.context("Exec")?;
    Session::open(&url, protocol, wants).await
}

async fn attach_url(t: &T, id: &str, wants: Wants) -> Result<String, tonic::Status> {
    let request = v1::AttachRequest {
        container_id: id.to_owned(),
        tty: wants.tty,
        stdin: wants.stdin,
        stdout: wants.stdout,
        stderr: wants.stderr,
        ..v1::AttachRequest::default()
    };
    Ok(t.rt().attach(request).await?.into_inner().url)
}

async fn exec_output(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t.idle().await?;
    let done = exec(&t, &id, "echo out; echo err >&2", OUTPUT, protocol).await?.finish().await?;
    same("stdout", done.text().as_str(), "out\n")?;
    same("stderr", String::from_utf8_lossy(&done.stderr).as_ref(), "err\n")?;
    same("exit code", done.exit_code(), Some(0))
}

async fn exec_code(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t.idle().await?;
    let done = exec(&t, &id, "exit 42", OUTPUT, protocol).await?.finish().await?;
    same("exit code", done.exit_code(), Some(42))?;
    same("reason", done.status["reason"].as_str(), Some("NonZeroExitCode"))
}

async fn exec_long(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t.idle().await?;
    let script = "dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\000' y";
    let done = exec(&t, &id, script, OUTPUT, protocol).await?.finish().await?;
    same("bytes", done.stdout.len(), 1 << 20)?;
    anyhow::ensure!(done.stdout.iter().all(|byte| *byte == b'y'), "other bytes");
    same("exit code", done.exit_code(), Some(0))
}

async fn exec_tty(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t.idle().await?;
    let mut session = exec(&t, &id, "while read line; do stty size; done", TERMINAL, protocol).await?;
    session.resize(91, 37).await?;
    // The size and the line come on two streams. The echo comes at once, the answer when the command has begun.
    let answers = |all: &str| all.lines().filter(|line| !matches!(*line, "" | "go")).count();
    let mut all = String::new();
    for _ in 0..200 {
        let before = answers(&all);
        session.send(b"go\n").await?;
        while answers(&all) == before || !all.ends_with('\n') {
            all.push_str(&session.read_until("\n").await?);
        }
        if all.contains("37 91") {
            break;
        }
    }
    holds("the terminal", &all, "37 91")?;
    holds("the echo", &all, "go\r\n")?;
    session.send(b"\x04").await?;
    same("exit code", session.finish().await?.exit_code(), Some(0))
}

/// As `kubectl exec -t` without `-i` asks.
async fn exec_tty_only(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t.idle().await?;
    let script = "test -t 0 && test -t 1 && echo terminal; echo error >&2; exit 5";
    let done = exec(&t, &id, script, SILENT_TERMINAL, protocol).await?.finish().await?;
    same("what it printed", done.text().as_str(), "terminal\r\nerror\r\n")?;
    same("exit code", done.exit_code(), Some(5))
}

async fn exec_words(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t.idle().await?;
    let mut session = exec(&t, &id, "read line; echo got:$line; echo err >&2; exit 7", ALL, protocol).await?;
    session.send(b"hello\n").await?;
    let done = session.finish().await?;
    same("stdout", done.text().as_str(), "got:hello\n")?;
    same("stderr", String::from_utf8_lossy(&done.stderr).as_ref(), "err\n")?;
    let words = done.status.as_str().with_context(|| format!("words, not {}", done.status))?;
    holds("the failure", words, "7")
}

/// The container tells its terminal's size whenever it is given a line.
async fn attach_resize(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            config.command = strings(&["/bin/sh", "-c", "while read line; do stty size; done"]);
            (config.stdin, config.tty) = (true, true);
        })
        .await?;
    let url = attach_url(&t, &id, TERMINAL).await.context("Attach")?;
    let mut session = Session::open(&url, protocol, TERMINAL).await?;
    session.resize(83, 29).await?;
    let mut all = String::new();
    for _ in 0..200 {
        session.send(b"go\n").await?;
        // The echo, and then the answer.
        all.push_str(&session.read_until("go\r\n").await?);
        while !all.ends_with('\n') || all.ends_with("go\r\n") {
            all.push_str(&session.read_until("\n").await?);
        }
        if all.contains("29 83") {
            return Ok(());
        }
    }
    holds("the terminal", &all, "29 83")
}

async fn exec_missing(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t.idle().await?;
    let url = exec_url(&t, &id, &["/bin/nobody-has-this"], OUTPUT).await.context("Exec")?;
    let done = Session::open(&url, protocol, OUTPUT).await?.finish().await?;
    same("status", done.status["status"].as_str(), Some("Failure"))?;
    holds("the status", &done.status.to_string(), "nobody-has-this")
}

async fn half_close(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t.idle().await?;
    let mut session = exec(&t, &id, "cat; echo end", ALL, protocol).await?;
    session.send(b"some text\n").await?;
    session.close_stdin().await?;
    let done = session.finish().await?;
    same("stdout", done.text().as_str(), "some text\nend\n")?;
    same("exit code", done.exit_code(), Some(0))
}

async fn attach(t: T, protocol: Protocol) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            config.command = strings(&["/bin/sh", "-c", "while read line; do echo got:$line; done"]);
            config.stdin = true;
        })
        .await?;
    let url = attach_url(&t, &id, ALL).await.context("Attach")?;
    let mut session = Session::open(&url, protocol, ALL).await?;
    session.send(b"hello\n").await?;
    session.read_until("got:hello\n").await.map(drop)
}

async fn url_form(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    let exec = exec_url(&t, &id, &["true"], OUTPUT).await.context("Exec")?;
    let attach = attach_url(&t, &id, OUTPUT).await.context("Attach")?;
    let forward = forward_url(&t, &pod.id, &[80]).await.context("PortForward")?;
    for (url, kind) in [(exec, "/exec/"), (attach, "/attach/"), (forward, "/portforward/")] {
        let (host, path) = http::parts(&url)?;
        anyhow::ensure!(host.contains(':') && path.contains(kind), "{url:?} has not {kind:?}");
    }
    Ok(())
}

async fn one_shot(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let url = exec_url(&t, &id, &["true"], OUTPUT).await.context("Exec")?;
    Session::open(&url, SPDY, OUTPUT).await?.finish().await?;
    let again =
        http::request("POST", &url, "", &[("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]).await?;
    anyhow::ensure!((400..500).contains(&again.status), "the second use: {}", again.head);
    Ok(())
}

async fn get_or_post(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
    ];
    for method in ["GET", "POST"] {
        let url = exec_url(&t, &id, &["true"], OUTPUT).await.context("Exec")?;
        let answer = http::request(method, &url, "", &headers).await?;
        same(method, answer.status, 101)?;
    }
    Ok(())
}

async fn invented_token(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let url = exec_url(&t, &id, &["true"], OUTPUT).await.context("Exec")?;
    let (before, _) = url.rsplit_once('/').context("a path")?;
    let headers = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
    let answer = http::request("POST", &format!("{before}/AAAAAAAA"), "", &headers).await?;
    same("the answer's code", answer.status, 404)
}

async fn tty_and_stderr(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let wants = Wants { tty: true, ..ALL };
    let wrong = [tonic::Code::InvalidArgument];
    refused_with("Exec", exec_url(&t, &id, &["true"], wants).await, &wrong).map(drop)
}

async fn no_stream(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let wrong = [tonic::Code::InvalidArgument];
    refused_with("Exec", exec_url(&t, &id, &["true"], Wants::default()).await, &wrong).map(drop)
}

async fn unknown(t: T) -> Result<()> {
    refused_with("Exec", exec_url(&t, "nothing", &["true"], OUTPUT).await, &[tonic::Code::NotFound]).map(drop)
}

async fn exec_created(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.create(&pod, &t.shell("true")).await?;
    refused("Exec in a created container", exec_url(&t, &id, &["true"], OUTPUT).await).map(drop)
}

async fn attach_unknown(t: T) -> Result<()> {
    refused_with("Attach", attach_url(&t, "nothing", OUTPUT).await, &[tonic::Code::NotFound]).map(drop)
}

async fn attach_ended(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell("true")).await?;
    t.exited(&id).await?;
    refused("Attach to an ended container", attach_url(&t, &id, OUTPUT).await).map(drop)
}

async fn attach_wrong(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    for wants in [Wants::default(), Wants { tty: true, ..ALL }] {
        refused_with("Attach", attach_url(&t, &id, wants).await, &[tonic::Code::InvalidArgument])?;
    }
    Ok(())
}

async fn stdin_once(t: T) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            config.command = strings(&["/bin/sh", "-c", "cat; exit 12"]);
            (config.stdin, config.stdin_once) = (true, true);
        })
        .await?;
    let url = attach_url(&t, &id, ALL).await.context("Attach")?;
    let mut session = Session::open(&url, SPDY, ALL).await?;
    session.send(b"text\n").await?;
    session.read_until("text\n").await?;
    session.close_stdin().await?;
    same("exit_code", t.exited(&id).await?.exit_code, 12)
}

async fn attach_two(t: T) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            config.command = strings(&["/bin/sh", "-c", "while read line; do echo got:$line; done"]);
            config.stdin = true;
        })
        .await?;
    let mut one = Session::open(&attach_url(&t, &id, ALL).await.context("Attach")?, SPDY, ALL).await?;
    let mut two = Session::open(&attach_url(&t, &id, ALL).await.context("Attach")?, SPDY, ALL).await?;
    // The first answers that each is attached.
    two.send(b"two\n").await?;
    two.read_until("got:two\n").await?;
    one.send(b"one\n").await?;
    one.read_until("got:one\n").await?;
    two.read_until("got:one\n").await.map(drop)
}

async fn vanished(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let mut session = exec(&t, &id, "echo up; cat; sleep 1", ALL, SPDY).await?;
    session.read_until("up\n").await?;
    drop(session);
    t.until("the command has seen the end of its stdin", || async {
        let text = t.sh(&id, "ps -o args").await?;
        Ok((!text.lines().any(|line| line.trim() == "cat")).then_some(()))
    })
    .await
}

async fn exec_user(t: T) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            super::super::context::security(config).run_as_user = Some(v1::Int64Value { value: 1000 });
        })
        .await?;
    let done = exec(&t, &id, "id -u", OUTPUT, SPDY).await?.finish().await?;
    same("id -u", done.text().as_str(), "1000\n")
}

async fn forward_url(t: &T, pod: &str, ports: &[i32]) -> Result<String, tonic::Status> {
    let request = v1::PortForwardRequest { pod_sandbox_id: pod.to_owned(), port: ports.to_vec() };
    Ok(t.rt().port_forward(request).await?.into_inner().url)
}

/// A pod that answers on a port; waits until it does.
async fn server(t: &T, script: &str, port: u16) -> Result<String> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell(script)).await?;
    listening(t, &id, port).await?;
    Ok(pod.id)
}

/// Waits until something in the container's network listens on a port.
pub(super) async fn listening(t: &T, id: &str, port: u16) -> Result<()> {
    let wanted = format!(":{port:04X} ");
    t.until("the server listens", || async {
        let table = t.sh(id, "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep ' 0A '; true").await?;
        Ok(table.contains(&wanted).then_some(()))
    })
    .await
}

/// busybox's httpd with one page.
pub(super) const HTTPD: &str =
    "mkdir -p /www && echo served >/www/index.html && exec httpd -f -p 8080 -h /www";
const REQUEST: &[u8] = b"GET / HTTP/1.0\r\n\r\n";

async fn ask(forwarder: &mut Forwarder, port: u16) -> Result<()> {
    let connection = forwarder.open(port).await?;
    forwarder.send(connection, REQUEST, false).await?;
    let (data, error) = forwarder.exchange(connection).await?;
    holds("the answer", &String::from_utf8_lossy(&data), "served\n")?;
    same("the error stream", error.as_str(), "")
}

async fn forward_spdy(t: T) -> Result<()> {
    let pod = server(&t, HTTPD, 8080).await?;
    let url = forward_url(&t, &pod, &[8080]).await.context("PortForward")?;
    ask(&mut Forwarder::spdy(&url).await?, 8080).await
}

async fn forward_tunnel(t: T) -> Result<()> {
    let pod = server(&t, HTTPD, 8080).await?;
    let url = forward_url(&t, &pod, &[8080]).await.context("PortForward")?;
    ask(&mut Forwarder::tunnel(&url).await?, 8080).await
}

async fn forward_several(t: T) -> Result<()> {
    let pod = server(&t, HTTPD, 8080).await?;
    let url = forward_url(&t, &pod, &[8080]).await.context("PortForward")?;
    let mut forwarder = Forwarder::spdy(&url).await?;
    for _ in 0..5 {
        ask(&mut forwarder, 8080).await?;
    }
    Ok(())
}

async fn forward_six(t: T) -> Result<()> {
    if std::fs::read_to_string("/proc/net/if_inet6").is_ok_and(|text| text.trim().is_empty()) {
        return skip("the host has no IPv6 address: /proc/net/if_inet6 is empty");
    }
    let script = "mkdir -p /www && echo served >/www/index.html && exec httpd -f -p [::1]:8080 -h /www";
    let pod = server(&t, script, 8080).await?;
    let url = forward_url(&t, &pod, &[8080]).await.context("PortForward")?;
    ask(&mut Forwarder::spdy(&url).await?, 8080).await
}

async fn forward_refused(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let url = forward_url(&t, &pod.id, &[8099]).await.context("PortForward")?;
    let mut forwarder = Forwarder::spdy(&url).await?;
    let connection = forwarder.open(8099).await?;
    let (data, error) = forwarder.read(connection).await?;
    same("data", data.len(), 0)?;
    holds("the error stream", &error, "8099")
}

async fn forward_half_close(t: T) -> Result<()> {
    let pod = server(&t, "nc -l -p 8081 -e sh -c 'wc -c'; sleep 3600", 8081).await?;
    let url = forward_url(&t, &pod, &[8081]).await.context("PortForward")?;
    let mut forwarder = Forwarder::spdy(&url).await?;
    let connection = forwarder.open(8081).await?;
    forwarder.send(connection, &[b'x'; 5000], true).await?;
    let (data, _) = forwarder.read(connection).await?;
    same("the server's count", String::from_utf8_lossy(&data).trim().to_owned().as_str(), "5000")
}

async fn forward_silent(t: T) -> Result<()> {
    let pod = server(&t, HTTPD, 8080).await?;
    let url = forward_url(&t, &pod, &[8080]).await.context("PortForward")?;
    let mut forwarder = Forwarder::spdy(&url).await?;
    let connection = forwarder.open(8080).await?;
    forwarder.send(connection, REQUEST, false).await?;
    let (data, error) = forwarder.read(connection).await?;
    holds("the answer", &String::from_utf8_lossy(&data), "served\n")?;
    same("the error stream", error.as_str(), "")
}

async fn forward_host(t: T) -> Result<()> {
    let mut config = t.pod();
    super::network::host_network(&mut config);
    let pod = t.run(&config).await?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        // What is left unread would end the connection with a reset.
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut [0; REQUEST.len()]).await?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"served\n").await
    });
    let url = forward_url(&t, &pod.id, &[i32::from(port)]).await.context("PortForward")?;
    ask(&mut Forwarder::spdy(&url).await?, port).await?;
    server.now_or_never().context("the host's server was not asked")???;
    Ok(())
}

async fn forward_unknown(t: T) -> Result<()> {
    refused_with("PortForward", forward_url(&t, "nothing", &[80]).await, &[tonic::Code::NotFound]).map(drop)
}

async fn forward_stopped(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    refused("PortForward to a stopped sandbox", forward_url(&t, &pod.id, &[80]).await).map(drop)
}

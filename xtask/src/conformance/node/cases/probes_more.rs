//! Probes: TCP, gRPC, startup.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::stream;
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::super::super::case::{Case, case, same};
use super::super::context::{IDLE, T};
use super::super::live::{condition, container};
use super::probes::exec_probe;

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Probing container";
    vec![
        case(group, "readiness by TCP needs a port that accepts", tcp_ready),
        case(group, "liveness by TCP restarts when nobody listens", tcp_liveness),
        case(group, "readiness by gRPC needs the answer SERVING", grpc_ready),
        case(group, "liveness by gRPC restarts when nobody listens", grpc_liveness),
        case(group, "a startup probe holds readiness back", startup_holds),
        case(group, "a startup probe holds liveness back", startup_holds_liveness),
        case(group, "a startup probe that fails restarts the container", startup_fails),
        case(group, "a startup probe is not asked again when it succeeded", startup_ends),
        case(
            group,
            "a container that was restarted is not ready before its probe says so",
            not_ready_after_restart,
        ),
        case(
            group,
            "probes of a container go on while another one of the pod is started again",
            beside_restarts,
        ),
    ]
}

fn tcp(port: u16) -> Value {
    json!({"tcpSocket": {"port": port}, "periodSeconds": 1})
}

async fn tcp_ready(t: T) -> Result<()> {
    let script = format!("until test -e /tmp/go; do sleep 0.1; done; httpd -p 8081 -h /tmp; {IDLE}");
    let live = t.run(t.pod(&script).main(json!({"readinessProbe": tcp(8081)}))).await?;
    live.event("Unhealthy", "Readiness probe failed: dial tcp ").await?;
    live.event("Unhealthy", ":8081: connect: connection refused").await?;
    live.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")?;
    live.exec("touch /tmp/go").await?;
    live.ready().await.map(drop)
}

async fn tcp_liveness(t: T) -> Result<()> {
    let live = t.run(t.idle().always().main(json!({"livenessProbe": tcp(8082)}))).await?;
    live.restarted("main", 1).await?;
    live.event("Unhealthy", "Liveness probe failed: dial tcp ").await.map(drop)
}

/// Answers every call of gRPC's health service by what `serving` says.
async fn health_service(address: IpAddr, serving: Arc<AtomicBool>) -> Result<u16> {
    let listener =
        TcpListener::bind(SocketAddr::new(address, 0)).await.context("a port for the health service")?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let serving = Arc::clone(&serving);
            let service = service_fn(move |_: Request<Incoming>| {
                // A message with field 1: SERVING is 1, NOT_SERVING 2.
                let word = if serving.load(Ordering::Relaxed) { 1 } else { 2 };
                async move { answer(word) }
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(connection), service));
        }
    });
    Ok(port)
}

type Frames = stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, std::convert::Infallible>>>;

fn answer(word: u8) -> Result<Response<StreamBody<Frames>>> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse()?);
    let frames =
        vec![Ok(Frame::data(Bytes::from(vec![0, 0, 0, 0, 2, 8, word]))), Ok(Frame::trailers(trailers))];
    let body = StreamBody::new(stream::iter(frames));
    Ok(Response::builder().header("content-type", "application/grpc").body(body)?)
}

async fn grpc_ready(t: T) -> Result<()> {
    // The host's network: so the service can be here.
    let address = t.need_local()?;
    let serving = Arc::new(AtomicBool::new(false));
    let port = health_service(address, Arc::clone(&serving)).await?;
    let probe = json!({"grpc": {"port": port, "service": "a"}, "periodSeconds": 1});
    let pod = t.idle().spec(json!({"hostNetwork": true})).main(json!({"readinessProbe": probe}));
    let live = t.run(pod).await?;
    live.event("Unhealthy", "Readiness probe failed: service unhealthy (responded with \"NOT_SERVING\")")
        .await?;
    live.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")?;
    serving.store(true, Ordering::Relaxed);
    live.ready().await.map(drop)
}

async fn grpc_liveness(t: T) -> Result<()> {
    let probe = json!({"grpc": {"port": 8083}, "periodSeconds": 1});
    let live = t.run(t.idle().always().main(json!({"livenessProbe": probe}))).await?;
    live.restarted("main", 1).await?;
    live.event("Unhealthy", "Liveness probe failed: ").await.map(drop)
}

fn startup(script: &str) -> Value {
    let mut probe = exec_probe(script);
    probe["failureThreshold"] = 600.into();
    probe
}

async fn startup_holds(t: T) -> Result<()> {
    let main = json!({"startupProbe": startup("test -e /tmp/go"), "readinessProbe": exec_probe("echo >> /tmp/asked")});
    let live = t.run(t.idle().main(main)).await?;
    live.event("Unhealthy", "Startup probe failed: ").await?;
    let pod = live.until("it runs", |pod| container(pod, "main")["state"]["running"].is_object()).await?;
    same("started", &container(&pod, "main")["started"], false)?;
    live.exec("test ! -e /tmp/asked").await?;
    live.exec("touch /tmp/go").await?;
    let pod = live.ready().await?;
    same("started", &container(&pod, "main")["started"], true)
}

async fn startup_holds_liveness(t: T) -> Result<()> {
    let mut liveness = exec_probe("echo >> /tmp/alive; exit 1");
    liveness["failureThreshold"] = 1.into();
    let main =
        json!({"startupProbe": startup("echo >> /tmp/asked; test -e /tmp/go"), "livenessProbe": liveness});
    let live = t.run(t.idle().always().main(main)).await?;
    live.until("it runs", |pod| container(pod, "main")["state"]["running"].is_object()).await?;
    live.exec_until("[ $(wc -l < /tmp/asked) -ge 4 ]").await?;
    live.exec("test ! -e /tmp/alive").await?;
    live.exec("touch /tmp/go").await?;
    live.restarted("main", 1).await.map(drop)
}

async fn startup_fails(t: T) -> Result<()> {
    let mut probe = exec_probe("exit 1");
    probe["failureThreshold"] = 2.into();
    let live = t.run(t.idle().always().main(json!({"startupProbe": probe}))).await?;
    live.restarted("main", 1).await?;
    live.event("Killing", "Container main failed startup probe, will be restarted").await?;
    live.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")
}

async fn startup_ends(t: T) -> Result<()> {
    let main = json!({"startupProbe": startup("echo >> /tmp/asked"), "readinessProbe": exec_probe("echo >> /tmp/ready")});
    let live = t.ready(t.idle().main(main)).await?;
    live.exec_until("[ $(wc -l < /tmp/ready) -ge 4 ]").await?;
    same("startup probes", live.exec("wc -l < /tmp/asked").await?.as_str(), "1")
}

async fn not_ready_after_restart(t: T) -> Result<()> {
    let script = format!("test -e /v/kept/again || touch /tmp/ready; {IDLE}");
    let pod = t.pod(&script).always().volume("kept", json!({"emptyDir": {}}));
    let live = t.ready(pod.main(json!({"readinessProbe": exec_probe("test -e /tmp/ready")}))).await?;
    live.exec("touch /v/kept/again").await?;
    live.end_main().await?;
    live.restarted("main", 1).await?;
    let pod = live.until("it runs", |pod| container(pod, "main")["state"]["running"].is_object()).await?;
    same("Ready", &condition(&pod, "Ready")["status"], "False")?;
    live.exec("touch /tmp/ready").await?;
    live.ready().await.map(drop)
}

async fn beside_restarts(t: T) -> Result<()> {
    let pod = t.idle().always().main(json!({"readinessProbe": exec_probe("test -e /tmp/ready")}));
    let live = t.run(pod.beside("other", "sleep 1; exit 1", json!({}))).await?;
    live.waiting("other", "CrashLoopBackOff").await?;
    live.exec("touch /tmp/ready").await?;
    live.until("main is ready", |pod| container(pod, "main")["ready"] == true).await?;
    live.exec("rm /tmp/ready").await?;
    live.until("main is not ready", |pod| container(pod, "main")["ready"] == false).await.map(drop)
}

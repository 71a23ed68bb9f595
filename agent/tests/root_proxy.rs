//! The proxy from the API server's lists and watches down to what a socket reaches, beside a pretended API server.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use ebpf_tests::{
    arena::Arena,
    servers::{Server, ask_tcp},
    tables::{at, ips},
};
use futures::StreamExt;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use keelson_agent::{
    config::{ForwardingMode, ProxySection, ShortcutMode, XdpMode},
    events::EventRecorder,
    proxy,
};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(90);

type Answer = UnsyncBoxBody<Bytes, Infallible>;
type Feed = mpsc::UnboundedSender<Value>;

/// Lists what it was given, then watches what it is told.
#[derive(Clone, Default)]
struct FakeApi {
    lists: Arc<HashMap<&'static str, Vec<Value>>>,
    watches: Arc<Mutex<HashMap<String, Feed>>>,
}

impl FakeApi {
    fn new(services: Vec<Value>, slices: Vec<Value>) -> Self {
        let lists = HashMap::from([("services", services), ("endpointslices", slices)]);
        Self { lists: Arc::new(lists), watches: Arc::default() }
    }

    fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let answer = api.answer(&request);
            async move { Ok::<_, Infallible>(Response::new(answer)) }
        });
        kube::Client::new(service, "default")
    }

    fn answer(&self, request: &Request<Body>) -> Answer {
        let plural = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        if request.uri().query().unwrap_or_default().contains("watch=true") {
            let (feed, events) = mpsc::unbounded_channel::<Value>();
            self.watches.lock().expect("nobody panics with it").insert(plural, feed);
            let lines = UnboundedReceiverStream::new(events)
                .map(|event| Ok(Frame::data(format!("{event}\n").into())));
            return StreamBody::new(lines).boxed_unsync();
        }
        let items = self.lists.get(plural.as_str()).cloned().unwrap_or_default();
        let list =
            json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items});
        Full::from(list.to_string()).boxed_unsync()
    }

    /// Sends an event to the watch of a kind, once there is one.
    async fn tell(&self, plural: &str, kind: &str, object: &Value) -> Result<()> {
        let until = Instant::now() + DEADLINE;
        loop {
            let feed = self.watches.lock().expect("nobody panics with it").get(plural).cloned();
            if let Some(feed) = feed {
                return feed.send(json!({"type": kind, "object": object})).context("the watch ended");
            }
            ensure!(Instant::now() < until, "nobody watches {plural}");
            tokio::task::yield_now().await;
        }
    }
}

fn web() -> Value {
    json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "u1", "resourceVersion": "1"},
        "spec": {
            "type": "NodePort", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
            "ports": [{"port": 80, "nodePort": 30000, "protocol": "TCP"}],
        },
    })
}

fn slice(addresses: &[&str], version: &str) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|address| json!({"addresses": [address], "conditions": {"ready": true}}))
        .collect();
    json!({
        "metadata": {
            "name": "web-abc", "namespace": "default", "resourceVersion": version,
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    })
}

/// Dials until the answer is as wanted; tells the last one otherwise.
async fn until_answered(address: SocketAddr, wanted: Option<&'static str>) -> Result<()> {
    let until = Instant::now() + DEADLINE;
    loop {
        let answer = tokio::task::spawn_blocking(move || ask_tcp(address).ok().map(|(who, _)| who)).await?;
        if answer.as_deref() == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{address} answers {answer:?}, not {wanted:?}");
    }
}

fn section(arena: &Arena) -> ProxySection {
    ProxySection {
        enabled: true,
        cgroup_root: arena.cgroup.clone(),
        pin_dir: arena.pin_dir.clone(),
        service_cidr: "10.96.0.0/12".to_owned(),
        node_port_addresses: Vec::new(),
        serve_outside: true,
        xdp: XdpMode::default(),
        pod_shortcut: ShortcutMode::default(),
        node_port_forwarding: ForwardingMode::default(),
        healthz_bind_address: [0, 0, 0, 0].into(),
        healthz_port: 10256,
        metrics_bind_address: [127, 0, 0, 1].into(),
        metrics_port: 10249,
    }
}

#[test]
fn services_of_the_api_server_are_reached_and_follow_it() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2", "192.0.2.10"]))?;
    let _servers = [Server::tcp(at("10.244.0.1:8080"))?, Server::tcp(at("10.244.0.2:8080"))?];
    // One thread, so that everything stays in the arena's network namespace.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let api = FakeApi::new(vec![web()], vec![slice(&["10.244.0.1"], "1")]);
        let (events, _facts) = EventRecorder::new();
        let cancel = CancellationToken::new();
        let (_node, node) = tokio::sync::watch::channel(None);
        let config = proxy::ProxyConfig::new(&section(&arena), "node-1", [192, 0, 2, 10].into())?;
        let (_, host_ports) = tokio::sync::mpsc::channel(1);
        let task = tokio::spawn(proxy::run(api.client(), config, node, events, host_ports, cancel.clone()));
        let vip = at("10.96.0.10:80");
        until_answered(vip, Some("10.244.0.1:8080")).await?;
        until_answered(at("127.0.0.1:30000"), Some("10.244.0.1:8080")).await?;
        until_answered(at("192.0.2.10:30000"), Some("10.244.0.1:8080")).await?;
        // An address that appears later serves too.
        ebpf_tests::arena::ip(&["addr", "add", "192.0.2.11/32", "dev", "lo"])?;
        until_answered(at("192.0.2.11:30000"), Some("10.244.0.1:8080")).await?;
        api.tell("endpointslices", "MODIFIED", &slice(&["10.244.0.2"], "2")).await?;
        until_answered(vip, Some("10.244.0.2:8080")).await?;
        api.tell("endpointslices", "MODIFIED", &slice(&[], "3")).await?;
        until_answered(vip, None).await?;
        let refused = tokio::task::spawn_blocking(move || ask_tcp(vip)).await?.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        api.tell("endpointslices", "MODIFIED", &slice(&["10.244.0.2"], "4")).await?;
        until_answered(vip, Some("10.244.0.2:8080")).await?;
        // The agent goes; the service stays.
        cancel.cancel();
        task.await??;
        until_answered(vip, Some("10.244.0.2:8080")).await?;
        proxy::cleanup(&arena.pin_dir, "10.96.0.0/12").await?;
        until_answered(vip, None).await?;
        assert!(!arena.pin_dir.exists());
        Ok(())
    })
}

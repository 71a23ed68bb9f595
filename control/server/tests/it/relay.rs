//! Streams through the server, with a kubelet that is played by the test.

use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::server::TlsStream;

use crate::harness::{Client, Cluster};

const POD: &str = "/api/v1/namespaces/default/pods/web";

/// A pod on node `a`, whose kubelet listens at the returned listener.
async fn pod_on_fake_kubelet(admin: &Client) -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let node = json!({"metadata": {"name": "a"}, "status": {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": listener.local_addr().unwrap().port()}},
    }});
    admin.create("/api/v1/nodes", &node).await;
    let containers = json!([{"name": "main", "image": "i"}, {"name": "side", "image": "i"}]);
    let pod = json!({"metadata": {"name": "web"}, "spec": {"nodeName": "a", "containers": containers}});
    admin.create("/api/v1/namespaces/default/pods", &pod).await;
    listener
}

/// Read up to the end of an HTTP head.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// Accept one request of the API server; it must show a client certificate.
async fn accept(cluster: &Cluster, listener: &TcpListener) -> (String, TlsStream<TcpStream>) {
    let (stream, _) = listener.accept().await.unwrap();
    let mut stream = cluster.kubelet_tls().accept(stream).await.unwrap();
    (head(&mut stream).await, stream)
}

#[tokio::test]
async fn logs_are_streamed_and_refusals_passed_on() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let listener = pod_on_fake_kubelet(&admin).await;
    let (code, error) = admin.get(&format!("{POD}/log")).await;
    assert_eq!(code, 400);
    assert!(error["message"].as_str().unwrap().ends_with("choose one of: [main side]"), "{error}");

    let path = format!("{POD}/log?container=side&follow=true&tailLines=5");
    let (answer, ()) = tokio::join!(admin.get(&path), async {
        let (request, mut stream) = accept(&cluster, &listener).await;
        assert!(
            request.starts_with("GET /containerLogs/default/web/side?follow=true&tailLines=5 HTTP/1.1"),
            "{request}"
        );
        let answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nline 1\r\n0\r\n\r\n";
        stream.write_all(answer).await.unwrap();
    });
    assert_eq!(answer, (200, json!("line 1")));

    let path = format!("{POD}/log?container=main");
    let (answer, ()) = tokio::join!(admin.get(&path), async {
        let (_, mut stream) = accept(&cluster, &listener).await;
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 14\r\n\r\nis starting up")
            .await
            .unwrap();
    });
    assert_eq!((answer.0, &answer.1["message"]), (400, &json!("is starting up")));
    cluster.stop().await;
}

#[tokio::test]
async fn an_upgrade_becomes_a_pipe_to_the_kubelet() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let listener = pod_on_fake_kubelet(&admin).await;
    let mut client = admin.connect().await;
    let request = format!(
        "POST {POD}/exec?command=sh&command=-c&container=main&stdin=true HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\
         Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    );
    client.write_all(request.as_bytes()).await.unwrap();
    let (request, mut kubelet) = accept(&cluster, &listener).await;
    let lower = request.to_lowercase();
    assert!(
        request.starts_with("POST /exec/default/web/main?command=sh&command=-c&stdin=true HTTP/1.1"),
        "{request}"
    );
    assert!(
        lower.contains("upgrade: spdy/3.1") && lower.contains("x-stream-protocol-version: v4"),
        "{request}"
    );
    kubelet
        .write_all(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\nhello",
        )
        .await
        .unwrap();
    assert!(head(&mut client).await.starts_with("HTTP/1.1 101"));
    let mut greeting = [0; 5];
    client.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"hello");
    client.write_all(b"world").await.unwrap();
    kubelet.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"world");
    drop(kubelet);
    assert_eq!(client.read(&mut greeting).await.unwrap_or(0), 0, "the end is passed on");
    cluster.stop().await;
}

#[tokio::test]
async fn a_nodes_kubelet_is_asked_through_the_proxy() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let listener = pod_on_fake_kubelet(&admin).await;
    let (answer, ()) = tokio::join!(admin.get("/api/v1/nodes/a/proxy/stats/summary?only_cpu=true"), async {
        let (request, mut stream) = accept(&cluster, &listener).await;
        assert!(request.starts_with("GET /stats/summary?only_cpu=true HTTP/1.1"), "{request}");
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\n";
        stream.write_all(format!("{head}{{\"a\": 1}}").as_bytes()).await.unwrap();
    });
    assert_eq!(answer, (200, json!({"a": 1})));
    let (answer, ()) = tokio::join!(admin.get("/api/v1/nodes/a/proxy/none"), async {
        let (_, mut stream) = accept(&cluster, &listener).await;
        let answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone";
        stream.write_all(answer).await.unwrap();
    });
    assert_eq!(answer.0, 404, "the kubelet's own answer");
    assert_eq!(admin.get("/api/v1/nodes/b/proxy/healthz").await.0, 404, "no such node");
    assert_eq!(admin.get("/api/v1/nodes/a:1/proxy/healthz").await.0, 400, "another port");
    cluster.stop().await;
}

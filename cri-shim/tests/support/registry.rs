//! A registry in memory: serves what it is given, breaks and refuses on demand.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::Write;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

/// A registry on a loopback port.
#[derive(Clone)]
pub struct Registry {
    address: std::net::SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Path below `/v2/` to type and bytes.
    objects: HashMap<String, (String, Bytes)>,
    /// Paths whose next answer breaks after half its bytes.
    broken: Vec<String>,
    /// `user:password` in base64 that the token server wants.
    protected: Option<String>,
    requests: Vec<String>,
}

/// `sha256:` and the hash.
pub fn digest(bytes: &[u8]) -> String {
    keelson_cri::images::digest::of(bytes)
}

/// A layer with the given files (path, content, mode), uncompressed.
pub fn layer(files: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        archive.append_data(&mut header, path, *content).expect("appended");
    }
    archive.into_inner().expect("finished")
}

/// gzip.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("compressed");
    encoder.finish().expect("compressed")
}

impl Registry {
    /// Starts an empty one.
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(State::default()));
        let this = Self { address, state };
        let server = this.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("accepted");
                let server = server.clone();
                let service = service_fn(move |request| {
                    let answer = server.answer(&request);
                    async move { Ok::<_, Infallible>(answer) }
                });
                tokio::spawn(async move {
                    drop(
                        hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(stream), service)
                            .await,
                    );
                });
            }
        });
        this
    }

    /// Host and port.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Serves an image of gzip layers under `name:tag`, inside an index when `indexed`; gives the configuration's digest.
    pub fn push(
        &self,
        name: &str,
        tag: &str,
        layers: &[Vec<u8>],
        config: serde_json::Value,
        indexed: bool,
    ) -> String {
        let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
        let mut document = serde_json::json!({
            "os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        document["config"] = config;
        let mut descriptors = Vec::new();
        for layer in layers {
            descriptors.push(self.blob(name, "application/vnd.oci.image.layer.v1.tar+gzip", gzip(layer)));
        }
        let config =
            self.blob(name, "application/vnd.oci.image.config.v1+json", document.to_string().into_bytes());
        let id = config["digest"].as_str().expect("a digest").to_owned();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": descriptors,
        });
        let mut descriptor =
            self.manifest(name, tag, "application/vnd.oci.image.manifest.v1+json", &manifest);
        if indexed {
            descriptor["platform"] = serde_json::json!({"os": "linux", "architecture": "amd64"});
            let index = serde_json::json!({
                "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [descriptor],
            });
            self.manifest(name, tag, "application/vnd.oci.image.index.v1+json", &index);
        }
        id
    }

    /// Lets the next answer for a blob break after half its bytes.
    pub fn break_blob(&self, name: &str, digest: &str) {
        self.state.lock().expect("unpoisoned").broken.push(format!("{name}/blobs/{digest}"));
    }

    /// Serves other bytes under a blob's digest.
    pub fn replace_blob(&self, name: &str, digest: &str, bytes: Vec<u8>) {
        let object = ("application/octet-stream".to_owned(), Bytes::from(bytes));
        self.state.lock().expect("unpoisoned").objects.insert(format!("{name}/blobs/{digest}"), object);
    }

    /// Asks for a token that only these credentials get.
    pub fn protect(&self, user: &str, password: &str) {
        use base64::Engine;
        let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        self.state.lock().expect("unpoisoned").protected = Some(pair);
    }

    /// Every request so far: path, query and range.
    pub fn requests(&self) -> Vec<String> {
        self.state.lock().expect("unpoisoned").requests.clone()
    }

    fn manifest(&self, name: &str, tag: &str, kind: &str, value: &serde_json::Value) -> serde_json::Value {
        let bytes = Bytes::from(value.to_string());
        let digest = digest(&bytes);
        let descriptor = serde_json::json!({"mediaType": kind, "digest": digest, "size": bytes.len()});
        let mut state = self.state.lock().expect("unpoisoned");
        for version in [tag, digest.as_str()] {
            state.objects.insert(format!("{name}/manifests/{version}"), (kind.to_owned(), bytes.clone()));
        }
        descriptor
    }

    fn blob(&self, name: &str, kind: &str, bytes: Vec<u8>) -> serde_json::Value {
        let digest = digest(&bytes);
        let descriptor = serde_json::json!({"mediaType": kind, "digest": digest, "size": bytes.len()});
        let object = ("application/octet-stream".to_owned(), Bytes::from(bytes));
        self.state.lock().expect("unpoisoned").objects.insert(format!("{name}/blobs/{digest}"), object);
        descriptor
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<BoxBody<Bytes, std::io::Error>> {
        let full = |bytes: Bytes| Full::new(bytes).map_err(|never| match never {}).boxed();
        let text = |name: header::HeaderName| {
            request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        let (authorization, range) = (text(header::AUTHORIZATION), text(header::RANGE));
        let mut state = self.state.lock().expect("unpoisoned");
        state.requests.push(format!("{} {range}", request.uri()));
        let path = request.uri().path();
        if path == "/token" {
            let allowed =
                state.protected.as_ref().is_some_and(|pair| authorization == format!("Basic {pair}"));
            let status = if allowed { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
            return Response::builder()
                .status(status)
                .body(full(r#"{"token":"secret"}"#.into()))
                .expect("formed");
        }
        if state.protected.is_some() && authorization != "Bearer secret" {
            let challenge = format!("Bearer realm=\"http://{}/token\",service=\"test\"", self.address);
            let answer = Response::builder().status(StatusCode::UNAUTHORIZED);
            return answer
                .header(header::WWW_AUTHENTICATE, challenge)
                .body(full(Bytes::new()))
                .expect("formed");
        }
        let path = path.trim_start_matches("/v2/").to_owned();
        let Some((kind, bytes)) = state.objects.get(&path).cloned() else {
            return Response::builder()
                .status(StatusCode::NOT_FOUND)
                .body(full(Bytes::new()))
                .expect("formed");
        };
        let from =
            range.strip_prefix("bytes=").and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
        let status = if from.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
        let rest = bytes.slice(from.unwrap_or(0)..);
        let answer = Response::builder().status(status).header(header::CONTENT_TYPE, kind);
        let answer = answer.header(header::CONTENT_LENGTH, rest.len());
        if let Some(index) = state.broken.iter().position(|broken| *broken == path) {
            state.broken.remove(index);
            let half = rest.slice(..rest.len() / 2);
            let cut = std::io::Error::other("cut");
            let parts = futures::stream::iter([Ok(Frame::data(half)), Err(cut)]);
            // The half must have left before the connection breaks.
            let slow = parts.then(|part| async move {
                if part.is_err() {
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                }
                part
            });
            return answer.body(BodyExt::boxed(StreamBody::new(slow))).expect("formed");
        }
        answer.body(full(rest)).expect("formed")
    }
}

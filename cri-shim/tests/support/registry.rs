//! A registry in memory: serves what it is given, over HTTP or HTTPS, breaks, refuses, stalls, lies and redirects on demand.

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
    /// What goes wrong, by the end of the path, and how many times more.
    faults: Vec<(String, Fault, usize)>,
    /// `user:password` in base64 that is wanted.
    protected: Option<String>,
    /// Ask for it at once instead of sending to a token server.
    basic: bool,
    /// The refresh token that the token server takes, and the access token that is asked for.
    tokens: Option<(String, String)>,
    requests: Vec<String>,
    headers: Vec<http::HeaderMap>,
}

/// What goes wrong with an answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The connection breaks after half the bytes.
    Cut,
    /// Half the bytes, then nothing.
    Stall,
    /// A status with headers and no content.
    Status(u16, Vec<(&'static str, String)>),
    /// Another length is announced than comes.
    Length(u64),
    /// More bytes than the object has, without a length.
    Longer(usize),
    /// Ranges are not understood.
    NoRange,
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
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
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
        Self::serve(None).await
    }

    /// Starts an empty one behind TLS.
    pub async fn start_tls(config: rustls::ServerConfig) -> Self {
        Self::serve(Some(tokio_rustls::TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn serve(tls: Option<tokio_rustls::TlsAcceptor>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(State::default()));
        let this = Self { address, state };
        let server = this.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("accepted");
                let server = server.clone();
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let server = server.clone();
                    async move {
                        let (head, body) = request.into_parts();
                        let body =
                            body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
                        Ok::<_, Infallible>(server.answer(&Request::from_parts(head, body)))
                    }
                });
                let tls = tls.clone();
                tokio::spawn(async move {
                    let server = hyper::server::conn::http1::Builder::new();
                    match tls {
                        None => drop(server.serve_connection(TokioIo::new(stream), service).await),
                        Some(tls) => {
                            let Ok(stream) = tls.accept(stream).await else { return };
                            drop(server.serve_connection(TokioIo::new(stream), service).await);
                        }
                    }
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
        self.finish(name, tag, &document, &descriptors, indexed)
    }

    /// Serves an image whose layers are blobs already made: media type, stored bytes and the digest of what they unpack to.
    pub fn push_blobs(&self, name: &str, tag: &str, layers: &[(&str, Vec<u8>, String)]) -> String {
        let diff_ids: Vec<_> = layers.iter().map(|(_, _, diff_id)| diff_id).collect();
        let document = serde_json::json!({
            "os": "linux", "architecture": "amd64", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let descriptors: Vec<_> =
            layers.iter().map(|(kind, bytes, _)| self.blob(name, kind, bytes.clone())).collect();
        self.finish(name, tag, &document, &descriptors, false)
    }

    fn finish(
        &self,
        name: &str,
        tag: &str,
        document: &serde_json::Value,
        descriptors: &[serde_json::Value],
        indexed: bool,
    ) -> String {
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
        self.fault(&format!("{name}/blobs/{digest}"), Fault::Cut, 1);
    }

    /// Lets the next `times` answers to paths that end so go wrong.
    pub fn fault(&self, path: &str, fault: Fault, times: usize) {
        self.state.lock().expect("unpoisoned").faults.push((path.to_owned(), fault, times));
    }

    /// Forgets all faults.
    pub fn heal(&self) {
        self.state.lock().expect("unpoisoned").faults.clear();
    }

    /// Serves any bytes as a manifest.
    pub fn push_document(&self, name: &str, version: &str, kind: &str, bytes: &[u8]) {
        let object = (kind.to_owned(), Bytes::copy_from_slice(bytes));
        let mut state = self.state.lock().expect("unpoisoned");
        state.objects.insert(format!("{name}/manifests/{version}"), object);
    }

    /// The bytes of a manifest, to be changed and pushed again.
    pub fn document(&self, name: &str, version: &str) -> serde_json::Value {
        let state = self.state.lock().expect("unpoisoned");
        let (_, bytes) = &state.objects[&format!("{name}/manifests/{version}")];
        serde_json::from_slice(bytes).expect("JSON")
    }

    /// The headers of every request so far.
    pub fn headers(&self) -> Vec<http::HeaderMap> {
        self.state.lock().expect("unpoisoned").headers.clone()
    }

    /// Serves other bytes under a blob's digest.
    pub fn replace_blob(&self, name: &str, digest: &str, bytes: Vec<u8>) {
        let object = ("application/octet-stream".to_owned(), Bytes::from(bytes));
        self.state.lock().expect("unpoisoned").objects.insert(format!("{name}/blobs/{digest}"), object);
    }

    /// Asks for these credentials itself.
    pub fn protect_basic(&self, user: &str, password: &str) {
        self.protect(user, password);
        self.state.lock().expect("unpoisoned").basic = true;
    }

    /// Asks for a token that only these credentials get.
    pub fn protect(&self, user: &str, password: &str) {
        use base64::Engine;
        let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        self.state.lock().expect("unpoisoned").protected = Some(pair);
    }

    /// Asks for an access token, which the token server gives only for a refresh token.
    pub fn protect_tokens(&self, refresh: &str, access: &str) {
        self.protect("nobody", "at all");
        self.state.lock().expect("unpoisoned").tokens = Some((refresh.to_owned(), access.to_owned()));
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

    #[allow(clippy::too_many_lines, reason = "one answer with all that can be wrong with it")]
    fn answer(&self, request: &Request<Bytes>) -> Response<BoxBody<Bytes, std::io::Error>> {
        let full = |bytes: Bytes| Full::new(bytes).map_err(|never| match never {}).boxed();
        let text = |name: header::HeaderName| {
            request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        let (authorization, range) = (text(header::AUTHORIZATION), text(header::RANGE));
        let mut state = self.state.lock().expect("unpoisoned");
        state.requests.push(format!("{} {range}", request.uri()));
        state.headers.push(request.headers().clone());
        let path = request.uri().path();
        if path == "/token" {
            let allowed = match &state.tokens {
                Some((refresh, _)) => {
                    let form = String::from_utf8_lossy(request.body()).into_owned();
                    request.method() == http::Method::POST
                        && form.split('&').any(|field| field == "grant_type=refresh_token")
                        && form.split('&').any(|field| field == format!("refresh_token={refresh}"))
                }
                None => state.protected.as_ref().is_some_and(|pair| authorization == format!("Basic {pair}")),
            };
            let status = if allowed { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
            let answer = match &state.tokens {
                // OAuth 2 calls it so.
                Some((_, access)) => serde_json::json!({ "access_token": access }),
                None => serde_json::json!({ "token": "secret" }),
            };
            return Response::builder().status(status).body(full(answer.to_string().into())).expect("formed");
        }
        let basic = state.protected.clone().filter(|_| state.basic).map(|pair| format!("Basic {pair}"));
        let token = state.tokens.as_ref().map_or("secret", |(_, access)| access);
        let wanted = basic.clone().unwrap_or_else(|| format!("Bearer {token}"));
        if state.protected.is_some() && authorization != wanted {
            let challenge = match basic {
                Some(_) => "Basic realm=\"test\"".to_owned(),
                None => format!("Bearer realm=\"http://{}/token\",service=\"test\"", self.address),
            };
            let answer = Response::builder().status(StatusCode::UNAUTHORIZED);
            return answer
                .header(header::WWW_AUTHENTICATE, challenge)
                .body(full(Bytes::new()))
                .expect("formed");
        }
        let path = path.trim_start_matches("/v2/").to_owned();
        let fault = take_fault(&mut state.faults, &path);
        if let Some(Fault::Status(status, headers)) = &fault {
            let mut answer = Response::builder().status(*status);
            for (name, value) in headers {
                answer = answer.header(*name, value);
            }
            return answer.body(full(Bytes::new())).expect("formed");
        }
        let Some((kind, bytes)) = state.objects.get(&path).cloned() else {
            return Response::builder()
                .status(StatusCode::NOT_FOUND)
                .body(full(Bytes::new()))
                .expect("formed");
        };
        let range = range.strip_prefix("bytes=").filter(|_| !matches!(fault, Some(Fault::NoRange)));
        let from = range.and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
        let status = if from.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
        let rest = bytes.slice(from.unwrap_or(0)..);
        let mut answer = Response::builder().status(status).header(header::CONTENT_TYPE, kind);
        if let Some(from) = from {
            let told = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            answer = answer.header(header::CONTENT_RANGE, told);
        }
        let stream = |parts: Vec<Result<Bytes, Option<std::io::Error>>>| {
            // What was sent must have left before the connection breaks; without an error it stays silent for good.
            let slow = futures::stream::iter(parts).then(|part| async move {
                match part {
                    Ok(bytes) => Ok(Frame::data(bytes)),
                    Err(Some(error)) => {
                        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                        Err(error)
                    }
                    Err(None) => std::future::pending().await,
                }
            });
            BodyExt::boxed(StreamBody::new(slow))
        };
        let half = rest.slice(..rest.len() / 2);
        let length = rest.len() as u64;
        match fault {
            Some(Fault::Cut) => {
                let answer = answer.header(header::CONTENT_LENGTH, length);
                let cut = std::io::Error::other("cut");
                answer.body(stream(vec![Ok(half), Err(Some(cut))])).expect("formed")
            }
            Some(Fault::Stall) => {
                let answer = answer.header(header::CONTENT_LENGTH, length);
                answer.body(stream(vec![Ok(half), Err(None)])).expect("formed")
            }
            Some(Fault::Length(told)) => {
                let answer = answer.header(header::CONTENT_LENGTH, told);
                answer.body(stream(vec![Ok(rest), Err(Some(std::io::Error::other("cut")))])).expect("formed")
            }
            Some(Fault::Longer(more)) => {
                answer.body(stream(vec![Ok(rest), Ok(Bytes::from(vec![b'x'; more]))])).expect("formed")
            }
            _ => answer.header(header::CONTENT_LENGTH, length).body(full(rest)).expect("formed"),
        }
    }
}

fn take_fault(faults: &mut Vec<(String, Fault, usize)>, path: &str) -> Option<Fault> {
    let index = faults.iter().position(|(end, _, _)| path.ends_with(end.as_str()))?;
    let fault = faults[index].1.clone();
    faults[index].2 -= 1;
    if faults[index].2 == 0 {
        faults.remove(index);
    }
    Some(fault)
}

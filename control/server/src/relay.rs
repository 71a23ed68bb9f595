//! Requests that a kubelet answers: logs are streamed through, exec, attach and port-forward are relayed as raw upgraded connections, and
//! what is below `nodes/NAME/proxy` is passed on as it is.
//!
//! The kubelet is reached at its node's InternalIP over TLS; its certificate must come from the cluster's authority, and the server shows a
//! client certificate of its own. The user has been authorized before; nothing of the user's credentials is passed on.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use control_api::{
    kinds, meta,
    status::{ApiError, Reason},
};
use cri_shim_streaming::relay::{self, RelayError};
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    api::{Api, dispatch::ResourceRequest, options::Freshness, write::ObjectRef},
    config::Credentials,
    http::{
        body::{self, Body, Reply},
        query::{self, Query},
    },
    serve::ServeError,
};

/// How long connecting to a kubelet may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long a kubelet may take until its answer begins.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// Log options that are passed on.
const LOG_OPTIONS: &[&str] =
    &["follow", "previous", "tailLines", "sinceSeconds", "sinceTime", "timestamps", "limitBytes", "stream"];

/// Opens connections to kubelets.
#[derive(Clone)]
pub(crate) struct KubeletClient {
    tls: TlsConnector,
}

impl KubeletClient {
    /// A client with the server's kubelet credentials.
    pub(crate) fn new(credentials: &Credentials) -> Result<Self, ServeError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(credentials.authority_pem.as_bytes()) {
            roots.add(certificate.map_err(ServeError::Pem)?).map_err(ServeError::Tls)?;
        }
        let identity = &credentials.kubelet_client;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(identity.certificate_pem.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(ServeError::Pem)?;
        let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).map_err(ServeError::Pem)?;
        let config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(ServeError::Tls)?;
        Ok(Self { tls: TlsConnector::from(Arc::new(config)) })
    }

    async fn connect(&self, kubelet: &Kubelet) -> Result<TlsStream<TcpStream>, ApiError> {
        let (address, port) = (kubelet.address, kubelet.port);
        let failed = |why: String| {
            ApiError::new(
                Reason::ServiceUnavailable,
                format!("error dialing the kubelet of node \"{}\" at {address}:{port}: {why}", kubelet.node),
            )
        };
        let connect = async {
            let stream =
                TcpStream::connect((address, port)).await.map_err(|error| failed(error.to_string()))?;
            stream.set_nodelay(true).map_err(|error| failed(error.to_string()))?;
            let name = ServerName::IpAddress(address.into());
            self.tls.connect(name, stream).await.map_err(|error| failed(error.to_string()))
        };
        match tokio::time::timeout(CONNECT_DEADLINE, connect).await {
            Ok(connected) => connected,
            Err(_elapsed) => Err(failed(format!("no answer within {CONNECT_DEADLINE:?}"))),
        }
    }
}

/// Where a node's kubelet listens.
struct Kubelet {
    node: String,
    address: IpAddr,
    port: u16,
}

/// Answer `pods/NAME/log`.
pub(crate) async fn logs(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let object = request.object()?;
    let (pod, kubelet) = locate(api, object).await?;
    let container = container(object, &pod, request.query.get("container"), false)?;
    let mut path =
        format!("/containerLogs/{}/{}/{container}", object.namespace.unwrap_or_default(), object.name);
    let options = LOG_OPTIONS
        .iter()
        .flat_map(|name| request.query.all(name).map(move |value| (*name, value)))
        .map(|(name, value)| format!("{name}={}", query::encode(value)));
    append_query(&mut path, options);
    let response = get(api, &kubelet, &path).await?;
    let (parts, incoming) = response.into_parts();
    if !parts.status.is_success() {
        return Err(upstream_error(parts.status, incoming).await);
    }
    let body: Body = incoming.map_err(Into::into).boxed_unsync();
    Ok(body::reply(StatusCode::OK, "text/plain", body))
}

/// Answer `exec`, `attach` and `portforward`.
pub(crate) async fn upgrade(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let object = request.object()?;
    let sub = request.target.sub().to_owned();
    if !relay::is_upgrade(request.headers()) {
        return Err(ApiError::bad_request("Upgrade request required"));
    }
    let (pod, kubelet) = locate(api, object).await?;
    let (namespace, name) = (object.namespace.unwrap_or_default(), object.name);
    let mut path = if sub == "portforward" {
        format!("/portForward/{namespace}/{name}")
    } else {
        let container = container(object, &pod, request.query.get("container"), true)?;
        format!("/{sub}/{namespace}/{name}/{container}")
    };
    append_query(&mut path, passed_on(&request.query));
    let stream = api.kubelets.connect(&kubelet).await?;
    let host = format!("{}:{}", kubelet.address, kubelet.port);
    match relay::relay_upgrade(request.http, stream, &path, &host).await {
        Ok(response) => {
            let (parts, body) = response.into_parts();
            Ok(Response::from_parts(parts, body.boxed_unsync()))
        }
        Err(error @ RelayError::NotAnUpgrade) => Err(ApiError::bad_request(error.to_string())),
        Err(error) => Err(ApiError::internal(format!("error relaying to the kubelet: {error}"))),
    }
}

/// Pass a request below `nodes/NAME/proxy` on to the node's kubelet; the answer is the kubelet's own.
pub(crate) async fn node(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let (name, port) = proxied(request.target.name.as_deref().unwrap_or_default())?;
    let kubelet = find_kubelet(api, name.to_owned())?;
    if port.is_some_and(|port| port != kubelet.port) {
        // Anything else that listens on the node is not for everybody who may ask a kubelet.
        return Err(ApiError::bad_request(format!(
            "only the kubelet's port {} of node \"{name}\" can be reached",
            kubelet.port
        )));
    }
    let path = behind_proxy(request.http.uri());
    if relay::is_upgrade(request.headers()) {
        let stream = api.kubelets.connect(&kubelet).await?;
        let host = format!("{}:{}", kubelet.address, kubelet.port);
        let answer = relay::relay_upgrade(request.http, stream, &path, &host).await;
        let answer =
            answer.map_err(|error| ApiError::internal(format!("error relaying to the kubelet: {error}")))?;
        let (parts, body) = answer.into_parts();
        return Ok(Response::from_parts(parts, body.boxed_unsync()));
    }
    let (parts, body) = request.http.into_parts();
    let mut builder = Request::builder().method(parts.method);
    for name in [header::ACCEPT, header::CONTENT_TYPE] {
        if let Some(value) = parts.headers.get(&name) {
            builder = builder.header(name, value);
        }
    }
    let answer = exchange(api, &kubelet, &path, builder, body::read(body).await?).await?;
    let (parts, incoming) = answer.into_parts();
    let body: Body = incoming.map_err(Into::into).boxed_unsync();
    let mut reply = Response::new(body);
    *reply.status_mut() = parts.status;
    if let Some(content_type) = parts.headers.get(header::CONTENT_TYPE) {
        reply.headers_mut().insert(header::CONTENT_TYPE, content_type.clone());
    }
    Ok(reply)
}

/// A node as a proxy's path names it: `NAME`, `NAME:PORT` or `https:NAME:PORT`.
fn proxied(text: &str) -> Result<(&str, Option<u16>), ApiError> {
    let parts: Vec<&str> = text.split(':').collect();
    let (name, port) = match parts.as_slice() {
        [name] | ["https", name, ""] => (*name, None),
        [name, port] | ["https", name, port] => (*name, Some(*port)),
        _ => return Err(ApiError::bad_request(format!("invalid node request {text:?}"))),
    };
    match port.map(str::parse) {
        None => Ok((name, None)),
        Some(Ok(port)) => Ok((name, Some(port))),
        Some(Err(_)) => Err(ApiError::bad_request(format!("invalid node request {text:?}: no port"))),
    }
}

/// What is asked of the kubelet, encoded as it came: all behind `/api/v1/nodes/NAME/proxy`.
fn behind_proxy(uri: &Uri) -> String {
    let rest = uri.path().trim_start_matches('/').splitn(6, '/').nth(5).unwrap_or_default();
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    format!("/{rest}{query}")
}

/// Parameters of exec, attach and port-forward, without the container, which is in the path.
fn passed_on(query: &Query) -> impl Iterator<Item = String> {
    query
        .pairs()
        .filter(|(name, _)| *name != "container")
        .map(|(name, value)| format!("{}={}", query::encode(name), query::encode(value)))
}

fn append_query(path: &mut String, parameters: impl Iterator<Item = String>) {
    for (index, parameter) in parameters.enumerate() {
        path.push(if index == 0 { '?' } else { '&' });
        path.push_str(&parameter);
    }
}

async fn get(api: &Api, kubelet: &Kubelet, path: &str) -> Result<Response<hyper::body::Incoming>, ApiError> {
    exchange(api, kubelet, path, Request::builder().method(Method::GET), Bytes::new()).await
}

/// Sends one request on a connection of its own; the answer has begun.
async fn exchange(
    api: &Api,
    kubelet: &Kubelet,
    path: &str,
    request: http::request::Builder,
    body: Bytes,
) -> Result<Response<hyper::body::Incoming>, ApiError> {
    let stream = api.kubelets.connect(kubelet).await?;
    let uri: Uri = path.parse().map_err(ApiError::internal)?;
    let request = request
        .uri(uri)
        .header(header::HOST, format!("{}:{}", kubelet.address, kubelet.port))
        .body(Full::new(body))
        .map_err(ApiError::internal)?;
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to a kubelet ended");
            }
        });
        sender.send_request(request).await
    };
    match tokio::time::timeout(ANSWER_DEADLINE, exchange).await {
        Ok(answer) => {
            answer.map_err(|error| ApiError::internal(format!("kubelet of {}: {error}", kubelet.node)))
        }
        Err(_elapsed) => Err(ApiError::internal(format!("the kubelet of {} does not answer", kubelet.node))),
    }
}

/// What a kubelet refused, in its own words.
async fn upstream_error(status: StatusCode, incoming: hyper::body::Incoming) -> ApiError {
    let text = match tokio::time::timeout(ANSWER_DEADLINE, body::read(incoming)).await {
        Ok(Ok(bytes)) => String::from_utf8_lossy(&bytes).trim().to_owned(),
        _ => String::new(),
    };
    let message = serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|status| Some(status.get("message")?.as_str()?.to_owned()))
        .unwrap_or(text);
    let reason = match status {
        StatusCode::BAD_REQUEST => Reason::BadRequest,
        StatusCode::NOT_FOUND => Reason::NotFound,
        StatusCode::SERVICE_UNAVAILABLE => Reason::ServiceUnavailable,
        _ => Reason::InternalError,
    };
    ApiError::new(reason, message)
}

/// The pod and its kubelet's address.
async fn locate(api: &Api, pod: ObjectRef<'_>) -> Result<(Value, Kubelet), ApiError> {
    let found = api.get_object(pod.info, pod.namespace, pod.name, Freshness::Latest).await?;
    let value = found.value().map_err(ApiError::internal)?;
    let node = value.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default().to_owned();
    if node.is_empty() {
        return Err(ApiError::bad_request(format!("pod {} does not have a host assigned", pod.name)));
    }
    let kubelet = find_kubelet(api, node)?;
    Ok((value, kubelet))
}

/// The kubelet of a node.
fn find_kubelet(api: &Api, node: String) -> Result<Kubelet, ApiError> {
    let nodes = kinds::find("", "v1", "nodes").ok_or_else(ApiError::unknown_path)?;
    let found = api.cached(nodes, None, &node).ok_or_else(|| ApiError::not_found(nodes, &node))?;
    let object = found.value().map_err(ApiError::internal)?;
    kubelet_of(node, &object)
}

fn kubelet_of(node: String, object: &Value) -> Result<Kubelet, ApiError> {
    let addresses = object.pointer("/status/addresses").and_then(Value::as_array).into_iter().flatten();
    let address = addresses
        .filter(|address| address["type"] == "InternalIP")
        .find_map(|address| address["address"].as_str()?.parse().ok());
    let port = object.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64);
    let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0).unwrap_or(10250);
    match address {
        Some(address) => Ok(Kubelet { node, address, port }),
        None => Err(ApiError::internal(format!("node \"{node}\" has reported no InternalIP"))),
    }
}

/// The container that is meant: the named one, or the only one.
fn container(pod: ObjectRef<'_>, object: &Value, asked: &str, running: bool) -> Result<String, ApiError> {
    let names = |field: &str| -> Vec<String> {
        let list = object.pointer(&format!("/spec/{field}")).and_then(Value::as_array);
        let names = list.into_iter().flatten().filter_map(|container| container["name"].as_str());
        names.map(str::to_owned).collect()
    };
    let main = names("containers");
    let all: Vec<String> = [main.clone(), names("initContainers"), names("ephemeralContainers")].concat();
    if running && matches!(phase(object), "Succeeded" | "Failed") {
        return Err(ApiError::bad_request(format!(
            "cannot exec into a container in a completed pod; current phase is {}",
            phase(object)
        )));
    }
    if !asked.is_empty() {
        if all.iter().any(|name| name == asked) {
            return Ok(asked.to_owned());
        }
        return Err(ApiError::bad_request(format!("container {asked} is not valid for pod {}", pod.name)));
    }
    match main.as_slice() {
        [only] => Ok(only.clone()),
        _ if running && !main.is_empty() => Ok(main[0].clone()),
        many => Err(ApiError::bad_request(format!(
            "a container name must be specified for pod {}, choose one of: [{}]",
            meta::name(object),
            many.join(" ")
        ))),
    }
}

fn phase(pod: &Value) -> &str {
    pod.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_may_be_named_with_scheme_and_port() {
        assert_eq!(proxied("a").unwrap(), ("a", None));
        assert_eq!(proxied("a:10250").unwrap(), ("a", Some(10250)));
        assert_eq!(proxied("https:a:10250").unwrap(), ("a", Some(10250)));
        assert_eq!(proxied("https:a:").unwrap(), ("a", None));
        assert!(proxied("a:kubelet").is_err() && proxied("http:a:10250").is_err());
    }

    #[test]
    fn what_is_behind_the_proxy_stays_encoded() {
        let path = |uri: &str| behind_proxy(&uri.parse().unwrap());
        assert_eq!(path("/api/v1/nodes/a/proxy"), "/");
        assert_eq!(path("/api/v1/nodes/a/proxy/"), "/");
        assert_eq!(path("/api/v1/nodes/a/proxy/run/ns/p%2Fq/c?cmd=a%20b"), "/run/ns/p%2Fq/c?cmd=a%20b");
        assert_eq!(path("/api/v1/nodes/a:1/proxy/runningpods/"), "/runningpods/");
    }
}

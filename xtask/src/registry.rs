//! The local image registry: the read side of the OCI distribution protocol over the demo images.
//!
//! Anonymous, plain HTTP, loopback or the nodes' own fabric only; the CRI server meets it as docker.io's mirror.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use tokio::net::TcpListener;

use crate::images::{Catalog, Store};
use crate::process::write_atomic;

/// Listens on a free loopback port, writes the mirror configuration below `config_dir`, and serves until dropped.
pub(crate) async fn serve(images: Store, config_dir: &Path, port_file: &Path) -> Result<()> {
    serve_at(Ipv4Addr::LOCALHOST, images, config_dir, port_file).await
}

/// The same at another address of this host.
pub(crate) async fn serve_at(
    address: Ipv4Addr,
    images: Store,
    config_dir: &Path,
    port_file: &Path,
) -> Result<()> {
    let catalog = Arc::new(images.catalog()?);
    let listener = TcpListener::bind((address, 0))
        .await
        .with_context(|| format!("the image registry: binding a port of {address}"))?;
    let local = listener.local_addr()?;
    write_atomic(&config_dir.join("docker.io/hosts.toml"), hosts_toml(local).as_bytes())?;
    write_atomic(port_file, local.port().to_string().as_bytes())?;
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors passes; anything else would come again at once and be seen in the log.
                eprintln!("registry: accept: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (images, catalog) = (images.clone(), Arc::clone(&catalog));
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let (images, catalog) = (images.clone(), Arc::clone(&catalog));
                async move { Ok::<_, std::convert::Infallible>(answer(&images, &catalog, &request).await) }
            });
            let io = hyper_util::rt::TokioIo::new(stream);
            // A client that goes away mid-way ends its own connection only.
            hyper::server::conn::http1::Builder::new().serve_connection(io, service).await.ok();
        });
    }
}

/// docker.io stays the server behind the mirror, so that other images still come where the Internet is reached.
fn hosts_toml(address: SocketAddr) -> String {
    format!(
        "server = \"https://registry-1.docker.io\"\n\n[host.\"http://{address}\"]\n  \
         capabilities = [\"pull\", \"resolve\"]\n"
    )
}

async fn answer(images: &Store, catalog: &Catalog, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this registry is read-only");
    }
    let path = request.uri().path();
    let Some(rest) = path.strip_prefix("/v2/") else {
        return refuse(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "not a /v2/ path");
    };
    if rest.is_empty() {
        return Response::new(Full::from("{}"));
    }
    if let Some((name, reference)) = rest.rsplit_once("/manifests/") {
        return manifest(images, catalog, name, reference).await;
    }
    if let Some((_, digest)) = rest.rsplit_once("/blobs/") {
        return blob(images, digest, "application/octet-stream").await;
    }
    if let Some(name) = rest.strip_suffix("/tags/list") {
        return match catalog.tags.get(name) {
            Some(tags) => {
                let tags: Vec<&String> = tags.keys().collect();
                Response::new(Full::from(serde_json::json!({"name": name, "tags": tags}).to_string()))
            }
            None => refuse(StatusCode::NOT_FOUND, "NAME_UNKNOWN", name),
        };
    }
    refuse(StatusCode::NOT_FOUND, "NAME_UNKNOWN", rest)
}

async fn manifest(images: &Store, catalog: &Catalog, name: &str, reference: &str) -> Response<Full<Bytes>> {
    let Some(tags) = catalog.tags.get(name) else {
        return refuse(StatusCode::NOT_FOUND, "NAME_UNKNOWN", name);
    };
    let digest = tags.get(reference).map_or(reference, String::as_str);
    match catalog.media_types.get(digest) {
        Some(media_type) => blob(images, digest, media_type).await,
        None => refuse(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", &format!("{name}:{reference}")),
    }
}

async fn blob(images: &Store, digest: &str, media_type: &str) -> Response<Full<Bytes>> {
    let Some(file) = images.blob(digest) else {
        return refuse(StatusCode::BAD_REQUEST, "DIGEST_INVALID", digest);
    };
    // The largest demo layer is a few MiB, so that reading it whole is fine.
    let Ok(content) = tokio::fs::read(&file).await else {
        return refuse(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", digest);
    };
    let mut response = Response::new(Full::from(content));
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, media_type),
        (header::HeaderName::from_static("docker-content-digest"), digest),
    ] {
        if let Ok(value) = header::HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    response
}

fn refuse(status: StatusCode, code: &str, detail: &str) -> Response<Full<Bytes>> {
    let body =
        serde_json::json!({"errors": [{"code": code, "message": code.to_lowercase(), "detail": detail}]});
    let mut response = Response::new(Full::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

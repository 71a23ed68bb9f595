//! PullImage: a large image of eight layers from a registry on this machine, with the peer's gzip in Go and with unpigz.
//!
//! The layers hold files of this machine's own /usr, so that they compress as programs do. All sides run on one
//! containerd version with the same snapshotter; each pull begins without the image and with no write waiting for the disk.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use cri_shim_api::v1;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode, header};
use serde_json::json;

use super::report::{Goal, Row};
use crate::bench::stats::{Round, median};
use crate::cmd::{Cmd, step, which};
use crate::cri_hosts::{CriHost, Ground, Kind, Options};
use crate::images::layer::{Entry, Layer, Tree, digest};

/// Layers of the image, and what they hold together, unpacked.
const LAYERS: usize = 8;
const BYTES: usize = 500 << 20;
/// The same with --quick.
const QUICK_BYTES: usize = 80 << 20;
/// A registry of its own, so that the other parts' configuration stays as it is.
const REGISTRY: &str = "pull.bench";

/// What the registry serves, by path below `/v2/`: type and bytes.
type Objects = HashMap<String, (&'static str, Bytes)>;

/// Pulls in turns; one row per peer.
pub(super) async fn measure(ground: &Ground, quick: bool, rounds: u32) -> Result<Vec<Row>> {
    let bytes = if quick { QUICK_BYTES } else { BYTES };
    let objects = tokio::task::spawn_blocking(move || image(bytes)).await??;
    let stored: usize = objects.values().map(|(_, bytes)| bytes.len()).sum::<usize>() >> 20;
    serve(objects, &ground.certs()).await?;
    if which("unpigz").is_none() {
        // Without it there is one row less.
        step("installing pigz", || Cmd::new("apt-get").args(["install", "-y", "-qq", "pigz"]).output()).ok();
    }
    println!("==> pulling an image of {} MiB ({stored} MiB compressed) in {LAYERS} layers", bytes >> 20);
    let ours = ground.start(0, Kind::Keelson, &Options::default()).await?;
    let mut rows = Vec::new();
    let without = [("CONTAINERD_DISABLE_PIGZ".to_owned(), "1".to_owned())].into();
    let mut peers = vec![("without unpigz", Options { env: without, ..Options::default() })];
    if which("unpigz").is_some() {
        peers.push(("with unpigz", Options::default()));
    }
    for (slot, (name, options)) in (1..).zip(peers) {
        let peer = ground.start(slot, Kind::Containerd, &options).await?;
        let mut all: Vec<Round> = Vec::new();
        // What is measured first finds caches as nothing later does.
        for host in [&ours, &peer] {
            pull(host).await.with_context(|| host.logs())?;
        }
        for _ in 0..rounds.clamp(1, 5) {
            let mut round = Round::default();
            for (host, is_ours) in [(&ours, true), (&peer, false), (&peer, false), (&ours, true)] {
                let seconds = pull(host).await.with_context(|| host.logs())?;
                if is_ours { round.0.push(seconds) } else { round.1.push(seconds) }
            }
            all.push(round);
        }
        let title = format!("{} MiB unpacked, {LAYERS} layers, peer {name}", bytes >> 20);
        rows.push(Row::of_rounds("PullImage", &title, "s", &all, median, Goal::Ratio(0.7)));
        peer.stop()?;
    }
    ours.stop()?;
    Ok(rows)
}

/// Seconds of one pull; the image is gone afterwards.
async fn pull(host: &CriHost) -> Result<f64> {
    let image = Some(v1::ImageSpec { image: format!("{REGISTRY}/large:1"), ..v1::ImageSpec::default() });
    tokio::task::spawn_blocking(rustix::fs::sync).await?;
    let begun = Instant::now();
    let request = v1::PullImageRequest { image: image.clone(), ..v1::PullImageRequest::default() };
    host.images().pull_image(request).await?;
    let seconds = begun.elapsed().as_secs_f64();
    host.images().remove_image(v1::RemoveImageRequest { image }).await?;
    Ok(seconds)
}

fn image(bytes: usize) -> Result<Objects> {
    let mut objects = Objects::new();
    let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
    for layer in layers(bytes)? {
        descriptors.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": layer.digest, "size": layer.compressed.len(),
        }));
        diff_ids.push(layer.diff_id);
        let path = format!("large/blobs/{}", layer.digest);
        objects.insert(path, ("application/octet-stream", layer.compressed.into()));
    }
    let config = json!({
        "os": "linux", "architecture": architecture(), "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string().into_bytes();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind, "layers": descriptors,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest(&config), "size": config.len(),
        },
    });
    objects.insert(format!("large/blobs/{}", digest(&config)), ("application/octet-stream", config.into()));
    let manifest = Bytes::from(manifest.to_string());
    for version in ["1".to_owned(), digest(&manifest)] {
        objects.insert(format!("large/manifests/{version}"), (kind, manifest.clone()));
    }
    Ok(objects)
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// Files of /usr in the order of their names, until there are enough, dealt out to layers of equal size.
fn layers(bytes: usize) -> Result<Vec<Layer>> {
    let mut found = Vec::new();
    let mut todo = vec![Path::new("/usr").to_owned()];
    let mut total = 0;
    while let Some(path) = todo.pop()
        && total < bytes
    {
        let metadata = path.symlink_metadata()?;
        if metadata.is_dir() {
            let mut below =
                std::fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
            below.sort();
            todo.extend(below.into_iter().rev());
        } else if metadata.is_file() {
            let size = usize::try_from(metadata.len())?;
            // One huge file would be a layer of its own.
            if size < bytes / LAYERS / 2 {
                total += size;
                found.push((path, size));
            }
        }
    }
    let mut trees: Vec<Tree> = (0..LAYERS).map(|_| Tree::default()).collect();
    let mut filled = 0;
    for (path, size) in found {
        let place = (filled * LAYERS / total.max(1)).min(LAYERS - 1);
        filled += size;
        trees[place].add(&path.to_string_lossy(), Entry::File(0o755, std::fs::read(&path)?));
    }
    std::thread::scope(|scope| {
        let packing: Vec<_> = trees.iter().map(|tree| scope.spawn(|| Layer::pack(tree))).collect();
        packing
            .into_iter()
            .map(|one| one.join().map_err(|_panic| anyhow::anyhow!("packing failed"))?)
            .collect()
    })
}

async fn serve(objects: Objects, certs: &Path) -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.context("binding a loopback port")?;
    let address = listener.local_addr()?;
    // containerd 1.6 reads no file without a host of its own.
    let hosts = format!(
        "server = \"http://{address}\"\n\n[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
    );
    crate::process::write_atomic(&certs.join(REGISTRY).join("hosts.toml"), hosts.as_bytes())?;
    let objects = Arc::new(objects);
    // It ends with the process; a connection that breaks ends by itself.
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let objects = Arc::clone(&objects);
            let service = hyper::service::service_fn(move |request| {
                let answer = answer(&objects, &request);
                async move { Ok::<_, std::convert::Infallible>(answer) }
            });
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(async move {
                hyper::server::conn::http1::Builder::new().serve_connection(io, service).await.ok();
            });
        }
    });
    Ok(())
}

fn answer(objects: &Objects, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path().trim_start_matches("/v2/");
    let Some((kind, bytes)) = objects.get(path) else {
        let mut response = Response::new(Full::from(""));
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    };
    let body = if request.method() == hyper::Method::HEAD { Bytes::new() } else { bytes.clone() };
    let mut response = Response::new(Full::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_LENGTH, bytes.len().into());
    let digest = if path.contains("/manifests/") { digest(bytes) } else { String::new() };
    if let Ok(digest) = header::HeaderValue::try_from(digest)
        && !digest.is_empty()
    {
        headers.insert(header::HeaderName::from_static("docker-content-digest"), digest);
    }
    response
}

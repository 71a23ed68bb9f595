//! Pulls that are cut off, and the ways to an image beside a pull: archives, the command line, tokens. Through a running
//! server. Needs root.

mod support;

use std::path::PathBuf;

use containerd_client::services::v1 as services;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots::ListSnapshotsRequest;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use cri_shim_api::v1;
use keelson_cri::containerd::Client;
use serde_json::json;
use support::cri::{Cri, PATIENCE, busybox_layers, shell};
use support::registry::{Fault, digest, gzip, layer};
use tonic::Code;

/// What containerd holds of images in our namespace.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held {
    leases: usize,
    /// Blobs that were begun and not finished, with their lengths.
    ingests: Vec<(String, i64)>,
    blobs: Vec<String>,
    /// Those being filled, and those that are done.
    open_snapshots: usize,
    snapshots: usize,
}

impl Held {
    async fn by(cri: &Cri) -> Self {
        let client = Client::new(&cri.containerd.socket(), "keelson").expect("a client");
        let request = services::ListRequest { filters: vec!["labels.\"io.keelson.owner\"".to_owned()] };
        let leases = LeasesClient::new(client.channel()).list(client.request(request, PATIENCE)).await;
        let mut content = ContentClient::new(client.channel());
        let request = services::ListStatusesRequest::default();
        let statuses = content.list_statuses(client.request(request, PATIENCE)).await.expect("listed");
        let mut ingests: Vec<_> =
            statuses.into_inner().statuses.into_iter().map(|one| (one.r#ref, one.offset)).collect();
        ingests.sort();
        let request = services::ListContentRequest::default();
        let mut stream = content.list(client.request(request, PATIENCE)).await.expect("listed").into_inner();
        let mut blobs = Vec::new();
        while let Some(part) = stream.message().await.expect("listed") {
            blobs.extend(part.info.into_iter().map(|one| one.digest));
        }
        blobs.sort();
        let request = ListSnapshotsRequest { snapshotter: "overlayfs".to_owned(), filters: Vec::new() };
        let mut snapshots = SnapshotsClient::new(client.channel());
        let mut stream =
            snapshots.list(client.request(request, PATIENCE)).await.expect("listed").into_inner();
        let (mut open_snapshots, mut done) = (0, 0);
        while let Some(part) = stream.message().await.expect("listed") {
            let open = part.info.iter().filter(|one| one.name.starts_with("extract-")).count();
            open_snapshots += open;
            done += part.info.len() - open;
        }
        let leases = leases.expect("listed").into_inner().leases.len();
        Self { leases, ingests, blobs, open_snapshots, snapshots: done }
    }

    async fn until(cri: &Cri, what: &str, fits: impl Fn(&Self) -> bool) -> Self {
        let begun = tokio::time::Instant::now();
        loop {
            let held = Self::by(cri).await;
            if fits(&held) {
                return held;
            }
            assert!(begun.elapsed() < PATIENCE, "{what}: {held:?}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

/// Bytes that do not compress, different for each seed.
fn noise(seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed) * 2 + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..400_000).flat_map(|_| next()).collect()
}

/// Directories of containerd's stores that hold what is half done.
fn half_done_files(cri: &Cri) -> Vec<PathBuf> {
    let below = |path: PathBuf| {
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>()
    };
    below(cri.dir().join("root/io.containerd.content.v1.content/ingest"))
}

fn snapshot_directories(cri: &Cri) -> usize {
    let directory = cri.dir().join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    std::fs::read_dir(directory).into_iter().flatten().count()
}

/// Begins a pull that stands still in the middle of its large layer, its small one done.
async fn stalled_pull(cri: &Cri, name: &str, seed: u32) -> (tokio::task::JoinHandle<()>, String, String) {
    let large = layer(&[("noise", &noise(seed), 0o644)]);
    let small = layer(&[("etc/small", &seed.to_le_bytes(), 0o644)]);
    let (blob, other) = (digest(&gzip(&large)), digest(&gzip(&small)));
    let repository = format!("library/{name}");
    cri.registry().push(&repository, "latest", &[large, small], json!({}), false);
    cri.registry().fault(&format!("blobs/{blob}"), Fault::Stall, 1);
    let (mut images, image) = (cri.images(), name.to_owned());
    let pull = tokio::spawn(async move {
        let spec = v1::ImageSpec { image, ..v1::ImageSpec::default() };
        let request = v1::PullImageRequest { image: Some(spec), ..v1::PullImageRequest::default() };
        images.pull_image(request).await.expect_err("cut off");
    });
    let half = |held: &Held| held.ingests.iter().any(|(name, offset)| name.ends_with(&blob) && *offset > 0);
    let there = |held: &Held| held.blobs.contains(&other) && held.open_snapshots > 0;
    Held::until(cri, "half a layer", |held| half(held) && there(held)).await;
    (pull, blob, other)
}

/// The requests for a blob, in order.
fn asked(cri: &Cri, blob: &str) -> Vec<String> {
    cri.registry().requests().into_iter().filter(|request| request.contains(blob)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_whose_server_was_killed_is_gone_on_with_or_swept() {
    let mut cri = Cri::start().await;
    let before = Held::until(&cri, "quiet", |held| held.leases == 0 && held.ingests.is_empty()).await;

    let (pull, blob, other) = stalled_pull(&cri, "resumed", 1).await;
    cri.kill();
    pull.await.expect("told");
    cri.start_again().await;
    let id = cri.pull("resumed").await;
    let requests = asked(&cri, &blob);
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert!(requests[1].contains("bytes=") && !requests[1].contains("bytes=0-"), "resumed: {requests:?}");
    assert_eq!(asked(&cri, &other).len(), 1, "what was whole is kept");
    let status = v1::ImageStatusRequest {
        image: Some(v1::ImageSpec { image: id, ..v1::ImageSpec::default() }),
        verbose: false,
    };
    let image = cri.images().image_status(status).await.expect("answered").into_inner().image;
    assert_eq!(image.expect("there").repo_tags, ["docker.io/library/resumed:latest"]);

    // containerd dies under a pull: it fails, and the next one goes on.
    let (pull, blob, _) = stalled_pull(&cri, "survives", 2).await;
    cri.containerd.kill();
    cri.registry().heal();
    // Nobody tells a transfer that stands still; its own server is the one that ends it.
    cri.kill();
    pull.await.expect("told");
    cri.containerd.start_again();
    cri.start_again().await;
    cri.pull("survives").await;
    assert!(!asked(&cri, &blob)[1].contains("bytes=0-"), "resumed");

    // Nobody asks again: what was begun goes by itself.
    let (pull, _, _) = stalled_pull(&cri, "given-up", 3).await;
    cri.kill();
    pull.await.expect("told");
    cri.reconfigure_stopped(&json!({ "images": { "progressDeadlineSeconds": 1 } })).await;
    let clean = |held: &Held| held.leases == 0 && held.ingests.is_empty() && held.open_snapshots == 0;
    // containerd removes an ingest's files a moment after the ingest.
    let swept = |held: &Held| clean(held) && half_done_files(&cri).is_empty();
    Held::until(&cri, "swept", swept).await;

    for name in ["resumed", "survives"] {
        let image = Some(v1::ImageSpec { image: name.to_owned(), ..v1::ImageSpec::default() });
        cri.images().remove_image(v1::RemoveImageRequest { image }).await.expect("removed");
    }
    // containerd removes a snapshot's directory a moment after the snapshot.
    let gone =
        |held: &Held| held.blobs.len() <= before.blobs.len() && snapshot_directories(&cri) == held.snapshots;
    assert_eq!(Held::until(&cri, "as before", gone).await, before);
    cri.assert_nothing_left().await;
}

/// An OCI layout as skopeo and buildx make it: compressed layers, an index, the image named by a tag only.
fn oci_layout(layers: &[Vec<u8>], annotations: &[(&str, &str)], foreign: bool) -> (Vec<u8>, String) {
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut blob = |kind: &str, bytes: Vec<u8>| {
        let (name, size) = (digest(&bytes), bytes.len());
        files.push((name.replace("sha256:", "blobs/sha256/"), bytes));
        json!({ "mediaType": kind, "digest": name, "size": size })
    };
    let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": { "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = blob("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
    let id = config["digest"].as_str().expect("a digest").to_owned();
    let layers: Vec<_> =
        layers.iter().map(|layer| blob("application/vnd.oci.image.layer.v1.tar+gzip", gzip(layer))).collect();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers });
    let mut manifest = blob(kind, manifest.to_string().into_bytes());
    manifest["annotations"] = annotations.iter().copied().collect::<serde_json::Value>();
    let mut manifests = vec![manifest];
    if foreign {
        // Another machine's, whose content the archive need not have.
        let mut other = manifests[0].clone();
        other["digest"] = json!(digest(b"elsewhere"));
        other["platform"] = json!({ "os": "linux", "architecture": "s390x" });
        manifests.push(other);
    }
    files.push((
        "index.json".to_owned(),
        json!({ "schemaVersion": 2, "manifests": manifests }).to_string().into(),
    ));
    files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    let files: Vec<(&str, &[u8], u32)> =
        files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice(), 0o644)).collect();
    (layer(&files), id)
}

fn stdout(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_imports_lists_pulls_and_removes() {
    let cri = Cri::start().await;
    let file = cri.dir().join("archive.tar");
    let path = file.display().to_string();
    let tag = ("org.opencontainers.image.ref.name", "2.0");
    let (archive, id) = oci_layout(&busybox_layers(), &[tag], true);
    std::fs::write(&file, archive).expect("written");

    let nameless = cri.command(&["image", "import", &path]);
    assert!(nameless.status.success(), "{}", stderr(&nameless));
    assert_eq!(stdout(&nameless).trim(), id, "a tag alone is no name");
    assert!(stderr(&nameless).contains("--name"), "{}", stderr(&nameless));
    let named = cri.command(&["image", "import", &path, "--name", "registry.test/team/tool"]);
    assert_eq!(stdout(&named).trim(), format!("{id} registry.test/team/tool:2.0"), "{}", stderr(&named));

    // What was imported beside it the server has, and runs.
    let pod = cri.pod("imported");
    let sandbox = cri.run(&pod).await.expect("run");
    let mut config = shell("tool", "echo from an archive");
    config.image =
        Some(v1::ImageSpec { image: "registry.test/team/tool:2.0".to_owned(), ..Default::default() });
    let (text, status) = cri.output(&sandbox, &pod, config).await;
    assert_eq!((text.as_str(), status.exit_code), ("from an archive", 0));
    assert_eq!(status.image_id, id);
    cri.remove(&sandbox).await;

    let listed = stdout(&cri.command(&["image", "list"]));
    let line = listed.lines().find(|line| line.starts_with(&id)).expect("listed");
    let mut words = line.split(' ').skip(1);
    assert!(
        words.next().and_then(|size| size.parse().ok()).is_some_and(|size: u64| size > 100_000),
        "{line}"
    );
    assert_eq!(words.next(), Some("registry.test/team/tool:2.0"));
    assert!(words.next().is_some_and(|name| name.starts_with("registry.test/team/tool@sha256:")), "{line}");
    let (full, other) = oci_layout(
        &[layer(&[("etc/other", b"1", 0o644)])],
        &[("io.containerd.image.name", "registry.test/full:3"), tag],
        false,
    );
    std::fs::write(&file, gzip(&full)).expect("written");
    let imported = cri.command(&["image", "import", &path]);
    assert_eq!(stdout(&imported).trim(), format!("{other} registry.test/full:3"), "{}", stderr(&imported));

    for name in ["registry.test/team/tool:2.0", &other, "never/there:1"] {
        let removed = cri.command(&["image", "remove", name]);
        assert!(removed.status.success(), "{name}: {}", stderr(&removed));
    }
    let listed = stdout(&cri.command(&["image", "list"]));
    assert!(!listed.contains(&id) && !listed.contains(&other), "{listed}");
    assert!(listed.contains("docker.io/library/busybox:latest"), "{listed}");
    cri.registry().push("library/second", "1", &[layer(&[("a", b"b", 0o644)])], json!({}), false);
    cri.registry().protect("user", "pass:word");
    let pulled = cri.command(&["image", "pull", "second:1", "--creds", "user:pass:word"]);
    assert!(pulled.status.success(), "{}", stderr(&pulled));
    assert!(stdout(&cri.command(&["image", "list"])).contains(stdout(&pulled).trim()));
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_command_line_says_what_is_wrong() {
    let cri = Cri::start().await;
    let dir = cri.dir().to_owned();
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.join(name), bytes).expect("written");
        dir.join(name).display().to_string()
    };
    let (archive, _) = oci_layout(&[layer(&[("a", b"b", 0o644)])], &[], false);
    let good = write("good.tar", &archive);
    let text = write("text.tar", &vec![b'x'; 2048]);
    let cut = write("cut.tar", &archive[..archive.len() / 3]);
    let other = write("other.tar", &layer(&[("readme", b"hello", 0o644)]));
    let damaged = write("damaged.tar", &layer(&[("index.json", b"{\"manifests\": 7}", 0o644)]));
    let absent = dir.join("absent.tar").display().to_string();
    let table: [(&[&str], &[&str]); 9] = [
        (&["image", "import", &absent], &["absent.tar", "No such file"]),
        (&["image", "import", &text], &["text.tar"]),
        (&["image", "import", &cut], &["cut.tar"]),
        (&["image", "import", &other], &["other.tar", "neither index.json nor manifest.json"]),
        (&["image", "import", &damaged], &["index.json"]),
        (&["image", "import", &good, "--name", "UPPER"], &["--name", "UPPER"]),
        (&["image", "pull", "UPPER"], &["UPPER"]),
        (&["image", "pull", "nope:1"], &["docker.io/library/nope:1", "not found"]),
        (&["image", "frobnicate"], &["frobnicate"]),
    ];
    for (arguments, words) in table {
        let output = cri.command(arguments);
        assert!(!output.status.success(), "{arguments:?}: {}", stdout(&output));
        for word in words {
            assert!(stderr(&output).contains(word), "{word:?} is not in: {}", stderr(&output));
        }
        assert_eq!(stdout(&output), "", "{arguments:?}");
    }
    let held = Held::until(&cri, "nothing begun", |held| held.leases == 0 && held.ingests.is_empty()).await;
    assert_eq!(held.open_snapshots, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_serve_as_credentials() {
    let cri = Cri::start().await;
    cri.registry().push("team/private", "1", &[layer(&[("a", b"b", 0o644)])], json!({}), false);
    cri.registry().protect_tokens("refresh-me", "access-me");
    let pull = async |auth: v1::AuthConfig| {
        let image = Some(v1::ImageSpec { image: "team/private:1".to_owned(), ..v1::ImageSpec::default() });
        let request = v1::PullImageRequest { image, auth: Some(auth), ..v1::PullImageRequest::default() };
        cri.images().pull_image(request).await.map(|answer| answer.into_inner().image_ref)
    };
    let identity =
        |token: &str| v1::AuthConfig { identity_token: token.to_owned(), ..v1::AuthConfig::default() };
    let access =
        |token: &str| v1::AuthConfig { registry_token: token.to_owned(), ..v1::AuthConfig::default() };
    for wrong in [identity("stolen"), access("stolen"), v1::AuthConfig::default()] {
        let status = pull(wrong).await.expect_err("refused");
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(
            status.message().contains("team/private:1") && !status.message().contains("stolen"),
            "{status}"
        );
    }
    let first = pull(identity("refresh-me")).await.expect("pulled");
    let image = Some(v1::ImageSpec { image: first.clone(), ..v1::ImageSpec::default() });
    cri.images().remove_image(v1::RemoveImageRequest { image }).await.expect("removed");
    let tokens = || cri.registry().requests().iter().filter(|one| one.starts_with("/token")).count();
    let before = tokens();
    assert_eq!(pull(access("access-me")).await.expect("pulled"), first);
    assert_eq!(tokens(), before, "a registry token is shown as it is");
}

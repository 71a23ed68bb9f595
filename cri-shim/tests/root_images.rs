//! Pulling, listing and removing images on a real containerd, from a registry in this process. Needs root.

mod support;

use std::path::PathBuf;
use std::time::Duration;

use keelson_cri::containerd::Client;
use keelson_cri::images::auth::Credentials;
use keelson_cri::images::usage::Meter;
use keelson_cri::images::{Image, ImageStore, Places, Settings, service, session::Session, unpack};
use support::containerd::Containerd;
use support::registry::{Registry, digest, gzip, layer};
use tonic::Code;

struct Fixture {
    containerd: Containerd,
    registry: Registry,
    client: Client,
    store: ImageStore,
}

impl Fixture {
    /// A store whose docker.io is a registry of this process.
    async fn start() -> Self {
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let containerd = Containerd::start();
        let registry = Registry::start().await;
        let certs = containerd.dir().join("certs.d");
        std::fs::create_dir_all(certs.join("docker.io")).expect("made");
        let hosts = format!("server = \"http://{}\"\n", registry.address());
        std::fs::write(certs.join("docker.io/hosts.toml"), hosts).expect("written");
        let client = Client::new(&containerd.socket(), "keelson").expect("a client");
        client.ensure_namespace().await.expect("a namespace");
        let store = ImageStore::new(client.clone(), places(&containerd), Settings::default());
        Self { containerd, registry, client, store }
    }

    async fn refusal(&self, reference: &str) -> tonic::Status {
        let error = self.store.pull(reference, None).await.expect_err("refused");
        service::status(&error)
    }

    fn rootfs_files(&self) -> Vec<PathBuf> {
        let snapshots = self.containerd.dir().join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
        let dirs = std::fs::read_dir(snapshots).expect("snapshots").flatten();
        let files =
            dirs.flat_map(|dir| std::fs::read_dir(dir.path().join("fs/etc")).into_iter().flatten().flatten());
        let mut names: Vec<_> = files.map(|file| PathBuf::from(file.file_name())).collect();
        names.sort();
        names
    }
}

fn places(containerd: &Containerd) -> Places {
    Places {
        registry_config_dir: containerd.dir().join("certs.d"),
        state_dir: containerd.dir().join("cri"),
        snapshotter: "overlayfs".to_owned(),
    }
}

/// Two layers, the first too long for one chunk and hard to compress.
fn layers() -> Vec<Vec<u8>> {
    let noise: Vec<u8> =
        (0..500_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    vec![
        layer(&[("etc/first", b"1", 0o644), ("noise", &noise, 0o644)]),
        layer(&[("etc/second", b"2", 0o644)]),
    ]
}

fn config() -> serde_json::Value {
    serde_json::json!({"Env": ["A=1"], "User": "1000:5", "StopSignal": "SIGQUIT"})
}

fn names(image: &Image) -> (&[String], &[String]) {
    (&image.repo_tags, &image.repo_digests)
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_not_compressed_are_pulled() {
    let fixture = Fixture::start().await;
    let layers: Vec<_> = layers()
        .into_iter()
        .map(|tar| {
            let digest = digest(&tar);
            ("application/vnd.oci.image.layer.v1.tar", tar, digest)
        })
        .collect();
    let id = fixture.registry.push_blobs("library/plain", "1", &layers);
    let pull = fixture.store.pull("plain:1", None);
    let image = tokio::time::timeout(Duration::from_secs(60), pull).await.expect("answered").expect("pulled");
    assert_eq!(image.id, id);
    assert_eq!(fixture.rootfs_files(), [PathBuf::from("first"), PathBuf::from("second")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_is_joined_resumed_and_complete() {
    let fixture = Fixture::start().await;
    let (registry, store) = (&fixture.registry, &fixture.store);
    let layers = layers();
    let long = digest(&gzip(&layers[0]));
    registry.break_blob("library/demo", &long);
    let id = registry.push("library/demo", "1", &layers, config(), true);
    let (first, second) =
        tokio::join!(store.pull("demo:1", None), store.pull("docker.io/library/demo:1", None));
    let image = first.expect("pulled");
    assert_eq!((image.id.as_str(), second.expect("joined").id.as_str()), (id.as_str(), id.as_str()));
    let requests = registry.requests();
    let of_long: Vec<_> = requests.iter().filter(|request| request.contains(&long)).collect();
    assert_eq!(of_long.len(), 2, "one break, one pull: {requests:?}");
    assert!(
        of_long[1].contains("bytes=") && !of_long[1].contains("bytes=0-"),
        "resumed, not repeated: {of_long:?}"
    );
    assert!(
        requests.iter().all(|request| request.contains("ns=docker.io")),
        "a mirror is told whose images it serves"
    );
    assert_eq!(fixture.rootfs_files(), [PathBuf::from("first"), PathBuf::from("second")]);

    let by_digest = &image.repo_digests[0];
    assert_eq!(image.repo_tags, ["docker.io/library/demo:1"]);
    assert!(by_digest.starts_with("docker.io/library/demo@sha256:"));
    assert_eq!(
        image.config().config().as_ref().and_then(|config| config.stop_signal().as_deref()),
        Some("SIGQUIT")
    );
    for reference in ["demo:1", by_digest, &id, &id[7..], &id[7..20]] {
        assert_eq!(store.resolve(reference).await.expect("found").id, id, "{reference}");
    }
    let before = registry.requests().len();
    store.pull("demo:1", None).await.expect("present");
    assert_eq!(registry.requests().len(), before + 1, "only the tag is looked up again");

    // What was forgotten in memory is found again in containerd.
    let anew = ImageStore::new(fixture.client.clone(), places(&fixture.containerd), Settings::default());
    let found = anew.resolve("demo:1").await.expect("found");
    assert_eq!(
        (names(&found), found.chain_id(), found.size()),
        (names(&image), image.chain_id(), image.size())
    );
    fixture.client.remove_snapshot(image.chain_id()).await.expect("removed");
    anew.ensure_unpacked(&found).await.expect("unpacked again");
    let session = Session::new(fixture.client.clone());
    assert!(unpack::is_unpacked(&session, "overlayfs", image.chain_id()).await.expect("asked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_frees_everything_and_tags_move() {
    let fixture = Fixture::start().await;
    let (registry, store) = (&fixture.registry, &fixture.store);
    let old = registry.push("library/demo", "latest", &layers(), config(), false);
    store.pull("demo", None).await.expect("pulled");
    registry.push("library/demo", "other", &layers(), config(), false);
    let same = store.pull("demo:other", None).await.expect("pulled");
    assert_eq!(same.repo_tags, ["docker.io/library/demo:latest", "docker.io/library/demo:other"]);
    let new = registry.push("library/demo", "latest", &layers()[1..], config(), false);
    assert_eq!(store.pull("demo", None).await.expect("pulled").id, new);
    assert_eq!(store.resolve(&old).await.expect("kept").repo_tags, ["docker.io/library/demo:other"]);

    let meter = Meter::new(Session::new(fixture.client.clone()), "overlayfs");
    let usage = meter.usage().await.expect("measured");
    assert!(usage.bytes > 2_000_000 && usage.mountpoint.contains("overlayfs"), "{usage:?}");
    tokio::try_join!(store.remove(&old), store.remove("demo:other"), store.remove(&new)).expect("removed");
    store.remove(&new).await.expect("removing what is not there is fine");
    assert!(store.list().await.expect("listed").is_empty());
    assert_eq!(meter.usage().await.expect("measured").bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_name_image_and_registry_and_leave_nothing() {
    let fixture = Fixture::start().await;
    let (registry, store) = (&fixture.registry, &fixture.store);
    let status = fixture.refusal("nope:1").await;
    assert_eq!(status.code(), Code::NotFound);
    let asked = format!("not found (asked http://{})", registry.address());
    assert!(
        status.message().contains("\"docker.io/library/nope:1\"") && status.message().contains(&asked),
        "{status}"
    );
    let status = fixture.refusal("localhost:1/x").await;
    assert_eq!(status.code(), Code::Unknown, "not the code of an absent server");
    assert!(status.message().contains("Connection refused"), "{status}");
    assert_eq!(fixture.refusal("UPPER").await.code(), Code::InvalidArgument);

    let layers = layers();
    registry.push("library/demo", "1", &layers, config(), false);
    let wrong = digest(&gzip(&layers[1]));
    registry.replace_blob("library/demo", &wrong, gzip(b"something else"));
    let status = fixture.refusal("demo:1").await;
    assert!(status.message().contains(&wrong), "{status}");
    assert!(store.list().await.expect("listed").is_empty());

    registry.replace_blob("library/demo", &wrong, gzip(&layers[1]));
    registry.protect("user", "secret");
    assert_eq!(fixture.refusal("demo:1").await.code(), Code::PermissionDenied);
    let credentials = |password: &str| Credentials {
        username: "user".to_owned(),
        password: password.to_owned(),
        ..Credentials::default()
    };
    store.pull("demo:1", Some(credentials("wrong"))).await.expect_err("refused");
    store.pull("demo:1", Some(credentials("secret"))).await.expect("pulled");
}

/// An archive as `docker save` made it for years: no manifest, uncompressed layers, one of them a link.
fn docker_archive(layers: &[Vec<u8>], tags: &[&str]) -> (Vec<u8>, String) {
    let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
    let config = serde_json::json!({
        "os": "linux", "architecture": "amd64", "config": {"Cmd": ["/x"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string().into_bytes();
    let names: Vec<_> = (0..layers.len()).map(|number| format!("{number}/layer.tar")).collect();
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": tags, "Layers": names}]);
    let manifest = manifest.to_string().into_bytes();
    let mut files: Vec<(&str, &[u8], u32)> =
        vec![("manifest.json", &manifest, 0o644), ("config.json", &config, 0o644)];
    files.extend(names.iter().zip(layers).map(|(name, layer)| (name.as_str(), layer.as_slice(), 0o644)));
    (layer(&files), digest(&config))
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_are_imported_as_if_pulled() {
    let fixture = Fixture::start().await;
    let file = fixture.containerd.dir().join("image.tar.gz");
    let (archive, id) = docker_archive(&layers(), &["saved:1", "saved:2"]);
    std::fs::write(&file, gzip(&archive)).expect("written");
    let images = fixture.store.import(&file, None).await.expect("imported");
    assert_eq!(images.iter().map(|image| image.id.as_str()).collect::<Vec<_>>(), [id.as_str()]);
    assert_eq!(images[0].repo_tags, ["docker.io/library/saved:1", "docker.io/library/saved:2"]);
    assert_eq!(fixture.rootfs_files(), [PathBuf::from("first"), PathBuf::from("second")]);
    fixture.store.import(&file, None).await.expect("importing again is fine");
    fixture.store.ensure_unpacked(&images[0]).await.expect("unpacked");
    fixture.store.remove("saved:1").await.expect("removed");
    assert!(fixture.store.list().await.expect("listed").is_empty());

    std::fs::write(&file, layer(&[("readme", b"no image", 0o644)])).expect("written");
    let error = fixture.store.import(&file, None).await.expect_err("refused");
    assert!(error.to_string().contains("image.tar.gz is no image archive"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_mounted_read_only_for_its_user_only() {
    let fixture = Fixture::start().await;
    let store = &fixture.store;
    fixture.registry.push("library/demo", "1", &layers(), config(), false);
    fixture.registry.push("library/one", "1", &layers()[1..], config(), false);
    let image = store.pull("demo:1", None).await.expect("pulled");
    let path = store.mount_readonly(&image, "c1/0").await.expect("mounted");
    assert_eq!(store.mount_readonly(&image, "c1/0").await.expect("again"), path);
    assert_eq!(std::fs::read(path.join("etc/first")).expect("read"), b"1");
    assert_eq!(std::fs::read(path.join("etc/second")).expect("read"), b"2");
    let refused = std::fs::write(path.join("etc/first"), "x").expect_err("read-only");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    store.remove("demo:1").await.expect("the image may go");
    assert_eq!(std::fs::read(path.join("etc/first")).expect("kept by the mount"), b"1");

    // A single layer is a bind mount instead of an overlay.
    let one = store.pull("one:1", None).await.expect("pulled");
    let second = store.mount_readonly(&one, "c2/0").await.expect("mounted");
    std::fs::write(second.join("new"), "x").expect_err("read-only");
    assert_eq!(std::fs::read(second.join("etc/second")).expect("read"), b"2");

    // After a crash: one user is known, one is not, and one mount was recorded only.
    let half = path.parent().and_then(std::path::Path::parent).expect("a parent").join("half");
    std::fs::create_dir_all(half.join("fs")).expect("made");
    let anew = ImageStore::new(fixture.client.clone(), places(&fixture.containerd), Settings::default());
    anew.retain_mounts(|owner| owner == "c1").await.expect("swept");
    assert!(path.join("etc/first").exists() && !second.exists() && !half.exists());
    anew.unmount_all("c1").await.expect("unmounted");
    anew.unmount("c1/0").await.expect("again is fine");
    assert!(!path.exists());
    anew.remove("one:1").await.expect("removed");
    let meter = Meter::new(Session::new(fixture.client.clone()), "overlayfs");
    assert_eq!(meter.usage().await.expect("measured").bytes, 0, "the views are gone too");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_pull_held_is_swept() {
    use containerd_client::services::v1::leases_client::LeasesClient;
    use containerd_client::services::v1::{CreateRequest, ListRequest};
    let fixture = Fixture::start().await;
    let deadline = std::time::Duration::from_secs(30);
    let mut leases = LeasesClient::new(fixture.client.channel());
    for (id, owner) in [("dead", "1:1:another-boot"), ("foreign", "")] {
        let label = if owner.is_empty() { "someone.else" } else { "io.keelson.owner" };
        let labels = [(label.to_owned(), owner.to_owned())].into();
        let message = CreateRequest { id: id.to_owned(), labels };
        leases.create(fixture.client.request(message, deadline)).await.expect("created");
    }
    let session = Session::new(fixture.client.clone());
    let own = session.leased().await.expect("leased");
    fixture.store.sweep().await.expect("swept");
    let listed = leases.list(fixture.client.request(ListRequest::default(), deadline)).await.expect("listed");
    let mut names: Vec<_> = listed.into_inner().leases.into_iter().map(|lease| lease.id).collect();
    names.retain(|name| !name.starts_with("keelson-image-"));
    assert_eq!(names, ["foreign"]);
    own.release(true).await;
}

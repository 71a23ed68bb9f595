//! Bad registries and bad images on a real containerd: a precise status that names what is wrong, and nothing left. Needs root.

mod support;

use std::time::Duration;

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{ListContentRequest, ListRequest, ListStatusesRequest};
use keelson_cri::containerd::Client;
use keelson_cri::images::{ImageStore, Places, Settings, service};
use serde_json::json;
use support::containerd::Containerd;
use support::registry::{Fault, Registry, digest, gzip, layer};
use tar::EntryType;
use tonic::Code;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

struct Fixture {
    containerd: Containerd,
    registry: Registry,
    client: Client,
}

impl Fixture {
    async fn start() -> Self {
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let containerd = Containerd::start();
        let registry = Registry::start().await;
        let certs = containerd.dir().join("certs.d/docker.io");
        std::fs::create_dir_all(&certs).expect("made");
        let hosts = format!("server = \"http://{}\"\n", registry.address());
        std::fs::write(certs.join("hosts.toml"), hosts).expect("written");
        let client = Client::new(&containerd.socket(), "keelson").expect("a client");
        client.ensure_namespace().await.expect("a namespace");
        Self { containerd, registry, client }
    }

    fn store(&self, settings: Settings) -> ImageStore {
        let places = Places {
            registry_config_dir: self.containerd.dir().join("certs.d"),
            state_dir: self.containerd.dir().join("cri"),
            snapshotter: "overlayfs".to_owned(),
        };
        ImageStore::new(self.client.clone(), places, settings)
    }

    /// Everything containerd still has, by name.
    async fn left(&self) -> Vec<String> {
        let request = |message| self.client.request(message, std::time::Duration::from_secs(30));
        let mut left = Vec::new();
        let mut content = ContentClient::new(self.client.channel());
        let mut listed =
            content.list(request(ListContentRequest::default())).await.expect("listed").into_inner();
        while let Some(part) = listed.message().await.expect("listed") {
            left.extend(part.info.into_iter().map(|info| format!("content {}", info.digest)));
        }
        let message = self.client.request(ListStatusesRequest::default(), std::time::Duration::from_secs(30));
        let ingests = content.list_statuses(message).await.expect("listed").into_inner();
        left.extend(ingests.statuses.into_iter().map(|status| format!("ingest {}", status.r#ref)));
        let message = self.client.request(ListRequest::default(), std::time::Duration::from_secs(30));
        let leases =
            LeasesClient::new(self.client.channel()).list(message).await.expect("listed").into_inner();
        left.extend(leases.leases.into_iter().map(|lease| format!("lease {}", lease.id)));
        let snapshots = self.client.snapshots(Vec::new()).await.expect("listed");
        left.extend(snapshots.into_iter().map(|snapshot| format!("snapshot {}", snapshot.name)));
        let images = self.store(Settings::default()).list().await.expect("listed");
        left.extend(images.iter().map(|image| format!("image {}", image.id)));
        left
    }

    /// Pulls, and wants a status with a code and texts, and nothing left behind.
    async fn refuses(&self, settings: &Settings, case: &str, image: &str, code: Code, texts: &[&str]) {
        let error = self.store(settings.clone()).pull(image, None).await.expect_err(case);
        let status = service::status(&error);
        assert_eq!(status.code(), code, "{case}: {status}");
        for text in texts {
            assert!(status.message().contains(text), "{case}: {text:?} is not in {status}");
        }
        // Directories of snapshots go a moment after their records.
        let left = self.left().await;
        assert!(left.is_empty(), "{case}: {left:?}");
        self.registry.heal();
    }
}

fn small() -> Vec<Vec<u8>> {
    vec![layer(&[("etc/first", b"1", 0o644)]), layer(&[("etc/second", b"2", 0o644)])]
}

/// A layer with one entry that is taken as it is, after a good one.
fn odd(kind: EntryType, path: &str, link: &str) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (kind, path, link) in [(EntryType::Regular, "good", ""), (kind, path, link)] {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(0);
        header.set_cksum();
        archive.append(&header, &b""[..]).expect("appended");
    }
    archive.into_inner().expect("finished")
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_cannot_be_used_are_refused() {
    let fixture = Fixture::start().await;
    let (registry, settings) = (&fixture.registry, Settings::default());
    let put =
        |tag: &str, kind: &str, text: &str| registry.push_document("library/bad", tag, kind, text.as_bytes());
    registry.push("library/bad", "good", &small(), json!({}), false);
    let changed = |tag: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let mut document = registry.document("library/bad", "good");
        change(&mut document);
        put(tag, MANIFEST, &document.to_string());
    };
    put("html", "text/html", "<html>login</html>");
    put("schema1", "application/vnd.docker.distribution.manifest.v1+json", r#"{"schemaVersion":1}"#);
    put("deep", MANIFEST, &"[".repeat(1_000_000));
    put("deep-inside", MANIFEST, &format!("{{\"config\":{}", "{\"a\":".repeat(100_000)));
    put("giant", MANIFEST, &" ".repeat(9 << 20));
    put("empty", MANIFEST, "");
    put("nothing", MANIFEST, "{}");
    put(
        "platform",
        INDEX,
        r#"{"schemaVersion":2,"manifests":[{"mediaType":"x","size":1,
        "digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000",
        "platform":{"os":"plan9","architecture":"vax"}}]}"#,
    );
    changed("sha512", &|document| {
        document["layers"][0]["digest"] = format!("sha512:{}", "0".repeat(128)).into();
    });
    changed("negative", &|document| document["layers"][0]["size"] = (-1).into());
    changed("overflow", &|document| {
        for layer in 0..2 {
            document["layers"][layer]["size"] = i64::MAX.into();
        }
    });
    changed("foreign", &|document| {
        document["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar".into();
    });
    changed("chart", &|document| {
        document["layers"][0]["mediaType"] = "application/vnd.cncf.helm.chart.content.v1.tar+gzip".into();
    });
    changed("config-size", &|document| {
        document["config"]["size"] = (document["config"]["size"].as_u64().expect("a size") + 1).into();
    });
    changed("layer-count", &|document| drop(document["layers"].as_array_mut().expect("a list").pop()));
    changed("config-is-layer", &|document| document["config"] = document["layers"][0].clone());
    let cases: [(&str, Code, &[&str]); 16] = [
        ("html", Code::FailedPrecondition, &["cannot understand the manifest"]),
        ("schema1", Code::FailedPrecondition, &["schema 1"]),
        ("deep", Code::FailedPrecondition, &["cannot understand"]),
        ("deep-inside", Code::FailedPrecondition, &["cannot understand"]),
        ("giant", Code::ResourceExhausted, &["longer than 8388608 bytes"]),
        ("empty", Code::FailedPrecondition, &["cannot understand"]),
        ("nothing", Code::FailedPrecondition, &["cannot understand"]),
        ("platform", Code::FailedPrecondition, &["no match for platform linux/", "plan9/vax"]),
        ("sha512", Code::FailedPrecondition, &["sha512:"]),
        ("negative", Code::FailedPrecondition, &["cannot understand the manifest"]),
        ("overflow", Code::ResourceExhausted, &["images.maxImageBytes"]),
        ("foreign", Code::FailedPrecondition, &["foreign", "sha256:"]),
        ("chart", Code::FailedPrecondition, &["helm", "no layer"]),
        ("config-size", Code::FailedPrecondition, &["image configuration sha256:", "not the promised"]),
        ("layer-count", Code::FailedPrecondition, &["1 layers", "2 diff ids"]),
        ("config-is-layer", Code::FailedPrecondition, &["cannot understand the image configuration"]),
    ];
    for (tag, code, texts) in cases {
        let image = format!("bad:{tag}");
        let named = format!("\"docker.io/library/bad:{tag}\"");
        let texts: Vec<&str> = texts.iter().copied().chain([named.as_str()]).collect();
        fixture.refuses(&settings, tag, &image, code, &texts).await;
    }
    for reference in ["", "UPPER", "a//b", "x@sha256:12", "h:99999/x", "-x", "a/../b", "a b", "x:-t"] {
        fixture.refuses(&settings, reference, reference, Code::InvalidArgument, &["image reference"]).await;
    }
    let wrong = format!("bad@{}", digest(b"other"));
    registry.push_document("library/bad", &digest(b"other"), MANIFEST, b"{}");
    fixture
        .refuses(&settings, "by digest", &wrong, Code::DataLoss, &["it sent other content", "asked for"])
        .await;
    fixture.store(settings).pull("bad:good", None).await.expect("the registry itself is fine");
}

/// What it is, the limits, the layer as `push_blobs` takes it, and how the refusal reads.
type BadLayer = (&'static str, Settings, (&'static str, Vec<u8>, String), Code, &'static [&'static str]);

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_cannot_be_used_are_refused() {
    let fixture = Fixture::start().await;
    let registry = &fixture.registry;
    let good = small();
    let plain = Settings::default();
    let only = |change: &dyn Fn(&mut Settings)| {
        let mut settings = Settings::default();
        change(&mut settings);
        settings
    };
    let bomb = layer(&[("zeros", &vec![0; 3 << 20], 0o644)]);
    let huge = vec![0; 300 << 20];
    let cut = gzip(&good[0])[..40].to_vec();
    let dots = odd(EntryType::Link, "stolen", "../../../../etc/shadow");
    let absolute = odd(EntryType::Link, "stolen", "/etc/shadow");
    let unknown = odd(EntryType::new(b'Q'), "odd", "");
    let whiteout = odd(EntryType::Regular, "etc/.wh...", "");
    let circle = odd(EntryType::Symlink, "loop", "loop");
    let good_one = (GZIP, gzip(&good[0]), digest(&good[0]));
    let as_layer = |bytes: &[u8]| (GZIP, gzip(bytes), digest(bytes));
    let noise = b"no archive at all".repeat(100);
    let cases: Vec<BadLayer> = vec![
        (
            "bomb",
            only(&|all| all.max_layer_bytes = 1 << 20),
            as_layer(&bomb),
            Code::ResourceExhausted,
            &["images.maxLayerBytes"],
        ),
        (
            "image",
            only(&|all| all.max_image_bytes = 1 << 20),
            as_layer(&bomb),
            Code::ResourceExhausted,
            &["images.maxImageBytes"],
        ),
        (
            "ratio",
            plain.clone(),
            (ZSTD, zstd::encode_all(huge.as_slice(), 1).expect("compressed"), digest(&huge)),
            Code::ResourceExhausted,
            &["images.maxCompressionRatio"],
        ),
        ("cut", plain.clone(), (GZIP, cut, digest(&good[0])), Code::DataLoss, &["cannot be read"]),
        ("noise", plain.clone(), as_layer(&noise), Code::DataLoss, &["damaged tar archive"]),
        ("diff-id", plain.clone(), (GZIP, gzip(&good[1]), digest(&good[0])), Code::DataLoss, &["promises"]),
        ("dots", plain.clone(), as_layer(&dots), Code::FailedPrecondition, &["stolen"]),
        ("absolute", plain.clone(), as_layer(&absolute), Code::FailedPrecondition, &["stolen"]),
        ("unknown", plain.clone(), as_layer(&unknown), Code::FailedPrecondition, &["odd", "unknown type"]),
        (
            "whiteout",
            plain.clone(),
            as_layer(&whiteout),
            Code::FailedPrecondition,
            &["etc/.wh...", "takes away no file"],
        ),
    ];
    for (case, settings, bad, code, texts) in cases {
        let layer = digest(&bad.1);
        let image = format!("library/layers:{case}");
        registry.push_blobs("library/layers", case, &[good_one.clone(), bad]);
        let texts: Vec<&str> = if case == "image" {
            texts.to_vec()
        } else {
            texts.iter().copied().chain([layer.as_str()]).collect()
        };
        fixture.refuses(&settings, case, &image, code, &texts).await;
    }
    let store = fixture.store(plain);
    // What looks bad but is none: a link in a circle that nobody follows, the same layer twice.
    registry.push_blobs("library/layers", "fine", &[good_one.clone(), good_one.clone(), as_layer(&circle)]);
    store.pull("layers:fine", None).await.expect("pulled");
    store.remove("layers:fine").await.expect("removed");
    let left = fixture.left().await;
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_that_misbehave_are_named_and_given_up() {
    let fixture = Fixture::start().await;
    let registry = &fixture.registry;
    let noise: Vec<u8> =
        (0..200_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let first = layer(&[("noise", &noise, 0o644)]);
    registry.push("library/demo", "1", &[first.clone(), small().remove(1)], json!({}), true);
    let blob = digest(&gzip(&first));
    let impatient = Settings { progress_deadline_seconds: 4, ..Settings::default() };
    let always = 1000;
    let circle = vec![("location", format!("http://{}/v2/library/demo/manifests/1", registry.address()))];
    let nowhere = vec![("location", "ftp://elsewhere/x".to_owned())];
    let cases: Vec<(&str, &str, Fault, Code, Vec<&str>)> = vec![
        (
            "circle",
            "manifests/1",
            Fault::Status(307, circle),
            Code::FailedPrecondition,
            vec!["redirects more than 10 times"],
        ),
        (
            "nowhere",
            "manifests/1",
            Fault::Status(302, nowhere),
            Code::FailedPrecondition,
            vec!["redirects to no usable address"],
        ),
        ("stalled manifest", "manifests/1", Fault::Stall, Code::DeadlineExceeded, vec!["no progress for 4s"]),
        ("stalled blob", &blob, Fault::Stall, Code::DeadlineExceeded, vec!["no progress for 4s"]),
        ("too short", &blob, Fault::Length(1000), Code::DataLoss, vec!["another length", &blob]),
        ("too long", &blob, Fault::Longer(10), Code::DataLoss, vec!["another length", &blob]),
        ("gone", &blob, Fault::Status(404, vec![]), Code::NotFound, vec!["failed to fetch layer", &blob]),
        (
            "forbidden",
            &blob,
            Fault::Status(403, vec![]),
            Code::PermissionDenied,
            vec!["access denied (403", &blob],
        ),
        (
            "rate limit",
            "manifests/1",
            Fault::Status(429, vec![("retry-after", "3600".to_owned())]),
            Code::Unknown,
            vec!["429 Too Many Requests"],
        ),
        ("bad request", "manifests/1", Fault::Status(400, vec![]), Code::Unknown, vec!["400 Bad Request"]),
    ];
    for (case, path, fault, code, mut texts) in cases {
        let address = registry.address();
        if code != Code::DeadlineExceeded {
            texts.push(&address);
        }
        texts.push("\"docker.io/library/demo:1\"");
        registry.fault(path, fault, always);
        fixture.refuses(&impatient, case, "demo:1", code, &texts).await;
    }
    registry.replace_blob("library/demo", &blob, gzip(b"something else"));
    fixture.refuses(&impatient, "other content", "demo:1", Code::DataLoss, &["another length", &blob]).await;
    let mut flipped = gzip(&first);
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    registry.replace_blob("library/demo", &blob, flipped);
    fixture.refuses(&impatient, "flipped", "demo:1", Code::DataLoss, &["it sent other content", &blob]).await;
    registry.replace_blob("library/demo", &blob, gzip(&first));
    fixture.store(impatient).pull("demo:1", None).await.expect("and now it is fine");
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_wait_for_their_turn_do_not_excuse_those_that_stall() {
    let fixture = Fixture::start().await;
    let registry = &fixture.registry;
    let layers: Vec<Vec<u8>> =
        (0..5).map(|number| layer(&[(format!("file{number}").as_str(), b"x", 0o644)])).collect();
    registry.push("library/wide", "1", &layers, json!({}), false);
    for layer in &layers {
        registry.fault(&digest(&gzip(layer)), Fault::Stall, 1000);
    }
    let settings = Settings {
        progress_deadline_seconds: 3,
        parallel_layers: 2,
        parallel_transfers: 3,
        ..Settings::default()
    };
    let store = fixture.store(settings);
    // The second one waits for what the first one holds; neither is excused by the other for ever.
    registry.push("library/other", "1", &layers[1..], json!({"User": "1"}), false);
    let both = async { tokio::join!(store.pull("wide:1", None), store.pull("other:1", None)) };
    let (wide, other) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("both are given up");
    for result in [wide, other] {
        let status = service::status(&result.expect_err("stalled"));
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    }
    registry.heal();
    store.pull("wide:1", None).await.expect("and now it is fine");
}

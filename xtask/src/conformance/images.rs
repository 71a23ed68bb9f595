//! The images that cases use, made from Debian's busybox-static: everyday ones, ones with each setting an image can
//! have, and ones that are broken or hostile.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use serde_json::{Value, json};

use super::registry::{Objects, Registry};
use crate::images::{Entry, Layer, Packages, Tree, architecture, busybox, digest};

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Users and groups beside root that the everyday image knows: `conf` is also in the group `extra`.
const PASSWD: &str =
    "root:x:0:0:root:/root:/bin/sh\nconf:x:1000:1000::/home/conf:/bin/sh\nplain:x:1002:1002::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nconf:x:1000:\nplain:x:1002:\nextra:x:50000:conf\n";

/// Where the images are served, and what is known of them.
#[derive(Clone)]
pub(crate) struct Catalog {
    registry: Option<Registry>,
    /// Digest of the manifest of `conformance/tags`.
    pub(crate) tags_digest: String,
    /// Digest of its configuration.
    pub(crate) tags_config: String,
    /// The same image under another host name of this machine.
    pub(crate) other_host: String,
}

impl Catalog {
    /// Makes the images and serves them.
    pub(crate) async fn serve(work: &Path, port: u16, escape: &Path) -> Result<Self> {
        let mut maker = Maker { architecture: architecture()?, objects: Objects::new() };
        let base = base(work)?;
        let (tags_digest, tags_config) = maker.good(&base)?;
        maker.bad(&base, escape)?;
        let registry = Registry::start(Arc::new(maker.objects), port).await?;
        let other_host = registry.address.replace("127.0.0.1", "localhost");
        Ok(Self { registry: Some(registry), tags_digest, tags_config, other_host })
    }

    /// No registry: the endpoint has what it needs.
    pub(crate) fn none() -> Self {
        Self {
            registry: None,
            tags_digest: String::new(),
            tags_config: String::new(),
            other_host: String::new(),
        }
    }

    /// The reference of one of the images; skips where there is no registry.
    pub(crate) fn reference(&self, name: &str) -> Result<String> {
        match &self.registry {
            Some(registry) => Ok(format!("{}/{name}", registry.address)),
            None => super::case::skip("--images preloaded: there is no registry to pull from"),
        }
    }

    /// The registry; skips where there is none.
    pub(crate) fn registry(&self) -> Result<&Registry> {
        match &self.registry {
            Some(registry) => Ok(registry),
            None => super::case::skip("--images preloaded: there is no registry to pull from"),
        }
    }
}

/// Downloads Debian's busybox-static, unless it is there.
pub(crate) fn fetch(work: &Path) -> Result<Packages> {
    Packages::fetch(&work.join("debs"), &["busybox-static"])
}

/// busybox with users of ours.
fn base(work: &Path) -> Result<Arc<Layer>> {
    let packages = fetch(work)?;
    let mut tree = busybox(&packages)?;
    tree.text("etc/passwd", PASSWD);
    tree.text("etc/group", GROUP);
    tree.add("home/conf", Entry::Dir(0o755));
    Ok(Arc::new(Layer::pack(&tree)?))
}

struct Maker {
    architecture: String,
    objects: Objects,
}

impl Maker {
    fn good(&mut self, base: &Arc<Layer>) -> Result<(String, String)> {
        let everyday = json!({"Env": ["PATH=/bin:/usr/bin", "FROM_IMAGE=yes"], "Cmd": ["sh"]});
        for name in ["conformance/busybox", "private/busybox"] {
            self.image(name, &["latest", "1.36"], &[base], &everyday);
        }
        self.image("conformance/bare", &["latest"], &[base], &json!({}));
        // For a CRI whose sandboxes need an image.
        self.image(
            "conformance/pause",
            &["latest"],
            &[base],
            &json!({"Entrypoint": ["/bin/sleep", "2000000000"]}),
        );
        let with = |extra: Value| {
            let mut all = everyday.clone();
            if let (Some(all), Value::Object(extra)) = (all.as_object_mut(), extra) {
                all.extend(extra);
            }
            all
        };
        self.image("conformance/user-uid", &["latest"], &[base], &with(json!({"User": "1002"})));
        self.image("conformance/user-name", &["latest"], &[base], &with(json!({"User": "conf"})));
        self.image("conformance/user-pair", &["latest"], &[base], &with(json!({"User": "1000:1002"})));
        let mut data = Tree::default();
        data.text("data/volume/seed", "seeded\n");
        data.text("files/top", "top\n");
        data.text("files/sub/inner", "inner\n");
        data.add("files/sub/link", Entry::Link("/etc/hostname".to_owned()));
        let data = Layer::pack(&data)?;
        let settings = json!({
            "Entrypoint": ["/bin/sh", "-c", "echo \"entry:$0:$*:$(pwd):$FROM_IMAGE:$OTHER\"; trap 'echo usr1; exit 7' USR1; trap 'echo term; exit 8' TERM; sleep 3600 & wait"],
            "Cmd": ["first", "second"], "WorkingDir": "/work/place", "StopSignal": "SIGUSR1",
            "Volumes": {"/data/volume": {}}, "Labels": {"made-by": "keelson"},
        });
        self.image("conformance/settings", &["latest"], &[base, &data], &with(settings));
        let mut files = Tree::default();
        files.text("top", "top\n");
        files.text("dir/inner", "inner\n");
        files.add("dir/up", Entry::Link("../../../../etc".to_owned()));
        files.add("bin/tool", Entry::File(0o755, b"#!/bin/sh\necho tool ran\n".to_vec()));
        let files = Layer::pack(&files)?;
        self.image("conformance/files", &["latest"], &[&files], &json!({}));
        // Images for the image manager's own cases; each has content of its own, so that none shares an id.
        let mut digests = (String::new(), String::new());
        for name in [
            "tags",
            "digest",
            "list",
            "remove",
            "race",
            "private",
            "consistency",
            "two-hosts",
            "user",
            "docker",
            // Layers of these do not come when the registry is told to stall.
            "stall-deadline",
            "stall-progress",
        ] {
            let mut mark = Tree::default();
            mark.text("mark", name);
            let mark = Layer::pack(&mark)?;
            let tags = ["1", "2", "3", "latest"];
            let made = self.image(&format!("conformance/image-{name}"), &tags, &[&mark], &everyday);
            if name == "tags" {
                digests = made;
            }
            if name == "private" {
                self.image("private/image", &["latest"], &[&mark], &everyday);
            }
        }
        self.index("conformance/image-index", base, &everyday);
        Ok(digests)
    }

    fn bad(&mut self, base: &Arc<Layer>, escape: &Path) -> Result<()> {
        let plain = json!({});
        self.tagged("broken/manifest", MANIFEST, b"{ this is no JSON".to_vec());
        let mut missing = Tree::default();
        missing.text("mark", "the layer that is missing");
        let missing = Layer::pack(&missing)?;
        self.image("broken/missing-blob", &["latest"], &[&missing], &plain);
        self.objects.remove(&format!("broken/missing-blob/blobs/{}", missing.digest));
        let mut mark = Tree::default();
        mark.text("mark", "the layer whose bytes are others");
        let mark = Layer::pack(&mark)?;
        self.image("broken/digest", &["latest"], &[&mark], &plain);
        let mut other = mark.compressed.clone();
        let middle = other.len() / 2;
        other[middle] ^= 1;
        self.object(&format!("broken/digest/blobs/{}", mark.digest), LAYER, other);
        let mut short = Tree::default();
        short.text("mark", "the layer that ends early");
        let short = Layer::pack(&short)?;
        self.image("broken/size", &["latest"], &[&short], &plain);
        let half = short.compressed[..short.compressed.len() / 2].to_vec();
        self.object(&format!("broken/size/blobs/{}", short.digest), LAYER, half);
        self.other_platform("broken/platform", base);
        self.hostile(escape)
    }

    /// Layers that try to write outside of their root.
    fn hostile(&mut self, escape: &Path) -> Result<()> {
        let target = escape.display().to_string();
        let link = |name: &str, target: &str, kind: tar::EntryType| -> Result<Vec<u8>> {
            let mut archive = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            header.set_mode(0o777);
            archive.append_link(&mut header, name, target)?;
            let mut header = tar::Header::new_gnu();
            header.set_size(8);
            header.set_mode(0o644);
            archive.append_data(&mut header, format!("{name}/planted"), &b"planted\n"[..])?;
            Ok(archive.into_inner()?)
        };
        let through_link = link("way", &target, tar::EntryType::Symlink)?;
        self.raw("hostile/link", &through_link)?;
        let up = "../".repeat(12) + target.trim_start_matches('/') + "/planted";
        self.raw("hostile/dotdot", &raw_file(&up))?;
        let hard = {
            let mut archive = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            archive.append_link(
                &mut header,
                "stolen",
                format!("{}secret", "../".repeat(40) + &target[1..] + "/"),
            )?;
            archive.into_inner()?
        };
        self.raw("hostile/hard-link", &hard)
    }

    fn raw(&mut self, name: &str, archive: &[u8]) -> Result<()> {
        let layer = Layer::of_archive(archive)?;
        self.image(name, &["latest"], &[&layer], &json!({}));
        Ok(())
    }

    /// Serves an image under its tags and digest; gives the digests of manifest and configuration.
    fn image(&mut self, name: &str, tags: &[&str], layers: &[&Layer], runtime: &Value) -> (String, String) {
        let docker = name.ends_with("docker");
        let config = self.config(name, layers, runtime, &self.architecture.clone());
        let kind = if docker { DOCKER_MANIFEST } else { MANIFEST };
        let manifest = Self::manifest(name, layers, &config, kind);
        let digest = digest(&manifest);
        for version in tags.iter().copied().chain([digest.as_str()]) {
            self.object(&format!("{name}/manifests/{version}"), kind, manifest.clone());
        }
        (digest, config["digest"].as_str().unwrap_or_default().to_owned())
    }

    fn index(&mut self, name: &str, layer: &Layer, runtime: &Value) {
        let mut entries = Vec::new();
        for architecture in ["s390x".to_owned(), self.architecture.clone()] {
            let mut runtime = runtime.clone();
            runtime["Labels"] = json!({"architecture": architecture});
            let config = self.config(name, &[layer], &runtime, &architecture);
            let manifest = Self::manifest(name, &[layer], &config, MANIFEST);
            let digest = digest(&manifest);
            self.object(&format!("{name}/manifests/{digest}"), MANIFEST, manifest.clone());
            entries.push(json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.len(),
                "platform": {"os": "linux", "architecture": architecture}}));
        }
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        self.tagged(name, INDEX, index.to_string().into_bytes());
    }

    /// An index that has nothing for this machine.
    fn other_platform(&mut self, name: &str, layer: &Layer) {
        let config = self.config(name, &[layer], &json!({}), "s390x");
        let manifest = Self::manifest(name, &[layer], &config, MANIFEST);
        let digest = digest(&manifest);
        self.object(&format!("{name}/manifests/{digest}"), MANIFEST, manifest.clone());
        let entry = json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.len(),
            "platform": {"os": "linux", "architecture": "s390x"}});
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
        self.tagged(name, INDEX, index.to_string().into_bytes());
    }

    /// Stores layers and configuration; gives the configuration's descriptor.
    fn config(&mut self, name: &str, layers: &[&Layer], runtime: &Value, architecture: &str) -> Value {
        for layer in layers {
            self.object(&format!("{name}/blobs/{}", layer.digest), LAYER, layer.compressed.clone());
        }
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "2020-01-01T00:00:00Z", "config": runtime,
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>()},
        })
        .to_string()
        .into_bytes();
        let digest = digest(&config);
        let size = config.len();
        self.object(&format!("{name}/blobs/{digest}"), CONFIG, config);
        let docker = name.ends_with("docker");
        let kind = if docker { "application/vnd.docker.container.image.v1+json" } else { CONFIG };
        json!({"mediaType": kind, "digest": digest, "size": size})
    }

    fn manifest(name: &str, layers: &[&Layer], config: &Value, kind: &str) -> Vec<u8> {
        let docker = name.ends_with("docker");
        let layer_kind = if docker { "application/vnd.docker.image.rootfs.diff.tar.gzip" } else { LAYER };
        let layers: Vec<Value> = layers
            .iter()
            .map(|layer| json!({"mediaType": layer_kind, "digest": layer.digest, "size": layer.compressed.len()}))
            .collect();
        json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers})
            .to_string()
            .into_bytes()
    }

    /// Serves a manifest or index as `latest` and by its digest.
    fn tagged(&mut self, name: &str, kind: &str, bytes: Vec<u8>) {
        let digest = digest(&bytes);
        self.object(&format!("{name}/manifests/{digest}"), kind, bytes.clone());
        self.object(&format!("{name}/manifests/latest"), kind, bytes);
    }

    fn object(&mut self, path: &str, kind: &str, bytes: Vec<u8>) {
        self.objects.insert(path.to_owned(), (kind.to_owned(), bytes.into()));
    }
}

/// An archive of one file whose name no library would write.
fn raw_file(name: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_size(8);
    header.set_mode(0o644);
    let field = &mut header.as_old_mut().name;
    for (slot, byte) in field.iter_mut().zip(name.bytes()) {
        *slot = byte;
    }
    header.set_cksum();
    let mut archive = header.as_bytes().to_vec();
    archive.extend_from_slice(b"planted\n");
    archive.resize(512 * 4, 0);
    archive
}

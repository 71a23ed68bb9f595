//! The demo images, made from Debian's nginx and busybox packages; there is no registry to fetch others from.
//!
//! nginx 1.17.9 and 1.17.10 are only names, for the tutorials that use them: both hold Debian's nginx, and differ in
//! the version that their start page tells. Output: a folder of content-addressed blobs and a tag table.

pub(crate) mod deb;
pub(crate) mod idle;
pub(crate) mod layer;
mod rootfs;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::process::write_atomic;
pub(crate) use deb::{Packages, architecture};
pub(crate) use layer::{Entry, Layer, Tree, digest};
pub(crate) use rootfs::busybox;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Raised whenever the images' content changes, so that a kept folder is made anew.
const RECIPE: u32 = 3;

/// What the registry serves: repository → tag → manifest digest, and media types by digest.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Catalog {
    recipe: u32,
    /// `library/nginx` → `1.17.9` → `sha256:…`.
    pub(crate) tags: BTreeMap<String, BTreeMap<String, String>>,
    /// Media type of each manifest and index.
    pub(crate) media_types: BTreeMap<String, String>,
}

/// A folder of images.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    /// The store in `dir`, which may not exist yet.
    pub(crate) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The tag table.
    pub(crate) fn catalog(&self) -> Result<Catalog> {
        let file = self.dir.join("catalog.json");
        let text = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("parsing {}", file.display()))
    }

    /// File of a blob, `sha256:<hex>`; `None` for any other form of name.
    pub(crate) fn blob(&self, digest: &str) -> Option<PathBuf> {
        let hex = digest.strip_prefix("sha256:")?;
        let valid = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit());
        valid.then(|| self.dir.join("blobs").join(hex))
    }

    fn put(&self, content: &[u8]) -> Result<String> {
        let digest = layer::digest(content);
        let file = self.blob(&digest).context("a digest that we made")?;
        if !file.is_file() {
            write_atomic(&file, content)?;
        }
        Ok(digest)
    }

    fn put_layer(&self, tree: &Tree) -> Result<Layer> {
        let layer = Layer::pack(tree)?;
        self.put(&layer.compressed)?;
        Ok(layer)
    }

    fn add(&self, catalog: &mut Catalog, image: &Image<'_>) -> Result<()> {
        let config = self.put(&serde_json::to_vec(&image.config())?)?;
        let config_size = self.size(&config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
            "layers": image.layers.iter().map(|layer| json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": layer.digest, "size": layer.compressed.len(),
            })).collect::<Vec<_>>(),
        });
        let manifest = self.put(&serde_json::to_vec(&manifest)?)?;
        let index = json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{
                "mediaType": MANIFEST, "digest": manifest, "size": self.size(&manifest)?,
                "platform": {"architecture": image.architecture, "os": "linux"},
            }],
        });
        let index = self.put(&serde_json::to_vec(&index)?)?;
        catalog.media_types.insert(manifest, MANIFEST.to_owned());
        catalog.media_types.insert(index.clone(), INDEX.to_owned());
        let tags = catalog.tags.entry(format!("library/{}", image.name)).or_default();
        for tag in image.tags {
            tags.insert((*tag).to_owned(), index.clone());
        }
        Ok(())
    }

    fn size(&self, digest: &str) -> Result<u64> {
        let file = self.blob(digest).context("a digest that we made")?;
        Ok(fs::metadata(&file)?.len())
    }
}

/// One image before it is written.
struct Image<'a> {
    name: &'a str,
    tags: &'a [&'a str],
    architecture: &'a str,
    layers: &'a [&'a Layer],
    runtime: serde_json::Value,
}

impl Image<'_> {
    fn config(&self) -> serde_json::Value {
        json!({
            "architecture": self.architecture,
            "os": "linux",
            // A fixed time keeps the digests equal on every machine with the same packages.
            "created": "2020-01-01T00:00:00Z",
            "config": self.runtime,
            "rootfs": {"type": "layers", "diff_ids": self.layers.iter().map(|l| &l.diff_id).collect::<Vec<_>>()},
            "history": self.layers.iter()
                .map(|_| json!({"created": "2020-01-01T00:00:00Z", "created_by": "cargo xtask up"}))
                .collect::<Vec<_>>(),
        })
    }
}

/// Makes the images in `dir` unless they are there already.
pub(crate) fn ensure(dir: &Path) -> Result<Store> {
    let store = Store::at(dir);
    if store.catalog().is_ok_and(|catalog| catalog.recipe == RECIPE) {
        return Ok(store);
    }
    fs::create_dir_all(dir.join("blobs")).with_context(|| format!("creating {}", dir.display()))?;
    crate::cmd::step("making the demo images from Debian's nginx and busybox packages", || build(&store))?;
    Ok(store)
}

fn build(store: &Store) -> Result<()> {
    let architecture = deb::architecture()?;
    let packages = deb::Packages::fetch(&store.dir.join("debs"), rootfs::PACKAGES)?;
    let base = store.put_layer(&rootfs::busybox(&packages)?)?;
    let server = store.put_layer(&rootfs::nginx(&packages)?)?;
    let mut catalog = Catalog { recipe: RECIPE, ..Catalog::default() };
    store.add(
        &mut catalog,
        &Image {
            name: "busybox",
            tags: &["latest", "1.36", "1.28"],
            architecture: &architecture,
            layers: &[&base],
            runtime: json!({"Env": [rootfs::PATH], "Cmd": ["sh"]}),
        },
    )?;
    for (version, tags) in [("1.17.9", &["1.17.9"][..]), ("1.17.10", &["1.17.10", "latest"][..])] {
        let page = store.put_layer(&rootfs::start_page(version))?;
        store.add(
            &mut catalog,
            &Image {
                name: "nginx",
                tags,
                architecture: &architecture,
                layers: &[&base, &server, &page],
                runtime: json!({
                    "Env": [rootfs::PATH, format!("NGINX_VERSION={version}")],
                    "Cmd": ["nginx", "-g", "daemon off;"],
                    "ExposedPorts": {"80/tcp": {}},
                    "StopSignal": "SIGQUIT",
                    "WorkingDir": "/",
                }),
            },
        )?;
    }
    write_atomic(&store.dir.join("catalog.json"), &serde_json::to_vec_pretty(&catalog)?)
}

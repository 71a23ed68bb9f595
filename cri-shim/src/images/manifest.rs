//! Reads manifests, indexes and image configurations, and picks this machine's platform from an index.
//!
//! Input: their bytes. Output: what a pull has to fetch and what a container has to know. It does no IO.
//! Formats: <https://github.com/opencontainers/image-spec/blob/v1.1.0/manifest.md>, `image-index.md` and `config.md`.

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};

use super::digest;

/// Most layers an image may have (the kernel's overlayfs stops at 500).
const MAX_LAYERS: usize = 500;

/// What a registry can answer to a manifest request.
#[derive(Debug)]
pub enum Parsed {
    /// One image per platform.
    Index(Box<ImageIndex>),
    /// One image.
    Manifest(Box<ImageManifest>),
}

/// Why a manifest or configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is not JSON of the documented form.
    #[error("cannot understand the {what} {digest}")]
    Parse {
        /// What it should be.
        what: &'static str,
        /// Which one.
        digest: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Docker's first format, which names no content digests.
    #[error(
        "the image has Docker's schema 1 manifest, which is not supported; push it again with a current tool"
    )]
    Schema1,
    /// The index has nothing for us.
    #[error("no match for platform linux/{wanted} in the manifest list, which has: {offered}")]
    Platform {
        /// Our architecture.
        wanted: &'static str,
        /// What there is.
        offered: String,
    },
    /// The index leads to another index.
    #[error("the manifest list entry {0} is a manifest list again")]
    Nested(String),
    /// Layers and the configuration's diff ids do not belong together.
    #[error("the manifest has {layers} layers, the image configuration {diff_ids} diff ids")]
    LayerCount {
        /// Layers of the manifest.
        layers: usize,
        /// Diff ids of the configuration.
        diff_ids: usize,
    },
    /// More layers than overlayfs takes.
    #[error("the manifest has {0} layers, more than the {MAX_LAYERS} that can be mounted")]
    TooManyLayers(usize),
    /// A layer that is fetched from elsewhere, as those of Windows were.
    #[error("layer {0} is foreign (not distributable by this registry), which is not supported")]
    Foreign(String),
    /// A layer that is no tar archive.
    #[error("layer {digest} is of type {kind:?}, which is no layer of a container image")]
    LayerKind {
        /// The layer.
        digest: String,
        /// Its media type.
        kind: String,
    },
    /// A document is longer or shorter than the one that leads to it says.
    #[error("the {what} {digest} has {got} bytes, not the promised {wanted}")]
    Size {
        /// What it is.
        what: &'static str,
        /// Which one.
        digest: String,
        /// The promise.
        wanted: u64,
        /// The truth.
        got: usize,
    },
    /// A digest of an algorithm that is not checked.
    #[error("unsupported digest {0}: only sha256 is")]
    Digest(String),
}

/// Parses a registry's answer; the document's own `mediaType` wins over the transport's.
pub fn parse(bytes: &[u8], media_type: &str, digest: &str) -> Result<Parsed, ManifestError> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        media_type: Option<String>,
        schema_version: Option<u32>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let wrong = |what| move |source| ManifestError::Parse { what, digest: digest.to_owned(), source };
    let head: Head = serde_json::from_slice(bytes).map_err(wrong("manifest"))?;
    let kind = head.media_type.as_deref().unwrap_or(media_type);
    if head.schema_version == Some(1) || kind.contains("distribution.manifest.v1+") {
        return Err(ManifestError::Schema1);
    }
    let is_index =
        kind.contains("image.index.") || kind.contains("manifest.list.") || head.manifests.is_some();
    if is_index {
        return serde_json::from_slice(bytes)
            .map(Box::new)
            .map(Parsed::Index)
            .map_err(wrong("manifest list"));
    }
    let manifest: ImageManifest = serde_json::from_slice(bytes).map_err(wrong("manifest"))?;
    let all = manifest.layers().iter().chain([manifest.config()]);
    for descriptor in all {
        check_digest(descriptor)?;
    }
    for layer in manifest.layers() {
        check_layer(layer)?;
    }
    match manifest.layers().len() {
        count if count > MAX_LAYERS => Err(ManifestError::TooManyLayers(count)),
        _ => Ok(Parsed::Manifest(Box::new(manifest))),
    }
}

/// Parses an image configuration and checks it against the manifest's layers.
pub fn parse_config(bytes: &[u8], manifest: &ImageManifest) -> Result<ImageConfiguration, ManifestError> {
    let wrong = |source| ManifestError::Parse {
        what: "image configuration",
        digest: manifest.config().digest().to_string(),
        source,
    };
    let mut config: ImageConfiguration = serde_json::from_slice(bytes).map_err(wrong)?;
    let (layers, diff_ids) = (manifest.layers().len(), config.rootfs().diff_ids().len());
    if layers != diff_ids {
        return Err(ManifestError::LayerCount { layers, diff_ids });
    }
    // Long, and of no use to a container.
    config.set_history(None);
    Ok(config)
}

/// Picks the entry for this machine.
pub fn select(index: &ImageIndex) -> Result<&Descriptor, ManifestError> {
    select_for(index, architecture())
}

/// Whether an entry may be for this machine.
pub fn fits(descriptor: &Descriptor) -> bool {
    rank(descriptor, architecture()).is_some()
}

/// How well an entry fits a machine, 0 best; `None` when it is for another one.
fn rank(descriptor: &Descriptor, wanted: &str) -> Option<u8> {
    match descriptor.platform() {
        None => Some(3),
        Some(platform) if platform.os().to_string() != "linux" => None,
        Some(platform) if platform.architecture().to_string() != wanted => None,
        Some(platform) => match (wanted, platform.variant().as_deref()) {
            (_, None) | ("amd64", Some("v1")) | ("arm64", Some("v8")) | ("arm", Some("v7")) => Some(0),
            ("arm", Some("v6" | "v5")) => Some(1),
            // Other variants need a processor that this one may not be.
            _ => None,
        },
    }
}

fn select_for<'a>(index: &'a ImageIndex, wanted: &'static str) -> Result<&'a Descriptor, ManifestError> {
    let ranked = index.manifests().iter().filter_map(|one| Some((rank(one, wanted)?, one)));
    let best = ranked.min_by_key(|(rank, _)| *rank);
    let chosen = best
        .map(|(_, one)| one)
        .ok_or_else(|| ManifestError::Platform { wanted, offered: offered(index) })?;
    check_digest(chosen)?;
    Ok(chosen)
}

/// The chain ids of a list of diff ids: the name of each layer together with all below it.
pub fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(parent) => digest::of(format!("{parent} {diff_id}")),
        };
        chain.push(next);
    }
    chain
}

/// Compares a document's length with its descriptor's.
pub fn check_size(what: &'static str, descriptor: &Descriptor, got: usize) -> Result<(), ManifestError> {
    let (wanted, digest) = (descriptor.size(), descriptor.digest().to_string());
    if wanted == got as u64 { Ok(()) } else { Err(ManifestError::Size { what, digest, wanted, got }) }
}

fn check_layer(layer: &Descriptor) -> Result<(), ManifestError> {
    let (kind, digest) = (layer.media_type().to_string(), layer.digest().to_string());
    if kind.contains(".foreign.") || kind.contains(".nondistributable.") {
        return Err(ManifestError::Foreign(digest));
    }
    let compressions = ["", "+gzip", "+zstd", ".gzip", ".zstd"];
    let tar = ["application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"];
    let rest = tar.iter().find_map(|tar| kind.strip_prefix(tar));
    if rest.is_some_and(|rest| compressions.contains(&rest)) {
        return Ok(());
    }
    Err(ManifestError::LayerKind { digest, kind })
}

fn check_digest(descriptor: &Descriptor) -> Result<(), ManifestError> {
    let digest = descriptor.digest().to_string();
    if super::reference::is_digest(&digest) { Ok(()) } else { Err(ManifestError::Digest(digest)) }
}

fn offered(index: &ImageIndex) -> String {
    let platforms = index.manifests().iter().filter_map(|one| one.platform().as_ref());
    let names = platforms.map(|platform| match platform.variant() {
        Some(variant) => format!("{}/{}/{variant}", platform.os(), platform.architecture()),
        None => format!("{}/{}", platform.os(), platform.architecture()),
    });
    names.collect::<Vec<_>>().join(", ")
}

/// This machine's architecture as images name it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(fill: char) -> String {
        format!("sha256:{}", fill.to_string().repeat(64))
    }

    fn index(platforms: &[(&str, &str, Option<&str>)]) -> ImageIndex {
        let entries: Vec<_> = platforms.iter().zip('0'..).map(|((os, architecture, variant), fill)| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1, "digest": digest(fill),
                "platform": {"os": os, "architecture": architecture, "variant": variant},
            })
        }).collect();
        let value = serde_json::json!({"schemaVersion": 2, "manifests": entries});
        match parse(value.to_string().as_bytes(), "", "d").expect("parsed") {
            Parsed::Index(index) => *index,
            Parsed::Manifest(_) => panic!("an index"),
        }
    }

    #[test]
    fn picks_this_platform_among_others_and_attestations() {
        let index = index(&[
            ("linux", "arm64", Some("v8")),
            ("unknown", "unknown", None),
            ("linux", "amd64", Some("v3")),
            ("windows", "amd64", None),
            ("linux", "amd64", None),
        ]);
        assert_eq!(select_for(&index, "amd64").expect("found").digest().to_string(), digest('4'));
        assert_eq!(select_for(&index, "arm64").expect("found").digest().to_string(), digest('0'));
        let error = select_for(&index, "s390x").expect_err("none").to_string();
        assert!(error.contains("linux/s390x") && error.contains("linux/arm64/v8"), "{error}");
    }

    #[test]
    fn refuses_what_it_cannot_check() {
        assert!(matches!(parse(br#"{"schemaVersion":1}"#, "", "d"), Err(ManifestError::Schema1)));
        assert!(matches!(parse(b"<html>", "text/html", "d"), Err(ManifestError::Parse { .. })));
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": {"mediaType": "x/y", "size": 2, "digest": digest('a')},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "size": 2, "digest": digest('b')}],
        });
        let Ok(Parsed::Manifest(manifest)) = parse(manifest.to_string().as_bytes(), "", "d") else {
            panic!("manifest")
        };
        let config = br#"{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}"#;
        let error = parse_config(config, &manifest).expect_err("layers differ");
        assert!(matches!(error, ManifestError::LayerCount { layers: 1, diff_ids: 0 }));
    }

    #[test]
    fn layers_that_are_none_are_named() {
        let kinds = [
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign"),
            ("application/vnd.cncf.helm.chart.content.v1.tar+gzip", "no layer of a container image"),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "no layer of a container image"),
        ];
        for (kind, wanted) in kinds {
            let manifest = serde_json::json!({
                "schemaVersion": 2,
                "config": {"mediaType": "x/y", "size": 2, "digest": digest('a')},
                "layers": [{"mediaType": kind, "size": 2, "digest": digest('b')}],
            });
            let error = parse(manifest.to_string().as_bytes(), "", "d").expect_err(kind).to_string();
            assert!(error.contains(wanted) && error.contains(&digest('b')), "{error}");
        }
    }

    #[test]
    fn deep_documents_are_refused_and_not_followed() {
        let deep = "[".repeat(100_000);
        assert!(matches!(parse(deep.as_bytes(), "", "d"), Err(ManifestError::Parse { .. })));
        let deep = [r#"{"manifests":"#, &deep].concat();
        assert!(matches!(parse(deep.as_bytes(), "", "d"), Err(ManifestError::Parse { .. })));
    }

    #[test]
    fn chain_ids_follow_the_specification() {
        let diff_ids = [digest('a'), digest('b')];
        let chain = chain_ids(&diff_ids);
        assert_eq!(chain[0], diff_ids[0]);
        assert_eq!(chain[1], digest::of(format!("{} {}", diff_ids[0], diff_ids[1])));
    }
}

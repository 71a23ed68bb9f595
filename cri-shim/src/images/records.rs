//! containerd's image records (names that lead to content and keep it from garbage collection), and what is known of
//! an image once its manifest and configuration were read.
//!
//! Each image has a record for its tag, one for its digest and one for its id, as containerd's own CRI writes them.

use std::collections::BTreeMap;

use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{
    CreateImageRequest, DeleteImageRequest, Image as Record, ListImagesRequest, UpdateImageRequest,
};
use containerd_client::types;
use oci_spec::image::{ImageConfiguration, ImageManifest};
use tonic::Code;

use super::content;
use super::manifest::{self, ManifestError, Parsed};
use super::session::{CALL_DEADLINE, CallError, Session, allow, call};

/// Marks the records that belong to the CRI.
const MANAGED: (&str, &str) = ("io.cri-containerd.image", "managed");

/// Marks an image that the kubelet must not collect.
const PINNED: (&str, &str) = ("io.cri-containerd.pinned", "pinned");

/// What an image's manifest and configuration say.
#[derive(Debug)]
pub struct Details {
    /// Digest of the configuration: the image's id.
    pub id: String,
    /// The snapshot with all layers.
    pub chain_id: String,
    /// Bytes of all its blobs as stored (compressed).
    pub size: u64,
    /// Its manifest.
    pub manifest: ImageManifest,
    /// Its configuration, without the history.
    pub config: ImageConfiguration,
}

/// Why an image's content could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// containerd does not have it, or failed.
    #[error("its content cannot be read")]
    Content(#[from] CallError),
    /// It cannot be understood.
    #[error("its content cannot be used")]
    Manifest(#[from] ManifestError),
}

/// Lists all records of the namespace.
pub async fn list(session: &Session) -> Result<Vec<Record>, CallError> {
    let mut images = ImagesClient::new(session.channel());
    let request = session.request(ListImagesRequest::default(), CALL_DEADLINE);
    call("list", "images", images.list(request)).await.map(|answer| answer.images)
}

/// Makes `name` lead to `target`, whatever it led to before.
pub async fn put(
    session: &Session,
    name: &str,
    target: types::Descriptor,
    pinned: bool,
) -> Result<(), CallError> {
    let _told = session.changes().in_the_end();
    let labels = [Some(MANAGED), pinned.then_some(PINNED)].into_iter().flatten();
    let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let record = Record { name: name.to_owned(), labels, target: Some(target), ..Record::default() };
    let mut images = ImagesClient::new(session.channel());
    let message = CreateImageRequest { image: Some(record.clone()), source_date_epoch: None };
    let created = call("record image", name, images.create(session.request(message, CALL_DEADLINE))).await;
    if allow(created, Code::AlreadyExists)?.is_none() {
        let message = UpdateImageRequest { image: Some(record), ..UpdateImageRequest::default() };
        call("record image", name, images.update(session.request(message, CALL_DEADLINE))).await?;
    }
    Ok(())
}

/// Removes a record; `sync` waits until what it alone kept is collected. A missing record is fine.
pub async fn delete(session: &Session, name: &str, sync: bool) -> Result<(), CallError> {
    let _told = session.changes().in_the_end();
    let mut images = ImagesClient::new(session.channel());
    let message = DeleteImageRequest { name: name.to_owned(), sync, ..DeleteImageRequest::default() };
    let deadline = if sync { CALL_DEADLINE * 4 } else { CALL_DEADLINE };
    let deleted = call("remove image", name, images.delete(session.request(message, deadline))).await;
    allow(deleted, Code::NotFound).map(drop)
}

/// Tells whether a record is pinned.
pub fn is_pinned(record: &Record) -> bool {
    record.labels.get(PINNED.0).is_some_and(|value| value == PINNED.1)
}

/// Reads the manifest and configuration a record leads to.
pub async fn load(session: &Session, target: &types::Descriptor) -> Result<Details, LoadError> {
    let bytes = content::read(session, &target.digest).await?;
    let mut size = bytes.len() as u64;
    let manifest = match manifest::parse(&bytes, &target.media_type, &target.digest)? {
        Parsed::Manifest(manifest) => *manifest,
        Parsed::Index(index) => {
            let chosen = manifest::select(&index)?;
            let digest = chosen.digest().to_string();
            let bytes = content::read(session, &digest).await?;
            size += bytes.len() as u64;
            match manifest::parse(&bytes, chosen.media_type().as_ref(), &digest)? {
                Parsed::Manifest(manifest) => *manifest,
                Parsed::Index(_) => return Err(ManifestError::Nested(digest).into()),
            }
        }
    };
    let config = content::read(session, manifest.config().digest().as_ref()).await?;
    let config = manifest::parse_config(&config, &manifest)?;
    Ok(details(size, manifest, config))
}

/// Puts together what is known; `documents` is the size of manifest and index.
pub fn details(documents: u64, manifest: ImageManifest, config: ImageConfiguration) -> Details {
    let blobs = manifest.layers().iter().chain([manifest.config()]);
    // A manifest may promise anything.
    let size = blobs.fold(documents, |sum, blob| sum.saturating_add(blob.size()));
    let chain_id = manifest::chain_ids(config.rootfs().diff_ids()).pop().unwrap_or_default();
    Details { id: manifest.config().digest().to_string(), chain_id, size, manifest, config }
}

/// Labels that make containerd keep a manifest's parts.
pub fn manifest_labels(manifest: &ImageManifest) -> BTreeMap<String, String> {
    let layers = manifest.layers().iter().enumerate();
    let layers = layers.map(|(index, layer)| (format!("containerd.io/gc.ref.content.l.{index}"), layer));
    let config = ("containerd.io/gc.ref.content.config".to_owned(), manifest.config());
    layers.chain([config]).map(|(key, part)| (key, part.digest().to_string())).collect()
}

/// Label that makes containerd keep the one manifest of an index that was pulled.
pub fn index_labels(manifest_digest: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("containerd.io/gc.ref.content.m.0".to_owned(), manifest_digest.to_owned())])
}

/// Label that makes containerd keep the unpacked layers of a configuration.
pub fn config_labels(snapshotter: &str, chain_id: &str) -> BTreeMap<String, String> {
    if chain_id.is_empty() {
        return BTreeMap::new();
    }
    BTreeMap::from([(format!("containerd.io/gc.ref.snapshot.{snapshotter}"), chain_id.to_owned())])
}

/// Label that tells a layer's uncompressed digest.
pub fn layer_labels(diff_id: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("containerd.io/uncompressed".to_owned(), diff_id.to_owned())])
}

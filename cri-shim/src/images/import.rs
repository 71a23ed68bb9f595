//! Imports image archives: everything a pull does, from a file instead of a registry.
//!
//! Input: an archive in docker's or the OCI layout. Output: images under the names the archive gives them. Docker's
//! older archives carry no manifest, so one is made; images in the OCI layout keep theirs and so their digests.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_client::types;
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::archive::{self, ArchiveError, Survey, read_up_to};
use super::content::{self, CHUNK, Writer};
use super::decode::Compression;
use super::digest;
use super::manifest::{self, ManifestError, Parsed};
use super::pull::{PullError, Shared};
use super::records::{self, Details};
use super::reference::{Reference, ReferenceError};
use super::session::{CallError, Session};
use super::store::{Image, ImageError, ImageStore};

/// The annotation of an OCI layout that holds an image's full name.
const NAME_ANNOTATION: &str = "io.containerd.image.name";

/// The one that holds a full name or, as the specification has it, only what tells the images of one archive apart.
const REF_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// Why an archive was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The name that images are to get is none.
    #[error("--name")]
    Name(#[source] ReferenceError),
    /// It cannot be read.
    #[error("cannot import")]
    Archive(#[from] ArchiveError),
    /// It has neither an `index.json` nor a `manifest.json`.
    #[error("{} is no image archive: it has neither index.json nor manifest.json", .0.display())]
    NoImages(PathBuf),
    /// Two images would get the same name.
    #[error("the archive has several images for the name {0}")]
    SameName(String),
    /// A part that its documents name is missing.
    #[error("the archive has no {0}")]
    Missing(String),
    /// A document is damaged.
    #[error("cannot understand {what} of the archive")]
    Document {
        /// Which.
        what: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// An image cannot be run here.
    #[error("an image of the archive cannot be used")]
    Manifest(#[from] ManifestError),
    /// containerd failed.
    #[error("containerd failed")]
    Containerd(#[from] CallError),
    /// A layer cannot be unpacked.
    #[error("failed to unpack")]
    Unpack(#[from] PullError),
    /// The image is not there after all.
    #[error("the imported image cannot be read back")]
    Image(#[from] ImageError),
    /// The reading thread was lost.
    #[error("the archive's reader ended early")]
    Lost(#[from] tokio::task::JoinError),
}

/// One image to be imported.
#[derive(Debug)]
struct Planned {
    names: Vec<Reference>,
    /// Manifest or index, as it is stored.
    target: types::Descriptor,
    /// Documents to store, by digest, with their labels.
    documents: BTreeMap<String, (Vec<u8>, BTreeMap<String, String>)>,
    details: Details,
}

impl ImageStore {
    /// Imports all images of an archive; gives them with the names they have now. `base` is the repository (and tag) of
    /// images that the archive names by a tag only, or not at all.
    pub async fn import(&self, path: &Path, base: Option<&str>) -> Result<Vec<Arc<Image>>, ImportError> {
        let base = base.map(Reference::parse).transpose().map_err(ImportError::Name)?;
        let owned = path.to_owned();
        let survey = Arc::new(tokio::task::spawn_blocking(move || archive::survey(&owned)).await??);
        let planned = plan(path, &survey, self.snapshotter(), base.as_ref())?;
        let work = super::pull::leased(self.shared(), async |shared: &Shared, threads: &TaskTracker| {
            carry_out(shared, threads, path, survey, &planned).await
        });
        Box::pin(work).await?;
        let mut images = Vec::new();
        for one in planned {
            images.push(self.resolve(&one.details.id).await?);
        }
        Ok(images)
    }
}

async fn carry_out(
    shared: &Shared,
    threads: &TaskTracker,
    path: &Path,
    survey: Arc<Survey>,
    planned: &[Planned],
) -> Result<(), ImportError> {
    let session = &shared.session;
    let mut layers = BTreeMap::new();
    for details in planned.iter().map(|one| &one.details) {
        for (layer, diff_id) in details.manifest.layers().iter().zip(details.config.rootfs().diff_ids()) {
            layers.insert(layer.digest().to_string(), (layer.size(), diff_id.clone()));
        }
    }
    store_layers(session, path, survey, layers).await?;
    for one in planned {
        for (digest, (bytes, labels)) in &one.documents {
            content::store(session, digest, bytes.clone(), labels.clone()).await?;
        }
        super::layers::unpack_stored(shared, &one.details, threads).await?;
        let (id, target) = (&one.details.id, &one.target);
        for name in &one.names {
            super::pull::record(session, name, id, target.clone()).await?;
        }
        // Also an image without a name is kept, under its id.
        records::put(session, id, target.clone(), false).await?;
    }
    Ok(())
}

/// Pieces of the archive's layers on their way to containerd.
enum Piece {
    Begin(String),
    Bytes(Vec<u8>),
}

async fn store_layers(
    session: &Session,
    path: &Path,
    survey: Arc<Survey>,
    layers: BTreeMap<String, (u64, String)>,
) -> Result<(), ImportError> {
    let (pieces, mut queue) = mpsc::channel(2);
    let (path, wanted) = (path.to_owned(), layers.keys().cloned().collect());
    let reader = tokio::task::spawn_blocking(move || read_layers(&path, &survey, wanted, &pieces));
    let mut writer: Option<(Writer, String)> = None;
    while let Some(piece) = queue.recv().await {
        match (piece, &mut writer) {
            (Piece::Begin(digest), _) => {
                finish(writer.take()).await?;
                let Some((size, diff_id)) = layers.get(&digest) else { continue };
                writer = Writer::open_empty(session, &digest, *size, &records::layer_labels(diff_id))
                    .await?
                    .map(|open| (open, diff_id.clone()));
            }
            (Piece::Bytes(bytes), Some((writer, _))) => writer.write(bytes).await?,
            // containerd has that layer already.
            (Piece::Bytes(_), None) => {}
        }
    }
    finish(writer).await?;
    Ok(reader.await??)
}

async fn finish(writer: Option<(Writer, String)>) -> Result<(), CallError> {
    match writer {
        Some((writer, diff_id)) => writer.commit(records::layer_labels(&diff_id)).await,
        None => Ok(()),
    }
}

fn read_layers(
    path: &Path,
    survey: &Survey,
    wanted: BTreeSet<String>,
    pieces: &mpsc::Sender<Piece>,
) -> Result<(), ArchiveError> {
    let send =
        |piece| pieces.blocking_send(piece).map_err(|_gone| io::Error::other("nobody takes the layers"));
    archive::stream(path, survey, wanted, |digest, reader| {
        send(Piece::Begin(digest.to_owned()))?;
        loop {
            let mut buffer = vec![0; CHUNK];
            let count = read_up_to(reader, &mut buffer)?;
            buffer.truncate(count);
            if count > 0 {
                send(Piece::Bytes(buffer))?;
            }
            if count < CHUNK {
                return Ok(());
            }
        }
    })
}

/// Decides what to import: images of the OCI index, or else of docker's manifest.
fn plan(
    path: &Path,
    survey: &Survey,
    snapshotter: &str,
    base: Option<&Reference>,
) -> Result<Vec<Planned>, ImportError> {
    let by_digest: BTreeMap<&str, &str> =
        survey.iter().map(|(name, entry)| (entry.digest.as_str(), name.as_str())).collect();
    let archive = Archive { survey, by_digest, snapshotter, base };
    let docker: Vec<DockerImage> =
        if survey.contains_key("manifest.json") { archive.parse("manifest.json")? } else { Vec::new() };
    if survey.contains_key("index.json") {
        let index: ImageIndex = archive.parse("index.json")?;
        let mut planned = Vec::new();
        let all = index.manifests();
        // One that is alone is taken as it is, and refused by name where it cannot be run.
        for descriptor in all.iter().filter(|one| all.len() == 1 || manifest::fits(one)) {
            planned.push(archive.oci(descriptor, &docker)?);
        }
        return one_each(planned);
    }
    if docker.is_empty() {
        return Err(ImportError::NoImages(path.to_owned()));
    }
    one_each(docker.iter().map(|image| archive.docker(image)).collect::<Result<_, _>>()?)
}

/// Refuses a name for two images.
fn one_each(planned: Vec<Planned>) -> Result<Vec<Planned>, ImportError> {
    let mut seen = BTreeMap::new();
    for one in &planned {
        for name in &one.names {
            if seen.insert(name, &one.details.id).is_some_and(|id| *id != one.details.id) {
                return Err(ImportError::SameName(name.to_string()));
            }
        }
    }
    Ok(planned)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl DockerImage {
    fn names(&self) -> Vec<Reference> {
        let tags = self.repo_tags.iter().flatten();
        tags.filter_map(|tag| Reference::parse(tag).ok()).collect()
    }
}

struct Archive<'a> {
    survey: &'a Survey,
    by_digest: BTreeMap<&'a str, &'a str>,
    snapshotter: &'a str,
    /// What images without a full name are called.
    base: Option<&'a Reference>,
}

impl Archive<'_> {
    fn document(&self, name: &str) -> Result<&[u8], ImportError> {
        let entry = self.survey.get(name).and_then(|entry| entry.document.as_deref());
        entry.ok_or_else(|| ImportError::Missing(name.to_owned()))
    }

    fn blob(&self, digest: &str) -> Result<&[u8], ImportError> {
        let name = self.by_digest.get(digest).ok_or_else(|| ImportError::Missing(digest.to_owned()))?;
        self.document(name)
    }

    fn parse<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<T, ImportError> {
        let wrong = |source| ImportError::Document { what: name.to_owned(), source };
        serde_json::from_slice(self.document(name)?).map_err(wrong)
    }

    /// An image of the OCI layout.
    fn oci(&self, descriptor: &Descriptor, docker: &[DockerImage]) -> Result<Planned, ImportError> {
        let digest = descriptor.digest().to_string();
        let bytes = self.blob(&digest)?;
        let mut documents = BTreeMap::new();
        let manifest = match manifest::parse(bytes, descriptor.media_type().as_ref(), &digest)? {
            Parsed::Manifest(manifest) => {
                documents.insert(digest.clone(), (bytes.to_vec(), records::manifest_labels(&manifest)));
                *manifest
            }
            Parsed::Index(index) => {
                let chosen = manifest::select(&index)?;
                let inner = chosen.digest().to_string();
                documents.insert(digest.clone(), (bytes.to_vec(), records::index_labels(&inner)));
                let bytes = self.blob(&inner)?;
                let Parsed::Manifest(manifest) =
                    manifest::parse(bytes, chosen.media_type().as_ref(), &inner)?
                else {
                    return Err(ManifestError::Nested(inner).into());
                };
                documents.insert(inner, (bytes.to_vec(), records::manifest_labels(&manifest)));
                *manifest
            }
        };
        let mut names: Vec<_> = self.annotated(descriptor).into_iter().collect();
        if names.is_empty() || !docker.is_empty() {
            let config = manifest.config().digest().to_string();
            let same =
                |image: &&DockerImage| self.survey.get(&image.config).is_some_and(|one| one.digest == config);
            names.extend(docker.iter().filter(same).flat_map(DockerImage::names));
            names.sort();
            names.dedup();
        }
        if names.is_empty() {
            names.extend(self.base.cloned());
        }
        let target = super::unpack::descriptor(descriptor);
        self.finish(names, target, manifest, documents)
    }

    /// The name that the index gives an image.
    fn annotated(&self, descriptor: &Descriptor) -> Option<Reference> {
        let annotation = |key: &str| descriptor.annotations().as_ref()?.get(key).map(String::as_str);
        if let Some(name) = annotation(NAME_ANNOTATION).and_then(|name| Reference::parse(name).ok()) {
            return Some(name);
        }
        match annotation(REF_ANNOTATION)? {
            full if full.contains(['/', ':']) => Reference::parse(full).ok(),
            // skopeo and buildx write only the tag; taken as a name it would be somebody else's.
            tag => self.base?.with_tag(tag),
        }
    }

    /// An image of docker's layout, with a manifest made for it.
    fn docker(&self, image: &DockerImage) -> Result<Planned, ImportError> {
        let config = self.document(&image.config)?;
        let mut layers = Vec::new();
        for name in &image.layers {
            let entry = self.survey.get(name).ok_or_else(|| ImportError::Missing(name.clone()))?;
            let kind = match entry.compression {
                Some(Compression::Gzip) => MediaType::ImageLayerGzip,
                Some(Compression::Zstd) => MediaType::ImageLayerZstd,
                None => MediaType::ImageLayer,
            };
            layers.push(describe(kind, entry.size, &entry.digest)?);
        }
        let config = describe(MediaType::ImageConfig, config.len() as u64, &digest::of(config))?;
        let made = serde_json::json!({
            "schemaVersion": 2, "mediaType": MediaType::ImageManifest.to_string(), "config": config, "layers": layers,
        });
        let bytes = made.to_string().into_bytes();
        let wrong = |source| ImportError::Document { what: "the manifest made".to_owned(), source };
        let manifest: ImageManifest = serde_json::from_slice(&bytes).map_err(wrong)?;
        let digest = digest::of(&bytes);
        let target = describe(MediaType::ImageManifest, bytes.len() as u64, &digest)?;
        let documents = BTreeMap::from([(digest, (bytes, records::manifest_labels(&manifest)))]);
        let mut names = image.names();
        if names.is_empty() {
            names.extend(self.base.cloned());
        }
        self.finish(names, super::unpack::descriptor(&target), manifest, documents)
    }

    fn finish(
        &self,
        names: Vec<Reference>,
        target: types::Descriptor,
        manifest: ImageManifest,
        mut documents: BTreeMap<String, (Vec<u8>, BTreeMap<String, String>)>,
    ) -> Result<Planned, ImportError> {
        for layer in manifest.layers() {
            if !self.by_digest.contains_key(layer.digest().as_ref()) {
                return Err(ImportError::Missing(layer.digest().to_string()));
            }
        }
        let digest = manifest.config().digest().to_string();
        let bytes = self.blob(&digest)?.to_vec();
        let config: ImageConfiguration = manifest::parse_config(&bytes, &manifest)?;
        let size = documents.values().map(|(bytes, _)| bytes.len() as u64).sum();
        let details = records::details(size, manifest, config);
        documents.insert(digest, (bytes, records::config_labels(self.snapshotter, &details.chain_id)));
        Ok(Planned { names, target, documents, details })
    }
}

fn describe(kind: MediaType, size: u64, digest: &str) -> Result<Descriptor, ImportError> {
    let digest: oci_spec::image::Digest =
        digest.parse().map_err(|_invalid| ManifestError::Digest(digest.to_owned()))?;
    Ok(Descriptor::new(kind, size, digest))
}

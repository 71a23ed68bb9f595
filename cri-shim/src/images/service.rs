//! The CRI ImageService: requests in, [`ImageStore`] calls, answers and gRPC codes out. It decides nothing itself.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cri_shim_api::v1;
use futures::Stream;
use tonic::{Code, Request, Response, Status};

use super::auth::Credentials;
use super::mount::MountError;
use super::pull::PullError;
use super::reference::Reference;
use super::registry::chain;
use super::session::CallError;
use super::store::{Image, ImageError, ImageStore};
use super::unpack::UnpackError;
use super::untar::ApplyError;
use super::usage::Meter;
use crate::error::short;
use crate::telemetry::rpc;

/// Images per message of a streamed listing.
const STREAM_BATCH: usize = 100;

/// Serves `runtime.v1.ImageService`.
pub struct Service {
    store: ImageStore,
    meter: Meter,
}

impl Service {
    /// Serves the images of `store`.
    pub fn new(store: ImageStore) -> Self {
        let meter = Meter::new(store.session().clone(), store.snapshotter());
        Self { store, meter }
    }

    async fn images(&self, filter: Option<v1::ImageFilter>) -> Result<Vec<v1::Image>, Status> {
        let wanted = filter.and_then(|filter| filter.image).map(|spec| spec.image).unwrap_or_default();
        if wanted.is_empty() {
            let images = self.store.list().await.map_err(|error| call_status(&error))?;
            return Ok(images.iter().map(|image| describe(image)).collect());
        }
        match self.store.resolve(&wanted).await {
            Ok(image) => Ok(vec![describe(&image)]),
            Err(ImageError::NotPresent(_)) => Ok(Vec::new()),
            Err(error) => Err(status(&error)),
        }
    }
}

#[tonic::async_trait]
impl v1::image_service_server::ImageService for Service {
    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let images = self.images(request.into_inner().filter).await?;
        Ok(Response::new(v1::ListImagesResponse { images }))
    }

    type StreamImagesStream = Pin<Box<dyn Stream<Item = Result<v1::StreamImagesResponse, Status>> + Send>>;

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.images(request.into_inner().filter).await?;
        let batches: Vec<_> = images
            .chunks(STREAM_BATCH)
            .map(|batch| Ok(v1::StreamImagesResponse { images: batch.to_vec() }))
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(batches))))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        note(request.get_ref().image.as_ref());
        let request = request.into_inner();
        let image = match self.store.resolve(&named(request.image)?).await {
            Ok(image) => Some(image),
            Err(ImageError::NotPresent(_)) => None,
            Err(error) => return Err(status(&error)),
        };
        let info = match &image {
            Some(image) if request.verbose => verbose(image)?,
            _ => BTreeMap::new(),
        };
        Ok(Response::new(v1::ImageStatusResponse { image: image.as_deref().map(describe), info }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        note(request.get_ref().image.as_ref());
        let request = request.into_inner();
        let image = named(request.image)?;
        let reference =
            Reference::parse(&image).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let credentials = match request.auth {
            Some(auth) => credentials(auth, reference.registry())?,
            None => None,
        };
        let image = self.store.pull(&image, credentials).await.map_err(|error| status(&error))?;
        Ok(Response::new(v1::PullImageResponse { image_ref: image.id.clone() }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        note(request.get_ref().image.as_ref());
        let image = named(request.into_inner().image)?;
        self.store.remove(&image).await.map_err(|error| status(&error))?;
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _request: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        let usage = self.meter.usage().await.map_err(|error| call_status(&error))?;
        let now = jiff::Timestamp::now().as_nanosecond();
        let filesystem = v1::FilesystemUsage {
            timestamp: i64::try_from(now).unwrap_or(i64::MAX),
            fs_id: Some(v1::FilesystemIdentifier { mountpoint: usage.mountpoint }),
            used_bytes: Some(v1::UInt64Value { value: usage.bytes }),
            inodes_used: Some(v1::UInt64Value { value: usage.inodes }),
        };
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: vec![filesystem.clone()],
            container_filesystems: vec![filesystem],
        }))
    }
}

/// An image error as the CRI's callers see it: the whole chain in the message.
pub fn status(error: &ImageError) -> Status {
    let code = match error {
        ImageError::Reference(_) | ImageError::Ambiguous(_) => Code::InvalidArgument,
        ImageError::NotPresent(_) => Code::NotFound,
        ImageError::Pull { source, .. } | ImageError::Unpack { source, .. } => pull_code(source),
        ImageError::Mount { source, .. } | ImageError::Unmount { source, .. } => mount_code(source),
        ImageError::Containerd(source) => source.code(),
        ImageError::Lost(_) => Code::Internal,
    };
    Status::new(code, short(&chain(error)))
}

fn pull_code(error: &PullError) -> Code {
    match error {
        PullError::Resolve { source, .. } | PullError::Fetch { source, .. } => match source {
            source if source.is_not_found() => Code::NotFound,
            source if source.is_denied() => Code::PermissionDenied,
            source if source.is_other_content() => Code::DataLoss,
            source if source.is_too_long() => Code::ResourceExhausted,
            source if source.is_misconfigured() => Code::FailedPrecondition,
            // Not `Unavailable`: to a gRPC client that would mean that this server is away.
            _ => Code::Unknown,
        },
        PullError::Hosts(_) | PullError::Manifest(_) => Code::FailedPrecondition,
        PullError::Unpack(source) => unpack_code(source),
        PullError::TooLarge { .. } => Code::ResourceExhausted,
        PullError::Stalled(_) => Code::DeadlineExceeded,
        PullError::Containerd(source) => source.code(),
        PullError::Lost(_) => Code::Internal,
    }
}

fn unpack_code(error: &UnpackError) -> Code {
    match error {
        UnpackError::Containerd(source) => source.code(),
        UnpackError::DiffId { .. } => Code::DataLoss,
        UnpackError::Apply { source, .. } => apply_code(source),
        UnpackError::Merge { source, .. } => host_code(source),
        UnpackError::Lost(_) => Code::Internal,
    }
}

fn apply_code(error: &ApplyError) -> Code {
    match error {
        ApplyError::Limit(_) => Code::ResourceExhausted,
        ApplyError::Read(_) => Code::DataLoss,
        ApplyError::Entry { .. } | ApplyError::Unsupported(_) => Code::FailedPrecondition,
        ApplyError::Make { source, .. } | ApplyError::Directory { source, .. } => host_code(source),
    }
}

fn host_code(error: &std::io::Error) -> Code {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
        // What an entry leads to is missing, no directory, or turns in a circle: the layer's fault.
        std::io::ErrorKind::NotFound
        | std::io::ErrorKind::NotADirectory
        | std::io::ErrorKind::InvalidInput
        | std::io::ErrorKind::InvalidFilename => Code::FailedPrecondition,
        _ if error.raw_os_error() == Some(libc::ELOOP) => Code::FailedPrecondition,
        _ => Code::Internal,
    }
}

fn mount_code(error: &MountError) -> Code {
    match error {
        MountError::Containerd(source) => source.code(),
        MountError::Host { source, .. } if source.kind() == std::io::ErrorKind::Unsupported => {
            Code::FailedPrecondition
        }
        MountError::Host { .. } | MountError::Table(_) | MountError::Lost(_) => Code::Internal,
    }
}

fn call_status(error: &CallError) -> Status {
    Status::new(error.code(), short(&chain(error)))
}

/// Says in the request's span which image it is about.
fn note(spec: Option<&v1::ImageSpec>) {
    rpc::image(spec.map(|spec| spec.image.as_str()).unwrap_or_default());
}

fn named(spec: Option<v1::ImageSpec>) -> Result<String, Status> {
    let image = spec.map(|spec| spec.image).unwrap_or_default();
    if image.is_empty() { Err(Status::invalid_argument("the request names no image")) } else { Ok(image) }
}

/// Credentials count only for the server they were given for.
fn credentials(auth: v1::AuthConfig, registry: &str) -> Result<Option<Credentials>, Status> {
    let server = auth.server_address.split("://").last().unwrap_or_default();
    let server = server.split('/').next().unwrap_or_default();
    let alias = matches!((server, registry), ("index.docker.io" | "registry-1.docker.io", "docker.io"));
    if !server.is_empty() && server != registry && !alias {
        return Ok(None);
    }
    let (username, password) = if auth.username.is_empty() && !auth.auth.is_empty() {
        let unusable = || Status::invalid_argument("auth is not base64 of user:password");
        let pair = STANDARD.decode(auth.auth.trim_end_matches('\0')).map_err(|_invalid| unusable())?;
        let pair = String::from_utf8(pair).map_err(|_invalid| unusable())?;
        let (username, password) = pair.split_once(':').ok_or_else(unusable)?;
        (username.to_owned(), password.trim_end_matches('\0').to_owned())
    } else {
        (auth.username, auth.password)
    };
    let credentials = Credentials {
        username,
        password,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    };
    Ok((credentials != Credentials::default()).then_some(credentials))
}

fn describe(image: &Image) -> v1::Image {
    let user = image.config().config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    let uid = user.parse().ok().map(|value| v1::Int64Value { value });
    let username = if uid.is_some() { String::new() } else { user.to_owned() };
    v1::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size(),
        uid,
        username,
        spec: Some(v1::ImageSpec { image: image.id.clone(), ..v1::ImageSpec::default() }),
        pinned: image.pinned,
    }
}

fn verbose(image: &Arc<Image>) -> Result<BTreeMap<String, String>, Status> {
    let info = serde_json::json!({"chainID": image.chain_id(), "imageSpec": image.config()});
    let text = serde_json::to_string(&info).map_err(|error| Status::internal(error.to_string()))?;
    Ok(BTreeMap::from([("info".to_owned(), text)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_go_only_to_their_server() {
        let auth = |server: &str| v1::AuthConfig {
            auth: STANDARD.encode("u:p:w"),
            server_address: server.to_owned(),
            ..v1::AuthConfig::default()
        };
        let found =
            credentials(auth("https://index.docker.io/v1/"), "docker.io").expect("valid").expect("used");
        assert_eq!((found.username.as_str(), found.password.as_str()), ("u", "p:w"));
        assert_eq!(credentials(auth("quay.io"), "docker.io").expect("valid"), None);
        assert!(credentials(auth(""), "docker.io").expect("valid").is_some());
        let broken = v1::AuthConfig { auth: "!".to_owned(), ..v1::AuthConfig::default() };
        assert!(credentials(broken, "docker.io").is_err());
    }

    #[test]
    fn a_missing_image_is_told_with_name_and_hosts() {
        use super::super::registry::{FetchError, HostError};
        let reference = "docker.io/library/nope:1".to_owned();
        let source = FetchError::of("http://127.0.0.1:5000", HostError::NotFound);
        let source = PullError::Resolve { reference: reference.clone(), source };
        let status = status(&ImageError::Pull { reference, source });
        assert_eq!(status.code(), Code::NotFound);
        assert_eq!(
            status.message(),
            "failed to pull and unpack image \"docker.io/library/nope:1\": failed to resolve reference \
             \"docker.io/library/nope:1\": not found (asked http://127.0.0.1:5000)"
        );
    }
}

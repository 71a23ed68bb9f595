//! Gathers the files of configMap, secret, downwardAPI and projected volumes.
//!
//! Input: the volume, its pod, and sources for objects and tokens. Output: [`Content`]; writing it is [`super::atomic`]'s.

use agent_core::env::fields::{field_value, resource_value};
use agent_core::resources::ResourceList;
use k8s_openapi::api::core::v1::{
    DownwardAPIVolumeFile, KeyToPath, Pod, PodSpec, ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::select::{self, File, Files, Selection, mode};
use super::tokens::{TokenKey, Tokens};
use crate::contracts::{ObjectSource, VolumeContext};

/// Mode of files where nothing is said.
const DEFAULT_MODE: u32 = 0o644;
/// Lifetime of tokens where nothing is said, in seconds.
const DEFAULT_TOKEN_SECONDS: i64 = 3600;

/// What a volume holds.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// Its files.
    pub(super) files: Files,
    /// When a token in it wants refreshing.
    pub(super) refresh_at: Option<jiff::Timestamp>,
}

/// Where content comes from.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    /// The pod.
    pub(super) pod: &'a Pod,
    /// Its spec.
    pub(super) spec: &'a PodSpec,
    /// Facts about the node.
    pub(super) context: &'a VolumeContext,
    /// ConfigMaps and Secrets.
    pub(super) objects: &'a dyn ObjectSource,
    /// Service account tokens.
    pub(super) tokens: &'a Tokens,
}

impl Inputs<'_> {
    fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or_default()
    }
}

/// Plugin name in the volume's path, and whether the content must not reach a disk. `None`: not of this module.
pub(super) fn plugin(volume: &Volume) -> Option<(&'static str, bool)> {
    if volume.config_map.is_some() {
        Some(("configmap", false))
    } else if volume.secret.is_some() {
        Some(("secret", true))
    } else if volume.downward_api.is_some() {
        Some(("downward-api", true))
    } else {
        volume.projected.is_some().then_some(("projected", true))
    }
}

/// The content of a volume for which [`plugin`] has an answer.
pub(super) async fn of(volume: &Volume, inputs: &Inputs<'_>) -> Result<Content, String> {
    let mut content = Content::default();
    if let Some(source) = &volume.config_map {
        let default_mode = mode(source.default_mode, DEFAULT_MODE);
        let selection = selection(source.items.as_deref(), default_mode, source.optional);
        content.files = config_map(inputs, &source.name, selection).await?;
    }
    if let Some(source) = &volume.secret {
        let default_mode = mode(source.default_mode, DEFAULT_MODE);
        let selection = selection(source.items.as_deref(), default_mode, source.optional);
        content.files = secret(inputs, source.secret_name.as_deref().unwrap_or_default(), selection).await?;
    }
    if let Some(source) = &volume.downward_api {
        let default_mode = mode(source.default_mode, DEFAULT_MODE);
        content.files = downward(inputs, source.items.as_deref().unwrap_or_default(), default_mode)?;
    }
    if let Some(source) = &volume.projected {
        let default_mode = mode(source.default_mode, DEFAULT_MODE);
        for projection in source.sources.iter().flatten() {
            project(projection, inputs, default_mode, &mut content).await?;
        }
    }
    Ok(content)
}

async fn project(
    projection: &VolumeProjection,
    inputs: &Inputs<'_>,
    default_mode: u32,
    content: &mut Content,
) -> Result<(), String> {
    if let Some(source) = &projection.config_map {
        let selection = selection(source.items.as_deref(), default_mode, source.optional);
        content.files.extend(config_map(inputs, &source.name, selection).await?);
    }
    if let Some(source) = &projection.secret {
        let selection = selection(source.items.as_deref(), default_mode, source.optional);
        content.files.extend(secret(inputs, &source.name, selection).await?);
    }
    if let Some(source) = &projection.downward_api {
        let items = source.items.as_deref().unwrap_or_default();
        content.files.extend(downward(inputs, items, default_mode)?);
    }
    if let Some(source) = &projection.service_account_token {
        let (file, refresh_at) = token(inputs, source, default_mode).await?;
        content.refresh_at = Some(content.refresh_at.map_or(refresh_at, |earlier| earlier.min(refresh_at)));
        content.files.insert(source.path.clone(), file);
    }
    if projection.cluster_trust_bundle.is_some() {
        return Err("projected source clusterTrustBundle is not supported".to_owned());
    }
    if projection.pod_certificate.is_some() {
        return Err("projected source podCertificate is not supported".to_owned());
    }
    Ok(())
}

async fn config_map(inputs: &Inputs<'_>, name: &str, selection: Selection<'_>) -> Result<Files, String> {
    let object =
        inputs.objects.config_map(inputs.namespace(), name).await.map_err(|error| error.to_string())?;
    match object {
        Some(object) => select::config_map(&object, selection),
        None if selection.optional => Ok(Files::new()),
        None => Err(format!("configmap {name:?} not found")),
    }
}

async fn secret(inputs: &Inputs<'_>, name: &str, selection: Selection<'_>) -> Result<Files, String> {
    let object = inputs.objects.secret(inputs.namespace(), name).await.map_err(|error| error.to_string())?;
    match object {
        Some(object) => select::secret(&object, selection),
        None if selection.optional => Ok(Files::new()),
        None => Err(format!("secret {name:?} not found")),
    }
}

fn downward(
    inputs: &Inputs<'_>,
    items: &[DownwardAPIVolumeFile],
    default_mode: u32,
) -> Result<Files, String> {
    let allocatable: ResourceList = inputs
        .context
        .allocatable
        .iter()
        .map(|(name, amount)| (name.clone(), Quantity(amount.clone())))
        .collect();
    let mut files = Files::new();
    for item in items {
        let value = match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), _) => field_value(inputs.pod, &field.field_path, None),
            (None, Some(resource)) => resource_value(inputs.pod, None, resource, &allocatable),
            (None, None) => Ok(String::new()),
        };
        let data = value.map_err(|error| error.to_string())?.into_bytes();
        files.insert(item.path.clone(), File { data, mode: mode(item.mode, default_mode), owner: None });
    }
    Ok(files)
}

/// A token's file is private to the pod's user where one can be told, as anybody who reads it can act as the pod.
async fn token(
    inputs: &Inputs<'_>,
    source: &ServiceAccountTokenProjection,
    default_mode: u32,
) -> Result<(File, jiff::Timestamp), String> {
    let account = inputs.spec.service_account_name.as_deref().filter(|name| !name.is_empty());
    let key = TokenKey {
        pod_uid: inputs.pod.metadata.uid.clone().unwrap_or_default(),
        pod_name: inputs.pod.metadata.name.clone().unwrap_or_default(),
        namespace: inputs.namespace().to_owned(),
        service_account: account.unwrap_or("default").to_owned(),
        audience: source.audience.clone().filter(|audience| !audience.is_empty()),
        expiration_seconds: source.expiration_seconds.unwrap_or(DEFAULT_TOKEN_SECONDS),
    };
    let token = inputs.tokens.get(&key).await?;
    let owner = common_user(inputs.spec);
    let has_group = inputs.spec.security_context.as_ref().is_some_and(|context| context.fs_group.is_some());
    let mode = if owner.is_some() || has_group { 0o600 } else { default_mode };
    Ok((File { data: token.text.into_bytes(), mode, owner }, token.refresh_at))
}

/// The user all containers run as, when it is one.
fn common_user(spec: &PodSpec) -> Option<u32> {
    let pod_user = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let mut users = spec.containers.iter().chain(spec.init_containers.iter().flatten()).map(|container| {
        container.security_context.as_ref().and_then(|context| context.run_as_user).or(pod_user)
    });
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok())?
}

fn selection(items: Option<&[KeyToPath]>, default_mode: u32, optional: Option<bool>) -> Selection<'_> {
    Selection { items: items.unwrap_or_default(), default_mode, optional: optional.unwrap_or(false) }
}

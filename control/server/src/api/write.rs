//! `create`, `update` and `patch`: decode → default → admit → validate → one guarded store transaction.
//!
//! An update is a function from the stored object to the new one. It commits only if the object is still the one it was computed from; where
//! the client named no resourceVersion, it is computed again, a bounded number of times.

use std::sync::Arc;

use bytes::Bytes;
use control_api::{
    apply::{self, Author},
    convert, decode, defaults,
    kinds::ResourceInfo,
    meta::{self, NewIdentity, UpdateTarget},
    schema,
    status::ApiError,
    validate,
};
use control_store::{Revision, StoreError, Txn};
use serde_json::Value;

use super::{
    Api,
    options::{FieldValidation, Freshness, WriteOptions},
    read::store_error,
};
use crate::{
    admission::{self, Admitted},
    auth::User,
    cache::Object,
    codec,
    http::negotiate::BodyFormat,
    protobuf,
};

/// How often a generated name is drawn again when it is taken.
const NAME_TRIES: usize = 8;
/// How often an update without a resourceVersion is computed again after a lost race.
const UPDATE_TRIES: usize = 10;

/// Who writes, how, and what they should be warned of.
pub(crate) struct Write<'a> {
    /// The user.
    pub user: &'a User,
    /// Parameters.
    pub options: WriteOptions,
    /// The subresource written to, or empty.
    pub subresource: String,
    /// The change itself keeps the record of field owners: server-side apply.
    pub keeps_owners: bool,
    /// Collected for `Warning` headers.
    pub warnings: Vec<String>,
}

impl<'a> Write<'a> {
    /// A write by a user.
    pub(crate) fn new(user: &'a User, options: WriteOptions) -> Self {
        Self { user, options, subresource: String::new(), keeps_owners: false, warnings: Vec::new() }
    }
}

/// An object named by a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ObjectRef<'a> {
    /// Its resource, as in the URL.
    pub info: &'static ResourceInfo,
    /// Its namespace.
    pub namespace: Option<&'a str>,
    /// Its name.
    pub name: &'a str,
}

/// Which part of an object an update may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// What a client may: see [`UpdateTarget`].
    Client(UpdateTarget),
    /// Anything: a change that the server itself makes, taken as it is.
    Whole,
}

impl Part {
    /// The object itself.
    pub(crate) const MAIN: Self = Self::Client(UpdateTarget::Main);
    /// Its status.
    pub(crate) const STATUS: Self = Self::Client(UpdateTarget::Status);
    /// Its desired state, through another subresource.
    pub(crate) const SPEC: Self = Self::Client(UpdateTarget::Spec);
    /// A pod's ephemeral containers.
    pub(crate) const EPHEMERAL_CONTAINERS: Self = Self::Client(UpdateTarget::EphemeralContainers);
    /// Whether a certificate request is approved.
    pub(crate) const APPROVAL: Self = Self::Client(UpdateTarget::Approval);
    /// The resources of a pod's containers.
    pub(crate) const RESIZE: Self = Self::Client(UpdateTarget::Resize);
}

/// What an update made of an object.
#[derive(Debug)]
pub(crate) enum Updated {
    /// It is stored (or would be, in a dry run).
    Stored(Arc<Object>),
    /// It did not exist and was created (server-side apply).
    Created(Arc<Object>),
    /// It only waited for its last finalizer and is gone; this was its last state.
    Removed(Arc<Object>),
}

impl Updated {
    /// The object in either case.
    pub(crate) fn object(self) -> Arc<Object> {
        match self {
            Self::Stored(object) | Self::Created(object) | Self::Removed(object) => object,
        }
    }
}

/// Decode a body and check it against the schema of its kind, in its stored version.
pub(crate) fn decode_object(
    info: &ResourceInfo,
    body: &[u8],
    format: BodyFormat,
    write: &mut Write<'_>,
) -> Result<Value, ApiError> {
    let (value, duplicates) = decode_any(body, format)?;
    let value = check_fields(info, value, &duplicates, write)?;
    Ok(convert::to_stored(info, value))
}

/// Decode a body without looking at its fields.
pub(crate) fn decode_any(body: &[u8], format: BodyFormat) -> Result<(Value, Vec<String>), ApiError> {
    match format {
        BodyFormat::Json => {
            let decoded = decode::json(body)?;
            Ok((decoded.value, decoded.duplicates))
        }
        BodyFormat::Yaml => {
            let value = serde_norway::from_slice(body)
                .map_err(|error| ApiError::bad_request(format!("error converting YAML to JSON: {error}")))?;
            Ok((value, Vec::new()))
        }
        BodyFormat::Protobuf => {
            let value = protobuf::decode(body).map_err(|error| ApiError::bad_request(error.to_string()))?;
            Ok((value, Vec::new()))
        }
    }
}

/// Refuse wrong types, and refuse or drop unknown fields as asked.
pub(crate) fn check_fields(
    info: &ResourceInfo,
    mut value: Value,
    duplicates: &[String],
    write: &mut Write<'_>,
) -> Result<Value, ApiError> {
    let report = schema::check(info, &value);
    if let Some(error) = report.decode_error(info) {
        return Err(error);
    }
    match write.options.validation {
        FieldValidation::Strict => {
            if let Some(error) = report.strict_error(info, duplicates) {
                return Err(error);
            }
        }
        FieldValidation::Warn => write.warnings.extend(report.warnings(duplicates)),
        FieldValidation::Ignore => {}
    }
    schema::prune(info, &mut value);
    Ok(value)
}

impl Api {
    /// Create an object from its stored form.
    pub(crate) async fn create(
        &self,
        info: &'static ResourceInfo,
        namespace: Option<&str>,
        object: Value,
        write: &mut Write<'_>,
    ) -> Result<Arc<Object>, ApiError> {
        let stored = self.stored_info(info)?;
        let generated = meta::name(&object).is_empty();
        if info.namespaced {
            admission::namespace::check(self, info, namespace.unwrap_or_default(), meta::name(&object))
                .await?;
        }
        let mut tries = if generated { NAME_TRIES } else { 1 };
        loop {
            tries -= 1;
            match self.try_create(stored, namespace, object.clone(), write).await {
                Err(error) if tries > 0 && error.reason == control_api::status::Reason::AlreadyExists => {}
                other => return other,
            }
        }
    }

    async fn try_create(
        &self,
        info: &'static ResourceInfo,
        namespace: Option<&str>,
        mut object: Value,
        write: &mut Write<'_>,
    ) -> Result<Arc<Object>, ApiError> {
        let (uid, suffix, now) = (self.random.uuid(), self.random.name_suffix(), now());
        let identity = NewIdentity { uid: &uid, now: &now, name_suffix: &suffix };
        defaults::apply(info, &mut object);
        meta::prepare_create(info, &mut object, namespace, &identity)?;
        let mut admitted = admission::create(self, write.user, info, &mut object).await?;
        let errors = validate::create(info, &object);
        if !errors.is_empty() {
            return Err(ApiError::invalid(info, meta::name(&object), &errors));
        }
        let name = meta::name(&object).to_owned();
        if write.options.dry_run {
            if self.cached(info, namespace, &name).is_some() {
                return Err(ApiError::already_exists(info, &name));
            }
            return unstored(info, &object);
        }
        let value = codec::encode(&object).map_err(ApiError::internal)?;
        let key = info.object_key(namespace, &name);
        match self.store.txn(Txn::create(Bytes::from(key), value.clone())).await {
            Ok(revision) => {
                admitted.commit();
                written(info, namespace, &name, revision, &value)
            }
            Err(StoreError::Conflict { .. }) => Err(ApiError::already_exists(info, &name)),
            Err(error) => Err(store_error(&error)),
        }
    }

    /// Change an object: `change` makes the new form from the stored one.
    ///
    /// `change` may run several times, and so must depend on nothing but its argument.
    pub(crate) async fn update(
        &self,
        target: ObjectRef<'_>,
        part: Part,
        write: &mut Write<'_>,
        mut change: impl FnMut(&Value, &mut Write<'_>) -> Result<Value, ApiError> + Send,
    ) -> Result<Updated, ApiError> {
        let ObjectRef { info, namespace, name } = target;
        let stored = self.stored_info(info)?;
        for _attempt in 0..UPDATE_TRIES {
            let current = self.get_object(info, namespace, name, Freshness::Latest).await?;
            let old = current.value().map_err(ApiError::internal)?;
            let warned = write.warnings.len();
            let new = change(&old, write)?;
            meta::check_preconditions(stored, &new, &old)?;
            match self.try_update(stored, target, part, write, (new, &old, &current)).await? {
                Some(updated) => return Ok(updated),
                // Computed again: a version that the client named then fails the precondition, a patch has a new one.
                None => write.warnings.truncate(warned),
            }
        }
        Err(ApiError::stale(info, name))
    }

    /// One attempt; `None` when somebody else wrote in between.
    async fn try_update(
        &self,
        info: &'static ResourceInfo,
        target: ObjectRef<'_>,
        part: Part,
        write: &Write<'_>,
        (mut new, old, current): (Value, &Value, &Arc<Object>),
    ) -> Result<Option<Updated>, ApiError> {
        let ObjectRef { namespace, name, .. } = target;
        let mut admitted = match part {
            Part::Client(part) => admit_update(self, write, info, &mut new, old, part)?,
            Part::Whole => Admitted::default(),
        };
        let removes = meta::finished_deleting(info, &new);
        if !removes && meta::same_but_version(&new, old) {
            return Ok(Some(Updated::Stored(Arc::clone(current))));
        }
        if write.options.dry_run {
            let object = unstored(info, &new)?;
            return Ok(Some(if removes { Updated::Removed(object) } else { Updated::Stored(object) }));
        }
        let key = Bytes::from(info.object_key(namespace, name));
        let value = codec::encode(&new).map_err(ApiError::internal)?;
        let txn = if removes {
            Txn::delete(key, current.revision)
        } else {
            Txn::update(key, current.revision, value.clone())
        };
        match self.store.txn(txn).await {
            Ok(revision) => {
                admitted.commit();
                let object = written(info, namespace, name, revision, &value)?;
                if removes {
                    admission::removed(self, info, &new);
                    return Ok(Some(Updated::Removed(object)));
                }
                Ok(Some(Updated::Stored(object)))
            }
            Err(StoreError::Conflict { current: None, .. }) => Err(ApiError::not_found(info, name)),
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(store_error(&error)),
        }
    }

    /// The row in whose version objects of this resource are stored.
    pub(crate) fn stored_info(&self, info: &ResourceInfo) -> Result<&'static ResourceInfo, ApiError> {
        self.cache.resource(info).map(|cache| cache.info()).ok_or_else(ApiError::unknown_path)
    }
}

/// Default, complete, admit and validate the new form that a client asked for.
fn admit_update(
    api: &Api,
    write: &Write<'_>,
    info: &'static ResourceInfo,
    new: &mut Value,
    old: &Value,
    part: UpdateTarget,
) -> Result<Admitted, ApiError> {
    if part == UpdateTarget::Main {
        admission::carry_over(info, new, old);
    }
    defaults::apply(info, new);
    meta::prepare_update(info, part, new, old)?;
    if !write.keeps_owners {
        let author =
            Author { manager: &write.options.field_manager, subresource: &write.subresource, now: &now() };
        apply::track_update(info, old, new, &author);
    }
    let admitted = admission::update(api, write.user, info, new, old, part)?;
    let errors = match part {
        UpdateTarget::Status | UpdateTarget::Approval => validate::status_update(info, new, old),
        UpdateTarget::Main | UpdateTarget::Spec => validate::update(info, new, old),
        UpdateTarget::EphemeralContainers => validate::ephemeral_containers_update(new, old),
        UpdateTarget::Resize => validate::resize(new, old),
    };
    if errors.is_empty() { Ok(admitted) } else { Err(ApiError::invalid(info, meta::name(old), &errors)) }
}

/// Now, as Kubernetes writes times.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The object that a transaction stored.
pub(crate) fn written(
    info: &ResourceInfo,
    namespace: Option<&str>,
    name: &str,
    revision: Revision,
    value: &Bytes,
) -> Result<Arc<Object>, ApiError> {
    let body = codec::splice(value, revision)
        .ok_or_else(|| ApiError::internal("the object was stored in a form that does not decode"))?;
    let key = match namespace.filter(|_| info.namespaced) {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name.to_owned(),
    };
    Object::new(info, &key, revision, body).map(Arc::new).map_err(ApiError::internal)
}

/// The answer of a dry run: the object as it would be.
fn unstored(info: &ResourceInfo, object: &Value) -> Result<Arc<Object>, ApiError> {
    let namespace = Some(meta::namespace(object)).filter(|namespace| !namespace.is_empty());
    let key = namespace.map_or(String::new(), |namespace| format!("{namespace}/")) + meta::name(object);
    Object::new(info, &key, Revision(0), Bytes::from(object.to_string()))
        .map(Arc::new)
        .map_err(ApiError::internal)
}

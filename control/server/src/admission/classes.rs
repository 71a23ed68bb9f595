//! The classes that new objects name or are given: of priority, of the runtime, of storage.

use control_api::{
    kinds::{self, ResourceInfo},
    meta,
    status::ApiError,
};
use serde_json::Value;

use crate::api::{Api, options::Freshness};

/// The PriorityClass that a pod names; the default one where it names none. `None` where there is no such class.
pub(super) async fn priority_class(api: &Api, pod: &Value) -> Result<Option<Value>, ApiError> {
    let classes = find("scheduling.k8s.io", "priorityclasses")?;
    match text(pod, "/spec/priorityClassName") {
        "" => Ok(all(api, classes)?.into_iter().find(|class| class["globalDefault"] == true)),
        name => named(api, classes, name).await,
    }
}

/// The RuntimeClass that a pod names; `None` where it names none, or there is no such class.
pub(super) async fn runtime_class(api: &Api, pod: &Value) -> Result<Option<Value>, ApiError> {
    match text(pod, "/spec/runtimeClassName") {
        "" => Ok(None),
        name => named(api, find("node.k8s.io", "runtimeclasses")?, name).await,
    }
}

/// Refuses a second PriorityClass for pods that name none.
pub(super) fn one_default(api: &Api, info: &'static ResourceInfo, class: &Value) -> Result<(), ApiError> {
    if class["globalDefault"] != true {
        return Ok(());
    }
    let name = meta::name(class);
    let other =
        all(api, info)?.into_iter().find(|other| other["globalDefault"] == true && meta::name(other) != name);
    match other {
        None => Ok(()),
        Some(other) => {
            let why = format!(
                "PriorityClass {} is already marked as default. Only one default can exist",
                meta::name(&other)
            );
            Err(ApiError::forbidden(info, name, &why))
        }
    }
}

/// Gives a claim that says nothing of its class the default one: the newest, as upstream.
pub(super) fn default_storage_class(api: &Api, claim: &mut Value) -> Result<(), ApiError> {
    const DEFAULT: &str = "/metadata/annotations/storageclass.kubernetes.io~1is-default-class";
    const OLD: &str = "/metadata/annotations/volume.beta.kubernetes.io~1storage-class";
    let says = claim.pointer("/spec/storageClassName").is_some() || claim.pointer(OLD).is_some();
    if says || !claim["spec"].is_object() {
        return Ok(());
    }
    let classes = all(api, find("storage.k8s.io", "storageclasses")?)?;
    let defaults = classes.iter().filter(|class| text(class, DEFAULT) == "true");
    // By age, then by name, so that two of one second do not take turns.
    let newest = defaults.max_by_key(|class| {
        (
            text(class, "/metadata/creationTimestamp").to_owned(),
            std::cmp::Reverse(meta::name(class).to_owned()),
        )
    });
    if let Some(class) = newest {
        claim["spec"]["storageClassName"] = meta::name(class).into();
    }
    Ok(())
}

fn find(group: &str, plural: &str) -> Result<&'static ResourceInfo, ApiError> {
    kinds::find(group, "v1", plural).ok_or_else(ApiError::unknown_path)
}

/// An object that may have been created a moment ago.
async fn named(api: &Api, info: &'static ResourceInfo, name: &str) -> Result<Option<Value>, ApiError> {
    let mut found = api.cached(info, None, name);
    if found.is_none() {
        api.wait(Freshness::Latest).await?;
        found = api.cached(info, None, name);
    }
    found.map(|found| found.value()).transpose().map_err(ApiError::internal)
}

fn all(api: &Api, info: &'static ResourceInfo) -> Result<Vec<Value>, ApiError> {
    let cache = api.cache.resource(info).ok_or_else(ApiError::unknown_path)?;
    let objects = cache.snapshot(None, |_| true).objects;
    objects.iter().map(|object| object.value().map_err(ApiError::internal)).collect()
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

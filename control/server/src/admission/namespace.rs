//! NamespaceLifecycle: nothing is created in a namespace that does not exist or is being deleted.

use control_api::{
    admit,
    kinds::{self, ResourceInfo},
    meta,
    status::ApiError,
};
use serde_json::Value;

use crate::api::{Api, options::Freshness};

/// Namespaces without which a cluster does not work (upstream's immortal namespaces).
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

/// Refuse to delete a namespace that the cluster needs.
pub(crate) fn deletable(info: &ResourceInfo, object: &Value) -> Result<(), ApiError> {
    let name = meta::name(object);
    if (info.group, info.kind) == ("", "Namespace") && IMMORTAL.contains(&name) {
        return Err(ApiError::forbidden(info, name, "this namespace may not be deleted"));
    }
    Ok(())
}

/// Refuse unless the namespace exists and stays.
pub(crate) async fn check(
    api: &Api,
    info: &ResourceInfo,
    namespace: &str,
    name: &str,
) -> Result<(), ApiError> {
    let namespaces = kinds::find("", "v1", "namespaces").ok_or_else(ApiError::unknown_path)?;
    let found = match api.cached(namespaces, None, namespace) {
        Some(found) => found,
        // It may have been created a moment ago.
        None => api.get_object(namespaces, None, namespace, Freshness::Latest).await?,
    };
    admit::namespace_open(info, &found.value().map_err(ApiError::internal)?, name)
}

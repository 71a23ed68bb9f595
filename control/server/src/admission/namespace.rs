//! NamespaceLifecycle: nothing is created in a namespace that does not exist or is being deleted.

use control_api::{
    kinds::{self, ResourceInfo},
    status::{ApiError, Cause},
};

use crate::api::{Api, options::Freshness};

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
    let found = found.value().map_err(ApiError::internal)?;
    if found.pointer("/status/phase").is_none_or(|phase| phase != "Terminating") {
        return Ok(());
    }
    let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
    let mut error = ApiError::forbidden(info, name, &why);
    error.causes.push(Cause {
        reason: "NamespaceTerminating".to_owned(),
        message: format!("namespace {namespace} is being terminated"),
        field: "metadata.namespace".to_owned(),
    });
    Err(error)
}

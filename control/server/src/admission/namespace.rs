//! NamespaceLifecycle: nothing is created in a namespace that does not exist or is being deleted.

use control_api::{
    admit,
    kinds::{self, ResourceInfo},
    status::ApiError,
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
    admit::namespace_open(info, &found.value().map_err(ApiError::internal)?, name)
}

//! ServiceAccount, PriorityClass and RuntimeClass admission and default tolerations of new pods. What is added is decided by `control_api::admit`; here its input is found.

use std::time::Duration;

use control_api::{
    admit::{self, Found},
    kinds, meta,
    status::ApiError,
};
use serde_json::Value;

use crate::{
    api::{Api, options::Freshness},
    cache::Object,
};

/// How long a pod's creation waits for its service account, which a controller makes right after the namespace.
const ACCOUNT_DEADLINE: Duration = Duration::from_secs(5);

pub(super) async fn create(api: &Api, pod: &mut Value) -> Result<(), ApiError> {
    let account = service_account(api, pod).await?;
    let account = account.map(|account| account.value()).transpose().map_err(ApiError::internal)?;
    let priority_class = super::classes::priority_class(api, pod).await?;
    let runtime_class = super::classes::runtime_class(api, pod).await?;
    let found = Found {
        service_account: account.as_ref(),
        priority_class: priority_class.as_ref(),
        runtime_class: runtime_class.as_ref(),
    };
    admit::pod(pod, found, &api.random.name_suffix())
}

async fn service_account(api: &Api, pod: &Value) -> Result<Option<std::sync::Arc<Object>>, ApiError> {
    let mirror = "/metadata/annotations/kubernetes.io~1config.mirror";
    if pod.pointer(mirror).is_some() {
        return Ok(None);
    }
    let accounts = kinds::find("", "v1", "serviceaccounts").ok_or_else(ApiError::unknown_path)?;
    let name = admit::service_account_name(pod);
    let namespace = meta::namespace(pod);
    if let Some(found) = api.cached(accounts, Some(namespace), name) {
        return Ok(Some(found));
    }
    let cache = api.cache.resource(accounts).ok_or_else(ApiError::unknown_path)?;
    let mut changed = cache.subscribe();
    api.wait(Freshness::Latest).await?;
    let appears = async {
        loop {
            changed.borrow_and_update();
            if let Some(found) = api.cached(accounts, Some(namespace), name) {
                return Some(found);
            }
            changed.changed().await.ok()?;
        }
    };
    if let Ok(Some(found)) = tokio::time::timeout(ACCOUNT_DEADLINE, appears).await {
        return Ok(Some(found));
    }
    let pods = kinds::find("", "v1", "pods").ok_or_else(ApiError::unknown_path)?;
    let why =
        format!("error looking up service account {namespace}/{name}: serviceaccount \"{name}\" not found");
    Err(ApiError::forbidden(pods, meta::name(pod), &why))
}

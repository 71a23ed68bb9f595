//! emptyDir volumes: a directory on disk, a tmpfs or one of huge pages, writable by everybody in the pod.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use agent_core::huge_pages::page_of_medium;
use agent_core::resources::{pod_limit, whole};
use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::ownership::Ownership;
use super::{make_dir, tmpfs};
use crate::contracts::VolumeContext;

/// What to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EmptyDir {
    medium: String,
    /// Bytes of a page, of a volume of huge pages; or why there can be none.
    page: Result<Option<u64>, String>,
    /// Bound of a tmpfs.
    size: Option<u64>,
}

impl EmptyDir {
    /// A tmpfs is as large as the smallest of `sizeLimit`, the pod's memory limit and the node's memory.
    pub(super) fn new(source: &EmptyDirVolumeSource, spec: &PodSpec, context: &VolumeContext) -> Self {
        let bytes = |quantity: &Quantity| whole(quantity).filter(|bytes| *bytes > 0);
        let allocatable = context.allocatable.get("memory").and_then(|text| bytes(&Quantity(text.clone())));
        let limits = [source.size_limit.as_ref().and_then(bytes), pod_limit(spec, "memory"), allocatable];
        let size = limits.into_iter().flatten().filter(|bytes| *bytes > 0).min();
        Self {
            page: page_of_medium(source.medium.as_deref().unwrap_or_default(), spec),
            medium: source.medium.clone().unwrap_or_default(),
            size: size.and_then(|bytes| u64::try_from(bytes).ok()),
        }
    }
}

/// Makes the directory, or leaves what is there: it lives as long as the pod.
pub(super) fn set_up(dir: &Path, plan: &EmptyDir, ownership: Ownership) -> Result<(), String> {
    let page = plan.page.clone()?;
    let make = || {
        make_dir(dir, 0o777)?;
        if plan.medium == "Memory" {
            tmpfs::ensure(dir, plan.size)?;
        }
        if let Some(page) = page {
            tmpfs::ensure_of_huge_pages(dir, page)?;
        }
        // The process's umask was taken off the mode.
        let mode = std::fs::metadata(dir)?.permissions().mode();
        if mode & 0o777 != 0o777 {
            std::fs::set_permissions(dir, PermissionsExt::from_mode(mode & 0o7000 | 0o777))?;
        }
        ownership.claim(dir)
    };
    match plan.medium.as_str() {
        "" | "Memory" => make().map_err(|error: std::io::Error| error.to_string()),
        _ if page.is_some() => make().map_err(|error| error.to_string()),
        other => Err(format!("unknown storage medium {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn size(source: serde_json::Value, spec: serde_json::Value, allocatable: &str) -> Option<u64> {
        let context = VolumeContext {
            allocatable: [("memory".to_owned(), allocatable.to_owned())].into(),
            ..VolumeContext::default()
        };
        let source = serde_json::from_value(source).unwrap();
        EmptyDir::new(&source, &serde_json::from_value(spec).unwrap(), &context).size
    }

    #[test]
    fn tmpfs_is_bounded_by_the_smallest_limit() {
        let open = json!({"containers": [{"name": "a"}]});
        let limited = json!({"containers": [{"name": "a", "resources": {"limits": {"memory": "64Mi"}}}]});
        assert_eq!(size(json!({"medium": "Memory"}), open.clone(), "1Gi"), Some(1 << 30));
        assert_eq!(
            size(json!({"medium": "Memory", "sizeLimit": "1Mi"}), limited.clone(), "1Gi"),
            Some(1 << 20)
        );
        assert_eq!(size(json!({"medium": "Memory", "sizeLimit": "1Gi"}), limited, "2Gi"), Some(64 << 20));
        assert_eq!(size(json!({"medium": "Memory", "sizeLimit": "0"}), open, "2Gi"), Some(2 << 30));
    }
}

//! What tests of volumes have in common: a kubelet root directory, what is mounted in it, and objects that volumes ask for.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use keelson_agent::contracts::{ObjectSource, SourceError};
use nix::mount::{MntFlags, umount2};
use serde_json::{Value, json};

/// A kubelet root directory whose mounts go with it, also when the test fails.
pub(crate) struct RootDir(tempfile::TempDir);

impl RootDir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap()
    }
}

impl Drop for RootDir {
    fn drop(&mut self) {
        for point in mounts_below(&self.path()).into_iter().rev() {
            // Without force, one whose server is gone would be waited for.
            let unmounted = umount2(&point, MntFlags::MNT_DETACH | MntFlags::MNT_FORCE);
            assert!(unmounted.is_ok() || std::thread::panicking(), "{}: {unmounted:?}", point.display());
        }
    }
}

/// Whether something is mounted at `path`.
pub(crate) fn is_mounted(path: &Path) -> bool {
    mounts_below(path).iter().any(|point| point == path)
}

/// Mount points at or below `directory`, in order.
pub(crate) fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(directory)).collect()
}

/// The pod that volumes are mounted for.
pub(crate) fn pod(uid: &str, spec: Value) -> Pod {
    let mut object = json!({
        "metadata": {"name": uid, "namespace": "ns", "uid": uid},
        "spec": {"containers": [{"name": "c"}]},
    });
    let Value::Object(spec) = spec else { panic!("a spec: {spec}") };
    for (field, value) in spec {
        object["spec"][field] = value;
    }
    serde_json::from_value(object).unwrap()
}

/// Any ConfigMap is missing; a Secret has one key, or is missing, too.
pub(crate) struct Objects {
    pub(crate) has_secrets: bool,
}

impl ObjectSource for Objects {
    fn config_map<'a>(
        &'a self,
        _namespace: &'a str,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<ConfigMap>>, SourceError>> {
        async { Ok(None) }.boxed()
    }

    fn secret<'a>(
        &'a self,
        _namespace: &'a str,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Secret>>, SourceError>> {
        let data = BTreeMap::from([("password".to_owned(), ByteString(b"s3cret".to_vec()))]);
        let secret = || Arc::new(Secret { data: Some(data), ..Secret::default() });
        let found = self.has_secrets.then(secret);
        async { Ok(found) }.boxed()
    }
}

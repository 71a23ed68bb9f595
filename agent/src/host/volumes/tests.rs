//! Set-up without mounts, from a fake object source; `tests/root_host.rs` has the mounts.

use std::collections::HashMap;
use std::fs;
use std::sync::Mutex;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use serde_json::json;

use super::*;
use crate::contracts::SourceError;

#[derive(Default)]
struct FakeObjects {
    config_maps: Mutex<HashMap<String, Arc<ConfigMap>>>,
}

impl ObjectSource for FakeObjects {
    fn config_map<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<ConfigMap>>, SourceError>> {
        let found = self.config_maps.lock().unwrap().get(&format!("{namespace}/{name}")).cloned();
        async move { Ok(found) }.boxed()
    }

    fn secret<'a>(
        &'a self,
        _namespace: &'a str,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Secret>>, SourceError>> {
        async { Ok(None) }.boxed()
    }
}

struct Bench {
    dir: tempfile::TempDir,
    objects: Arc<FakeObjects>,
    volumes: Volumes,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let objects = Arc::new(FakeObjects::default());
        let service = tower::service_fn(|_request: http::Request<kube::client::Body>| async {
            Err::<http::Response<kube::client::Body>, _>(io::Error::other("no API server in this test"))
        });
        let client = Client::new(service, "default");
        let source: Arc<dyn ObjectSource> = Arc::clone(&objects) as _;
        let volumes = Volumes::new(dir.path(), source, client);
        Self { dir, objects, volumes }
    }

    fn put(&self, name: &str, object: serde_json::Value) {
        let object = Arc::new(serde_json::from_value(object).unwrap());
        self.objects.config_maps.lock().unwrap().insert(format!("ns/{name}"), object);
    }

    async fn mount(&self, volumes: serde_json::Value) -> Result<MountedVolumes, String> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "ns", "uid": "u1"},
            "spec": {"containers": [{"name": "c"}], "volumes": volumes},
        }))
        .unwrap();
        self.volumes.mount_all(&pod, &VolumeContext::default()).await.map_err(|error| error.to_string())
    }
}

#[tokio::test]
async fn a_config_map_is_written_updated_and_torn_down() {
    let bench = Bench::new();
    let volume = json!([{"name": "cfg", "configMap": {"name": "cm"}}]);
    let error = bench.mount(volume.clone()).await.unwrap_err();
    assert_eq!(error, "MountVolume.SetUp failed for volume \"cfg\" : configmap \"cm\" not found");
    bench.put("cm", json!({"data": {"key": "old"}}));
    let mounted = bench.mount(volume.clone()).await.unwrap();
    let dir = &mounted.volumes["cfg"];
    assert!(dir.read_only);
    assert_eq!(dir.path, bench.dir.path().join("pods/u1/volumes/kubernetes.io~configmap/cfg"));
    assert_eq!(fs::read_to_string(dir.path.join("key")).unwrap(), "old");
    bench.put("cm", json!({"data": {"key": "new"}}));
    bench.mount(volume).await.unwrap();
    assert_eq!(fs::read_to_string(dir.path.join("key")).unwrap(), "new");
    assert_eq!(bench.volumes.on_disk().await.unwrap(), ["u1"]);
    bench.volumes.teardown("u1").await.unwrap();
    bench.volumes.teardown("u1").await.unwrap();
    assert!(bench.volumes.on_disk().await.unwrap().is_empty());
}

#[tokio::test]
async fn empty_dirs_are_shared_and_kept() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    let volume = json!([{"name": "scratch", "emptyDir": {}}]);
    let path = bench.mount(volume.clone()).await.unwrap().volumes["scratch"].path.clone();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o777);
    fs::write(path.join("file"), "x").unwrap();
    bench.mount(volume).await.unwrap();
    assert!(path.join("file").exists());
}

#[tokio::test]
async fn problems_name_the_volume() {
    let bench = Bench::new();
    for (volume, message) in [
        (json!({"name": "v", "rbd": {"image": "i", "monitors": ["m"]}}), "no volume plugin matched"),
        (json!({"name": "v", "gitRepo": {"repository": "r"}}), "git-repo volume plugin has been disabled"),
        (json!({"name": "v", "emptyDir": {"medium": "Moon"}}), "unknown storage medium \"Moon\""),
        (json!({"name": "v", "configMap": {"name": "x", "optional": true}}), ""),
    ] {
        match bench.mount(json!([volume])).await {
            Ok(_) => assert_eq!(message, ""),
            Err(error) => {
                assert_eq!(error, format!("MountVolume.SetUp failed for volume \"v\" : {message}"));
            }
        }
    }
}

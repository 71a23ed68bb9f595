//! A pod with a ResourceClaim: what its user sees while the driver is away, and what its container gets from it.

use std::path::{Path, PathBuf};

use tonic::body::Body;

use super::*;
use crate::dra::wire::{
    Claims, Device, Method, Prepared, PreparedClaim, Service, Unprepared, UnpreparedClaim,
};
use crate::plugins::socket::{Methods, answer, serve, unimplemented};
use crate::plugins::{Plugin, PluginHandler as _};

const DRIVER: &str = "gpu.example.com";

#[derive(Clone)]
struct Driver(Journal);

impl Methods for Driver {
    const NAME: &'static str = "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin";

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        let path = request.uri().path().to_owned();
        let prepare = |asked: Claims| async move {
            let device = Device { cdi_device_ids: vec!["gpu=0".to_owned()], ..Device::default() };
            let result = PreparedClaim { devices: vec![device], error: String::new() };
            let claims = asked.claims.into_iter().map(|claim| (claim.uid, result.clone())).collect();
            Ok(Prepared { claims })
        };
        let unprepare = |asked: Claims| async move {
            let result = |uid| (uid, UnpreparedClaim::default());
            Ok(Unprepared { claims: asked.claims.into_iter().map(|claim| result(claim.uid)).collect() })
        };
        if path == Service::V1.path(Method::Prepare) {
            self.0.add("driver: prepare");
            answer(request, prepare).await
        } else if path == Service::V1.path(Method::Unprepare) {
            self.0.add("driver: unprepare");
            answer(request, unprepare).await
        } else {
            unimplemented()
        }
    }
}

/// Serves until the test is over.
async fn start_driver(journal: &Journal, socket: &Path) {
    let (driver, at) = (Driver(journal.clone()), socket.to_owned());
    tokio::spawn(async move { serve(&at, driver, CancellationToken::new()).await });
    let begin = Instant::now();
    while let Err(error) = tokio::net::UnixStream::connect(socket).await {
        assert!(begin.elapsed() < DEADLINE, "the driver does not serve: {error}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn register(scene: &Scene, socket: &Path) {
    let plugin = Plugin {
        name: DRIVER.to_owned(),
        endpoint: socket.to_owned(),
        versions: vec![Service::V1.told().to_owned()],
        socket: PathBuf::from("/registration"),
    };
    let agent = scene.agent.as_ref().expect("it runs");
    agent.claims.register(&plugin).await.expect("it is taken in");
}

fn claim() -> Value {
    let result = json!({"driver": DRIVER, "pool": "p", "device": "d", "request": "r"});
    json!({"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim",
        "metadata": {"name": "c", "namespace": "ns", "uid": "claim-uid"}, "spec": {},
        "status": {"allocation": {"devices": {"results": [result]}},
            "reservedFor": [{"resource": "pods", "name": "p", "uid": "u"}]}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_with_a_claim_waits_for_its_driver_and_gives_back_before_it_is_over() {
    let mut scene = Scene::new().await;
    scene.stop_agent().await;
    scene.tells_events = true;
    scene.start_agent().await;
    *scene.api.claim.lock().unwrap_or_else(PoisonError::into_inner) = Some(claim());
    let socket = scene.host.1.path().join("dra.sock");
    start_driver(&scene.journal, &socket).await;
    scene
        .create(json!({"resourceClaims": [{"name": "gpu", "resourceClaimName": "c"}],
            "containers": [{"name": "a", "image": "i", "resources": {"claims": [{"name": "gpu"}]}}]}))
        .await;
    scene
        .journal
        .wait_for(
            "event: FailedPrepareDynamicResources Failed to prepare dynamic resources: prepare dynamic \
             resources: DRA driver gpu.example.com is not registered",
        )
        .await;
    assert!(scene.journal.lines().iter().all(|line| !line.contains("run sandbox")));
    register(&scene, &socket).await;
    scene.journal.wait_for("Ready=True").await;
    scene.journal.assert_order(&["driver: prepare", "cri: run sandbox 0", "cri: create a 0 cdi gpu=0"]);

    // The next agent starts the container again though it does not know the driver.
    scene.stop_agent().await;
    scene.start_agent().await;
    scene.journal.take();
    scene.cri.exit("a", 1);
    scene.journal.wait_for("cri: create a 1 cdi gpu=0").await;
    scene.journal.wait_for("cri: start a").await;
    let agent = scene.agent.as_ref().expect("it runs");
    agent.events.send(PodEvent::Apply(scene.api.delete(5))).await.expect("the manager listens");
    scene.journal.wait_for("cri: stop a 5").await;
    register(&scene, &socket).await;
    scene.journal.wait_for("api: delete").await;
    scene.journal.assert_order(&["cri: stop a 5", "driver: unprepare", "api: Failed", "api: delete"]);
    assert!(scene.journal.lines().iter().all(|line| !line.contains("driver: prepare")));
    scene.stop_agent().await;
}

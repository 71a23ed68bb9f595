//! ResourceClaims with a DRA driver of ours, over its sockets, and a real API server with its controllers: from a pod's template
//! to the names of CDI devices, and back. The agent's side has the rights of a node; devices are chosen by hand.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

mod dra_driver;
mod plane;
mod plugin;

use std::sync::Arc;
use std::time::{Duration, Instant};

use dra_driver::{Fault, Shared};
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimTemplate, ResourceSlice};
use keelson_agent::contracts::ObjectSource;
use keelson_agent::dra::wire::Service;
use keelson_agent::dra::{Dra, DraSettings};
use keelson_agent::plugins::{self, Handlers};
use keelson_agent::sources::objects::Objects;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use plane::eventually;
use plane::node::{Bench, Wakes};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const DRIVER: &str = "gpu.keelson.test";

/// One life of an agent.
struct Agent {
    dra: Dra,
    objects: Objects,
    cancel: CancellationToken,
    woken: Wakes,
}

impl Bench {
    fn agent(&self) -> Agent {
        let settings = DraSettings {
            call_deadline: Duration::from_secs(2),
            patience: Duration::from_secs(2),
            ..DraSettings::new(&self.root(), "a")
        };
        let objects = Objects::new(self.node.clone());
        let source: Arc<dyn ObjectSource> = Arc::new(objects.clone());
        let dra = Dra::load(settings, source, self.node.clone());
        let cancel = CancellationToken::new();
        let handlers: Handlers = Arc::new(vec![Arc::new(dra.clone())]);
        tokio::spawn(plugins::run(plugins::directory(&self.root()), handlers, cancel.clone()));
        Agent { dra, objects, cancel, woken: Wakes::default() }
    }

    fn claims(&self) -> Api<ResourceClaim> {
        Api::namespaced(self.plane.admin.clone(), "default")
    }

    async fn claim(&self, name: &str) {
        let claim = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"devices": {
            "requests": [{"name": "one", "exactly": {"deviceClassName": "gpu"}},
                {"name": "two", "exactly": {"deviceClassName": "gpu"}}]}}}))
        .unwrap();
        self.claims().create(&PostParams::default(), &claim).await.unwrap();
    }

    /// What a scheduler does.
    async fn allocate(&self, name: &str, pods: &[&Pod]) {
        let results: Vec<Value> = ["one", "two"]
            .iter()
            .map(|request| {
                json!({"request": request, "driver": DRIVER, "pool": "pool", "device": format!("dev-{request}")})
            })
            .collect();
        let users: Vec<Value> = pods
            .iter()
            .map(|pod| json!({"resource": "pods", "name": pod.metadata.name, "uid": pod.metadata.uid}))
            .collect();
        let patch =
            json!({"status": {"allocation": {"devices": {"results": results}}, "reservedFor": users}});
        self.claims().patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    }

    /// A pod on the node, as the API server has it.
    async fn pod(&self, name: &str, claims: Value) -> Pod {
        let pods: Api<Pod> = Api::namespaced(self.plane.admin.clone(), "default");
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {
            "nodeName": "a", "automountServiceAccountToken": false, "resourceClaims": claims,
            "containers": [
                {"name": "all", "image": "i", "resources": {"claims": [{"name": "gpu"}]}},
                {"name": "one", "image": "i", "resources": {"claims": [{"name": "gpu", "request": "one"}]}},
                {"name": "none", "image": "i"}]}}))
        .unwrap();
        eventually("the namespace takes the pod", || async {
            pods.create(&PostParams::default(), &pod).await.is_ok()
        })
        .await;
        pods.get(name).await.unwrap()
    }
}

impl Agent {
    async fn prepare(&self, pod: &Pod) -> Result<(), String> {
        self.woken.follow(&self.objects, pod);
        self.dra.prepare(pod).await
    }

    async fn cdi_ids(&self, pod: &Pod, name: &str) -> Result<Vec<String>, String> {
        self.dra.cdi_ids(pod, container(pod, name)).await
    }
}

fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap()
}

fn container<'a>(pod: &'a Pod, name: &str) -> &'a Container {
    pod.spec.as_ref().unwrap().containers.iter().find(|container| container.name == name).unwrap()
}

fn by_name(claim: &str) -> Value {
    json!([{"name": "gpu", "resourceClaimName": claim}])
}

fn id(claim: &str, request: &str) -> String {
    format!("{DRIVER}/device={claim}-{request}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_claim_is_prepared_once_and_undone_with_its_last_pod() {
    let bench = Bench::start().await;
    let agent = bench.agent();
    let shared = Shared::new(DRIVER, Service::V1, &["one", "two"]);
    let process = shared.start(&bench.root());
    assert!(shared.told(1).await.registered);
    bench.claim("c").await;
    let (first, second) = (bench.pod("p1", by_name("c")).await, bench.pod("p2", by_name("c")).await);
    bench.allocate("c", &[&first, &second]).await;

    agent.prepare(&first).await.unwrap();
    agent.prepare(&first).await.unwrap();
    agent.prepare(&second).await.unwrap();
    assert_eq!(shared.take_calls(), ["prepare c"]);
    assert_eq!(agent.cdi_ids(&first, "all").await.unwrap(), [id("c", "one"), id("c", "two")]);
    assert_eq!(agent.cdi_ids(&second, "one").await.unwrap(), [id("c", "one")]);
    assert_eq!(agent.cdi_ids(&second, "none").await.unwrap(), [""; 0]);
    let held = agent.dra.of_container(&first, container(&first, "one"));
    assert_eq!((held[0].namespace.as_str(), held[0].name.as_str()), ("default", "c"));
    let (driver, device) = &held[0].devices[0];
    assert_eq!((driver.as_str(), device.pool.as_str(), device.device.as_str()), (DRIVER, "pool", "dev-one"));

    // The next agent knows all of it without the driver.
    agent.cancel.cancel();
    process.end();
    let agent = bench.agent();
    assert!(agent.dra.holds(uid(&first)) && agent.dra.holds(uid(&second)));
    assert_eq!(agent.cdi_ids(&first, "one").await.unwrap(), [id("c", "one")]);
    agent.dra.release(uid(&first)).await.unwrap();
    assert!(!agent.dra.holds(uid(&first)), "another pod has it: the driver need not be asked");
    // What cannot be undone now stays to be done.
    assert_eq!(
        agent.dra.release(uid(&second)).await.unwrap_err(),
        format!("unprepare dynamic resources: DRA driver {DRIVER} is not registered")
    );
    assert!(agent.dra.holds(uid(&second)));
    let _process = shared.start(&bench.root());
    shared.told(2).await;
    shared.set_fault(Some(Fault::Refuses));
    assert_eq!(
        agent.dra.release(uid(&second)).await.unwrap_err(),
        "unprepare dynamic resources: NodeUnprepareResources failed for ResourceClaim c: it is in use"
    );
    shared.set_fault(None);
    agent.dra.release(uid(&second)).await.unwrap();
    agent.dra.release(uid(&second)).await.unwrap();
    assert_eq!(shared.take_calls(), ["unprepare c", "unprepare c"]);
    assert!(agent.dra.pods().is_empty());
    bench.stop(&agent.cancel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_waits_for_its_claim_and_for_its_driver() {
    let bench = Bench::start().await;
    let agent = bench.agent();
    let pod = bench.pod("p", by_name("c")).await;
    let problem = |outcome: Result<(), String>| outcome.unwrap_err();
    assert_eq!(
        problem(agent.prepare(&pod).await),
        "prepare dynamic resources: fetch ResourceClaim c: resourceclaims.resource.k8s.io \"c\" not found"
    );
    bench.claim("c").await;
    let claim = bench.claims().get("c").await.unwrap();
    assert_eq!(
        problem(agent.prepare(&pod).await),
        format!(
            "prepare dynamic resources: pod p ({}) is not allowed to use ResourceClaim c ({})",
            uid(&pod),
            claim.metadata.uid.unwrap()
        )
    );
    bench.allocate("c", &[&pod]).await;
    let away = format!("prepare dynamic resources: DRA driver {DRIVER} is not registered");
    assert_eq!(problem(agent.prepare(&pod).await), away);
    assert!(!agent.dra.holds(uid(&pod)), "it can be deleted without the driver");

    // It is woken when the driver comes.
    let before = agent.woken.count();
    let shared = Shared::new(DRIVER, Service::V1Beta1, &["one"]);
    let _process = shared.start(&bench.root());
    eventually("the pod is woken", || async { agent.woken.count() > before }).await;
    for (fault, expected) in [
        (Fault::Fails, "NodePrepareResources: rpc error: code = Internal desc = no such hardware"),
        (Fault::Refuses, "NodePrepareResources failed for ResourceClaim c: the device is on fire"),
        (Fault::Skips, "NodePrepareResources skipped 1 ResourceClaims"),
    ] {
        shared.set_fault(Some(fault));
        let found = problem(agent.prepare(&pod).await);
        assert_eq!(found, format!("prepare dynamic resources: {expected}"));
        assert!(agent.dra.holds(uid(&pod)), "the driver may have begun");
    }
    shared.set_fault(None);
    agent.prepare(&pod).await.unwrap();
    assert_eq!(agent.cdi_ids(&pod, "all").await.unwrap(), [id("c", "one")]);
    bench.stop(&agent.cancel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_hangs_holds_up_its_own_pods_only() {
    let bench = Bench::start().await;
    let agent = bench.agent();
    let shared = Shared::new(DRIVER, Service::V1, &["one"]);
    let process = shared.start(&bench.root());
    assert!(shared.told(1).await.registered);
    for claim in ["stuck", "fine"] {
        bench.claim(claim).await;
    }
    let (stuck, fine) = (bench.pod("p1", by_name("stuck")).await, bench.pod("p2", by_name("fine")).await);
    bench.allocate("stuck", &[&stuck]).await;
    bench.allocate("fine", &[&fine]).await;
    shared.set_fault(Some(Fault::Hangs));
    let waiting = tokio::spawn({
        let (dra, stuck) = (agent.dra.clone(), stuck.clone());
        async move { (dra.prepare(&stuck).await, Instant::now()) }
    });
    let calls = Arc::clone(&shared);
    eventually("the driver was asked", || async { !calls.take_calls().is_empty() }).await;
    shared.set_fault(None);
    agent.prepare(&fine).await.unwrap();
    let done = Instant::now();
    let (outcome, ended) = waiting.await.unwrap();
    assert_eq!(
        outcome.unwrap_err(),
        "prepare dynamic resources: NodePrepareResources: rpc error: code = DeadlineExceeded desc = no answer within 2 s"
    );
    assert!(done < ended, "the other pod did not wait");

    // Killed in the middle of a call: the next agent finds what it has to undo.
    shared.set_fault(Some(Fault::Hangs));
    let dra = agent.dra.clone();
    let (pod, calls) = (stuck.clone(), Arc::clone(&shared));
    let hanging = tokio::spawn(async move { dra.prepare(&pod).await });
    eventually("the driver was asked again", || async { !calls.take_calls().is_empty() }).await;
    hanging.abort();
    agent.cancel.cancel();
    drop(process);
    shared.set_fault(None);
    let agent = bench.agent();
    let _process = shared.start(&bench.root());
    shared.told(2).await;
    assert!(agent.dra.pods().contains_key(uid(&stuck)));
    eventually("the claim is undone", || async { agent.dra.release(uid(&stuck)).await.is_ok() }).await;
    assert_eq!(shared.take_calls().last().unwrap(), "unprepare stuck");
    assert!(agent.cdi_ids(&fine, "one").await.is_ok(), "and keeps what is in use");
    bench.stop(&agent.cancel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_gives_each_pod_a_claim_that_goes_with_it() {
    let bench = Bench::start().await;
    let agent = bench.agent();
    let shared = Shared::new(DRIVER, Service::V1, &["one", "two"]);
    let _process = shared.start(&bench.root());
    assert!(shared.told(1).await.registered);
    let templates: Api<ResourceClaimTemplate> = Api::namespaced(bench.plane.admin.clone(), "default");
    let template = serde_json::from_value(json!({"metadata": {"name": "t"}, "spec": {"spec": {"devices": {
        "requests": [{"name": "one", "exactly": {"deviceClassName": "gpu"}}]}}}}))
    .unwrap();
    templates.create(&PostParams::default(), &template).await.unwrap();
    let made = bench.pod("p", json!([{"name": "gpu", "resourceClaimTemplateName": "t"}])).await;
    if made.status.as_ref().is_none_or(|status| status.resource_claim_statuses.is_none()) {
        let early = agent.prepare(&made).await.unwrap_err();
        assert_eq!(early, "prepare dynamic resources: pod \"default/p\": ResourceClaim not created yet");
    }
    let pods: Api<Pod> = Api::namespaced(bench.node.clone(), "default");
    let named =
        |pod: &Pod| pod.status.as_ref()?.resource_claim_statuses.as_ref()?[0].resource_claim_name.clone();
    eventually("the pod is told its claim", || async { named(&pods.get("p").await.unwrap()).is_some() })
        .await;
    let pod = pods.get("p").await.unwrap();
    let name = named(&pod).unwrap();
    assert!(name.starts_with("p-gpu-"), "{name}");
    bench.allocate(&name, &[&pod]).await;
    agent.prepare(&pod).await.unwrap();
    assert_eq!(agent.cdi_ids(&pod, "one").await.unwrap(), [id(&name, "one")]);

    // Over, and undone before that is told: then the claim's devices are free, and it goes.
    agent.dra.release(uid(&pod)).await.unwrap();
    let ended = json!({"status": {"phase": "Succeeded"}});
    pods.patch_status("p", &PatchParams::default(), &Patch::Strategic(&ended)).await.unwrap();
    let claims = bench.claims();
    eventually("the claim is gone", || async { claims.get_opt(&name).await.unwrap().is_none() }).await;
    assert_eq!(shared.take_calls(), [format!("prepare {name}"), format!("unprepare {name}")]);
    bench.stop(&agent.cancel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_of_drivers_that_have_gone_are_removed() {
    let bench = Bench::start().await;
    let slices: Api<ResourceSlice> = Api::all(bench.node.clone());
    let publish = |name: &'static str, driver: &'static str| {
        let slice: ResourceSlice = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {
            "driver": driver, "nodeName": "a", "pool": {"name": "pool", "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "d"}]}}))
        .unwrap();
        let slices = slices.clone();
        async move { slices.create(&PostParams::default(), &slice).await.unwrap() }
    };
    publish("ours", DRIVER).await;
    publish("forgotten", "old.keelson.test").await;
    let elsewhere = serde_json::from_value(json!({"metadata": {"name": "elsewhere"}, "spec": {
        "driver": "old.keelson.test", "nodeName": "b", "devices": [{"name": "d"}],
        "pool": {"name": "other", "generation": 1, "resourceSliceCount": 1}}}))
    .unwrap();
    let all: Api<ResourceSlice> = Api::all(bench.plane.admin.clone());
    all.create(&PostParams::default(), &elsewhere).await.unwrap();
    let agent = bench.agent();
    let shared = Shared::new(DRIVER, Service::V1, &["one"]);
    let process = shared.start(&bench.root());
    assert!(shared.told(1).await.registered);
    let tidy = tokio::spawn(agent.dra.clone().tidy_slices(agent.cancel.clone()));
    let names = || async {
        let found = all.list(&ListParams::default()).await.unwrap();
        let mut names: Vec<String> =
            found.items.into_iter().filter_map(|slice| slice.metadata.name).collect();
        names.sort();
        names
    };
    eventually("what an earlier driver left is gone", || async { names().await == ["elsewhere", "ours"] })
        .await;
    // It dies and leaves its sockets behind.
    drop(process);
    eventually("its slices are gone", || async { names().await == ["elsewhere"] }).await;
    let process = shared.start(&bench.root());
    assert!(shared.told(2).await.registered);
    publish("again", DRIVER).await;
    process.end();
    eventually("and gone again", || async { names().await == ["elsewhere"] }).await;
    agent.cancel.cancel();
    tidy.await.unwrap();
    all.delete("elsewhere", &DeleteParams::default()).await.unwrap();
    bench.stop(&agent.cancel).await;
}

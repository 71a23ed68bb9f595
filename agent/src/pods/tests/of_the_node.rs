//! What is not in the API's usual order: static pods, evictions, ephemeral containers.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::sources::manifest::{self, Origin};

fn static_pod(image: &str) -> Arc<Pod> {
    let text = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, spec: {{containers: [{{name: a, image: {image}}}]}}}}"
    );
    let origin = Origin { node_name: "n", source: "file", file: "p.yaml", seen: jiff::Timestamp::UNIX_EPOCH };
    let pod = manifest::parse(text.as_bytes(), origin).expect("a good manifest");
    Arc::new(pod)
}

impl Scene {
    async fn with_statics() -> Self {
        let mut scene = Self::new().await;
        scene.stop_agent().await;
        scene.expects_static = BTreeSet::from([StaticSource::File]);
        scene.start_agent().await;
        scene
    }

    async fn statics(&self, pods: Vec<Arc<Pod>>) {
        for pod in &pods {
            let uid = pod.metadata.uid.as_deref().expect("a uid");
            let dir = self.host.1.path().join("kubelet/pods").join(Path::new(uid));
            std::fs::create_dir_all(dir).expect("a pod directory");
        }
        self.send(PodEvent::Static(StaticSource::File, pods)).await;
    }

    async fn send(&self, event: PodEvent) {
        self.agent.as_ref().expect("it runs").events.send(event).await.expect("the manager listens");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_static_pod_runs_is_shown_and_outlives_its_mirror() {
    let mut scene = Scene::with_statics().await;
    let pod = static_pod("one");
    scene.statics(vec![Arc::clone(&pod)]).await;
    scene.journal.wait_for("api: Running Ready=True").await;
    scene.journal.assert_order(&["api: create p-n", "api: Running Ready=True"]);
    let mirror = scene.api.pods().remove(0);
    let annotations = mirror.metadata.annotations.clone().expect("some");
    assert_eq!(annotations.get("kubernetes.io/config.mirror"), pod.metadata.uid.as_ref());
    // Somebody deletes what the API shows: it is made anew, and nothing happens to the containers.
    scene.journal.take();
    scene.api.forget();
    scene.send(PodEvent::Delete(mirror)).await;
    scene.journal.wait_for("api: create p-n").await;
    scene.journal.wait_for("api: Running Ready=True").await;
    assert!(
        scene.journal.lines().iter().all(|line| !line.starts_with("cri: stop")),
        "{:#?}",
        scene.journal.lines()
    );
    // Another manifest is another pod, once the old one has ended.
    scene.journal.take();
    let mirror = scene.api.pods().remove(0);
    scene.statics(vec![static_pod("two")]).await;
    scene.journal.wait_for("api: delete").await;
    scene.send(PodEvent::Delete(mirror)).await;
    scene.journal.wait_for("api: Running Ready=True").await;
    scene.journal.assert_order(&[
        "cri: stop a 30",
        "cri: remove sandbox",
        "cri: run sandbox",
        "cri: start a",
    ]);
    scene.journal.assert_order(&["api: delete", "api: create p-n", "api: Running Ready=True"]);
    scene.journal.take();
    scene.statics(Vec::new()).await;
    scene.journal.wait_for("cri: remove sandbox").await;
    scene.journal.wait_for("api: delete").await;
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_leaves_static_pods_alone_however_late_they_are_read() {
    let mut scene = Scene::with_statics().await;
    let pod = static_pod("one");
    scene.statics(vec![Arc::clone(&pod)]).await;
    scene.journal.wait_for("api: Running Ready=True").await;
    scene.stop_agent().await;
    scene.journal.take();
    scene.start_agent().await;
    scene.send(PodEvent::Synced(scene.api.pods())).await;
    scene.statics(vec![pod]).await;
    let seen = scene.agent.as_ref().expect("it runs").directory.clone();
    let begin = Instant::now();
    while !seen.container("default", "p-n", None, "a").is_ok_and(|container| container.running) {
        assert!(begin.elapsed() < DEADLINE, "the pod is not picked up");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let changes: Vec<String> = scene
        .journal
        .lines()
        .into_iter()
        .filter(|line| line.starts_with("cri") && !line.contains("list"))
        .collect();
    assert!(changes.is_empty(), "{changes:#?}");
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_static_pod_that_is_removed_and_put_back_at_once_runs_again() {
    let mut scene = Scene::with_statics().await;
    let pod = static_pod("one");
    scene.statics(vec![Arc::clone(&pod)]).await;
    scene.journal.wait_for("api: Running Ready=True").await;
    scene.journal.take();
    scene.statics(Vec::new()).await;
    scene.statics(vec![pod]).await;
    scene.journal.wait_for("cri: run sandbox").await;
    scene.journal.assert_order(&["cri: stop a 30", "cri: remove sandbox", "cri: run sandbox"]);
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evicted_pod_ends_quickly_and_says_why() {
    let mut scene = Scene::new().await;
    scene.create(simple()).await;
    scene.journal.wait_for("Ready=True").await;
    scene.journal.take();
    let eviction = Eviction {
        uid: "u".to_owned(),
        reason: "Evicted",
        message: "The node was low on resource: memory. ".to_owned(),
        grace: 1,
    };
    let agent = scene.agent.as_ref().expect("it runs");
    agent.evictions.send(eviction).await.expect("the manager listens");
    scene.journal.wait_for("host: remove cgroup").await;
    scene.journal.wait_for("host: teardown").await;
    scene.journal.wait_for("Evicted").await;
    scene.journal.assert_order(&["cri: stop a 2", "cri: stop sandbox", "host: teardown"]);
    let status = scene.api.pods()[0].status.clone().expect("a status");
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.message.as_deref(), Some("The node was low on resource: memory. "));
    let disrupted =
        status.conditions.iter().flatten().find(|condition| condition.type_ == "DisruptionTarget");
    assert_eq!(disrupted.and_then(|found| found.reason.as_deref()), Some("TerminationByKubelet"));
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_under_pressure_refuses_pods() {
    let mut scene = Scene::new().await;
    scene.pressures.send_replace(BTreeSet::from([Pressure::Disk]));
    scene.create(simple()).await;
    scene.journal.wait_for("Evicted").await;
    let status = scene.api.pods()[0].status.clone().expect("a status");
    assert_eq!(status.message.as_deref(), Some("The node had condition: [DiskPressure]. "));
    assert!(
        scene.journal.lines().iter().all(|line| !line.starts_with("cri: run")),
        "{:#?}",
        scene.journal.lines()
    );
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ephemeral_container_joins_a_running_pod() {
    let mut scene = Scene::new().await;
    scene.create(simple()).await;
    scene.journal.wait_for("Ready=True").await;
    scene.journal.take();
    let changed = scene.api.edit(|pod| {
        pod["spec"]["ephemeralContainers"] =
            json!([{"name": "d", "image": "i", "imagePullPolicy": "IfNotPresent", "targetContainerName": "a"}]);
    });
    scene.send(PodEvent::Apply(changed)).await;
    scene.journal.wait_for("cri: start d").await;
    scene.journal.assert_order(&["cri: create d 0 target c1", "cri: start d"]);
    let begin = Instant::now();
    loop {
        let status = scene.api.pods()[0].status.clone().expect("a status");
        let told = status.ephemeral_container_statuses.unwrap_or_default();
        if told
            .iter()
            .any(|told| told.name == "d" && told.state.as_ref().is_some_and(|state| state.running.is_some()))
        {
            break;
        }
        assert!(begin.elapsed() < DEADLINE, "{told:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    scene.cri.exit("d", 0);
    let seen = scene.agent.as_ref().expect("it runs").directory.clone();
    while seen.container("ns", "p", None, "d").is_ok_and(|container| container.running) {
        assert!(begin.elapsed() < DEADLINE, "its end is not seen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(scene.journal.lines().iter().filter(|line| line.contains("create d")).count(), 1);
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_goes_down_refuses_pods() {
    let mut scene = Scene::new().await;
    scene.going_down.send_replace(true);
    scene.create(simple()).await;
    scene.journal.wait_for("NodeShutdown").await;
    let status = scene.api.pods()[0].status.clone().expect("a status");
    assert_eq!(status.message.as_deref(), Some("Pod was rejected as the node is shutting down."));
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_an_api_server_runs_its_static_pods() {
    let mut scene = Scene::new().await;
    scene.stop_agent().await;
    scene.offline = true;
    scene.expects_static = BTreeSet::from([StaticSource::File]);
    scene.start_agent().await;
    scene.statics(vec![static_pod("one")]).await;
    scene.journal.wait_for("cri: start a").await;
    scene.cri.exit("a", 1);
    scene.journal.wait_for("cri: create a 1").await;
    scene.statics(Vec::new()).await;
    scene.journal.wait_for("cri: remove sandbox").await;
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_no_processors_are_left_for_is_rejected_before_anything_is_made() {
    let mut scene = Scene::new().await;
    scene.stop_agent().await;
    scene.exclusive_cpus = true;
    scene.start_agent().await;
    let amounts = json!({"cpu": "100000", "memory": "1Gi"});
    let mut spec = simple();
    spec["containers"][0]["resources"] = json!({"requests": amounts, "limits": amounts});
    scene.create(spec).await;
    scene.journal.wait_for("api: Failed").await;
    let status = scene.api.pods().remove(0).status.clone().expect("a status");
    assert_eq!(status.reason.as_deref(), Some("UnexpectedAdmissionError"));
    let message = status.message.unwrap_or_default();
    assert!(
        message.starts_with("Allocate failed due to not enough cpus available to satisfy request")
            && message.ends_with(", which is unexpected"),
        "{message}"
    );
    assert!(
        scene.journal.lines().iter().all(|line| !line.starts_with("cri: run sandbox")),
        "{:#?}",
        scene.journal.lines()
    );
    scene.stop_agent().await;
}

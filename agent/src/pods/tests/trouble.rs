//! API server, runtime, disk and clock that fail for long: what runs goes on, and in the end everything is told and as it
//! should be. The clock of the loops runs faster than the machine's where an hour has to pass.

use std::sync::atomic::Ordering;

use serde_json::json;

use super::*;

/// What an API server answers that is overloaded, broken, or has forgotten where a watch was.
const TROUBLES: [u16; 5] = [429, 500, 410, 503, 409];

impl Scene {
    /// A node whose clock shows `rate` seconds for each.
    async fn with_clock(rate: u32) -> Self {
        let mut scene = Self::new().await;
        scene.stop_agent().await;
        scene.clock = Arc::new(Lapse::new(rate));
        scene.start_agent().await;
        scene
    }

    async fn tell(&self, event: PodEvent) {
        self.agent.as_ref().expect("it runs").events.send(event).await.expect("the manager listens");
    }

    /// As kill -9: nothing is finished, nothing is said.
    async fn kill_agent(&mut self) {
        let agent = self.agent.take().expect("it runs");
        agent.feed.abort();
        for task in agent.tasks {
            task.abort();
            task.await.ok();
        }
    }

    /// Waits until `holds`; an agent that a trap springs for is killed, and another one started.
    #[track_caller]
    fn until(&mut self, what: &'static str, holds: fn(&Self) -> bool) -> BoxFuture<'_, ()> {
        async move {
            let begin = Instant::now();
            while !holds(self) {
                assert!(begin.elapsed() < DEADLINE, "not {what}: {:#?}", self.journal.lines());
                let trap = Arc::clone(&self.journal.1);
                let pause = tokio::time::timeout(Duration::from_millis(5), trap.sprung.notified());
                if pause.await.is_ok() {
                    self.kill_agent().await;
                    self.start_agent().await;
                }
                let (_, _, at_once) = self.cri.left();
                assert!(at_once <= 1, "a container runs twice: {:#?}", self.journal.lines());
            }
        }
        .boxed()
    }

    /// Waits for something that happens without the agent's being killed.
    async fn eventually(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !holds(self) {
            assert!(begin.elapsed() < DEADLINE, "not {what}: {:#?}", self.journal.lines());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Has the agent look at the runtime, and waits until it has done what follows from that: it looks once more.
    async fn looked_again(&self) {
        for _ in 0..2 {
            let before = self.cri.listed();
            self.cri.nudge();
            self.eventually("looked at", |scene| scene.cri.listed() > before).await;
        }
    }

    fn phase(&self) -> String {
        let pods = self.api.pods();
        let status = pods.first().and_then(|pod| pod.status.clone());
        status.and_then(|status| status.phase).unwrap_or_default()
    }

    fn is_ready(&self) -> bool {
        let pods = self.api.pods();
        let conditions = pods.first().and_then(|pod| pod.status.clone()?.conditions);
        conditions.iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    }

    fn restarts_told(&self) -> i32 {
        let pods = self.api.pods();
        let statuses = pods.first().and_then(|pod| pod.status.clone()?.container_statuses);
        statuses.iter().flatten().map(|status| status.restart_count).max().unwrap_or(0)
    }

    fn lines_with(&self, part: &str) -> usize {
        self.journal.lines().iter().filter(|line| line.contains(part)).count()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_hour_without_the_api_server_harms_no_pod() {
    let mut scene = Scene::with_clock(1500).await;
    scene.create(simple()).await;
    scene.until("ready", Scene::is_ready).await;
    scene.journal.take();
    scene.api.fail_with(&TROUBLES, false);
    let begin = scene.clock.passed();
    scene.cri.exit("a", 1);
    scene.journal.wait_for("cri: start a").await;
    while scene.clock.passed().saturating_sub(begin) < Duration::from_secs(3600) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(scene.restarts_told(), 0);
    let tries = scene.api.failed();
    assert!((10..1000).contains(&tries), "{tries} requests in an hour");
    scene.api.fail_with(&[], false);
    scene.until("told", |scene| scene.restarts_told() == 1 && scene.is_ready()).await;
    assert_eq!((scene.lines_with("cri: stop"), scene.lines_with("run sandbox")), (0, 0));
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_deleted_though_every_answer_is_lost_at_first() {
    let mut scene = Scene::with_clock(100).await;
    scene.create(simple()).await;
    scene.until("ready", Scene::is_ready).await;
    scene.api.fail_with(&[500], true);
    let deleted = scene.api.delete(1);
    scene.tell(PodEvent::Apply(deleted)).await;
    scene.until("failed", |scene| scene.api.failed() > 5).await;
    scene.api.fail_with(&[], false);
    scene.until("gone", |scene| scene.api.pods().is_empty() && scene.cri.left() == (0, 0, 0)).await;
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_state_of_a_pod_changes_nothing() {
    let mut scene = Scene::new().await;
    scene.create(simple()).await;
    scene.until("ready", Scene::is_ready).await;
    let old = scene.api.pods().remove(0);
    let changed = scene.api.edit(|pod| pod["spec"]["containers"][0]["image"] = json!("other"));
    scene.tell(PodEvent::Apply(changed)).await;
    scene.until("restarted", |scene| scene.restarts_told() == 1 && scene.is_ready()).await;
    scene.journal.take();
    scene.tell(PodEvent::Apply(Arc::clone(&old))).await;
    let deleted = scene.api.delete(1);
    scene.tell(PodEvent::Apply(deleted)).await;
    scene.tell(PodEvent::Apply(old)).await;
    scene.until("gone", |scene| scene.api.pods().is_empty() && scene.cri.left() == (0, 0, 0)).await;
    assert_eq!(scene.lines_with("cri: create"), 0, "{:#?}", scene.journal.lines());
    scene.stop_agent().await;
}

/// A pod from its creation to its end, the agent being killed at line `trap` of the journal; how many lines there were.
async fn life(trap: usize) -> usize {
    let mut scene = Scene::with_clock(100).await;
    scene.journal.take();
    scene.journal.1.lines.store(trap, Ordering::SeqCst);
    let image = |name: &str| json!({"name": name, "image": "i", "imagePullPolicy": "IfNotPresent"});
    let mut sidecar = image("s");
    sidecar["restartPolicy"] = json!("Always");
    scene.create(json!({"initContainers": [sidecar], "containers": [image("a")]})).await;
    scene.until("ready", |scene| scene.is_ready() && scene.phase() == "Running").await;
    scene.cri.exit("a", 1);
    scene.until("restarted", |scene| scene.restarts_told() == 1 && scene.is_ready()).await;
    let deleted = scene.api.delete(1);
    scene.tell(PodEvent::Apply(deleted)).await;
    scene.until("gone", |scene| scene.api.pods().is_empty() && scene.cri.left() == (0, 0, 0)).await;
    let lines = scene.journal.lines().len();
    if let Some(agent) = &scene.agent {
        agent.feed.abort();
    }
    scene.stop_agent().await;
    lines
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_killed_anywhere_is_followed_by_one_that_goes_on() {
    let lines = life(0).await;
    assert!(lines > 15, "{lines}");
    for trap in 1..=lines {
        life(trap).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_that_does_not_answer_is_waited_for() {
    let mut scene = Scene::new().await;
    scene.stop_agent().await;
    (scene.clock, scene.deadline) = (Arc::new(Lapse::new(50)), Duration::from_millis(200));
    scene.start_agent().await;
    scene.cri.stall(true);
    scene.create(simple()).await;
    scene.eventually("asked", |scene| scene.cri.held() > 0).await;
    assert_eq!(scene.cri.left(), (0, 0, 0));
    scene.cri.stall(false);
    scene.until("ready", Scene::is_ready).await;
    // While it runs nothing is touched.
    scene.journal.take();
    let held = scene.cri.held();
    scene.cri.stall(true);
    scene.cri.nudge();
    scene.eventually("asked", |scene| scene.cri.held() > held).await;
    scene.cri.stall(false);
    scene.looked_again().await;
    assert_eq!(scene.cri.left(), (1, 1, 1));
    assert_eq!(scene.lines_with("cri: stop") + scene.lines_with("cri: remove"), 0);
    scene.cri.exit("a", 1);
    scene.until("restarted", |scene| scene.restarts_told() == 1 && scene.is_ready()).await;
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_full_is_told_and_what_runs_goes_on() {
    let mut scene = Scene::with_clock(100).await;
    // No file can be made in the pod's directory: it is none.
    let dir = scene.host.1.path().join("kubelet/pods/u");
    std::fs::remove_dir(&dir).expect("an empty directory");
    std::fs::write(&dir, b"").expect("a file in its place");
    scene.host.2.store(true, Ordering::SeqCst);
    scene.create(simple()).await;
    scene.journal.wait_for("cri: run sandbox").await;
    scene.eventually("tried again and again", |scene| scene.lines_with("host: no space") > 2).await;
    assert_eq!(scene.lines_with("cri: create"), 0, "its volumes are not there");
    scene.host.2.store(false, Ordering::SeqCst);
    scene.journal.wait_for("CreateContainerConfigError").await;
    std::fs::remove_file(&dir).expect("it is there");
    std::fs::create_dir(&dir).expect("a directory again");
    scene.until("ready", Scene::is_ready).await;
    // Full again: what runs is left alone, a restart is tried until there is room.
    std::fs::rename(&dir, dir.with_extension("aside")).expect("it is there");
    std::fs::write(&dir, b"").expect("a file in its place");
    scene.journal.take();
    scene.looked_again().await;
    assert_eq!(scene.cri.left(), (1, 1, 1));
    scene.cri.exit("a", 1);
    scene.journal.wait_for("CreateContainerConfigError").await;
    std::fs::remove_file(&dir).expect("it is there");
    std::fs::rename(dir.with_extension("aside"), &dir).expect("it is there");
    scene.until("restarted", |scene| scene.restarts_told() == 1 && scene.is_ready()).await;
    assert_eq!(scene.lines_with("run sandbox"), 0);
    scene.stop_agent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_waits_for_a_clock_that_was_set_back() {
    let mut scene = Scene::new().await;
    scene.api.fail_with(&[500], false);
    scene.create(simple()).await;
    scene.journal.wait_for("cri: start a").await;
    scene.until("refused", |scene| scene.api.failed() > 2).await;
    scene.clock.set(-3600);
    // A restart, whose last end is an hour ahead now.
    scene.cri.exit("a", 1);
    scene.journal.wait_for("cri: create a 1").await;
    scene.cri.exit("a", 1);
    scene.journal.wait_for("cri: create a 2").await;
    scene.api.fail_with(&[], false);
    scene.until("told", |scene| scene.restarts_told() == 2 && scene.is_ready()).await;
    scene.clock.set(7200);
    scene.cri.exit("a", 1);
    scene.until("restarted", |scene| scene.restarts_told() == 3 && scene.is_ready()).await;
    scene.stop_agent().await;
}

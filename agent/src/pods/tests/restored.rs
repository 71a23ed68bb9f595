//! A database that was restored: what the API server has forgotten is told again, and what runs goes on.

use super::*;

impl Scene {
    /// The database is that of the moment when the pod was made, and the server lists what it has.
    async fn restore(&self, spec: &Value) {
        self.api.create(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "spec": spec}));
        let agent = self.agent.as_ref().expect("it runs");
        agent.events.send(PodEvent::Synced(self.api.pods())).await.expect("the manager listens");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_status_that_a_restored_database_lost_is_written_again() {
    let mut scene = Scene::new().await;
    scene.create(simple()).await;
    scene.journal.wait_for("api: Running Ready=True").await;
    for _ in 0..2 {
        scene.journal.take();
        scene.restore(&simple()).await;
        scene.journal.wait_for("api: Running Ready=True").await;
        let lines = scene.journal.take();
        assert!(!lines.iter().any(|line| line.starts_with("cri: ") && !line.contains("list")), "{lines:#?}");
    }
    // From here on its lower versions count.
    scene.cri.exit("a", 1);
    scene.journal.wait_for("restarts=1").await;
    scene.stop_agent().await;
}

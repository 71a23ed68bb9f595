//! What the runtime lost, the loop still knows.

use super::*;

#[test]
fn a_pod_that_is_over_starts_nothing_though_the_runtime_forgot_it() {
    let mut world = one("Never");
    world.settle().exit("a", 0).settle().log.clear();
    world.memory.over = true;
    world.observed = ObservedPod::default();
    world.settle().expect("");
}

#[test]
fn an_instance_that_the_runtime_lost_is_counted() {
    let mut world = one("Always");
    let mut pod = Arc::unwrap_or_clone(Arc::clone(&world.desired.pod));
    pod.status = serde_json::from_value(json!({"phase": "Running", "containerStatuses": [{"name": "a", "image": "i",
        "imageID": "", "ready": false, "restartCount": 4, "state": {"waiting": {"reason": "ContainerCreating"}}}]}))
    .expect("a status");
    world.desired = DesiredPod::new(Arc::new(pod), Fate::Run);
    world.settle().expect("cgroup, volumes, image a, sandbox 0, start a 5");
}

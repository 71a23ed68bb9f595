//! Pods with ResourceClaims.

use super::*;
use crate::model::StepKey;

impl World {
    pub(super) fn prepare_claims(&mut self) -> String {
        (self.memory.claims, self.memory.claims_held) = (Step::Done, true);
        "claims".to_owned()
    }

    pub(super) fn release_claims(&mut self) -> String {
        self.memory.claims_held = false;
        "release claims".to_owned()
    }
}

fn world() -> World {
    World::new(&json!({"restartPolicy": "Never", "containers": [{"name": "a"}],
        "resourceClaims": [{"name": "gpu", "resourceClaimName": "c"}]}))
}

#[test]
fn claims_are_ready_before_the_sandbox_and_undone_before_the_phase_is_told() {
    let mut world = world();
    world.settle().expect("cgroup, volumes, image a, claims, sandbox 0, start a 0");
    world.exit("a", 0);
    let plan = world.plan();
    assert_eq!((plan.actions, plan.ended), (vec![PodAction::ReleaseClaims], false));
    world.settle().expect("release claims, stop sandbox, teardown, remove cgroup");
    assert!(world.last.ended);
}

#[test]
fn a_pod_waits_for_its_claims_and_its_containers_do_not_wait_twice() {
    let mut world = world();
    let later = world.now + SignedDuration::from_secs(5);
    world.memory.claims = Step::Failed { retry_at: later };
    world.settle().expect("cgroup, volumes, image a");
    assert_eq!(world.last.wake_at, Some(later));
    world.wait(1).expect("claims, sandbox 0, start a 0");
    // The next agent leaves a pod alone that has its sandbox.
    world.memory = PodMemory { services_synced: true, claims_held: true, ..PodMemory::default() };
    world.settle().expect("cgroup, volumes");
    world.fate(Fate::Terminate { grace: 1, gone: true }).settle();
    world.expect("kill a 1, release claims, stop sandbox, teardown, remove cgroup, remove sandbox");
}

#[test]
fn claims_that_are_being_prepared_are_waited_for() {
    let mut world = world();
    world.memory.busy.insert(StepKey::Claims);
    world.fate(Fate::Terminate { grace: 1, gone: true }).settle().expect("");
    assert!(!world.last.done && !world.last.ended);
    world.memory.busy.clear();
    world.settle();
    assert!(world.last.done);
}

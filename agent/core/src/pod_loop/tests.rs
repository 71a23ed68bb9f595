//! What the pod loop makes of outcomes, holds and ends.

use jiff::SignedDuration;
use serde_json::{Value, json};

use super::*;

const BEGIN: i64 = 1_000_000;

fn at(millis: i64) -> Timestamp {
    Timestamp::from_second(BEGIN).unwrap() + SignedDuration::from_millis(millis)
}

fn desired(metadata: &Value, spec: &Value) -> DesiredPod {
    let mut pod =
        json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "spec": {"containers": []}});
    for (part, changes) in [("metadata", metadata), ("spec", spec)] {
        for (key, value) in changes.as_object().unwrap() {
            pod[part][key] = value.clone();
        }
    }
    DesiredPod::new(Arc::new(serde_json::from_value(pod).unwrap()), Fate::Run)
}

/// A loop that has looked at the runtime, and found nothing.
fn fresh(spec: &Value) -> PodLoop {
    let mut state = PodLoop::new(desired(&json!({}), spec), PlanSettings::default());
    state.saw(ObservedPod::default());
    state
}

/// What the loop begins at that time.
fn begins(state: &mut PodLoop, now: Timestamp) -> Vec<PodAction> {
    state.read_clock(now);
    let plan = state.plan(now, PlanSettings::default());
    state.begin(&plan, now, PlanSettings::default())
}

#[test]
fn a_failed_step_is_held_back_for_longer_each_time_until_it_is_done() {
    let mut state = fresh(&json!({}));
    let mut now = at(0);
    for pause in [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000] {
        assert!(begins(&mut state, now).contains(&PodAction::EnsureCgroup));
        state.absorb(&PodAction::EnsureCgroup, StepEnd::Failed, now);
        let until = now + SignedDuration::from_millis(pause);
        assert!(
            !begins(&mut state, until - SignedDuration::from_millis(1)).contains(&PodAction::EnsureCgroup)
        );
        assert_eq!(state.next_wake(), Some(until));
        now = until;
    }
    assert!(begins(&mut state, now).contains(&PodAction::EnsureCgroup));
    state.absorb(&PodAction::EnsureCgroup, StepEnd::Done, now);
    assert!(!begins(&mut state, now).contains(&PodAction::EnsureCgroup));
    // As after a reboot: the next failure is a first one again.
    state.memory.cgroup = Step::Todo;
    begins(&mut state, now);
    state.absorb(&PodAction::EnsureCgroup, StepEnd::Failed, now);
    begins(&mut state, now);
    assert_eq!(state.next_wake(), Some(now + SignedDuration::from_millis(250)));
}

#[test]
fn a_clock_that_is_set_back_ends_pauses() {
    let mut state = fresh(&json!({}));
    begins(&mut state, at(0));
    state.absorb(&PodAction::EnsureCgroup, StepEnd::Failed, at(0));
    assert_eq!(state.read_clock(at(-900)), None, "a clock is corrected all the time");
    assert!(!begins(&mut state, at(-900)).contains(&PodAction::EnsureCgroup));
    assert_eq!(state.read_clock(at(-3_600_000)), Some(at(-900)));
    assert!(begins(&mut state, at(-3_600_000)).contains(&PodAction::EnsureCgroup));
}

#[test]
fn a_deadline_is_told_once_and_only_of_a_pod_that_had_not_ended() {
    for (phase, is_told) in [("Running", true), ("Succeeded", false)] {
        let mut pod = desired(&json!({}), &json!({"activeDeadlineSeconds": 60}));
        let status = json!({"phase": phase, "startTime": at(0)});
        Arc::make_mut(&mut pod.pod).status = Some(serde_json::from_value(status).unwrap());
        let mut state = PodLoop::new(pod, PlanSettings::default());
        assert!(!state.apply_times(at(59_999)));
        assert_eq!(state.next_wake(), Some(at(60_000)), "{phase}");
        assert_eq!(state.apply_times(at(60_000)), is_told, "{phase}");
        assert!(matches!(&state.desired.fate, Fate::Fail { reason, .. } if reason == DEADLINE_EXCEEDED));
        assert!(!state.apply_times(at(60_001)), "{phase}");
    }
}

#[test]
fn volumes_are_set_up_again_for_what_changed_meanwhile() {
    let mounted = || StepEnd::Mounted { refresh_at: Some(at(5000)) };
    let mut state = fresh(&json!({}));
    assert!(begins(&mut state, at(0)).contains(&PodAction::MountVolumes));
    state.take_signal(true);
    assert!(!begins(&mut state, at(1)).contains(&PodAction::MountVolumes), "it runs");
    state.absorb(&PodAction::MountVolumes, mounted(), at(2));
    assert!(begins(&mut state, at(2)).contains(&PodAction::MountVolumes), "for the change");
    state.absorb(&PodAction::MountVolumes, mounted(), at(3));
    assert!(!begins(&mut state, at(3)).contains(&PodAction::MountVolumes));
    // Then when contents grow old, and for other labels, which files may show.
    state.apply_times(at(5000));
    assert!(begins(&mut state, at(5000)).contains(&PodAction::MountVolumes));
    state.absorb(&PodAction::MountVolumes, mounted(), at(5001));
    let labelled = desired(&json!({"labels": {"app": "web"}}), &json!({}));
    assert!(!state.take_desired(labelled, PlanSettings::default()), "the spec is the same");
    assert_eq!(state.memory.volumes, Step::Todo);
}

#[test]
fn an_end_makes_pulls_and_longer_kills_pointless() {
    let kill = |grace| PodAction::KillContainer {
        id: "i".to_owned(),
        container: "c".to_owned(),
        grace,
        message: String::new(),
    };
    let pull = PodAction::EnsureImage { container: "c".to_owned() };
    let end = Fate::Terminate { grace: 10, gone: false };
    let mut state = fresh(&json!({}));
    assert!(!state.is_pointless(&pull, &Fate::Run));
    assert!(state.is_pointless(&pull, &end) && state.is_pointless(&kill(30), &end));
    assert!(!state.is_pointless(&kill(10), &end) && !state.is_pointless(&PodAction::EnsureCgroup, &end));
    state.desired.fate = end.clone();
    assert!(!state.is_pointless(&pull, &end), "it was begun though the pod ends");
}

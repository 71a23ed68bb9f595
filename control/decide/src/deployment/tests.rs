//! Scenarios of single steps, and a simulation of whole rollouts with pods that become ready in any order.

use k8s_openapi::{
    api::{
        apps::v1::{DeploymentStrategy, ReplicaSetStatus, RollingUpdateDeployment},
        core::v1::{Container, PodSpec, PodTemplateSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta, Time},
        util::intstr::IntOrString,
    },
};
use proptest::prelude::*;

use super::*;

/// The API server, the ReplicaSet controller and the pods, in miniature.
struct World {
    deployment: Deployment,
    sets: Vec<ReplicaSet>,
    /// Ready and unready pods, by ReplicaSet name.
    pods: BTreeMap<String, (i32, i32)>,
    serial: i64,
}

fn template(image: &str) -> PodTemplateSpec {
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(StringMap::from([("app".into(), "web".into())])),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            containers: vec![Container { image: Some(image.into()), ..Container::default() }],
            ..PodSpec::default()
        }),
    }
}

fn now() -> Timestamp {
    Timestamp::from_second(1_000).expect("in range")
}

impl World {
    fn new(replicas: i32, surge: i32, unavailable: i32) -> Self {
        let deployment = Deployment {
            metadata: ObjectMeta {
                name: Some("web".into()),
                uid: Some("web-uid".into()),
                generation: Some(1),
                ..ObjectMeta::default()
            },
            spec: Some(DeploymentSpec {
                replicas: Some(replicas),
                progress_deadline_seconds: Some(600),
                revision_history_limit: Some(2),
                selector: LabelSelector {
                    match_labels: Some(StringMap::from([("app".into(), "web".into())])),
                    match_expressions: None,
                },
                strategy: Some(DeploymentStrategy {
                    type_: Some("RollingUpdate".into()),
                    rolling_update: Some(RollingUpdateDeployment {
                        max_surge: Some(IntOrString::Int(surge)),
                        max_unavailable: Some(IntOrString::Int(unavailable)),
                    }),
                }),
                template: template("v1"),
                ..DeploymentSpec::default()
            }),
            status: None,
        };
        World { deployment, sets: Vec::new(), pods: BTreeMap::new(), serial: 0 }
    }

    fn spec(&mut self) -> &mut DeploymentSpec {
        *self.deployment.metadata.generation.get_or_insert_default() += 1;
        self.deployment.spec.as_mut().expect("fixture has a spec")
    }

    fn plan(&self) -> Plan {
        let sets: Vec<_> = self.sets.iter().cloned().map(Arc::new).collect();
        plan(&Observed { deployment: &self.deployment, replica_sets: &sets, pods: &[] }, now())
    }

    /// One pass of the Deployment controller. True when it wrote anything.
    fn step(&mut self) -> bool {
        let plan = self.plan();
        let wrote = !plan.actions.is_empty() || plan.status.is_some();
        for action in plan.actions {
            self.carry_out(action);
        }
        if plan.status.is_some() {
            self.deployment.status = plan.status;
        }
        wrote
    }

    fn carry_out(&mut self, action: Action) {
        self.serial += 1;
        match action {
            Action::CreateReplicaSet(mut set) => {
                set.metadata.uid.clone_from(&set.metadata.name);
                set.metadata.generation = Some(1);
                set.metadata.creation_timestamp = Timestamp::from_second(self.serial).ok().map(Time);
                assert!(self.find(object::name(&set.metadata)).is_none(), "created twice");
                self.sets.push(*set);
            }
            Action::UpdateReplicaSet(update) => {
                let set = self.find(&update.name).expect("updates an existing set");
                set.metadata.annotations.get_or_insert_default().extend(update.annotations);
                if let Some(resize) = update.resize {
                    *set.metadata.generation.get_or_insert_default() += 1;
                    set.spec.as_mut().expect("has a spec").replicas = Some(resize.to);
                }
            }
            Action::DeleteReplicaSet { name, .. } => {
                assert_eq!(self.pods.get(&name).copied().unwrap_or_default(), (0, 0));
                self.sets.retain(|set| object::name(&set.metadata) != name);
            }
            Action::AnnotateDeployment(annotations) => {
                self.deployment.metadata.annotations.get_or_insert_default().extend(annotations);
            }
        }
    }

    fn find(&mut self, name: &str) -> Option<&mut ReplicaSet> {
        self.sets.iter_mut().find(|set| object::name(&set.metadata) == name)
    }

    /// The ReplicaSet controller makes the pods of one set match its size.
    fn sync_pods(&mut self, index: usize) -> bool {
        let Some(set) = self.sets.get(index) else { return false };
        let wanted = replica_set::replicas(set);
        let (ready, unready) = self.pods.entry(object::name(&set.metadata).to_owned()).or_default();
        let before = (*ready, *unready);
        *unready += (wanted - *ready - *unready).max(0);
        let surplus = *ready + *unready - wanted;
        let of_unready = surplus.clamp(0, *unready);
        *unready -= of_unready;
        *ready -= (surplus - of_unready).max(0);
        before != (*ready, *unready)
    }

    fn report(&mut self, index: usize) -> bool {
        let Some(set) = self.sets.get_mut(index) else { return false };
        let (ready, unready) = self.pods.get(object::name(&set.metadata)).copied().unwrap_or_default();
        let status = ReplicaSetStatus {
            replicas: ready + unready,
            ready_replicas: Some(ready),
            available_replicas: Some(ready),
            observed_generation: set.metadata.generation,
            ..ReplicaSetStatus::default()
        };
        let changed = set.status.as_ref() != Some(&status);
        set.status = Some(status);
        changed
    }

    fn make_one_ready(&mut self, index: usize) -> bool {
        let Some(set) = self.sets.get(index) else { return false };
        match self.pods.get_mut(object::name(&set.metadata)) {
            Some((ready, unready)) if *unready > 0 => {
                *unready -= 1;
                *ready += 1;
                true
            }
            _ => false,
        }
    }

    /// Runs everything until nothing changes any more.
    fn settle(&mut self, mut check: impl FnMut(&World)) {
        for _ in 0..10_000 {
            let mut changed = self.step();
            check(self);
            for index in 0..self.sets.len() {
                changed |= self.sync_pods(index);
                check(self);
                changed |= self.make_one_ready(index);
                changed |= self.report(index);
            }
            if !changed {
                return;
            }
        }
        panic!("the rollout does not come to an end");
    }

    fn available(&self) -> i32 {
        self.pods.values().map(|(ready, _)| ready).sum()
    }

    fn total(&self) -> i32 {
        self.sets.iter().map(replica_set::replicas).sum()
    }

    fn active(&self) -> Vec<(&str, i32)> {
        let active = self.sets.iter().filter(|set| replica_set::replicas(set) > 0);
        active
            .map(|set| {
                let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
                let containers = template.and_then(|template| template.spec.as_ref()).map(|s| &s.containers);
                let image = containers.and_then(|containers| containers[0].image.as_deref());
                (image.unwrap_or_default(), replica_set::replicas(set))
            })
            .collect()
    }

    fn progressing(&self) -> (String, String) {
        let status = self.deployment.status.as_ref().expect("has a status");
        let conditions = status.conditions.as_ref().expect("has conditions");
        let progressing =
            conditions.iter().find(|condition| condition.type_ == "Progressing").expect("is reported");
        (progressing.status.clone(), progressing.reason.clone().unwrap_or_default())
    }

    fn revision(&self) -> &str {
        object::annotation(&self.deployment.metadata, REVISION).unwrap_or_default()
    }
}

#[test]
fn the_first_step_creates_the_whole_replica_set() {
    let mut world = World::new(3, 1, 0);
    assert!(world.step());
    assert_eq!(world.active(), [("v1", 3)]);
    let set = &world.sets[0];
    assert_eq!(object::annotation(&set.metadata, REVISION), Some("1"));
    assert_eq!(object::annotation(&set.metadata, MAX_REPLICAS), Some("4"));
    let labels = set.metadata.labels.as_ref().expect("labels");
    assert!(object::name(&set.metadata).ends_with(&labels[POD_TEMPLATE_HASH]));
    assert_eq!(world.progressing(), ("True".into(), "NewReplicaSetCreated".into()));
    world.settle(|_| ());
    assert_eq!(world.progressing(), ("True".into(), "NewReplicaSetAvailable".into()));
    assert_eq!(world.revision(), "1");
}

#[test]
fn an_undo_reuses_the_old_set_with_a_new_revision() {
    let mut world = World::new(3, 1, 1);
    world.settle(|_| ());
    world.spec().template = template("v2");
    world.settle(|_| ());
    assert_eq!((world.active(), world.revision()), (vec![("v2", 3)], "2"));
    world.spec().template = template("v1");
    world.settle(|_| ());
    assert_eq!((world.active(), world.revision()), (vec![("v1", 3)], "3"));
    assert_eq!(world.sets.len(), 2, "no third set was made");
    let history = object::annotation(&world.sets[0].metadata, "deployment.kubernetes.io/revision-history");
    assert_eq!(history, Some("1"));
}

#[test]
fn old_sets_beyond_the_history_limit_go() {
    let mut world = World::new(1, 1, 0);
    for version in ["v1", "v2", "v3", "v4", "v5"] {
        world.spec().template = template(version);
        world.settle(|_| ());
    }
    assert_eq!(world.sets.len(), 3, "the current one and two old ones");
    assert_eq!(world.revision(), "5");
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll_out() {
    let mut world = World::new(2, 1, 0);
    world.settle(|_| ());
    world.spec().paused = Some(true);
    world.spec().template = template("v2");
    world.spec().replicas = Some(4);
    world.settle(|_| ());
    assert_eq!(world.active(), [("v1", 4)]);
    assert_eq!(world.progressing().1, "DeploymentPaused");
    world.spec().paused = Some(false);
    world.settle(|_| ());
    assert_eq!(world.active(), [("v2", 4)]);
}

#[test]
fn scaling_in_mid_rollout_keeps_the_proportions() {
    let mut world = World::new(10, 3, 2);
    world.settle(|_| ());
    world.spec().template = template("v2");
    world.step();
    world.step();
    assert_eq!(world.active(), [("v1", 8), ("v2", 3)]);
    world.step();
    let before = world.active().iter().map(|(_, size)| *size).collect::<Vec<_>>();
    world.spec().replicas = Some(20);
    world.step();
    let after = world.active().iter().map(|(_, size)| *size).collect::<Vec<_>>();
    assert_eq!(after.iter().sum::<i32>(), 23, "twenty and the surge");
    assert!(after[0] > before[0] && after[1] > before[1], "{before:?} → {after:?}");
    world.settle(|_| ());
    assert_eq!(world.active(), [("v2", 20)]);
}

#[test]
fn recreate_never_runs_two_versions() {
    let mut world = World::new(3, 0, 0);
    world.spec().strategy = Some(DeploymentStrategy { type_: Some("Recreate".into()), rolling_update: None });
    world.settle(|_| ());
    world.spec().template = template("v2");
    world.settle(|world| {
        let running = world.pods.values().filter(|(ready, unready)| ready + unready > 0).count();
        assert!(running <= 1);
    });
    assert_eq!(world.active(), [("v2", 3)]);
}

#[test]
fn a_stuck_rollout_times_out_and_says_so() {
    let mut world = World::new(2, 1, 0);
    world.settle(|_| ());
    world.spec().template = template("broken");
    while world.step() {}
    let sets: Vec<_> = world.sets.iter().cloned().map(Arc::new).collect();
    let observed = Observed { deployment: &world.deployment, replica_sets: &sets, pods: &[] };
    let waiting = plan(&observed, now());
    assert_eq!(waiting.requeue_after, Some(SignedDuration::from_secs(601)));
    let late = plan(&observed, now() + SignedDuration::from_secs(601));
    world.deployment.status = late.status;
    assert_eq!(world.progressing(), ("False".into(), "ProgressDeadlineExceeded".into()));
    assert_eq!(world.available(), 2, "the old pods still serve");
}

#[test]
fn a_hash_collision_changes_the_next_name() {
    let mut world = World::new(1, 1, 0);
    world.step();
    let ours = world.sets[0].clone();
    assert_eq!(resolve_collision(&world.deployment, &ours), Collision::Ours);
    let mut other = ours;
    other.spec.as_mut().expect("spec").template = Some(template("other"));
    let Collision::Retry(status) = resolve_collision(&world.deployment, &other) else {
        panic!("must count the collision")
    };
    let before = template_hash(&template("v1"), None);
    assert_ne!(template_hash(&template("v1"), status.collision_count), before);
}

proptest! {
    /// Whatever the order of events, a rollout keeps its promises at every moment and comes to an end.
    #[test]
    fn rollouts_keep_their_promises(
        replicas in 1..12_i32,
        surge in 0..4_i32,
        unavailable in 0..4_i32,
        events in prop::collection::vec((0..5_u8, 0..4_usize), 0..80),
    ) {
        let mut world = World::new(replicas, surge, unavailable);
        world.settle(|_| ());
        let sizes = Sizes::of(world.deployment.spec.as_ref().expect("spec"));
        let check = |world: &World| {
            assert!(world.total() <= sizes.most(), "too many pods: {:?}", world.active());
            assert!(
                world.available() >= sizes.fewest_available(),
                "too few available: {:?} {:?}", world.pods, sizes
            );
        };
        world.spec().template = template("v2");
        for (index, (event, which)) in events.into_iter().enumerate() {
            match event {
                0 => { world.step(); }
                1 => { world.sync_pods(which); }
                2 => { world.make_one_ready(which); }
                3 => { world.report(which); }
                _ if index % 7 == 0 => world.spec().template = template(&format!("v{}", which + 2)),
                _ => {}
            }
            check(&world);
        }
        world.spec().template = template("last");
        world.settle(check);
        prop_assert_eq!(world.active(), vec![("last", replicas)]);
        prop_assert_eq!(world.available(), replicas);
    }
}

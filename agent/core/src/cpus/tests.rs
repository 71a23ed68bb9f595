//! What containers get, on machines of several shapes.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// A machine whose siblings are numbered as Linux does on most: first all first threads, then all second ones.
fn machine(sockets: u32, cores: u32, threads: u32) -> Topology {
    let mut topology = Topology::new();
    for thread in 0..threads {
        for socket in 0..sockets {
            for core in 0..cores {
                let core = socket * cores + core;
                topology.insert(thread * sockets * cores + core, Place { socket, core, node: socket });
            }
        }
    }
    topology
}

fn policy(topology: Topology, reserved: &str) -> Policy {
    Policy { topology, reserved: reserved.parse().unwrap(), options: Options::default() }
}

fn container(name: &str, cpu: &str) -> Value {
    let amounts = json!({"cpu": cpu, "memory": "1Gi"});
    json!({"name": name, "resources": {"requests": amounts, "limits": amounts}})
}

fn pod(uid: &str, containers: &[Value]) -> Pod {
    serde_json::from_value(json!({"metadata": {"uid": uid}, "spec": {"containers": containers}})).unwrap()
}

fn set(text: &str) -> CpuSet {
    text.parse().unwrap()
}

#[test]
fn sets_are_written_as_the_kernel_writes_them() {
    for text in ["", "0", "0-3", "0-1,3,8-10"] {
        assert_eq!(set(text).to_string(), text);
    }
    assert_eq!(set("3,1,2\n").to_string(), "1-3");
    for wrong in ["a", "3-1", "1,,2", "-1", "0-4294967295"] {
        assert!(wrong.parse::<CpuSet>().is_err(), "{wrong}");
    }
}

#[test]
fn whole_sockets_and_cores_are_taken_first() {
    let policy = policy(machine(2, 4, 2), "0,8");
    let mut assignments = Assignments::default();
    let mut give = |uid: &str, cpu: &str| {
        policy.assign(&mut assignments, &pod(uid, &[container("a", cpu)])).unwrap();
        assignments.of(uid, "a").unwrap().to_string()
    };
    assert_eq!(give("socket", "8"), "4-7,12-15", "the socket that is whole");
    assert_eq!(give("core", "2"), "1,9", "both threads of one core");
    assert_eq!(give("thread", "1"), "2");
    assert_eq!(give("other", "1"), "10", "the core that is broken up already");
    assert_eq!(policy.shared(&assignments).to_string(), "0,3,8,11");
    let error = policy.assign(&mut assignments, &pod("late", &[container("a", "4")])).unwrap_err();
    assert_eq!(error.to_string(), "not enough cpus available to satisfy request: requested=4, available=2");
    assert!(assignments.release("socket") && !assignments.release("socket"));
    assert_eq!(policy.shared(&assignments).len(), 12);
}

#[test]
fn only_whole_processors_of_guaranteed_pods_are_exclusive() {
    let policy = policy(machine(1, 4, 1), "0");
    let mut assignments = Assignments::default();
    policy.assign(&mut assignments, &pod("part", &[container("a", "1500m")])).unwrap();
    let burstable = json!({"name": "a", "resources": {"requests": {"cpu": "1"}}});
    policy.assign(&mut assignments, &pod("burstable", &[burstable])).unwrap();
    assert_eq!(assignments, Assignments::default());
    policy.assign(&mut assignments, &pod("mixed", &[container("a", "1"), container("b", "100m")])).unwrap();
    assert_eq!((assignments.of("mixed", "a"), assignments.of("mixed", "b")), (Some(set("1")), None));
}

#[test]
fn init_containers_use_the_processors_of_those_that_follow() {
    let policy = policy(machine(1, 8, 1), "0");
    let mut assignments = Assignments::default();
    let mut sidecar = container("log", "1");
    sidecar["restartPolicy"] = json!("Always");
    let spec = json!({"metadata": {"uid": "u"}, "spec": {
        "initContainers": [container("small", "1"), sidecar, container("big", "4")],
        "containers": [container("main", "2")],
    }});
    policy.assign(&mut assignments, &serde_json::from_value(spec).unwrap()).unwrap();
    let of = |name: &str| assignments.of("u", name).unwrap();
    assert_eq!((of("log").len(), of("main").len(), of("big").len()), (1, 2, 4));
    assert!(of("log").is_disjoint(&of("main")));
    assert!(of("small").is_subset(&of("big")) && of("main").is_subset(&of("big")));
    assert_eq!(assignments.taken().len(), 4, "not the sum of all");
}

#[test]
fn whole_cores_only_where_that_is_wanted() {
    let mut policy = policy(machine(1, 2, 2), "");
    policy.options.full_cores_only = true;
    let mut assignments = Assignments::default();
    let error = policy.assign(&mut assignments, &pod("odd", &[container("a", "1")])).unwrap_err();
    assert_eq!(error.to_string(), "SMT Alignment Error: requested 1 cpus not multiple cpus per core = 2");
    policy.assign(&mut assignments, &pod("even", &[container("a", "2")])).unwrap();
    assert_eq!(assignments.of("even", "a"), Some(set("0,2")));
}

#[test]
fn reserved_ones_are_shared_unless_that_is_forbidden() {
    let mut policy = policy(machine(1, 4, 1), "0-1");
    assert_eq!(policy.shared(&Assignments::default()).to_string(), "0-3");
    policy.options.strict_reservation = true;
    assert_eq!(policy.shared(&Assignments::default()).to_string(), "2-3");
    assert_eq!(Policy::reserve(&machine(1, 4, 2), 2).unwrap().to_string(), "0,4");
    assert_eq!(Policy::reserve(&machine(1, 2, 1), 3), None);
}

proptest! {
    /// Whatever comes and goes: nobody shares, nobody gets what is kept, everybody gets what it asked for.
    #[test]
    fn exclusive_is_exclusive(
        (sockets, cores, threads) in (1_u32..4, 1_u32..6, 1_u32..3),
        kept in 0_usize..4,
        steps in proptest::collection::vec((0_u8..6, 1_usize..9, any::<bool>()), 1..40),
    ) {
        let topology = machine(sockets, cores, threads);
        let reserved = Policy::reserve(&topology, kept.min(topology.len())).unwrap();
        let policy = Policy { topology, reserved: reserved.clone(), options: Options::default() };
        let mut assignments = Assignments::default();
        for (uid, count, comes) in steps {
            let uid = uid.to_string();
            if !comes {
                assignments.release(&uid);
                continue;
            }
            let before = assignments.clone();
            let is_new = !before.0.contains_key(&uid);
            let free = policy.all().minus(&before.taken()).minus(&reserved).len();
            match policy.assign(&mut assignments, &pod(&uid, &[container("a", &count.to_string())])) {
                Ok(()) if is_new => prop_assert_eq!(assignments.of(&uid, "a").unwrap().len(), count),
                Ok(()) => prop_assert_eq!(&assignments, &before),
                Err(_) => {
                    prop_assert!(free < count);
                    prop_assert_eq!(&assignments, &before);
                }
            }
            let sets: Vec<CpuSet> = assignments.0.keys().filter_map(|uid| assignments.of(uid, "a")).collect();
            prop_assert_eq!(sets.iter().map(CpuSet::len).sum::<usize>(), assignments.taken().len(), "disjoint");
            prop_assert!(assignments.taken().is_disjoint(&reserved));
            prop_assert!(reserved.is_subset(&policy.shared(&assignments)));
            prop_assert_eq!(policy.shared(&assignments).union(&assignments.taken()), policy.all());
        }
    }

    #[test]
    fn sets_survive_being_written(numbers in proptest::collection::btree_set(0_u32..300, 0..40)) {
        let set: CpuSet = numbers.into_iter().collect();
        prop_assert_eq!(set.to_string().parse::<CpuSet>(), Ok(set));
    }
}

#[test]
fn hints_tell_which_nodes_have_enough() {
    let policy = policy(machine(2, 4, 1), "0");
    let mut assignments = Assignments::default();
    let near = Some([0].into_iter().collect());
    let alone = |uid: &str, cpu: &str| {
        let pod = pod(uid, &[container("a", cpu)]);
        let container = pod.spec.as_ref().unwrap().containers[0].clone();
        (pod, container)
    };
    let hinted = |assignments: &Assignments, uid: &str, cpu: &str| {
        let (pod, container) = alone(uid, cpu);
        policy.hints(assignments, &pod, &container).map(|hints| {
            let text = hints
                .iter()
                .map(|hint| format!("{}{}", hint.nodes.unwrap(), if hint.preferred { "!" } else { "" }));
            text.collect::<Vec<_>>().join(" ")
        })
    };
    assert_eq!(hinted(&assignments, "u", "500m"), None, "shared ones are everywhere");
    assert_eq!(hinted(&assignments, "u", "2").unwrap(), "0! 1! 0-1");
    assert_eq!(hinted(&assignments, "u", "4").unwrap(), "1! 0-1", "one is reserved");
    assert_eq!(hinted(&assignments, "u", "5").unwrap(), "0-1!", "no node has as many");
    assert_eq!(hinted(&assignments, "u", "8").unwrap(), "", "nothing has");
    let (pod, container) = alone("v", "3");
    policy.assign_container(&mut assignments, &pod, &container, near).unwrap();
    assert_eq!(assignments.of("v", "a").unwrap().to_string(), "1-3");
    assert_eq!(hinted(&assignments, "v", "3").unwrap(), "0! 0-1", "what it has");
    assert_eq!(hinted(&assignments, "u", "2").unwrap(), "1! 0-1");
    let (pod, container) = alone("w", "2");
    policy.assign_container(&mut assignments, &pod, &container, near).unwrap();
    assert_eq!(assignments.of("w", "a").unwrap().to_string(), "4-5", "nothing is left of the nearer ones");
}

//! Scenarios of a node that runs short.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::*;

const MIB: u64 = 1 << 20;
const TRANSITION: Duration = Duration::from_secs(300);

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[derive(Default)]
struct Given {
    hard: Option<BTreeMap<String, String>>,
    soft: BTreeMap<String, String>,
    grace: BTreeMap<String, Duration>,
    reclaim: BTreeMap<String, String>,
    merge: bool,
    enforced: bool,
}

impl Given {
    fn parse(&self) -> Result<Vec<Threshold>, Vec<String>> {
        parse_thresholds(ThresholdSettings {
            hard: self.hard.as_ref(),
            soft: &self.soft,
            soft_grace: &self.grace,
            minimum_reclaim: &self.reclaim,
            merge_defaults: self.merge,
            pods_enforced: self.enforced,
        })
    }

    fn signals(&self) -> String {
        let names: Vec<&str> =
            self.parse().expect("good").iter().map(|threshold| threshold.signal.as_str()).collect();
        names.join(" ")
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).expect("in range")
}

fn left(mib: u64) -> BTreeMap<Signal, Observation> {
    let observation = Observation { available: mib * MIB, capacity: 1000 * MIB };
    BTreeMap::from([(Signal::MemoryAvailable, observation)])
}

#[test]
fn configurations_mean_what_they_mean_upstream() {
    let all = "memory.available nodefs.available nodefs.inodesFree imagefs.available imagefs.inodesFree";
    assert_eq!(Given::default().signals(), all);
    assert_eq!(Given { hard: Some(map(&[])), ..Given::default() }.signals(), "");
    let one = Some(map(&[("pid.available", "10%")]));
    assert_eq!(Given { hard: one.clone(), ..Given::default() }.signals(), "pid.available");
    assert_eq!(
        Given { hard: one, merge: true, ..Given::default() }.signals(),
        format!("{all} pid.available")
    );
    let off = Given {
        hard: Some(map(&[("nodefs.available", "0%"), ("memory.available", "7.5%")])),
        ..Given::default()
    };
    let thresholds = off.parse().expect("good");
    assert_eq!(thresholds.len(), 1, "0% switches a threshold off");
    assert_eq!(thresholds[0].value.of(1000), 75);
}

#[test]
fn what_holds_for_the_nodes_memory_holds_for_that_of_pods() {
    let enforced = Given { enforced: true, ..Given::default() };
    let thresholds = enforced.parse().expect("good");
    let value = |signal| thresholds.iter().find(|known| known.signal == signal).map(|known| known.value);
    assert_eq!(value(Signal::AllocatableMemoryAvailable), value(Signal::MemoryAvailable));
    assert!(value(Signal::AllocatableMemoryAvailable).is_some());
    let pods_fill_their_share = BTreeMap::from([
        (Signal::MemoryAvailable, Observation { available: 500 * MIB, capacity: 1000 * MIB }),
        (Signal::AllocatableMemoryAvailable, Observation { available: 50 * MIB, capacity: 600 * MIB }),
    ]);
    let decision = State::default().decide(&thresholds, &pods_fill_their_share, TRANSITION, at(0));
    assert_eq!(decision.pressures, BTreeSet::from([Pressure::Memory]));
    assert_eq!(decision.due[0].signal, Signal::AllocatableMemoryAvailable);
}

#[test]
fn the_containers_file_system_has_the_thresholds_of_what_it_is() {
    let given = Given {
        hard: Some(map(&[
            ("nodefs.available", "10%"),
            ("imagefs.available", "15%"),
            ("containerfs.available", "50%"),
        ])),
        ..Given::default()
    };
    let thresholds = given.parse().expect("good");
    assert!(thresholds.iter().all(|known| known.signal != Signal::ContainerFsAvailable));
    let derived = |on_node_fs| {
        let derived = for_container_fs(&thresholds, on_node_fs);
        assert_eq!(derived.len(), 1);
        assert_eq!(derived[0].signal, Signal::ContainerFsAvailable);
        derived[0].value.of(1000)
    };
    assert_eq!((derived(true), derived(false)), (100, 150));
}

#[test]
fn what_cannot_work_is_named() {
    let bad = Given {
        hard: Some(map(&[
            ("memory.available", "lots"),
            ("disk.available", "1Gi"),
            ("nodefs.available", "101%"),
        ])),
        soft: map(&[("memory.available", "200Mi")]),
        grace: BTreeMap::from([("pid.available".to_owned(), Duration::from_secs(1))]),
        reclaim: map(&[("memory.available", "-1")]),
        ..Given::default()
    };
    let problems = bad.parse().expect_err("five problems").join("\n");
    for part in [
        "evictionHard memory.available \"lots\": expected an amount",
        "evictionHard: unknown eviction signal \"disk.available\", known are memory.available,",
        "evictionHard nodefs.available \"101%\": must be at most 100%",
        "evictionMinimumReclaim memory.available \"-1\": must be above 0",
        "evictionSoftGracePeriod must be specified for the soft eviction threshold memory.available",
        "evictionSoftGracePeriod pid.available has no threshold in evictionSoft",
    ] {
        assert!(problems.contains(part), "{part} in {problems}");
    }
}

#[test]
fn a_hard_threshold_acts_at_once_and_the_pressure_stays_a_while() {
    let thresholds = Given::default().parse().expect("good");
    let mut state = State::default();
    let calm = state.decide(&thresholds, &left(100), TRANSITION, at(0));
    assert_eq!(calm, Decision::default());
    let low = state.decide(&thresholds, &left(99), TRANSITION, at(10));
    assert_eq!((low.due.len(), low.pressures), (1, BTreeSet::from([Pressure::Memory])));
    let after = state.decide(&thresholds, &left(500), TRANSITION, at(309));
    assert_eq!((after.due.len(), after.pressures), (0, BTreeSet::from([Pressure::Memory])));
    assert_eq!(state.decide(&thresholds, &left(500), TRANSITION, at(310)).pressures, BTreeSet::new());
}

#[test]
fn a_soft_threshold_waits_for_its_grace_and_forgets_an_interruption() {
    let given = Given {
        hard: Some(map(&[])),
        soft: map(&[("memory.available", "30%")]),
        grace: BTreeMap::from([("memory.available".to_owned(), Duration::from_secs(60))]),
        ..Given::default()
    };
    let thresholds = given.parse().expect("good");
    let mut state = State::default();
    let first = state.decide(&thresholds, &left(299), TRANSITION, at(0));
    assert_eq!((first.due.len(), first.wake_at, first.pressures.len()), (0, Some(at(60)), 1));
    state.decide(&thresholds, &left(300), TRANSITION, at(30));
    assert!(state.decide(&thresholds, &left(299), TRANSITION, at(60)).due.is_empty());
    assert_eq!(state.decide(&thresholds, &left(299), TRANSITION, at(120)).due.len(), 1);
}

#[test]
fn the_minimum_reclaim_must_be_free_too() {
    let given = Given {
        hard: Some(map(&[("memory.available", "100Mi")])),
        reclaim: map(&[("memory.available", "50Mi")]),
        ..Given::default()
    };
    let thresholds = given.parse().expect("good");
    let mut state = State::default();
    assert!(state.decide(&thresholds, &left(149), TRANSITION, at(0)).due.is_empty());
    assert_eq!(state.decide(&thresholds, &left(99), TRANSITION, at(1)).due.len(), 1);
    assert_eq!(state.decide(&thresholds, &left(149), TRANSITION, at(2)).due.len(), 1);
    assert!(state.decide(&thresholds, &left(150), TRANSITION, at(3)).due.is_empty());
}

fn pod(name: &str, priority: i32, request_mib: u64, used_mib: u64) -> PodUse {
    let resources = if request_mib == 0 {
        json!({})
    } else {
        json!({"requests": {"memory": format!("{request_mib}Mi")}})
    };
    let pod = json!({"metadata": {"name": name, "uid": name}, "spec": {"priority": priority,
        "containers": [{"name": "c", "resources": resources}]}});
    PodUse {
        pod: Arc::new(serde_json::from_value(pod).expect("a pod")),
        containers: BTreeMap::from([("c".to_owned(), ContainerUse { memory: used_mib * MIB, disk: 0 })]),
        volumes: 0,
        inodes: 0,
        processes: used_mib,
    }
}

#[track_caller]
fn check_order(signal: Signal, expected: &str) {
    let mut pods = vec![
        pod("guaranteed", 0, 100, 90),
        pod("greedy", 0, 10, 200),
        pod("small", 0, 0, 5),
        pod("important", 100, 0, 500),
        pod("modest", 0, 300, 250),
    ];
    rank(signal, &mut pods);
    let names: Vec<&str> = pods.iter().filter_map(|pod| pod.pod.metadata.name.as_deref()).collect();
    assert_eq!(names.join(" "), expected);
}

#[test]
fn those_above_their_request_go_first_then_by_priority_and_excess() {
    check_order(Signal::MemoryAvailable, "greedy small important guaranteed modest");
    check_order(Signal::PidAvailable, "modest greedy guaranteed small important");
}

#[test]
fn the_victim_is_told_why() {
    let threshold = &Given::default().parse().expect("good")[0];
    let observed = Observation { available: 50 * MIB + 1024, capacity: 1000 * MIB };
    assert_eq!(
        message(threshold, observed, &pod("p", 0, 10, 200)),
        "The node was low on resource: memory. Threshold quantity: 100Mi, available: 51201Ki. Container c was using \
         200Mi, request is 10Mi, has larger consumption of memory. "
    );
    let pids = Threshold { signal: Signal::PidAvailable, value: Amount::Absolute(2000), ..threshold.clone() };
    let observed = Observation { available: 1500, capacity: 4000 };
    assert_eq!(
        message(&pids, observed, &pod("p", 0, 10, 200)),
        "The node was low on resource: pids. Threshold quantity: 2k, available: 1500. "
    );
}

#[test]
fn who_may_come_while_the_node_is_short() {
    let pod = |spec: Value| -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).expect("a pod")
    };
    let plain = pod(json!({"containers": [{"name": "c"}]}));
    let requests = json!({"requests": {"memory": "1Mi"}});
    let burstable = pod(json!({"containers": [{"name": "c", "resources": requests}]}));
    let tolerant = pod(json!({"containers": [{"name": "c"}],
        "tolerations": [{"key": "node.kubernetes.io/memory-pressure", "operator": "Exists", "effect": "NoSchedule"}]}));
    let critical = pod(json!({"priority": 2_000_001_000, "containers": [{"name": "c"}]}));
    let memory = BTreeSet::from([Pressure::Memory]);
    let disk = BTreeSet::from([Pressure::Memory, Pressure::Disk]);
    let why = admit(&plain, &memory).expect_err("refused");
    assert_eq!(
        (why.reason.as_str(), why.message.as_str()),
        ("Evicted", "The node had condition: [MemoryPressure]. ")
    );
    assert!(admit(&burstable, &memory).is_ok() && admit(&tolerant, &memory).is_ok());
    assert!(admit(&burstable, &disk).is_err() && admit(&tolerant, &disk).is_err());
    assert!(admit(&critical, &disk).is_ok() && admit(&plain, &BTreeSet::new()).is_ok());
}

#[test]
fn a_pod_over_its_own_limits_is_told_which() {
    let mut used = pod("p", 0, 0, 0);
    let spec = json!({"priority": 0, "volumes": [
            {"name": "v", "emptyDir": {"sizeLimit": "1Mi"}},
            {"name": "ram", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}],
        "containers": [
            {"name": "a", "resources": {"limits": {"ephemeral-storage": "2Mi"}}},
            {"name": "b", "resources": {"limits": {"ephemeral-storage": "2Mi"}}}]});
    used.pod =
        Arc::new(serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).expect("a pod"));
    assert!(has_disk_limits(&used.pod));
    assert_eq!(limited_volumes(used.pod.spec.as_ref().expect("a spec")).collect::<Vec<_>>(), ["v"]);
    let disk = |a: u64, b: u64| {
        let of = |mib: u64| ContainerUse { memory: 0, disk: mib * MIB };
        BTreeMap::from([("a".to_owned(), of(a)), ("b".to_owned(), of(b))])
    };
    let volumes = |mib: u64| BTreeMap::from([("v".to_owned(), mib * MIB), ("ram".to_owned(), 9 * MIB)]);
    used.containers = disk(2, 2);
    assert_eq!(over_limit(&used, &volumes(1)), None);
    let volume = over_limit(&used, &volumes(2));
    assert_eq!(volume.as_deref(), Some("Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". "));
    used.containers = disk(0, 3);
    let container = over_limit(&used, &volumes(0));
    assert_eq!(
        container.as_deref(),
        Some("Container b exceeded its local ephemeral storage limit \"2Mi\". ")
    );
    used.containers = disk(2, 2);
    used.volumes = 1;
    let pod = over_limit(&used, &volumes(0));
    assert_eq!(
        pod.as_deref(),
        Some("Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. ")
    );
    assert!(!has_disk_limits(&self::pod("q", 0, 0, 0).pod));
}

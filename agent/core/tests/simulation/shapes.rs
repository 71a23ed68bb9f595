//! Pods of many shapes. A container's name tells what it does once nothing disturbs it: `run` goes on, `job` ends well, `crash`
//! ends badly, `init` and `look` (ephemeral) end well, `side` (sidecar) goes on.

use k8s_openapi::api::core::v1::{Container, Pod};
use serde_json::{Value, json};

use crate::random::Random;

/// A new pod as the API server makes it.
pub(crate) fn pod(random: &mut Random, name: &str, uid: &str) -> Pod {
    let mains: Vec<Value> = (0..random.between(1, 4)).map(|index| main(random, index)).collect();
    let inits: Vec<Value> = (0..random.between(0, 4)).map(|index| init(random, index)).collect();
    let mut spec = json!({
        "restartPolicy": random.pick(&["Always", "Always", "OnFailure", "Never"]),
        "terminationGracePeriodSeconds": random.pick(&[0, 1, 5, 30, 60]),
        "containers": mains,
        "initContainers": inits,
        "hostNetwork": random.chance(10),
    });
    if random.chance(15) {
        spec["activeDeadlineSeconds"] = json!(random.between(20, 900));
    }
    let pod = json!({
        "metadata": {"name": name, "namespace": "ns", "uid": uid, "generation": 1},
        "spec": spec,
        "status": {"phase": "Pending"},
    });
    serde_json::from_value(pod).expect("a pod")
}

fn main(random: &mut Random, index: i64) -> Value {
    let kind = random.pick(&["run", "run", "run", "job", "crash"]);
    let mut main = container(random, &format!("{kind}-{index}"));
    if random.chance(15) {
        main["restartPolicy"] = json!("Never");
        let operator = random.pick(&["In", "NotIn"]);
        main["restartPolicyRules"] =
            json!([{"action": "Restart", "exitCodes": {"operator": operator, "values": [3, 42]}}]);
    }
    if random.chance(30) {
        main["readinessProbe"] = probe(random);
    }
    if random.chance(30) {
        main["livenessProbe"] = probe(random);
        if random.chance(30) {
            main["livenessProbe"]["terminationGracePeriodSeconds"] = json!(random.between(1, 20));
        }
    }
    with_startup(random, main)
}

fn init(random: &mut Random, index: i64) -> Value {
    if random.chance(50) {
        return container(random, &format!("init-{index}"));
    }
    let mut sidecar = container(random, &format!("side-{index}"));
    sidecar["restartPolicy"] = json!("Always");
    with_startup(random, sidecar)
}

fn container(random: &mut Random, name: &str) -> Value {
    let mut container = json!({"name": name, "image": "i:1"});
    if random.chance(15) && !name.starts_with("init") {
        container["lifecycle"] = json!({"postStart": {"exec": {"command": ["hello"]}}});
    }
    if random.chance(25) && !name.starts_with("init") {
        container["lifecycle"]["preStop"] = json!({"exec": {"command": ["bye"]}});
    }
    container
}

fn with_startup(random: &mut Random, mut container: Value) -> Value {
    if random.chance(20) {
        container["startupProbe"] = probe(random);
    }
    container
}

fn probe(random: &mut Random) -> Value {
    json!({
        "exec": {"command": ["true"]},
        "initialDelaySeconds": random.between(0, 3),
        "periodSeconds": random.between(1, 15),
        "failureThreshold": random.between(1, 4),
    })
}

/// What the container does when nothing disturbs it: how long it runs, in milliseconds, and what it ends with.
pub(crate) fn life(random: &mut Random, container: &str) -> Option<(i64, i32)> {
    match container.split('-').next().unwrap_or_default() {
        "run" | "side" => None,
        "crash" => Some((random.between(100, 3000), 1)),
        _ => Some((random.between(10, 5000), 0)),
    }
}

/// An ephemeral container that the pod is given.
pub(crate) fn ephemeral(pod: &Pod, name: &str) -> Value {
    let target = pod.spec.as_ref().and_then(|spec| spec.containers.first()).map(|main| main.name.clone());
    json!({"name": name, "image": "i:1", "targetContainerName": target})
}

/// Whether a hook is there: `postStart` or `preStop`.
pub(crate) fn has_hook(container: &Container, pre_stop: bool) -> bool {
    let lifecycle = container.lifecycle.as_ref();
    lifecycle
        .is_some_and(|hooks| if pre_stop { hooks.pre_stop.is_some() } else { hooks.post_start.is_some() })
}

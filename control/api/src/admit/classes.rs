//! What a pod's PriorityClass and RuntimeClass give it.

use serde_json::{Value, json};

use super::{SYSTEM_PRIORITIES, refused};
use crate::{
    status::ApiError,
    value::{ensure_map, int, list, map, set_default, text},
};

/// Fills in `priority` and `preemptionPolicy` from the class: the one that the pod names, or the default of those that name
/// none. The system's own classes are known without an object.
pub(super) fn add_priority(pod: &mut Value, class: Option<&Value>) -> Result<(), ApiError> {
    let name = text(pod, "/spec/priorityClassName").to_owned();
    let system = SYSTEM_PRIORITIES.iter().find(|(known, ..)| *known == name);
    let priority = match (class, system) {
        (Some(class), _) => int(class, "/value").unwrap_or(0),
        (None, Some((_, value, _))) => *value,
        (None, None) if name.is_empty() => 0,
        (None, None) => return Err(refused(pod, &format!("no PriorityClass with name {name} was found"))),
    };
    if let Some(asked) = int(pod, "/spec/priority").filter(|asked| *asked != priority) {
        return Err(refused(
            pod,
            &format!(
                "the integer value of priority ({asked}) must not be provided in pod spec; priority admission controller \
                 computed {priority} from the given PriorityClass name"
            ),
        ));
    }
    let policy = match class.map(|class| text(class, "/preemptionPolicy")) {
        None | Some("") => "PreemptLowerPriority",
        Some(policy) => policy,
    };
    let spec = &mut pod["spec"];
    spec["priority"] = json!(priority);
    if let (true, Some(class)) = (name.is_empty(), class) {
        spec["priorityClassName"] = json!(text(class, "/metadata/name"));
    }
    set_default(spec, "preemptionPolicy", policy);
    if text(spec, "/preemptionPolicy") != policy {
        let asked = text(spec, "/preemptionPolicy").to_owned();
        return Err(refused(
            pod,
            &format!(
                "the string value of PreemptionPolicy ({asked}) must not be provided in pod spec; priority admission \
                 controller computed {policy} from the given PriorityClass name"
            ),
        ));
    }
    Ok(())
}

/// Fills in the overhead, node selector and tolerations of the pod's RuntimeClass.
pub(super) fn add_runtime_class(pod: &mut Value, class: Option<&Value>) -> Result<(), ApiError> {
    let name = text(pod, "/spec/runtimeClassName").to_owned();
    let overhead = class.and_then(|class| class.pointer("/overhead/podFixed")).cloned();
    if let Some(asked) = pod.pointer("/spec/overhead")
        && Some(asked) != overhead.as_ref()
    {
        let why = if overhead.is_some() {
            "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead"
        } else {
            "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead"
        };
        return Err(refused(pod, why));
    }
    if name.is_empty() {
        return Ok(());
    }
    let Some(class) = class else {
        return Err(refused(pod, &format!("pod rejected: RuntimeClass \"{name}\" not found")));
    };
    if let Some(overhead) = overhead {
        pod["spec"]["overhead"] = overhead;
    }
    for (key, value) in map(class, "/scheduling/nodeSelector").into_iter().flatten() {
        let conflicts =
            map(pod, "/spec/nodeSelector").and_then(|own| own.get(key)).is_some_and(|own| own != value);
        if conflicts {
            return Err(refused(
                pod,
                "conflict: runtimeClass.scheduling.nodeSelector and pod.spec.nodeSelector",
            ));
        }
        if let Some(selector) = ensure_map(&mut pod["spec"], "nodeSelector") {
            selector.insert(key.clone(), value.clone());
        }
    }
    let extra: Vec<Value> = list(class, "/scheduling/tolerations")
        .iter()
        .filter(|toleration| !list(pod, "/spec/tolerations").contains(toleration))
        .cloned()
        .collect();
    if !extra.is_empty() {
        let mut all = list(pod, "/spec/tolerations").to_vec();
        all.extend(extra);
        pod["spec"]["tolerations"] = json!(all);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: &Value) -> Value {
        json!({"metadata": {"name": "p"}, "spec": spec})
    }

    #[test]
    fn priority_comes_from_the_class_and_from_nowhere_else() {
        let class = json!({"metadata": {"name": "high"}, "value": 1000, "preemptionPolicy": "Never"});
        let mut named = pod(&json!({"priorityClassName": "high"}));
        add_priority(&mut named, Some(&class)).unwrap();
        assert_eq!(
            (&named["spec"]["priority"], &named["spec"]["preemptionPolicy"]),
            (&json!(1000), &json!("Never"))
        );
        let mut unnamed = pod(&json!({}));
        add_priority(&mut unnamed, Some(&class)).unwrap();
        assert_eq!(unnamed["spec"]["priorityClassName"], "high");
        let mut plain = pod(&json!({}));
        add_priority(&mut plain, None).unwrap();
        assert_eq!((&plain["spec"]["priority"], plain["spec"].get("priorityClassName")), (&json!(0), None));
        let mut critical = pod(&json!({"priorityClassName": "system-node-critical"}));
        add_priority(&mut critical, None).unwrap();
        assert_eq!(critical["spec"]["priority"], 2_000_001_000);
        let error = add_priority(&mut pod(&json!({"priorityClassName": "x"})), None).unwrap_err();
        assert_eq!(error.message, "pods \"p\" is forbidden: no PriorityClass with name x was found");
        let error = add_priority(&mut pod(&json!({"priority": 7})), None).unwrap_err();
        assert!(error.message.contains("must not be provided in pod spec"), "{error}");
    }

    #[test]
    fn a_runtime_class_gives_overhead_and_place() {
        let class = json!({"handler": "h", "overhead": {"podFixed": {"memory": "10Mi"}},
            "scheduling": {"nodeSelector": {"kvm": "yes"}, "tolerations": [{"key": "kvm", "operator": "Exists"}]}});
        let mut object = pod(&json!({"runtimeClassName": "h"}));
        add_runtime_class(&mut object, Some(&class)).unwrap();
        assert_eq!(object["spec"]["overhead"], json!({"memory": "10Mi"}));
        assert_eq!(object["spec"]["nodeSelector"], json!({"kvm": "yes"}));
        assert_eq!(list(&object, "/spec/tolerations").len(), 1);
        add_runtime_class(&mut object, Some(&class)).unwrap();
        assert_eq!(list(&object, "/spec/tolerations").len(), 1, "once is enough");
        let missing = add_runtime_class(&mut pod(&json!({"runtimeClassName": "h"})), None).unwrap_err();
        assert_eq!(missing.message, "pods \"p\" is forbidden: pod rejected: RuntimeClass \"h\" not found");
        let foreign = pod(&json!({"overhead": {"cpu": "1"}}));
        assert!(add_runtime_class(&mut foreign.clone(), None).unwrap_err().message.contains("set without"));
    }
}

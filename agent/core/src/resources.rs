//! Sums of container resources: what a pod requests and may use. Pure.
//!
//! Quantities come in as the API's strings; an unparsable one counts as absent, because the API server has
//! validated them.

use std::collections::BTreeMap;

use control_api::quantity::Quantity as Number;
use k8s_openapi::api::core::v1::{Container, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::model::is_sidecar;

/// A list of resources, as in `requests` and `limits`.
pub type ResourceList = BTreeMap<String, Quantity>;

/// Which half of `resources` is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `requests`
    Requests,
    /// `limits`
    Limits,
}

/// The quantity in thousandths, rounded up; `None` when it does not parse.
pub fn milli(quantity: &Quantity) -> Option<i64> {
    Number::parse(&quantity.0).ok().map(Number::millis)
}

/// The quantity in whole units, rounded up; `None` when it does not parse.
pub fn whole(quantity: &Quantity) -> Option<i64> {
    Number::parse(&quantity.0).ok().map(Number::value)
}

/// `resources.<side>[name]` in thousandths for `cpu`, in whole units for all else.
pub fn amount(resources: Option<&ResourceRequirements>, side: Side, name: &str) -> Option<i64> {
    let list = match side {
        Side::Requests => resources?.requests.as_ref(),
        Side::Limits => resources?.limits.as_ref(),
    }?;
    let quantity = list.get(name)?;
    if name == "cpu" { milli(quantity) } else { whole(quantity) }
}

/// A container's request of `name`; a limit without a request is also the request (API defaulting does the same).
pub fn request(container: &Container, name: &str) -> i64 {
    let resources = container.resources.as_ref();
    amount(resources, Side::Requests, name).or_else(|| amount(resources, Side::Limits, name)).unwrap_or(0)
}

/// The pod's effective request of `name`, as the scheduler counts it: the larger of the containers' sum (sidecars
/// included) and the largest init step, plus overhead; pod-level resources win where given.
pub fn pod_request(spec: &PodSpec, name: &str) -> i64 {
    let overhead = overhead(spec, name);
    if let Some(pod_level) = amount(spec.resources.as_ref(), Side::Requests, name) {
        return pod_level + overhead;
    }
    let mut sidecars = 0_i64;
    let mut init_peak = 0_i64;
    for init in spec.init_containers.iter().flatten() {
        let needed = request(init, name);
        if is_sidecar(init) {
            sidecars += needed;
            init_peak = init_peak.max(sidecars);
        } else {
            init_peak = init_peak.max(sidecars + needed);
        }
    }
    let main: i64 = spec.containers.iter().map(|container| request(container, name)).sum();
    (main + sidecars).max(init_peak) + overhead
}

/// The pod's limit of `name`: the sum over its containers and sidecars, or `None` when one of them has none.
pub fn pod_limit(spec: &PodSpec, name: &str) -> Option<i64> {
    if let Some(pod_level) = amount(spec.resources.as_ref(), Side::Limits, name) {
        return Some(pod_level + overhead(spec, name));
    }
    let mut sum = 0_i64;
    for container in
        spec.containers.iter().chain(spec.init_containers.iter().flatten().filter(|c| is_sidecar(c)))
    {
        sum += amount(container.resources.as_ref(), Side::Limits, name)?;
    }
    let init_peak = spec
        .init_containers
        .iter()
        .flatten()
        .filter_map(|init| amount(init.resources.as_ref(), Side::Limits, name))
        .max()
        .unwrap_or(0);
    Some(sum.max(init_peak) + overhead(spec, name))
}

fn overhead(spec: &PodSpec, name: &str) -> i64 {
    spec.overhead
        .as_ref()
        .and_then(|list| list.get(name))
        .and_then(|quantity| if name == "cpu" { milli(quantity) } else { whole(quantity) })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_scale_and_round_up() {
        for (text, millis, units) in [
            ("100m", 100, 1),
            ("1", 1000, 1),
            ("0.5", 500, 1),
            ("1.5Gi", 1_610_612_736_000, 1_610_612_736),
            ("64Mi", 67_108_864_000, 67_108_864),
            ("1e3", 1_000_000, 1000),
            ("2k", 2_000_000, 2000),
            ("1u", 1, 1),
        ] {
            let quantity = Quantity(text.to_owned());
            assert_eq!((milli(&quantity), whole(&quantity)), (Some(millis), Some(units)), "{text}");
        }
        for text in ["", "abc", "1X", "1.2.3"] {
            assert_eq!(whole(&Quantity(text.to_owned())), None, "{text}");
        }
    }

    #[test]
    fn a_pod_requests_the_larger_of_init_and_main() {
        let spec: PodSpec = serde_json::from_value(serde_json::json!({
            "initContainers": [
                {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}},
                {"name": "once", "resources": {"requests": {"cpu": "1"}}}
            ],
            "containers": [
                {"name": "a", "resources": {"requests": {"cpu": "200m"}, "limits": {"cpu": "500m"}}},
                {"name": "b", "resources": {"limits": {"cpu": "300m"}}}
            ]
        }))
        .expect("a pod spec");
        assert_eq!(pod_request(&spec, "cpu"), 1100);
        assert_eq!(pod_limit(&spec, "cpu"), None, "the sidecar has no limit");
    }
}

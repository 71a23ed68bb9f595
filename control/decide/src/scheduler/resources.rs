//! Amounts of CPU, memory, storage and extended resources: what pods ask for and nodes offer.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Container, Pod, PodSpec, ResourceRequirements},
    apimachinery::pkg::api::resource::Quantity,
};

use crate::quantity::{milli_value, value};

/// A bundle of resource amounts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Thousandths of a core.
    pub milli_cpu: i64,
    /// Bytes.
    pub memory: i64,
    /// Bytes of node-local storage.
    pub ephemeral_storage: i64,
    /// Everything else (huge pages, devices), by resource name.
    pub extended: BTreeMap<String, i64>,
}

/// What a container without a request counts as when nodes are scored, so that such pods spread too.
const SCORED_CPU: i64 = 100;
const SCORED_MEMORY: i64 = 200 * 1024 * 1024;

impl Resources {
    /// Reads a resource list; `pods` is not an amount and is left out.
    pub fn of(list: Option<&BTreeMap<String, Quantity>>) -> Self {
        let mut resources = Resources::default();
        for (name, quantity) in list.into_iter().flatten() {
            match name.as_str() {
                "cpu" => resources.milli_cpu = milli_value(quantity),
                "memory" => resources.memory = value(quantity),
                "ephemeral-storage" => resources.ephemeral_storage = value(quantity),
                "pods" => {}
                _ => {
                    resources.extended.insert(name.clone(), value(quantity));
                }
            }
        }
        resources
    }

    /// What the pod occupies on its node: its containers and sidecars together, or its biggest init step,
    /// whichever is more; pod-level requests override; plus the overhead of its runtime class.
    pub fn requested_by(pod: &Pod) -> Self {
        pod.spec.as_ref().map(|spec| pod_requests(spec, &|list| Resources::of(list))).unwrap_or_default()
    }

    /// Like [`Self::requested_by`], with a small default for containers that ask for nothing.
    pub fn scored_for(pod: &Pod) -> Self {
        let with_defaults = |list: Option<&BTreeMap<String, Quantity>>| {
            let mut resources = Resources::of(list);
            if resources.milli_cpu == 0 {
                resources.milli_cpu = SCORED_CPU;
            }
            if resources.memory == 0 {
                resources.memory = SCORED_MEMORY;
            }
            resources
        };
        pod.spec.as_ref().map(|spec| pod_requests(spec, &with_defaults)).unwrap_or_default()
    }

    /// Adds the other amounts.
    pub fn add(&mut self, other: &Resources) {
        self.combine(other, i64::saturating_add);
    }

    /// Takes the other amounts away.
    pub fn subtract(&mut self, other: &Resources) {
        self.combine(other, i64::saturating_sub);
    }

    fn combine(&mut self, other: &Resources, operation: fn(i64, i64) -> i64) {
        self.milli_cpu = operation(self.milli_cpu, other.milli_cpu);
        self.memory = operation(self.memory, other.memory);
        self.ephemeral_storage = operation(self.ephemeral_storage, other.ephemeral_storage);
        for (name, amount) in &other.extended {
            let own = self.extended.entry(name.clone()).or_default();
            *own = operation(*own, *amount);
        }
        self.extended.retain(|_, amount| *amount != 0);
    }
}

type Reader<'a> = dyn Fn(Option<&BTreeMap<String, Quantity>>) -> Resources + 'a;

fn requests(resources: Option<&ResourceRequirements>) -> Option<&BTreeMap<String, Quantity>> {
    resources.and_then(|resources| resources.requests.as_ref())
}

fn pod_requests(spec: &PodSpec, read: &Reader<'_>) -> Resources {
    let of_container = |container: &Container| read(requests(container.resources.as_ref()));
    let mut running = Resources::default();
    for container in &spec.containers {
        running.add(&of_container(container));
    }
    let mut sidecars = Resources::default();
    let mut peak = Resources::default();
    for container in spec.init_containers.iter().flatten() {
        let own = of_container(container);
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars.add(&own);
            peak.combine(&sidecars, i64::max);
        } else {
            let mut step = sidecars.clone();
            step.add(&own);
            peak.combine(&step, i64::max);
        }
    }
    running.add(&sidecars);
    running.combine(&peak, i64::max);
    if let Some(pod_level) = requests(spec.resources.as_ref()) {
        let pod_level_amounts = Resources::of(Some(pod_level));
        if pod_level.contains_key("cpu") {
            running.milli_cpu = pod_level_amounts.milli_cpu;
        }
        if pod_level.contains_key("memory") {
            running.memory = pod_level_amounts.memory;
        }
    }
    running.add(&Resources::of(spec.overhead.as_ref()));
    running
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(cpu: &str, sidecar: bool) -> Container {
        Container {
            restart_policy: sidecar.then(|| "Always".to_owned()),
            resources: Some(ResourceRequirements {
                requests: Some([("cpu".to_owned(), Quantity(cpu.into()))].into()),
                ..ResourceRequirements::default()
            }),
            ..Container::default()
        }
    }

    #[test]
    fn init_steps_and_sidecars_count_as_documented() {
        for (description, init, main, expected) in [
            ("sum of containers", vec![], vec!["100m", "200m"], 300),
            ("big init step", vec![("1", false)], vec!["100m"], 1000),
            ("sidecar adds to containers", vec![("50m", true)], vec!["100m"], 150),
            ("init step after a sidecar", vec![("50m", true), ("1", false)], vec!["100m"], 1050),
        ] {
            let pod = Pod {
                spec: Some(PodSpec {
                    init_containers: Some(init.iter().map(|(cpu, side)| container(cpu, *side)).collect()),
                    containers: main.iter().map(|cpu| container(cpu, false)).collect(),
                    ..PodSpec::default()
                }),
                ..Pod::default()
            };
            assert_eq!(Resources::requested_by(&pod).milli_cpu, expected, "{description}");
        }
    }
}

//! When what a Service's endpoints follow has changed: told in its slices, so that a proxy can tell how late it is.
//!
//! As the stock controller has it: the earliest of what changed since the slices were last looked at, of the Service's creation and
//! the moments in which its pods became ready or ceased to be.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::{
    core::v1::{Pod, Service},
    discovery::v1::EndpointSlice,
};

use crate::object::uid;

/// Annotation of a slice: the moment, as RFC 3339 has it.
pub const LAST_CHANGE: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// What was last seen of each Service.
#[derive(Debug)]
pub struct Triggers<K>(BTreeMap<K, Seen>);

#[derive(Debug, Default)]
struct Seen {
    created: Option<Timestamp>,
    pods: BTreeMap<String, Timestamp>,
}

impl<K> Default for Triggers<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord> Triggers<K> {
    /// The earliest change since the last call for this key; `pods` are those that the Service selects.
    pub fn next<'p>(
        &mut self,
        key: K,
        service: &Service,
        pods: impl Iterator<Item = &'p Pod>,
    ) -> Option<Timestamp> {
        let before = self.0.remove(&key).unwrap_or_default();
        let created = service.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let pods: BTreeMap<String, Timestamp> =
            pods.filter_map(|pod| Some((uid(&pod.metadata).to_owned(), last_turn(pod)?))).collect();
        let of_pods = pods.iter().filter(|(pod, at)| before.pods.get(*pod).is_none_or(|seen| seen < at));
        let of_service = created.filter(|at| before.created.is_none_or(|seen| seen < *at));
        let earliest = of_pods.map(|(_, at)| *at).chain(of_service).min();
        self.0.insert(key, Seen { created, pods });
        earliest
    }

    /// The Service is gone.
    pub fn forget(&mut self, key: &K) {
        self.0.remove(key);
    }
}

/// When the pod last became ready, or ceased to be.
fn last_turn(pod: &Pod) -> Option<Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready")?;
    ready.last_transition_time.as_ref().map(|time| time.0)
}

/// Says so in a slice that is about to be written; without a moment it says nothing.
pub fn annotate(slice: &mut EndpointSlice, at: Option<Timestamp>) {
    match at {
        Some(at) => {
            let annotations = slice.metadata.annotations.get_or_insert_default();
            annotations.insert(LAST_CHANGE.to_owned(), at.to_string());
        }
        None => {
            if let Some(annotations) = &mut slice.metadata.annotations {
                annotations.remove(LAST_CHANGE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::core::v1::{PodCondition, PodStatus},
        apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    };

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn service(created: i64) -> Service {
        let creation_timestamp = Some(Time(at(created)));
        Service { metadata: ObjectMeta { creation_timestamp, ..ObjectMeta::default() }, ..Service::default() }
    }

    fn pod(name: &str, turned: i64) -> Pod {
        let condition = PodCondition {
            type_: "Ready".to_owned(),
            last_transition_time: Some(Time(at(turned))),
            ..PodCondition::default()
        };
        Pod {
            metadata: ObjectMeta { uid: Some(name.to_owned()), ..ObjectMeta::default() },
            status: Some(PodStatus { conditions: Some(vec![condition]), ..PodStatus::default() }),
            ..Pod::default()
        }
    }

    #[test]
    fn the_earliest_change_counts_once() {
        let mut triggers = Triggers::default();
        let service = service(10);
        let mut next = |pods: &[Pod]| triggers.next("s", &service, pods.iter());
        assert_eq!(next(&[pod("a", 12)]), Some(at(10)), "the Service is new");
        assert_eq!(next(&[pod("a", 12)]), None, "nothing has changed");
        assert_eq!(next(&[pod("a", 20), pod("b", 18)]), Some(at(18)), "two pods have turned");
        assert_eq!(next(&[pod("b", 18)]), None, "one that is gone is no moment");
        assert_eq!(next(&[pod("a", 20), pod("b", 18)]), Some(at(20)), "and comes back as a new one");
        triggers.forget(&"s");
        assert_eq!(triggers.next("s", &service, std::iter::empty()), Some(at(10)));
    }

    #[test]
    fn a_slice_says_the_moment_of_its_last_change_only() {
        let mut slice = EndpointSlice::default();
        annotate(&mut slice, None);
        assert_eq!(slice.metadata.annotations, None);
        annotate(&mut slice, Some(at(0)));
        let told = slice.metadata.annotations.clone().unwrap();
        assert_eq!(told[LAST_CHANGE], "2027-01-15T08:00:00Z");
        annotate(&mut slice, None);
        assert!(slice.metadata.annotations.unwrap().is_empty());
    }
}

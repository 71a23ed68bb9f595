//! Waking what owns a changed object: its controller, or everything that could adopt it. Deployments own ReplicaSets as
//! ReplicaSets own pods.

use control_decide::{object::controller_of, selector};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::{
    informer::{Cached, Change, Informer, Key},
    queue::Queue,
};

/// Puts the owner of a changed object into the queue: the controller of this kind that it names, and where it names none
/// all owners of its namespace whose selector matches its labels.
pub(crate) fn wake<O: Cached, D: Cached>(
    queue: &Queue<Key>,
    kind: &str,
    owners: &Informer<O>,
    selector_of: impl Fn(&O) -> Option<&LabelSelector>,
    change: &Change<D>,
) {
    for meta in change.states().map(|dependent| dependent.meta()) {
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        match controller_of(meta) {
            Some(owner) if owner.kind == kind => queue.add(Key::new(namespace, &owner.name)),
            Some(_) => {}
            None => {
                let candidates = owners.in_namespace(namespace);
                let selecting = candidates.iter().filter(|owner| {
                    selector_of(owner).is_some_and(|wanted| selector::matches(wanted, meta.labels.as_ref()))
                });
                selecting.for_each(|owner| queue.add(Key::of(owner.meta())));
            }
        }
    }
}

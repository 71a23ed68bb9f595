//! Garbage collection by owner references: background, foreground and orphaning deletion.
//!
//! [`Graph`] follows every object's metadata and says what to look at; [`decide`] says what to do with one
//! object, given its live state and that of its owners. The graph may be late or miss kinds, so nothing is
//! ever deleted on its word alone: owners are always confirmed to be absent by a live read.
//! <https://kubernetes.io/docs/concepts/architecture/garbage-collection/>

mod graph;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use self::graph::{Graph, Identity, TypeName, Work};
use crate::object;

/// Finalizer of an object whose dependents must go first.
pub const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an object whose dependents must be kept.
pub const ORPHAN: &str = "orphan";

/// A live owner, seen from its dependent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerState {
    /// It does not exist (any more), or another object has its name.
    Absent,
    /// It exists and is deleted once its dependents are.
    WaitsForDependents,
    /// It exists, or cannot be judged: the dependent stays.
    Solid,
}

/// How an object's own dependents fare when it is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// They are deleted afterwards.
    Background,
    /// They are deleted before it.
    Foreground,
    /// They are kept.
    Orphan,
}

/// What to do with one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Leave it.
    Nothing,
    /// Remove the finalizer: nothing blocks the object any more.
    RemoveForegroundFinalizer,
    /// It waits for these dependents: look at them.
    CheckDependents(Vec<Identity>),
    /// It has owners left: remove the references to these others.
    DropOwners(BTreeSet<String>),
    /// Delete it.
    Delete {
        /// What happens to its dependents.
        propagation: Propagation,
        /// First clear `blockOwnerDeletion` in its references, or two objects would wait for each other.
        unblock_owners: bool,
    },
}

/// Decides about an object from its live metadata and the live state of its owners (by uid).
pub fn decide(graph: &Graph, live: &ObjectMeta, owners: &BTreeMap<String, OwnerState>) -> Decision {
    let uid = object::uid(live);
    let deleting = object::is_being_deleted(live);
    if deleting && object::has_finalizer(live, FOREGROUND) {
        let blocking = graph.blocking_dependents(uid);
        return if blocking.is_empty() {
            Decision::RemoveForegroundFinalizer
        } else {
            Decision::CheckDependents(blocking)
        };
    }
    let references = live.owner_references.as_deref().unwrap_or_default();
    if deleting || references.is_empty() {
        return Decision::Nothing;
    }
    let with_state = |wanted: OwnerState| -> BTreeSet<String> {
        let in_state = references
            .iter()
            .filter(|reference| owners.get(&reference.uid).copied().unwrap_or(OwnerState::Solid) == wanted);
        in_state.map(|reference| reference.uid.clone()).collect()
    };
    let mut leaving = with_state(OwnerState::Absent);
    let waiting = with_state(OwnerState::WaitsForDependents);
    let someone_waits = !waiting.is_empty();
    leaving.extend(waiting);
    if !with_state(OwnerState::Solid).is_empty() {
        return if leaving.is_empty() { Decision::Nothing } else { Decision::DropOwners(leaving) };
    }
    if someone_waits && graph.has_dependents(uid) {
        let unblock_owners = graph.has_dependent_deleting_foreground(uid);
        return Decision::Delete { propagation: Propagation::Foreground, unblock_owners };
    }
    let propagation = if object::has_finalizer(live, ORPHAN) {
        Propagation::Orphan
    } else if object::has_finalizer(live, FOREGROUND) {
        Propagation::Foreground
    } else {
        Propagation::Background
    };
    Decision::Delete { propagation, unblock_owners: false }
}

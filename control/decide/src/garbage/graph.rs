//! Who owns whom, as far as events have told.
//!
//! Input: metadata of objects as they appear, change and go. Output: the objects worth a closer look. An
//! owner that is only known from references stands in the graph as unconfirmed until it is observed or a
//! live read shows that it is absent. Bounded by the number of objects in the cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::{FOREGROUND, ORPHAN};
use crate::object;

/// The type of an object, as owner references spell it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TypeName {
    /// Group and version, `apps/v1`.
    pub api_version: String,
    /// Kind, `ReplicaSet`.
    pub kind: String,
}

/// Where an object is found, and which one it must be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    /// Its type.
    pub type_name: Arc<TypeName>,
    /// Its namespace; for an unconfirmed owner that of a dependent, empty if cluster-scoped.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What should be done next, outside the graph.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// Look at the object and its owners live, then [`super::decide`].
    Check(Identity),
    /// Remove the object from its dependents' references, then remove its finalizer.
    Orphan(Identity),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Owner {
    uid: String,
    blocks: bool,
}

#[derive(Clone, Debug)]
struct Entry {
    identity: Identity,
    owners: Vec<Owner>,
    dependents: BTreeSet<String>,
    /// False while the object is only known from references to it.
    observed: bool,
    deleting_foreground: bool,
    orphaning: bool,
}

/// The owner graph, by uid.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    entries: BTreeMap<String, Entry>,
}

impl Graph {
    /// Takes over an object as an event shows it.
    pub fn observe(&mut self, type_name: &Arc<TypeName>, meta: &ObjectMeta) -> Vec<Work> {
        let uid = object::uid(meta);
        let references = meta.owner_references.as_deref().unwrap_or_default();
        let deleting = object::is_being_deleted(meta);
        let deleting_foreground = deleting && object::has_finalizer(meta, FOREGROUND);
        let orphaning = deleting && object::has_finalizer(meta, ORPHAN);
        let identity = Identity {
            type_name: Arc::clone(type_name),
            namespace: object::namespace(meta).to_owned(),
            name: object::name(meta).to_owned(),
            uid: uid.to_owned(),
        };
        let mut work = Vec::new();
        let entry =
            self.entries.entry(uid.to_owned()).or_insert_with(|| Entry::unconfirmed(identity.clone()));
        let starts_foreground = deleting_foreground && !entry.deleting_foreground;
        let starts_orphaning = orphaning && !entry.orphaning;
        entry.identity = identity.clone();
        entry.observed = true;
        entry.deleting_foreground = deleting_foreground;
        entry.orphaning = orphaning;
        let owners = references.iter().map(|reference| Owner {
            uid: reference.uid.clone(),
            blocks: reference.block_owner_deletion == Some(true),
        });
        let before = std::mem::replace(&mut entry.owners, owners.collect());
        let dependents = if starts_foreground { entry.dependents.clone() } else { BTreeSet::new() };

        self.relink(&identity, references, &before, &mut work);
        if starts_orphaning {
            work.push(Work::Orphan(identity));
        } else if starts_foreground {
            work.extend(dependents.iter().filter_map(|dependent| self.check(dependent)));
            work.push(Work::Check(identity));
        }
        work
    }

    /// Connects an object to its present owners and cuts it from its former ones.
    fn relink(
        &mut self,
        identity: &Identity,
        references: &[OwnerReference],
        before: &[Owner],
        work: &mut Vec<Work>,
    ) {
        for reference in references {
            let mut first_mention = false;
            let owner = self.entries.entry(reference.uid.clone()).or_insert_with(|| {
                let owner = unconfirmed_owner(identity, reference);
                work.push(Work::Check(owner.clone()));
                first_mention = true;
                Entry::unconfirmed(owner)
            });
            let is_new = owner.dependents.insert(identity.uid.clone());
            // An owner long unconfirmed may be known as absent already: nobody will look at it again.
            if is_new && !first_mention && (owner.deleting_foreground || !owner.observed) {
                work.push(Work::Check(identity.clone()));
            }
        }
        for former in before {
            let present = references.iter().find(|reference| reference.uid == former.uid);
            if present.is_none() {
                self.unlink(&former.uid, &identity.uid);
            }
            // An owner that waits for this one to go must notice that it no longer has to.
            let released = present.is_none_or(|reference| reference.block_owner_deletion != Some(true));
            if former.blocks && released {
                work.extend(self.check_if_waiting(&former.uid));
            }
        }
    }

    /// Takes note that an object is gone (by an event, or because a live read did not find it).
    pub fn forget(&mut self, uid: &str) -> Vec<Work> {
        let Some(entry) = self.entries.remove(uid) else { return Vec::new() };
        let mut work: Vec<_> =
            entry.dependents.iter().filter_map(|dependent| self.check(dependent)).collect();
        for owner in &entry.owners {
            self.unlink(&owner.uid, uid);
            work.extend(self.check_if_waiting(&owner.uid));
        }
        if !entry.dependents.is_empty() {
            // Dependents still refer to it; without this entry a later one could not be connected.
            let mut absent = Entry::unconfirmed(entry.identity);
            absent.dependents = entry.dependents;
            self.entries.insert(uid.to_owned(), absent);
        }
        work
    }

    fn unlink(&mut self, owner: &str, dependent: &str) {
        let Some(entry) = self.entries.get_mut(owner) else { return };
        entry.dependents.remove(dependent);
        if !entry.observed && entry.dependents.is_empty() {
            self.entries.remove(owner);
        }
    }

    fn check(&self, uid: &str) -> Option<Work> {
        self.entries.get(uid).map(|entry| Work::Check(entry.identity.clone()))
    }

    fn check_if_waiting(&self, uid: &str) -> Option<Work> {
        let waiting = self.entries.get(uid).filter(|entry| entry.deleting_foreground);
        waiting.map(|entry| Work::Check(entry.identity.clone()))
    }

    /// True when a look at the object could lead to a write: it or one of its owners is unconfirmed or waits
    /// for dependents.
    pub fn needs_check(&self, uid: &str) -> bool {
        let unsettled = |entry: &Entry| !entry.observed || entry.deleting_foreground;
        let Some(entry) = self.entries.get(uid) else { return false };
        unsettled(entry)
            || entry.owners.iter().any(|owner| self.entries.get(&owner.uid).is_none_or(unsettled))
    }

    /// True when the object was seen itself, not only in references.
    pub fn is_observed(&self, uid: &str) -> bool {
        self.entries.get(uid).is_some_and(|entry| entry.observed)
    }

    /// True when some object refers to this one as its owner.
    pub fn has_dependents(&self, uid: &str) -> bool {
        self.entries.get(uid).is_some_and(|entry| !entry.dependents.is_empty())
    }

    /// The objects that refer to this one as their owner.
    pub fn dependents(&self, uid: &str) -> Vec<Identity> {
        self.dependents_where(uid, |_| true)
    }

    /// Dependents that keep their owner from going, in foreground deletion.
    pub(super) fn blocking_dependents(&self, uid: &str) -> Vec<Identity> {
        self.dependents_where(uid, |dependent| {
            dependent.owners.iter().any(|owner| owner.uid == uid && owner.blocks)
        })
    }

    /// True when a dependent itself waits for its dependents: the two could wait for each other.
    pub(super) fn has_dependent_deleting_foreground(&self, uid: &str) -> bool {
        !self.dependents_where(uid, |dependent| dependent.deleting_foreground).is_empty()
    }

    fn dependents_where(&self, uid: &str, holds: impl Fn(&Entry) -> bool) -> Vec<Identity> {
        let dependents = self.entries.get(uid).into_iter().flat_map(|entry| &entry.dependents);
        dependents
            .filter_map(|dependent| self.entries.get(dependent))
            .filter(|dependent| holds(dependent))
            .map(|dependent| dependent.identity.clone())
            .collect()
    }
}

impl Entry {
    fn unconfirmed(identity: Identity) -> Self {
        Entry {
            identity,
            owners: Vec::new(),
            dependents: BTreeSet::new(),
            observed: false,
            deleting_foreground: false,
            orphaning: false,
        }
    }
}

fn unconfirmed_owner(dependent: &Identity, reference: &OwnerReference) -> Identity {
    Identity {
        type_name: Arc::new(TypeName {
            api_version: reference.api_version.clone(),
            kind: reference.kind.clone(),
        }),
        namespace: dependent.namespace.clone(),
        name: reference.name.clone(),
        uid: reference.uid.clone(),
    }
}

//! Objects of one kind by name, packed: what is remembered of a cluster with tens of thousands of Services is a few
//! large blocks of memory, not hundreds of thousands of small ones among those that a listing leaves behind. Pure.
//!
//! Records lie one behind the other in one arena; a changed one is written anew at its end, and the arena is copied
//! when less than half of it is in use. Two sorted lists of record numbers find them: by name, and by what they belong
//! to.

use std::{cmp::Ordering, marker::PhantomData, ops::Range};

use super::super::facts::ObjectName;

/// What can be kept in an arena.
pub(super) trait Pack: Sized {
    /// Whether [`Self::group`] is worth a list.
    const GROUPED: bool;
    /// The object of the same namespace that it belongs to.
    fn group(&self) -> &str;
    /// Appends its bytes.
    fn pack(&self, out: &mut Vec<u8>);
    /// Reads what [`Self::pack`] wrote.
    fn unpack(bytes: &[u8], name: Called<'_>) -> Self;
}

/// How a record is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Called<'r> {
    pub(super) namespace: &'r str,
    pub(super) name: &'r str,
    pub(super) group: &'r str,
}

impl Called<'_> {
    pub(super) fn to_object(self) -> ObjectName {
        ObjectName { namespace: self.namespace.to_owned(), name: self.name.to_owned() }
    }
}

/// Below this an arena is never copied.
const SMALL: usize = 1 << 16;

/// Number of a record; it keeps it as long as the object is there.
pub(super) type Id = u32;

/// The objects.
#[derive(Debug)]
pub(super) struct Records<F> {
    arena: Vec<u8>,
    /// Where each record lies; empty for numbers that are free.
    places: Vec<Place>,
    free: Vec<Id>,
    by_name: Vec<Id>,
    by_group: Vec<Id>,
    /// Bytes of the arena that are in use.
    live: usize,
    kind: PhantomData<F>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    at: u32,
    len: u32,
}

impl Place {
    fn range(self) -> Range<usize> {
        self.at as usize..self.at as usize + self.len as usize
    }
}

impl<F> Default for Records<F> {
    fn default() -> Self {
        Self {
            arena: Vec::new(),
            places: Vec::new(),
            free: Vec::new(),
            by_name: Vec::new(),
            by_group: Vec::new(),
            live: 0,
            kind: PhantomData,
        }
    }
}

impl<F: Pack> Records<F> {
    /// How many there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Numbers of all, by name.
    pub(super) fn ids(&self) -> impl Iterator<Item = Id> + use<'_, F> {
        self.by_name.iter().copied()
    }

    /// The number of an object.
    pub(super) fn id(&self, name: &ObjectName) -> Option<Id> {
        self.find(name).ok().map(|place| self.by_name[place])
    }

    /// An object.
    pub(super) fn get(&self, name: &ObjectName) -> Option<F> {
        self.id(name).map(|id| self.read(id))
    }

    /// An object by its number.
    pub(super) fn read(&self, id: Id) -> F {
        let (name, bytes) = self.parts(id);
        F::unpack(bytes, name)
    }

    /// What an object is called.
    pub(super) fn name(&self, id: Id) -> Called<'_> {
        self.parts(id).0
    }

    /// Numbers of the objects that belong to one, by name.
    pub(super) fn members(&self, of: Called<'_>) -> &[Id] {
        let from = self.by_group.partition_point(|id| self.beside(*id, of) == Ordering::Less);
        self.members_from(from, of)
    }

    /// The same for callers who ask for one after the other, in order: `from` is where the last answer ended.
    pub(super) fn next_members(&self, from: &mut usize, of: Called<'_>) -> &[Id] {
        while self.by_group.get(*from).is_some_and(|id| self.beside(*id, of) == Ordering::Less) {
            *from += 1;
        }
        let found = self.members_from(*from, of);
        *from += found.len();
        found
    }

    fn members_from(&self, from: usize, of: Called<'_>) -> &[Id] {
        let rest = &self.by_group[from..];
        let count = rest.iter().take_while(|id| self.beside(**id, of) == Ordering::Equal).count();
        &rest[..count]
    }

    /// How what a record belongs to stands beside an object of this name.
    fn beside(&self, id: Id, of: Called<'_>) -> Ordering {
        let own = self.name(id);
        (own.namespace, own.group).cmp(&(of.namespace, of.name))
    }

    /// Adds or replaces an object; returns its number.
    pub(super) fn put(&mut self, name: &ObjectName, facts: &F) -> Id {
        let place = self.append(name, facts);
        let id = match self.find(name) {
            Ok(index) => {
                let id = self.by_name[index];
                self.ungroup(id);
                self.live -= self.places[id as usize].len as usize;
                self.places[id as usize] = place;
                id
            }
            Err(index) => {
                let id = self.free.pop().unwrap_or_else(|| {
                    self.places.push(Place::default());
                    u32::try_from(self.places.len() - 1).unwrap_or(Id::MAX)
                });
                self.places[id as usize] = place;
                self.by_name.insert(index, id);
                id
            }
        };
        if F::GROUPED {
            let index = self.group_index(id);
            self.by_group.insert(index, id);
        }
        self.tidy();
        id
    }

    /// Removes an object; returns the number that it had.
    pub(super) fn remove(&mut self, name: &ObjectName) -> Option<Id> {
        let index = self.find(name).ok()?;
        let id = self.by_name.remove(index);
        self.ungroup(id);
        self.live -= self.places[id as usize].len as usize;
        self.places[id as usize] = Place::default();
        self.free.push(id);
        self.tidy();
        Some(id)
    }

    fn ungroup(&mut self, id: Id) {
        if F::GROUPED {
            let index = self.group_index(id);
            if self.by_group.get(index) == Some(&id) {
                self.by_group.remove(index);
            }
        }
    }

    fn group_index(&self, id: Id) -> usize {
        let order = |id: Id| {
            let name = self.name(id);
            (name.namespace, name.group, name.name)
        };
        let own = order(id);
        // Listings come in order: most often the last place is right.
        if self.by_group.last().is_none_or(|last| order(*last) < own) {
            return self.by_group.len();
        }
        self.by_group.partition_point(|other| order(*other) < own)
    }

    fn find(&self, name: &ObjectName) -> Result<usize, usize> {
        let wanted = (name.namespace.as_str(), name.name.as_str());
        let order = |id: &Id| {
            let name = self.name(*id);
            (name.namespace, name.name).cmp(&wanted)
        };
        if self.by_name.last().is_none_or(|last| order(last) == Ordering::Less) {
            return Err(self.by_name.len());
        }
        self.by_name.binary_search_by(order)
    }

    /// Writes a record: three lengths, three texts, the rest.
    fn append(&mut self, name: &ObjectName, facts: &F) -> Place {
        let start = self.arena.len();
        let texts = [name.namespace.as_str(), name.name.as_str(), facts.group()].map(cut);
        for text in texts {
            let len = u16::try_from(text.len()).unwrap_or(u16::MAX);
            self.arena.extend_from_slice(&len.to_ne_bytes());
        }
        for text in texts {
            self.arena.extend_from_slice(text.as_bytes());
        }
        facts.pack(&mut self.arena);
        let len = self.arena.len() - start;
        self.live += len;
        let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
        Place { at: number(start), len: number(len) }
    }

    fn parts(&self, id: Id) -> (Called<'_>, &[u8]) {
        let place = self.places.get(id as usize).copied().unwrap_or_default();
        let mut bytes = self.arena.get(place.range()).unwrap_or_default();
        let mut lengths = [0; 3];
        for length in &mut lengths {
            let Some((first, rest)) = bytes.split_first_chunk::<2>() else { break };
            *length = usize::from(u16::from_ne_bytes(*first));
            bytes = rest;
        }
        let [namespace, name, group] = lengths.map(|length| {
            let (text, rest) = bytes.split_at_checked(length).unwrap_or_default();
            bytes = rest;
            std::str::from_utf8(text).unwrap_or_default()
        });
        (Called { namespace, name, group }, bytes)
    }

    /// Copies what is in use where that is less than half.
    fn tidy(&mut self) {
        if self.arena.len() < SMALL || self.arena.len() / 2 < self.live {
            return;
        }
        let mut fresh = Vec::with_capacity(self.live + self.live / 4);
        for id in &self.by_name {
            let place = &mut self.places[*id as usize];
            let at = u32::try_from(fresh.len()).unwrap_or(u32::MAX);
            fresh.extend_from_slice(&self.arena[place.range()]);
            place.at = at;
        }
        self.arena = fresh;
    }
}

/// Names of Kubernetes are far shorter; what is not would be no name of an object that it took.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(usize::from(u16::MAX));
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// An object with a group and a body.
    #[derive(Clone, Debug, PartialEq)]
    struct Thing(String, Vec<u8>);

    impl Pack for Thing {
        const GROUPED: bool = true;
        fn group(&self) -> &str {
            &self.0
        }
        fn pack(&self, out: &mut Vec<u8>) {
            out.extend_from_slice(&self.1);
        }
        fn unpack(bytes: &[u8], name: Called<'_>) -> Self {
            Self(name.group.to_owned(), bytes.to_vec())
        }
    }

    fn name(n: u8) -> ObjectName {
        ObjectName { namespace: format!("n{}", n % 3), name: format!("o{n}") }
    }

    proptest! {
        /// Whatever is put and removed, records are what a plain map would hold, in its order.
        #[test]
        fn records_are_a_map(steps in prop::collection::vec((any::<bool>(), 0_u8..40, 0_u8..5, 0_usize..3000), 1..200)) {
            let mut records = Records::<Thing>::default();
            let mut plain: BTreeMap<ObjectName, Thing> = BTreeMap::new();
            for (put, n, group, size) in steps {
                if put {
                    let thing = Thing(format!("g{group}"), vec![n; size]);
                    let id = records.put(&name(n), &thing);
                    prop_assert_eq!(records.id(&name(n)), Some(id));
                    plain.insert(name(n), thing);
                } else {
                    prop_assert_eq!(records.remove(&name(n)).is_some(), plain.remove(&name(n)).is_some());
                }
            }
            prop_assert_eq!(records.len(), plain.len());
            let all: Vec<_> = records.ids().map(|id| (records.name(id).to_object(), records.read(id))).collect();
            prop_assert_eq!(all, plain.clone().into_iter().collect::<Vec<_>>());
            let mut from = 0;
            for namespace in ["n0", "n1", "n2"] {
                for group in ["g0", "g1", "g2", "g3", "g4"] {
                    let of = Called { namespace, name: group, group: "" };
                    let found: Vec<_> = records.members(of).iter().map(|id| records.name(*id).to_object()).collect();
                    let next: Vec<_> = records.next_members(&mut from, of).to_vec();
                    prop_assert_eq!(&next[..], records.members(of));
                    let wanted = plain.iter().filter(|(name, thing)| name.namespace == namespace && thing.0 == group);
                    prop_assert_eq!(found, wanted.map(|(name, _)| name.clone()).collect::<Vec<_>>());
                }
            }
        }
    }
}

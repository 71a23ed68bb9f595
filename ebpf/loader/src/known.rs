//! What is remembered of the services that the maps hold. Pure.
//!
//! Tens of thousands of services are usual, so nothing is kept here that the maps themselves tell: endpoints are read
//! back from the backend index when a service changes, and names stay in the kernel. What is left is about a hundred
//! bytes per service, in two tables without an allocation per entry but for its frontends.

use std::{
    collections::HashMap,
    hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState},
};

use ebpf_common::{Backend, ExtentHeader, FrontendKey, NetAddr, Protocol, ServiceSlot};

use crate::{
    alloc::Range,
    memory::Memory,
    room::BackendKey,
    table::{Place, ServiceKey},
};

/// An endpoint as the maps hold it: who, its id, whom it answers.
pub(crate) type HeldBackend = (BackendKey, u32, Place);

/// A service as the maps hold it.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) id: u32,
    pub(crate) slot: ServiceSlot,
    pub(crate) extent: Option<Range>,
    /// By key, with the flags of each.
    pub(crate) frontends: Box<[(FrontendKey, u32)]>,
    /// In order.
    pub(crate) ranges: Box<[(NetAddr, u8)]>,
    /// The endpoints of an extent that holds nonsense beside them, found after a restart; others are read from the maps.
    pub(crate) salvaged: Option<Box<[HeldBackend]>>,
    /// Tells the name that was written from others; 0 before one was.
    pub(crate) name: u64,
    /// What its extent has of a table for consistent hashing: 0 for none, else what tells its weights.
    pub(crate) table: u64,
    /// The fingerprint of what was asked for last; 0 for a service found in the maps and not yet claimed.
    pub(crate) desired: u64,
}

impl Known {
    /// Its endpoints, by address.
    pub(crate) fn backends<M: Memory>(&self, memory: &M) -> Vec<HeldBackend> {
        if let Some(salvaged) = &self.salvaged {
            return salvaged.to_vec();
        }
        let Some(extent) = self.extent else {
            return Vec::new();
        };
        let header = ExtentHeader(memory.extent_word(extent.start));
        let held = (1..=header.all()).filter_map(|position| {
            let id = u32::try_from(memory.extent_word(extent.start + position)).ok()?;
            let backend = memory.backend(id);
            Some(((backend.addr, backend.port), id, place(position, header)))
        });
        let mut all: Vec<HeldBackend> = held.collect();
        all.sort_unstable();
        all
    }

    /// Whether somebody may send datagrams to its endpoints.
    pub(crate) fn takes_datagrams(&self) -> bool {
        self.frontends.iter().any(|(frontend, _)| frontend.proto == Protocol::Udp.number())
    }
}

/// Which policies a backend answers, from its position in the index (1-based).
pub(crate) fn place(position: u32, header: ExtentHeader) -> Place {
    if position <= header.cluster() {
        Place::LocalOnly
    } else if position <= header.local() {
        Place::Local
    } else {
        Place::Far
    }
}

/// The flags of a backend at its place.
pub(crate) fn flags(place: Place) -> u16 {
    match place {
        Place::LocalOnly => Backend::FLAG_LOCAL,
        Place::Local => Backend::FLAG_LOCAL | Backend::FLAG_CLUSTER,
        Place::Far => Backend::FLAG_CLUSTER,
    }
}

/// All services that are known by name: names are kept as 64 bits under a secret of this process, since two that meet
/// there are not to be expected, and a name is longer than all else that is kept.
#[derive(Debug, Default)]
pub(crate) struct Book {
    ids: HashMap<u64, u32, BuildHasherDefault<AsItIs>>,
    /// By id; ids are dense.
    services: Vec<Option<Known>>,
    secret: RandomState,
}

impl Book {
    /// The 64 bits that stand for a name; never 0.
    pub(crate) fn print(&self, key: &ServiceKey) -> u64 {
        self.secret.hash_one(key).max(1)
    }

    /// A service by its name.
    pub(crate) fn get(&self, key: &ServiceKey) -> Option<&Known> {
        self.services.get(*self.ids.get(&self.print(key))? as usize)?.as_ref()
    }

    /// The same, to be changed.
    pub(crate) fn get_mut(&mut self, key: &ServiceKey) -> Option<&mut Known> {
        let id = *self.ids.get(&self.print(key))?;
        self.services.get_mut(id as usize)?.as_mut()
    }

    /// Takes a service out.
    pub(crate) fn take(&mut self, print: u64) -> Option<Known> {
        let id = self.ids.remove(&print)?;
        self.services.get_mut(id as usize)?.take()
    }

    /// Puts a service in.
    pub(crate) fn put(&mut self, print: u64, known: Known) {
        let id = known.id as usize;
        if self.services.len() <= id {
            self.services.resize_with(id + 1, || None);
        }
        self.ids.insert(print, known.id);
        self.services[id] = Some(known);
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// The prints of all that these are not.
    pub(crate) fn others<'k>(&self, keys: impl Iterator<Item = &'k ServiceKey>) -> Vec<u64> {
        let named: std::collections::HashSet<u64> = keys.map(|key| self.print(key)).collect();
        let mut others: Vec<(u32, u64)> = self
            .ids
            .iter()
            .filter(|(print, _)| !named.contains(*print))
            .map(|(print, id)| (*id, *print))
            .collect();
        others.sort_unstable();
        others.into_iter().map(|(_, print)| print).collect()
    }
}

/// Hashes a number that is a hash already.
#[derive(Debug, Default)]
pub(crate) struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

//! What the synchroniser writes to: the maps, or a stand-in that tests watch.

use ebpf_common::{Backend, FrontendKey, FrontendValue, NetAddr, NodePortBounds, ServiceSlot};
use thiserror::Error;

/// Sizes of the maps. Fixed when they are made; opening with other sizes makes new maps and moves everything over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Frontends, of any service.
    pub frontends: u32,
    /// Services.
    pub services: u32,
    /// Backends, of any service.
    pub backends: u32,
    /// Words of the backend index: one per backend and one per service, and room to write new extents beside old.
    pub extent_words: u32,
}

impl Default for Capacity {
    /// Room for 10,000 services of ten endpoints with some to spare: more take larger maps, while these go on serving.
    fn default() -> Self {
        Self { frontends: 32_768, services: 16_384, backends: 131_072, extent_words: 163_840 }
    }
}

impl Capacity {
    /// Whether everything of the other size has room.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        self.frontends >= other.frontends
            && self.services >= other.services
            && self.backends >= other.backends
            && self.extent_words >= other.extent_words
    }

    /// A size in which this many services and backends have room, with as much again to grow and to replace: doubled
    /// as often as needed. Nothing where that is beyond what arrays may have.
    #[must_use]
    pub fn grown_for(&self, frontends: usize, services: usize, backends: usize) -> Option<Self> {
        let fit = |from: u32, needed: usize| {
            let mut size = from.max(2);
            while (size as usize) <= needed {
                size = size.checked_mul(2).filter(|size| *size <= LARGEST)?;
            }
            Some(size)
        };
        Some(Self {
            frontends: fit(self.frontends, frontends)?,
            services: fit(self.services, services)?,
            backends: fit(self.backends, backends + backends / 8)?,
            // One word per backend and service, twice: the new extent stands beside the old.
            extent_words: fit(self.extent_words, (backends + services) * 2)?,
        })
    }
}

impl Capacity {
    /// The same with room for this many more words of the backend index: tables for consistent hashing, twice.
    #[must_use]
    pub fn with_words(mut self, words: usize) -> Self {
        let needed = self.extent_words as usize / 2 + words * 2;
        while (self.extent_words as usize) <= needed && self.extent_words < LARGEST && words > 0 {
            self.extent_words *= 2;
        }
        self
    }
}

/// No map grows beyond this many elements.
const LARGEST: u32 = 1 << 24;

/// A write or read of the maps that the kernel refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The frontend hash did not take an entry.
    #[error("cannot write frontend {frontend}")]
    WriteFrontend {
        /// Which one.
        frontend: String,
        /// Why.
        #[source]
        source: aya::maps::MapError,
    },
    /// The frontend hash did not let an entry go.
    #[error("cannot remove frontend {frontend}")]
    RemoveFrontend {
        /// Which one.
        frontend: String,
        /// Why.
        #[source]
        source: aya::maps::MapError,
    },
    /// A service's name or source range was not taken.
    #[error("cannot write the {what} of service {service}")]
    WriteService {
        /// Name or source range.
        what: &'static str,
        /// The service's id.
        service: u32,
        /// Why.
        #[source]
        source: aya::maps::MapError,
    },
    /// The frontend hash could not be listed.
    #[error("cannot list the frontends")]
    ListFrontends(#[source] aya::maps::MapError),
}

/// What was collected, and the kernel did not take.
#[derive(Debug)]
pub(crate) struct Unwritten {
    /// Of which service.
    pub(crate) service: u32,
    /// Which of its frontends.
    pub(crate) frontend: FrontendKey,
    /// Why.
    pub(crate) why: MemoryError,
}

/// The writable half of the data plane. Indices are always below the capacity: the allocators see to it.
pub(crate) trait Memory {
    /// Replaces a service's slot with one store, after everything it leads to is written.
    fn publish_slot(&mut self, service: u32, slot: ServiceSlot);
    /// Reads a slot back.
    fn slot(&self, service: u32) -> ServiceSlot;
    /// Writes a word of the backend index.
    fn write_extent_word(&mut self, index: u32, word: u64);
    /// Reads a word of the backend index.
    fn extent_word(&self, index: u32) -> u64;
    /// Writes a backend.
    fn write_backend(&mut self, id: u32, backend: Backend);
    /// Reads a backend.
    fn backend(&self, id: u32) -> Backend;
    /// Adds or replaces a frontend, atomically.
    fn insert_frontend(&mut self, key: FrontendKey, value: FrontendValue) -> Result<(), MemoryError>;
    /// Removes a frontend; one that is not there is fine.
    fn remove_frontend(&mut self, key: FrontendKey) -> Result<(), MemoryError>;
    /// Lists all frontends.
    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MemoryError>;
    /// Collects new frontends from now on, to be written together by [`Self::flush`]. Only while no program
    /// reads the maps.
    fn collect(&mut self) {}
    /// Writes what was collected; returns what the kernel did not take.
    fn flush(&mut self) -> Vec<Unwritten> {
        Vec::new()
    }
    /// Names a service, for people.
    fn write_name(&mut self, service: u32, name: &str) -> Result<(), MemoryError>;
    /// Forgets the name.
    fn remove_name(&mut self, service: u32) -> Result<(), MemoryError>;
    /// The name of a service, if it has one.
    fn name(&self, service: u32) -> Option<String>;
    /// Lets clients of a range in.
    fn insert_range(&mut self, service: u32, range: (NetAddr, u8)) -> Result<(), MemoryError>;
    /// Does not let them in any more.
    fn remove_range(&mut self, service: u32, range: (NetAddr, u8)) -> Result<(), MemoryError>;
    /// All ranges, with the service of each.
    fn ranges(&self) -> Vec<(u32, (NetAddr, u8))>;
    /// Publishes the range of NodePorts.
    fn publish_node_ports(&mut self, bounds: NodePortBounds);
    /// Waits until no program reads what was unpublished before this call.
    fn wait_for_readers(&self);
}

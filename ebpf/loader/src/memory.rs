//! What the synchroniser writes to: the maps, or a stand-in that tests watch.

use ebpf_common::{Backend, FrontendKey, FrontendValue, NodePortBounds, ServiceSlot};
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
    /// Room for 30,000 services; about 10 MiB of kernel memory when empty.
    fn default() -> Self {
        Self { frontends: 131_072, services: 32_768, backends: 131_072, extent_words: 262_144 }
    }
}

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
    /// The frontend hash could not be listed.
    #[error("cannot list the frontends")]
    ListFrontends(#[source] aya::maps::MapError),
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
    /// Publishes the range of NodePorts.
    fn publish_node_ports(&mut self, bounds: NodePortBounds);
    /// Waits until no program reads what was unpublished before this call.
    fn wait_for_readers(&self);
}

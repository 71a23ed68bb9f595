//! Typed handles of the maps, and the memory-mapped arrays through which most writes go without a system call.

#![allow(unsafe_code, reason = "memory-mapped kernel arrays")]

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
};
use ebpf_common::{
    Backend, FrontendKey, FrontendValue, Meta, NetAddr, NodePortBounds, ServiceSlot, ServiceStats, map_names,
};
use thiserror::Error;

use crate::{
    memory::{Memory, MemoryError},
    sys,
    table::describe,
};

/// A map of the object that is missing or not what this library was built for.
#[derive(Debug, Error)]
pub enum MapsError {
    /// The object has no such map.
    #[error("the BPF object has no map {0}")]
    Absent(&'static str),
    /// The map has another type or other sizes.
    #[error("map {name} is not of the expected kind")]
    Kind {
        /// Which map.
        name: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// The kernel does not map the array into memory.
    #[error("cannot map array {name} into memory")]
    Mmap {
        /// Which map.
        name: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The maps that user space writes or reads.
pub(crate) struct Maps {
    frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    node_addresses: HashMap<MapData, NetAddr, u32>,
    stats: PerCpuArray<MapData, ServiceStats>,
    meta: Array<MapData, Meta>,
    slots: Mapped<ServiceSlot>,
    extents: Mapped<u64>,
    backends: Mapped<Backend>,
    node_ports: Mapped<NodePortBounds>,
}

impl Maps {
    /// Takes the maps out of a loaded object.
    pub(crate) fn take(object: &mut Ebpf) -> Result<Self, MapsError> {
        Ok(Self {
            frontends: take(object, map_names::FRONTENDS)?,
            node_addresses: take(object, map_names::NODE_ADDRESSES)?,
            stats: take(object, map_names::SERVICE_STATS)?,
            meta: take(object, map_names::META)?,
            slots: Mapped::open(object, map_names::SERVICES)?,
            extents: Mapped::open(object, map_names::EXTENTS)?,
            backends: Mapped::open(object, map_names::BACKENDS)?,
            node_ports: Mapped::open(object, map_names::NODE_PORT_BOUNDS)?,
        })
    }

    /// Marks the maps as complete.
    pub(crate) fn write_meta(&mut self, meta: Meta) -> Result<(), MapError> {
        self.meta.set(0, meta, 0)
    }

    /// Addresses of this node that programs know.
    pub(crate) fn node_addresses(&self) -> Result<Vec<NetAddr>, MapError> {
        self.node_addresses.keys().collect()
    }

    /// Adds an address of this node.
    pub(crate) fn add_node_address(&mut self, address: NetAddr) -> Result<(), MapError> {
        self.node_addresses.insert(address, 1, 0)
    }

    /// Removes an address of this node.
    pub(crate) fn remove_node_address(&mut self, address: &NetAddr) -> Result<(), MapError> {
        self.node_addresses.remove(address)
    }

    /// Counters of a service, summed over all CPUs.
    pub(crate) fn stats(&self, service: u32) -> Result<ServiceStats, MapError> {
        let mut sum = ServiceStats::default();
        for cpu in self.stats.get(&service, 0)?.iter() {
            sum.forwarded += cpu.forwarded;
            sum.refused += cpu.refused;
        }
        Ok(sum)
    }
}

impl Memory for Maps {
    fn publish_slot(&mut self, service: u32, slot: ServiceSlot) {
        self.slots.word(service).store(slot.0, Ordering::Release);
    }

    fn slot(&self, service: u32) -> ServiceSlot {
        ServiceSlot(self.slots.word(service).load(Ordering::Acquire))
    }

    fn write_extent_word(&mut self, index: u32, word: u64) {
        self.extents.word(index).store(word, Ordering::Release);
    }

    fn extent_word(&self, index: u32) -> u64 {
        self.extents.word(index).load(Ordering::Acquire)
    }

    fn write_backend(&mut self, id: u32, backend: Backend) {
        self.backends.write(id, backend);
    }

    fn backend(&self, id: u32) -> Backend {
        self.backends.read(id)
    }

    fn insert_frontend(&mut self, key: FrontendKey, value: FrontendValue) -> Result<(), MemoryError> {
        self.frontends
            .insert(key, value, 0)
            .map_err(|source| MemoryError::WriteFrontend { frontend: describe(&key), source })
    }

    fn remove_frontend(&mut self, key: FrontendKey) -> Result<(), MemoryError> {
        match self.frontends.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(MemoryError::RemoveFrontend { frontend: describe(&key), source }),
        }
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MemoryError> {
        self.frontends.iter().collect::<Result<_, _>>().map_err(MemoryError::ListFrontends)
    }

    fn publish_node_ports(&mut self, bounds: NodePortBounds) {
        self.node_ports.word(0).store(bounds.0, Ordering::Release);
    }

    fn wait_for_readers(&self) {
        sys::wait_for_grace_period();
    }
}

fn take<M: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, name: &'static str) -> Result<M, MapsError> {
    let map = object.take_map(name).ok_or(MapsError::Absent(name))?;
    M::try_from(map).map_err(|source| MapsError::Kind { name, source })
}

/// An array of the kernel, mapped into our memory. Its stores are seen by programs at once.
struct Mapped<T> {
    base: NonNull<T>,
    len: u32,
    bytes: usize,
    /// Keeps the element type; the map itself is kept alive by the mapping.
    element: PhantomData<T>,
}

// SAFETY: the mapping is plain shared memory that belongs to this value; no thread-local state is involved.
unsafe impl<T: Send> Send for Mapped<T> {}

impl<T: Copy + aya::Pod> Mapped<T> {
    fn open(object: &mut Ebpf, name: &'static str) -> Result<Self, MapsError> {
        let map = object.take_map(name).ok_or(MapsError::Absent(name))?;
        // The conversion checks key and value sizes.
        let array =
            Array::<&MapData, T>::try_from(&map).map_err(|source| MapsError::Kind { name, source })?;
        let len = array.len();
        let Map::Array(data) = &map else {
            return Err(MapsError::Absent(name));
        };
        // The kernel's stride is the size rounded up to eight; every element type is a multiple of eight already.
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let bytes = (len as usize * size_of::<T>()).next_multiple_of(page_size());
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = data.fd().as_fd().as_raw_fd();
        // SAFETY: a fresh shared mapping of a descriptor that is open during the call, at an address the kernel
        // chooses; it touches no memory of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, 0) };
        match NonNull::new(base) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED => {
                Ok(Self { base: base.cast(), len, bytes, element: PhantomData })
            }
            _ => Err(MapsError::Mmap { name, source: io::Error::last_os_error() }),
        }
    }

    fn element(&self, index: u32) -> NonNull<T> {
        assert!(index < self.len, "the allocators hand out indices below the capacity only");
        // SAFETY: `index` is below the number of elements that the mapping holds.
        unsafe { self.base.add(index as usize) }
    }

    /// The element as one atomic word; only for types of eight bytes.
    fn word(&self, index: u32) -> &AtomicU64 {
        const { assert!(size_of::<T>() == 8) };
        // SAFETY: the element is eight bytes, aligned to eight by the page-aligned base, and only ever accessed by
        // whole-word loads and stores, here and in the programs.
        unsafe { self.element(index).cast::<AtomicU64>().as_ref() }
    }

    fn write(&mut self, index: u32, value: T) {
        // SAFETY: the element lies within the mapping; readers reach it only through a word published later, or
        // tolerate a change of its flags.
        unsafe { self.element(index).write_volatile(value) };
    }

    fn read(&self, index: u32) -> T {
        // SAFETY: the element lies within the mapping and `Pod` makes every bit pattern a value.
        unsafe { self.element(index).read_volatile() }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `open`; no reference into it outlives this value.
        if unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "cannot unmap a BPF array");
        }
    }
}

fn page_size() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096)
}

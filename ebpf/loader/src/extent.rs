//! A service's list of backends, as words of the backend index. Pure.

use ebpf_common::{Backend, ExtentHeader};

use crate::{known::flags, memory::Memory, room::Prepared, table::Place};

/// Writes the new backends and the new extent. Nothing points at either yet, except for backends whose place alone
/// changed, which stay valid throughout.
pub(crate) fn write_backends<M: Memory>(memory: &mut M, service: u32, prepared: &Prepared) {
    let Some(extent) = prepared.extent else {
        return;
    };
    let (mut local_only, mut local) = (0_u16, 0_u16);
    for (index, backend) in (extent.start + 1..).zip(&prepared.order) {
        let (place, (addr, port)) = (backend.place, backend.at);
        local_only += u16::from(place == Place::LocalOnly);
        local += u16::from(place <= Place::Local);
        let value = Backend { addr, port, flags: flags(place), service };
        if backend.fresh || memory.backend(backend.id) != value {
            memory.write_backend(backend.id, value);
        }
        memory.write_extent_word(index, u64::from(backend.id));
    }
    let all = u16::try_from(prepared.order.len()).unwrap_or(u16::MAX);
    let mut header = ExtentHeader::new(all, local, local_only);
    if let Some(table) = &prepared.table {
        header = header.with_table(table.kind);
        for (index, word) in (extent.start + 1 + u32::from(all)..).zip(&table.words) {
            memory.write_extent_word(index, *word);
        }
    }
    memory.write_extent_word(extent.start, header.0);
}

/// Marks a backend as gone, for sockets and clients that remember it; its address stays readable until reuse.
pub(crate) fn retire_backend<M: Memory>(memory: &mut M, id: u32) {
    let backend = memory.backend(id);
    memory.write_backend(id, Backend { flags: 0, ..backend });
}

//! Which layout and sizes pinned maps have.

use std::path::Path;

use aya::maps::{Array, MapData};
use ebpf_common::{LAYOUT_VERSION, Meta, map_names};

use crate::{memory::Capacity, plane::OpenError};

/// What maps of this size say about themselves.
pub(crate) fn meta(capacity: Capacity) -> Meta {
    Meta {
        layout_version: LAYOUT_VERSION,
        frontends: capacity.frontends,
        services: capacity.services,
        backends: capacity.backends,
        extent_words: capacity.extent_words,
        flows: 0,
    }
}

/// The sizes of maps of this layout; nothing for another layout.
pub(crate) fn capacity_of(meta: &Meta) -> Option<Capacity> {
    (meta.layout_version == LAYOUT_VERSION).then_some(Capacity {
        frontends: meta.frontends,
        services: meta.services,
        backends: meta.backends,
        extent_words: meta.extent_words,
    })
}

/// Whether the maps in a directory are of this layout and not larger, so that what they hold can be copied.
pub(crate) fn fits(dir: &Path, capacity: Capacity) -> bool {
    read_meta(dir).and_then(|meta| capacity_of(&meta)).is_some_and(|old| capacity.holds(&old))
}

/// Makes the pinned maps look as if another version had made them, so that the next process moves everything to new
/// ones: for tests of upgrades and downgrades.
#[doc(hidden)]
pub fn pretend_layout(pin_dir: &Path, version: u32) -> Result<(), OpenError> {
    let dir = pin_dir.join("maps");
    let name = map_names::META;
    let mut map: Array<MapData, Meta> = crate::maps::pinned(&dir, name)?;
    let meta = map.get(&0, 0).map_err(OpenError::Meta)?;
    map.set(0, Meta { layout_version: version, ..meta }, 0).map_err(OpenError::Meta)
}

/// What the maps in a directory say about themselves; nothing where they are not complete.
pub(crate) fn read_meta(dir: &Path) -> Option<Meta> {
    let data = MapData::from_pin(dir.join(map_names::META)).ok()?;
    let map = aya::maps::Map::from_map_data(data).ok()?;
    Array::<MapData, Meta>::try_from(map).ok()?.get(&0, 0).ok()
}

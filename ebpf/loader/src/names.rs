//! What people call services, in the maps: short names in a memory-mapped array, which costs no system call; the few long
//! ones in a hash.

use std::path::Path;

use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError},
};
use ebpf_common::{ServiceName, ShortName, map_names};

use crate::maps::{Mapped, MapsError, ignore_absent, pinned, take};

/// Both maps.
pub(crate) struct Names {
    short: Mapped<ShortName>,
    long: HashMap<MapData, u32, ServiceName>,
}

impl Names {
    /// Takes the maps out of a loaded object.
    pub(crate) fn take(object: &mut Ebpf) -> Result<Self, MapsError> {
        Ok(Self {
            short: Mapped::open(object, map_names::NAMES)?,
            long: take(object, map_names::LONG_NAMES)?,
        })
    }

    /// Opens the pinned maps.
    pub(crate) fn pinned(dir: &Path) -> Result<Self, MapsError> {
        Ok(Self { short: Mapped::pinned(dir, map_names::NAMES)?, long: pinned(dir, map_names::LONG_NAMES)? })
    }

    /// Takes over what smaller maps hold.
    pub(crate) fn copy_from(&mut self, other: &Self) -> Result<(), MapsError> {
        let name = map_names::LONG_NAMES;
        for item in &other.long {
            let (service, long) = item.map_err(|source| MapsError::Copy { name, source })?;
            self.long.insert(service, long, 0).map_err(|source| MapsError::Copy { name, source })?;
        }
        self.short.copy_from(&other.short);
        Ok(())
    }

    /// Names a service.
    pub(crate) fn write(&mut self, service: u32, name: &str) -> Result<(), MapError> {
        if let Some(short) = ShortName::new(name) {
            self.remove(service)?;
            self.short.write(service, short);
        } else {
            self.long.insert(service, ServiceName::new(name), 0)?;
            self.short.write(service, ShortName::LONG);
        }
        Ok(())
    }

    /// Forgets a service's name.
    pub(crate) fn remove(&mut self, service: u32) -> Result<(), MapError> {
        let former = self.short.read(service);
        self.short.write(service, ShortName::NONE);
        if former == ShortName::LONG { ignore_absent(self.long.remove(&service)) } else { Ok(()) }
    }

    /// The name of a service, if it has one.
    pub(crate) fn get(&self, service: u32) -> Option<String> {
        if service >= self.short.len() {
            return None;
        }
        let short = self.short.read(service);
        if short != ShortName::LONG {
            return short.text().map(|(start, ending)| format!("{start}{ending}"));
        }
        self.long.get(&service, 0).ok().map(|long| long.text().to_owned())
    }
}

//! Loads, probes, attaches, pins and upgrades the BPF programs; the only crate that knows aya.
//!
//! A caller opens the [`DataPlane`], gives it all services once ([`DataPlane::replace_all`]), attaches it, and from
//! then on hands it changes ([`DataPlane::apply`]). Everything is pinned, so programs and maps outlive the caller; the
//! next one adopts them, finds in the maps themselves which ids are in use, and writes only what differs.
//!
//! Reading order: [`table`] (what a caller wants), [`alloc`], [`memory`] (what can be written), [`known`] (what is
//! remembered), [`services`] (what to write in which order; pure), [`room`], [`extent`], [`maglev`], [`restore`], then
//! [`addresses`], the adapters [`maps`], [`names`], [`layout`], [`pins`], [`links`], [`probe`], [`sys`], and [`plane`], which joins them; [`heal`], [`flows`]
//! and [`view`] stand beside. Nothing here knows Kubernetes, and nothing here polls.

mod addresses;
mod alloc;
mod devices;
mod extent;
mod flows;
mod heal;
mod known;
mod layout;
mod links;
mod maglev;
mod maps;
mod memory;
mod names;
mod object;
mod pins;
mod plane;
mod probe;
mod report;
mod restore;
mod room;
mod services;
mod shortcuts;
mod sys;
mod table;
mod view;

pub use devices::{Device, PacketHook, Side};
pub use flows::FlowStock;
pub use heal::{Healed, reconnect_datagrams};
#[doc(hidden)]
pub use layout::pretend_layout;
pub use links::{Attached, LinkError};
pub use maps::MapsError;
pub use memory::{Capacity, MemoryError};
pub use object::is_built;
pub use pins::{PinError, map_memory, unload};
pub use plane::{Config, DataPlane, OpenError, Usage, netns_cookie};
pub use probe::{Feature, missing, probe};
pub use report::{Refused, SyncReport};
pub use shortcuts::{PodPort, Tunnel};
pub use sys::{ProgramRuns, TestRun, monotonic, program_runs, run_time_stats};
pub use table::{
    Change, DesiredBackend, DesiredFrontend, DesiredService, DesiredWay, Family, Listen, Place, Policy,
    ServiceKey, ServiceTable, SourcePrefix, describe,
};
pub use view::{SeenBackend, SeenDevice, SeenFlow, SeenService, Source, Trace, View};

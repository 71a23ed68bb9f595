//! Node agent: pods, probes, volumes, status, the kubelet API and the eBPF service proxy; the parts of `keelson-agent`.
//!
//! How they connect: [`roles`] builds every part and joins their tasks. [`sources`] watch the API server; [`pods`] runs
//! the `Desired/Observed → plan` loop of `agent_core` and acts through [`runtime`] (the CRI) and [`host`] (cgroups,
//! volumes), [`csi`] (volumes of drivers) and [`dra`] (devices of drivers; [`plugins`] finds both); [`probes`] and [`events`] hang off it. [`node`], [`server`], [`proxy`], [`network`] and [`host_ports`] run beside it and read
//! pods through [`contracts`], where the seams between all of them are. A library only so that root tests can drive parts;
//! nobody else links it.

pub mod certificates;
mod chain;
pub mod check;
pub mod config;
pub mod contracts;
pub mod csi;
pub mod devices;
pub mod dra;
pub mod events;
mod files;
pub mod host;
pub mod host_ports;
pub mod logging;
pub mod network;
pub mod node;
pub mod numa;
pub mod observability;
pub mod pace;
pub mod plugins;
pub mod pods;
pub mod preflight;
pub mod probes;
pub mod proxy;
pub mod roles;
pub mod runtime;
pub mod server;
pub mod shutdown;
pub mod sources;
mod system_bus;
pub mod upkeep;
pub mod users;

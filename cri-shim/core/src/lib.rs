//! What a CRI server decides, without doing any of it.
//!
//! Input: CRI messages (`cri-shim-api`), image configurations, the text of files and the current time. Output: names,
//! records with their state machine, OCI runtime specifications, log lines, resolver files, figures parsed from cgroup files.
//! In reading order: [`ids`] and [`names`], [`record`] (what is known of a sandbox or container and how it may change),
//! [`exit`] (why a container ended), [`filter`] (lists), [`cgroup`] (paths for both drivers), [`bandwidth`] and [`sysctls`] of pods, [`oci`] (CRI configuration to OCI specification), [`users`],
//! [`resolv`], [`log_line`], [`stats`], [`metrics`] (the figures under the names of cAdvisor).
//! This crate does no IO, reads no clock and makes no random number.

pub mod bandwidth;
pub mod cgroup;
pub mod exit;
pub mod filter;
pub mod ids;
pub mod log_line;
pub mod metrics;
pub mod names;
pub mod oci;
pub mod record;
pub mod resolv;
pub mod signal;
pub mod stats;
pub mod sysctls;
pub mod users;

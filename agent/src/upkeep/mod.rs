//! Keeps the node in working order: logs rotated, unused images removed, pods evicted before the node runs dry.
//!
//! Inputs: the configuration, figures of the node, the CRI's lists, the pods' views. Outputs: rotated files, removed images,
//! evictions for the pods' manager, pressures for the node's conditions. Four loops; decisions are `agent_core`'s.

pub mod eviction;
pub mod images;
pub mod limits;
pub mod logs;

//! The pod loop: desired pods from the API, observed pods from the CRI, steps in between.
//!
//! [`manager`] owns the set of pods and starts one [`worker`] per pod. A worker is woken by changes only, asks its
//! [`agent_core::pod_loop::PodLoop`] what to do, runs the steps side by side as tasks ([`steps`], [`start`], [`kill`]), and
//! tells the API ([`status_sync`]). [`directory`] lets other parts look pods up.
//!
//! ```text
//! API watch ─▶ manager ─▶ worker ─▶ plan ─▶ steps ─▶ CRI, host
//! CRI events ─▶ directory ─▶ worker ◀───── outcomes ──┘   └▶ status ─▶ API
//! ```

mod absorb;
pub mod clock;
pub mod context;
pub mod device_health;
pub mod directory;
mod kill;
pub mod manager;
mod orphans;
mod report;
mod start;
mod status_sync;
mod steps;
mod worker;

#[cfg(test)]
mod tests;

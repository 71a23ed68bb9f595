//! Operations on containers: [`create`] (with [`inputs`], what the host contributes), [`start`], [`stop`] (and remove),
//! [`update`], and what CRI shows of them ([`status`]).

pub mod create;
pub mod inputs;
pub mod start;
pub mod status;
pub mod stop;
pub mod update;

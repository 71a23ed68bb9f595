//! Operations on containers: [`create`] (with [`inputs`], what the host contributes, [`identity`], [`volumes`] and [`cdi`]), [`start`],
//! [`stop`] (and remove), [`update`], and what CRI shows of them ([`status`]).

pub mod cdi;
pub mod create;
pub mod identity;
pub mod inputs;
pub mod start;
pub mod status;
pub mod stop;
pub mod update;
pub mod volumes;

//! Operations on sandboxes: [`run`], [`stop`] (and remove), and what CRI shows of them ([`status`]).

pub mod run;
pub mod status;
pub mod stop;

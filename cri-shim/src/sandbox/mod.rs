//! Operations on sandboxes: [`run`] with its process [`pause`], [`stop`] (and remove), and what CRI shows of them ([`status`]).

pub mod pause;
pub mod run;
pub mod status;
pub mod stop;
pub mod update;

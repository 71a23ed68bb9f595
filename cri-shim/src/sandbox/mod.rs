//! Operations on sandboxes: [`run`] with its process [`pause`], [`stop`] (and remove, with
//! [`owed`], what could not be given back), and what CRI shows of them ([`status`]).

pub mod owed;
pub mod pause;
pub mod run;
pub mod status;
pub mod stop;
pub mod update;

//! An OCI runtime inside the caller's process: no daemon, no helper program, no global state, no async.
//!
//! [`Create`] turns a runtime specification into a process that has everything of the container (namespaces, mounts,
//! devices, cgroups, confinement) and waits before its program; [`Pending::start`] lets it run; [`Container`] is what
//! can be done with it afterwards, by this or, through its JSON, by another process: [`Container::exec`], signals,
//! resources, figures, removal.
//!
//! Everything that needs memory is prepared before the fork, because callers may have threads; the child makes system
//! calls only, and reports the step that failed through a socket, so that errors name it wherever it happened.
//! Parts of the specification that are not offered are refused with the field's name.

pub mod cgroup;
pub mod container;
pub mod error;
pub mod exec;
pub mod sealed;
pub mod stdio;
pub mod wait;

mod hooks;
mod host;
mod plan;
mod seccomp;
mod steps;

pub use container::{Container, Create, Created, Pending};
pub use error::Error;
pub use exec::{Child, Exec};
pub use stdio::{Stdio, WindowSize};

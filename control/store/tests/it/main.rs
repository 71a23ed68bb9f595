//! The store against a model, and against `kill -9`.
#![allow(clippy::unwrap_used, reason = "test helpers panic on purpose")]

mod kill;
mod model;

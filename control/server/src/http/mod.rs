//! HTTP vocabulary of the server: targets, parameters, negotiation, bodies. Connections are in [`crate::serve`].

pub mod body;
pub mod negotiate;
pub mod query;
pub mod target;

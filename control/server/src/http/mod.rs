//! HTTP vocabulary of the server: targets, parameters, negotiation, bodies. Connections are in [`crate::serve`].

pub(crate) mod body;
pub(crate) mod negotiate;
pub(crate) mod query;
pub(crate) mod target;

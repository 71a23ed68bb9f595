//! Tables that were made from published interface definitions.

pub(crate) mod messages;

//! Kubernetes API vocabulary as pure functions over `serde_json::Value`.
//!
//! Inputs are decoded objects, patches and query strings; outputs are new objects, verdicts, tables and documents.
//! This crate does no IO and reads no clock and no random source: the caller passes the time, uids and name
//! suffixes in. It keeps no state but lazily built tables. Reading order, which is also the order in which a write
//! request uses the modules:
//!
//! 1. [`kinds`]: the table of served resources; everything else takes a [`kinds::ResourceInfo`] from it.
//! 2. [`decode`] and [`schema`]: bytes to `Value`, strict field checking.
//! 3. [`patch`] (and [`apply`] for server-side apply): patch documents to a new object.
//! 4. [`defaults`], [`admit`]: what upstream's defaulting and built-in admission fill in.
//! 5. [`meta`]: uid, generation, status/spec separation, deletion.
//! 6. [`validate`]: upstream's validation, with its wording.
//! 7. [`convert`]: versions that share one stored form (events).
//! 8. [`status`]: errors as HTTP code and `metav1.Status`.
//! 9. [`selector`], [`quantity`], [`scale`], [`table`], [`discovery`], [`openapi`]: reading side.

pub mod admit;
pub mod apply;
pub mod convert;
pub mod decode;
pub mod defaults;
pub mod discovery;
pub mod kinds;
pub mod meta;
pub mod openapi;
pub mod patch;
pub mod quantity;
pub mod scale;
pub mod schema;
pub mod selector;
pub mod status;
pub mod table;
pub mod validate;
mod value;

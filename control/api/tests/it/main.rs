//! Integration tests of control-api: generated files are current, documents are what kubectl reads.

mod annotations;
mod generate;
mod shapes;
mod typed;

//! Parsing, checksums and load-balancing decisions over a byte-access trait; no_std.
#![no_std]

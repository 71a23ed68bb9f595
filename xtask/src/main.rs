//! Everything a developer, operator or CI runs.

fn main() {}

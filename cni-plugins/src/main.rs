//! The keelson CNI plugins, one multi-call executable.

fn main() {}

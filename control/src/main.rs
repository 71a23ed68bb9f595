//! Kubernetes API server, store, scheduler and controllers in one process.

fn main() {}

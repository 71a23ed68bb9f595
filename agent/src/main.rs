//! Node agent: pods, probes, volumes, status and the eBPF service proxy.

fn main() {}

//! CRI v1 server on containerd.

fn main() {}

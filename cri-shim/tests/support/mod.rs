//! What root tests of keelson-cri share: a containerd of their own and a tiny registry.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

pub mod containerd;
pub mod cri;
pub mod leftovers;
pub mod life;
pub mod pods;
pub mod registry;

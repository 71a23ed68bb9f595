//! Keys and values of every BPF map, shared by the programs and user space.
#![no_std]

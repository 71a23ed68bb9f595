//! Loads, probes, attaches, pins and upgrades the BPF programs; typed map handles.

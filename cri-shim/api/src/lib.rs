//! CRI v1 messages and services, wire-compatible with cri-api 1.36.

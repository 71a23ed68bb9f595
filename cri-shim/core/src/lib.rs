//! Sandbox and container state machine, CRI configuration to OCI spec, log lines, name rules.

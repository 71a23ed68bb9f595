//! Controllers and scheduler as pure functions: plan(desired, observed, now) -> Plan.

//! Scenarios: pods from start to end, as a table of what the loop does next.

//! CNI 1.1 configuration, results, errors, version conversion; address allocation as a pure step.

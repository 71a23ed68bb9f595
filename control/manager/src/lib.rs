//! Runs the controllers and the scheduler against any Kubernetes API server: watch, decide, write.

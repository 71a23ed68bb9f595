//! Why an operation of the runtime failed: the step, what it worked on, and the kernel's answer.

use std::io;

/// A failed operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A part of the specification that cannot be carried out as it is written.
    #[error("{field}: {problem}")]
    Spec {
        /// The field, as `linux.seccomp.syscalls[3].names`.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The program to run does not exist in the container, or may not be executed.
    #[error("exec: {program:?}: {problem}")]
    Exec {
        /// The program as the specification names it.
        program: String,
        /// Why, as other runtimes word it: `executable file not found in $PATH`, `permission denied`.
        problem: String,
        /// The kernel's answer (`NotFound`, `PermissionDenied`, …), which `problem` already tells.
        source: io::Error,
    },
    /// A step failed, in this process or in the container's.
    #[error("{step}")]
    Step {
        /// What was done, to what: `mount tmpfs on /dev`.
        step: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A hook could not be run, failed or took too long.
    #[error("{hook}: {problem}")]
    Hook {
        /// Its place in the specification and its program.
        hook: String,
        /// What happened, with what it printed.
        problem: String,
    },
    /// The container's process ended before it was ready, without a report: killed, often by its memory limit.
    #[error("the container's process ended while it was set up ({0})")]
    Died(String),
    /// The container's first process has ended.
    #[error("container {0} is not running")]
    NotRunning(String),
    /// The kernel or the host lacks something.
    #[error("{feature} is not available: {reason}")]
    Unavailable {
        /// What was asked for.
        feature: &'static str,
        /// Why it is not there.
        reason: String,
    },
}

impl Error {
    /// For `map_err`: names the step that an io error belongs to.
    pub(crate) fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Step { step: step.into(), source: source.into() }
    }

    /// A field of the specification that is refused.
    pub(crate) fn spec(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Spec { field: field.into(), problem: problem.into() }
    }

    /// This and all its sources in one line, as a log or a gRPC status wants it.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        if matches!(self, Self::Exec { .. }) {
            return text;
        }
        let mut source = std::error::Error::source(self);
        while let Some(inner) = source {
            text.push_str(": ");
            text.push_str(&inner.to_string());
            source = inner.source();
        }
        text
    }
}

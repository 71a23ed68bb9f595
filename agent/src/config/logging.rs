//! `logging`: what is written to the log, and in which form. Pure.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::{AgentConfig, GoDuration};

/// From this verbosity on, the agent's own steps are written.
const DETAILED: u32 = 4;
/// From this one on, everything that it has to say.
const EVERYTHING: u32 = 6;

/// `logging`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoggingSettings {
    /// `text` or `json`.
    pub format: String,
    /// Without effect: every line is written at once.
    pub flush_frequency: Option<Frequency>,
    /// 0 to 3 is usual, 4 and 5 tell of steps, more of everything.
    pub verbosity: u32,
    /// Other verbosities for parts of the agent.
    pub vmodule: Vec<ModuleVerbosity>,
    /// Options of formats; alpha upstream, without effect here.
    pub options: LoggingOptions,
}

/// A `metav1.Duration`, or nanoseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Frequency {
    /// As older files have it.
    Nanoseconds(u64),
    /// As newer files have it.
    Duration(GoDuration),
}

/// An entry of `logging.vmodule`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ModuleVerbosity {
    /// A module of the agent, as `pods` or `pods/worker`; it includes those below.
    pub file_pattern: String,
    /// Its verbosity.
    pub verbosity: u32,
}

/// `logging.options`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoggingOptions {
    /// Of the format `text`.
    pub text: OutputOptions,
    /// Of the format `json`.
    pub json: OutputOptions,
}

/// Where lines go.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutputOptions {
    /// Errors to stderr, all else to stdout.
    pub split_stream: bool,
    /// How much may be held back.
    pub info_buffer_size: Option<serde_json::Value>,
}

impl LoggingSettings {
    /// Whether lines are JSON objects.
    pub fn is_json(&self) -> bool {
        self.format == "json"
    }

    /// What is written, as tracing's directives say it.
    pub fn directives(&self) -> String {
        let level = |verbosity: u32| match verbosity {
            EVERYTHING.. => "trace",
            DETAILED.. => "debug",
            _ => "info",
        };
        // The client library's own reports of an unreachable API server repeat ours.
        let mut text = format!("info,kube_client=off,keelson_agent={}", level(self.verbosity));
        for module in &self.vmodule {
            let path = module.file_pattern.trim_end_matches(['*', '/']).replace('/', "::");
            let place = if path.is_empty() { String::new() } else { format!("::{path}") };
            // Writing to a String cannot fail.
            write!(text, ",keelson_agent{place}={}", level(module.verbosity)).ok();
        }
        text
    }

    pub(super) fn problems(&self, config: &AgentConfig) -> Vec<String> {
        let mut problems = Vec::new();
        if !matches!(self.format.as_str(), "" | "text" | "json") {
            let given = &self.format;
            problems.push(format!("logging.format: Invalid value: {given:?}: Unsupported log format"));
        }
        if self.is_json() && !self.vmodule.is_empty() {
            problems.push("logging.vmodule: Forbidden: Only supported for text log format".to_owned());
        }
        for (place, module) in self.vmodule.iter().enumerate() {
            let is_name =
                |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '/' | '*');
            if module.file_pattern.is_empty() || !module.file_pattern.chars().all(is_name) {
                problems.push(format!(
                    "logging.vmodule[{place}].filePattern: {:?} is not a module of the agent, as pods/worker",
                    module.file_pattern
                ));
            }
        }
        for (name, options) in [("text", &self.options.text), ("json", &self.options.json)] {
            if options.split_stream && !config.is_enabled("LoggingAlphaOptions") {
                problems.push(format!(
                    "logging.options.{name}.splitStream: Forbidden: Feature LoggingAlphaOptions is disabled"
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_becomes_levels() {
        let of = |text: &str| serde_norway::from_str::<LoggingSettings>(text).expect("settings").directives();
        assert_eq!(of("{}"), "info,kube_client=off,keelson_agent=info");
        assert_eq!(of("{verbosity: 3, flushFrequency: 5000000000}"), of("{flushFrequency: 5s}"));
        assert!(of("verbosity: 4").ends_with("keelson_agent=debug"));
        assert!(
            of("{verbosity: 2, vmodule: [{filePattern: pods/worker*, verbosity: 9}]}")
                .ends_with("keelson_agent=info,keelson_agent::pods::worker=trace")
        );
    }
}

//! The agent's log on stderr: its form, and how much it says, which may change while the agent runs.
//!
//! Input: `logging` of the configuration; `RUST_LOG` counts more. Output: lines of text or JSON objects, each written at once.

use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;

use crate::config::LoggingSettings;

/// Replaces the filter of the running log.
type Reload = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

static RELOAD: OnceLock<Reload> = OnceLock::new();

/// Starts the log; to be called once.
pub fn init(settings: &LoggingSettings) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_unset| EnvFilter::new(settings.directives()));
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
    if settings.is_json() {
        let builder = builder.json().with_env_filter(filter).with_filter_reloading();
        let handle = builder.reload_handle();
        remember(Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string())));
        builder.init();
    } else {
        let builder = builder.with_env_filter(filter).with_filter_reloading();
        let handle = builder.reload_handle();
        remember(Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string())));
        builder.init();
    }
}

/// Says as much as `logging.verbosity` with this number would.
pub fn set_verbosity(verbosity: u32) -> Result<(), String> {
    let reload = RELOAD.get().ok_or("the log was not started by the agent")?;
    reload(EnvFilter::new(LoggingSettings { verbosity, ..LoggingSettings::default() }.directives()))
}

fn remember(reload: Reload) {
    // A second log does not start either.
    drop(RELOAD.set(reload));
}

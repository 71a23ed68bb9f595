//! Kubernetes API server, store, scheduler and controllers in one process.
//!
//! `keelson-control serve --config FILE` reads the configuration, makes what certificates are missing, opens the store, and runs the roles of
//! the configuration until SIGTERM or SIGINT. Exit code 0 after an orderly end, 1 after an error, 2 for wrong arguments.

mod config;
mod identities;
mod roles;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::config::ControlConfig;

/// Worker threads of the runtime: the work is short, and each thread costs memory.
const WORKERS: usize = 2;
/// Threads that may block on the store file at a time.
const BLOCKING: usize = 8;

#[derive(Parser)]
#[command(name = "keelson-control", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the control plane.
    Serve {
        /// The configuration file (YAML).
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let Arguments { command: Command::Serve { config } } = Arguments::parse();
    install_tracing();
    match serve(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(path: &std::path::Path) -> anyhow::Result<()> {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        anyhow::bail!("another TLS provider is installed already");
    }
    let config = ControlConfig::load(path)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let outcome = runtime.block_on(async {
        let cancel = CancellationToken::new();
        cancel_on_signal(&cancel)?;
        roles::run(config, cancel).await
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    outcome
}

fn cancel_on_signal(cancel: &CancellationToken) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    let cancel = cancel.clone();
    tokio::spawn(async move {
        // Cancel safe: signals are kept until received.
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!("{name}: shutting down");
        cancel.cancel();
    });
    Ok(())
}

fn install_tracing() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

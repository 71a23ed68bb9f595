//! `keelson-cri`: CRI v1 on containerd.
//!
//! In reading order: [`config`]; [`runtime`] (what every operation works with) over [`state`], [`journal`] and
//! [`containerd`]; [`sandbox`] and [`container`] (the operations), [`exits`] and [`recovery`] (what happens by itself),
//! [`network`], [`logs`], [`stats`], [`host`]; [`images`], [`exec`] with [`attach`]; [`service`] and [`status`] (gRPC), [`serve`].
//! It knows no Pod, Service or API server: only what CRI requests say.

mod attach;
mod clock;
mod config;
mod container;
mod containerd;
mod error;
mod events;
mod exec;
mod exits;
mod facts;
mod flight;
mod host;
mod images;
mod journal;
mod logs;
mod network;
mod recovery;
mod runtime;
mod sandbox;
mod serve;
mod service;
mod state;
mod stats;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// CRI v1 server on containerd.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = "/etc/keelson/cri.yaml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::builder()
                .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
                .from_env_lossy(),
        )
        .init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        anyhow::bail!("a TLS provider is installed already");
    }
    let config = config::Config::load(&arguments.config)?;
    // Two threads: the work is waiting, and what blocks has threads of its own that end when idle.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .enable_all()
        .build()?
        .block_on(serve::serve(config))
}

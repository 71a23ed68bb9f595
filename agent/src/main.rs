//! Node agent: pods, probes, volumes, status, the kubelet API and the eBPF service proxy.
//!
//! Input: `--config FILE` (KubeletConfiguration and a `keelson:` section). Roles run as tasks of one process and end
//! together; pods outlive them. This file only reads the configuration and joins the roles.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use keelson_agent::config::AgentConfig;
use keelson_agent::proxy::show;
use keelson_agent::{check, host, preflight, roles};

/// The client library's own reports of an unreachable API server repeat ours.
const DEFAULT_LOG: &str = "info,kube_client=off";

/// Kubernetes node agent.
#[derive(Debug, Parser)]
#[command(name = "keelson-agent", version)]
struct Arguments {
    /// Configuration file: KubeletConfiguration v1beta1 with a `keelson:` section.
    #[arg(long, default_value = "/etc/keelson/agent.yaml")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Chore>,
}

/// What the program does instead of running the agent.
#[derive(Debug, Subcommand)]
enum Chore {
    /// Tell what this machine lacks, and how to mend it; starts nothing.
    Check,
    /// The service data plane, which outlives the agent.
    #[command(subcommand)]
    Proxy(ProxyChore),
    /// The network between nodes, which outlives the agent.
    #[command(subcommand)]
    Network(NetworkChore),
    /// What the service data plane of this node does.
    Service {
        /// Where it is pinned; the configuration file tells by default.
        #[arg(long)]
        pin_dir: Option<PathBuf>,
        /// How the answer looks.
        #[arg(long, short, value_enum, default_value_t)]
        output: show::Output,
        #[command(subcommand)]
        question: ServiceQuestion,
    },
}

#[derive(Debug, Subcommand)]
enum NetworkChore {
    /// Remove the tunnel device and the routes to other nodes' pods.
    Cleanup {
        /// The tunnel device.
        #[arg(long, default_value = "kl-vxlan")]
        device: String,
    },
}

#[derive(Debug, Subcommand)]
enum ServiceQuestion {
    #[command(flatten)]
    Maps(show::Question),
    /// Compare the maps with the API server; fails where they differ.
    Verify,
}

#[derive(Debug, Subcommand)]
enum ProxyChore {
    /// Detach and unpin the data plane, and remove its routes.
    Cleanup {
        /// Where it is pinned.
        #[arg(long)]
        pin_dir: PathBuf,
        /// Service range whose route is removed.
        #[arg(long = "service-cidr", default_value = "")]
        service_cidr: String,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_unset| EnvFilter::new(DEFAULT_LOG)),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match start(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            error!("{problem:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    // Fails only when one was installed before: this is the first statement of the process.
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        warn!("a TLS provider was installed already");
    }
    if let Some(chore) = &arguments.command {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        return match chore {
            Chore::Check => {
                let config = AgentConfig::load(&arguments.config)?;
                report(&runtime.block_on(check::run(&config)))
            }
            Chore::Proxy(ProxyChore::Cleanup { pin_dir, service_cidr }) => {
                runtime.block_on(keelson_agent::proxy::cleanup(pin_dir, service_cidr))
            }
            Chore::Network(NetworkChore::Cleanup { device }) => {
                runtime.block_on(keelson_agent::network::cleanup(device))
            }
            Chore::Service { pin_dir, output, question } => {
                service(arguments, pin_dir.as_deref(), *output, question)
            }
        };
    }
    host::memory::economize();
    let config = AgentConfig::load(&arguments.config)?;
    if !config.ignored.is_empty() {
        warn!(fields = %config.ignored.join(", "), "configuration fields without effect so far");
    }
    preflight::check(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let cancel = CancellationToken::new();
        tokio::spawn(cancel_on_signal(cancel.clone())?);
        roles::run(config, cancel).await
    })
}

/// Prints findings; an error when one of them stops the agent.
fn report(findings: &[check::Finding]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for finding in findings {
        writeln!(out, "{finding}")?;
    }
    let bad = findings.iter().filter(|finding| finding.grade == check::Grade::Bad).count();
    anyhow::ensure!(bad == 0, "{bad} finding(s) keep the agent or its pods from starting");
    Ok(())
}

/// `keelson-agent service …`.
fn service(
    arguments: &Arguments,
    pin_dir: Option<&Path>,
    output: show::Output,
    question: &ServiceQuestion,
) -> anyhow::Result<()> {
    let from_config = || {
        let config = AgentConfig::load(&arguments.config).context("--pin-dir is not given, and")?;
        let section =
            config.keelson.proxy.as_ref().context("the configuration has no keelson.proxy section")?;
        anyhow::Ok(section.pin_dir.clone())
    };
    let pin_dir = pin_dir.map_or_else(from_config, |dir| Ok(dir.to_owned()))?;
    let mut out = std::io::stdout().lock();
    let mut draw = |text: &str| -> anyhow::Result<()> {
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    };
    let ServiceQuestion::Maps(question) = question else {
        let config = AgentConfig::load(&arguments.config)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let differences = runtime.block_on(roles::verify_services(&config, &pin_dir))?;
        for difference in &differences {
            draw(&format!("{difference}\n"))?;
        }
        anyhow::ensure!(differences.is_empty(), "{} difference(s) between maps and API", differences.len());
        return draw("the maps hold what the API says\n");
    };
    show::answer(&pin_dir, question, output, draw)
}

/// SIGTERM and SIGINT end the agent; its pods go on.
fn cancel_on_signal(cancel: CancellationToken) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping; pods go on");
        cancel.cancel();
    })
}

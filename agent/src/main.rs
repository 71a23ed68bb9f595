//! Node agent: pods, probes, volumes, status, the kubelet API and the eBPF service proxy.
//!
//! Input: `--config FILE` (KubeletConfiguration and a `keelson:` section). Roles run as tasks of one process and end
//! together; pods outlive them. This file only reads the configuration and joins the roles; [`arguments`] is the command line.

mod arguments;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use keelson_agent::config::{AgentConfig, LoggingSettings};
use keelson_agent::proxy::show;
use keelson_agent::{check, host, logging, preflight, roles};

use arguments::{Arguments, Chore, NetworkChore, ProxyChore, ServiceQuestion};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.command {
        Some(chore) => {
            logging::init(&LoggingSettings::default());
            do_chore(&arguments, chore)
        }
        None => start(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            error!("{problem:#}");
            ExitCode::FAILURE
        }
    }
}

fn do_chore(arguments: &Arguments, chore: &Chore) -> anyhow::Result<()> {
    install_tls();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match chore {
        Chore::Check => {
            let config = AgentConfig::load_from(&arguments.source())?;
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
    }
}

/// Runs the agent.
fn start(arguments: &Arguments) -> anyhow::Result<()> {
    host::memory::economize();
    let config = AgentConfig::load_from(&arguments.source());
    // What is wrong with the configuration is told in the usual form.
    logging::init(&config.as_ref().map(|config| config.logging.clone()).unwrap_or_default());
    install_tls();
    let config = config?;
    for ignored in &config.ignored {
        warn!(field = %ignored.field, "a configuration field changes nothing: {}", ignored.reason);
    }
    for flag in arguments.idle() {
        warn!("--{flag} changes nothing");
    }
    preflight::check(&config)?;
    if config.keelson.kubelet {
        host::prepare(&config)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async {
        let cancel = CancellationToken::new();
        tokio::spawn(cancel_on_signal(cancel.clone())?);
        roles::run(config, cancel).await
    });
    // Whoever waits for a file system that hangs is not waited for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    ended
}

fn install_tls() {
    // Fails only when one was installed before: nothing of this process used TLS yet.
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        warn!("a TLS provider was installed already");
    }
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
        let config = AgentConfig::load_from(&arguments.source()).context("--pin-dir is not given, and")?;
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
        let config = AgentConfig::load_from(&arguments.source())?;
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

//! `lb-bench connections|pods|packets|rates|programming|soak …`: measures, prints one JSON document, and tells on standard
//! error how far it is. `cargo xtask bench lb` builds, runs and draws it.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the report goes to standard output, progress to error"
)]

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use ebpf_tests::bench::{
    client, connections, far, packets,
    peers::{self, Peer},
    programming::{self, Size},
    rates, shortcut, soak,
};

#[derive(Parser)]
#[command(about = "Measures the service data plane beside other ways to forward.")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Connections, requests and calls through a ClusterIP, over those straight to the pod.
    Connections {
        /// Services in all, one measurement each.
        #[arg(long, value_delimiter = ',', default_value = "1,1000,5000,30000")]
        services: Vec<u32>,
        /// Endpoints of each service that nobody dials.
        #[arg(long, default_value_t = 3)]
        endpoints: u32,
        /// Stop when the 95 % interval of our ratio is within this fraction.
        #[arg(long, default_value_t = 0.01)]
        precision: f64,
        /// Stop a kind of work anyway after so many seconds.
        #[arg(long, default_value_t = 600)]
        seconds: u64,
        /// Repetitions per block.
        #[arg(long, default_value_t = 2000)]
        block: u32,
        /// Peers to measure; all that are known when not given, `none` for none.
        #[arg(long, value_delimiter = ',')]
        peer: Vec<String>,
    },
    /// What a packet from outside costs the programs, by BPF_PROG_TEST_RUN.
    Packets {
        /// Services in all, one measurement each.
        #[arg(long, value_delimiter = ',', default_value = "1,1000,5000,30000")]
        services: Vec<u32>,
        /// Endpoints of each service that nobody dials.
        #[arg(long, default_value_t = 3)]
        endpoints: u32,
        /// Single runs of each kind.
        #[arg(long, default_value_t = 4_000, value_parser = clap::value_parser!(u16).range(1..=4_000))]
        runs: u16,
    },
    /// How many packets from outside a NodePort forwards, and what one costs the processor.
    Rates {
        /// Rounds, two blocks of each way.
        #[arg(long, default_value_t = 10)]
        rounds: u32,
        /// Milliseconds that a block shall take.
        #[arg(long, default_value_t = 1000)]
        block: u64,
        /// Peers to measure; all that are known when not given, `none` for none.
        #[arg(long, value_delimiter = ',')]
        peer: Vec<String>,
    },
    /// Connections and requests between pods of one node, over those over a plain bridge.
    Pods {
        /// Stop when the 95 % interval of our ratio is within this fraction.
        #[arg(long, default_value_t = 0.01)]
        precision: f64,
        /// Stop a kind of work anyway after so many seconds.
        #[arg(long, default_value_t = 600)]
        seconds: u64,
        /// Repetitions per block.
        #[arg(long, default_value_t = 2000)]
        block: u32,
        /// Pods of two nodes with a tunnel between them instead.
        #[arg(long)]
        far: bool,
    },
    /// Many services from nothing, and one endpoint changed.
    Programming {
        /// The keelson-agent to run.
        #[arg(long)]
        agent: PathBuf,
        /// Services × endpoints.
        #[arg(long, value_delimiter = ',', value_parser = size, default_value = "5000x3,10000x10")]
        sizes: Vec<Size>,
        /// Changes of one endpoint.
        #[arg(long, default_value_t = 200)]
        changes: u32,
        /// Seconds that a peer's changes may take in all.
        #[arg(long, default_value_t = 10)]
        peer_seconds: u64,
        /// Peers to measure; all that are known when not given, `none` for none.
        #[arg(long, value_delimiter = ',')]
        peer: Vec<String>,
    },
    /// Kills and exchanges the agent under load.
    Soak {
        /// The keelson-agent to run.
        #[arg(long)]
        agent: PathBuf,
        /// Another one to exchange it with.
        #[arg(long)]
        other: Option<PathBuf>,
        /// How long.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Milliseconds between two kills.
        #[arg(long, default_value_t = 1000)]
        every: u64,
        /// Services that nobody dials.
        #[arg(long, default_value_t = 1000)]
        services: u32,
    },
    /// The dialling side of a measurement; started by it.
    #[command(hide = true)]
    Client,
}

fn size(text: &str) -> Result<Size> {
    let (services, endpoints) = text.split_once('x').context("a size is written as 5000x3")?;
    Ok(Size { services: services.parse()?, endpoints: endpoints.parse()? })
}

fn chosen(names: &[String]) -> Result<Vec<Arc<dyn Peer>>> {
    let all = peers::all();
    let known: Vec<&str> = all.iter().map(|peer| peer.name()).collect();
    for name in names {
        ensure!(
            name == "none" || known.contains(&name.as_str()),
            "--peer {name}: known are {}",
            known.join(", ")
        );
    }
    Ok(all
        .into_iter()
        .filter(|peer| names.is_empty() || names.iter().any(|name| name == peer.name()))
        .collect())
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Connections { services, endpoints, precision, seconds, block, peer } => {
            let peers = chosen(&peer)?;
            let limit = Duration::from_secs(seconds);
            let mut reports = Vec::new();
            for services in services {
                eprintln!("{services} services");
                let peers = peers.clone();
                let options = connections::Options { services, endpoints, precision, limit, block, peers };
                reports.push(connections::measure(&options)?);
            }
            println!("{}", serde_json::to_string_pretty(&reports)?);
        }
        What::Pods { precision, seconds, block, far } => {
            let limit = Duration::from_secs(seconds);
            let options = shortcut::Options { precision, limit, block };
            let reports = if far { far::measure(&options)? } else { shortcut::measure(&options)? };
            println!("{}", serde_json::to_string_pretty(&reports)?);
        }
        What::Packets { services, endpoints, runs } => {
            let reports = packets::measure(&packets::Options { services, endpoints, runs })?;
            println!("{}", serde_json::to_string_pretty(&reports)?);
        }
        What::Rates { rounds, block, peer } => {
            let (block, peers) = (Duration::from_millis(block), chosen(&peer)?);
            let report = rates::measure(&rates::Options { rounds, block, peers })?;
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
        What::Programming { agent, sizes, changes, peer_seconds, peer } => {
            let peer_limit = Duration::from_secs(peer_seconds);
            let options = programming::Options { agent, changes, peer_limit, peers: chosen(&peer)? };
            let mut reports = Vec::new();
            for size in sizes {
                eprintln!("{} services with {} endpoints", size.services, size.endpoints);
                reports.push(programming::measure(&options, size)?);
            }
            println!("{}", serde_json::to_string_pretty(&reports)?);
        }
        What::Soak { agent, other, seconds, every, services } => {
            let (duration, every) = (Duration::from_secs(seconds), Duration::from_millis(every));
            let options = soak::Options { agent, other, duration, every, services };
            println!("{}", serde_json::to_string_pretty(&soak::soak(&options)?)?);
        }
        What::Client => client::serve(std::io::stdin().lock(), std::io::stdout().lock())?,
    }
    Ok(())
}

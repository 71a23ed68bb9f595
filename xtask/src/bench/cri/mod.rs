//! `bench cri`: keelson-cri beside containerd's own CRI plugin: same machine, same run, same images, same CNI plugins,
//! interleaved A/B/B/A.
//!
//! Each side has a containerd, directories, cgroups and a bridge of its own. Times are what a client of the CRI sees;
//! ratios carry a 95 % bootstrap interval over rounds; goals are printed beside them. Memory is taken with one side
//! running at a time, since the sides would share pages and halve each other's PSS.

mod cpu;
mod driver;
mod exec;
mod lifecycle;
mod memory;
mod pull;
pub(super) mod report;
mod svg;

use anyhow::{Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use self::driver::Driver;
use self::report::Report;
use crate::cmd::{Cmd, step, which};
use crate::cri_hosts::{Ground, Kind, Options, Plugins};
use crate::paths::Layout;

/// Part of the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// Sandboxes and containers from run to remove.
    Lifecycle,
    /// ExecSync of `true`.
    Exec,
    /// Memory per pod, and CPU while nothing happens.
    Memory,
    /// PullImage of a large image.
    Pull,
}

/// The command line.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Arguments {
    /// Few rounds, few pods: shows that it works; the figures are coarse.
    #[arg(long)]
    quick: bool,
    /// Runtime handler of our side; its default handler when not given.
    #[arg(long, default_value = "")]
    handler: String,
    /// CNI plugins of both sides.
    #[arg(long, value_enum, default_value_t)]
    cni: Plugins,
    /// Pods for the memory figures.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=110))]
    pods: u32,
    /// Give containers the runtime's default seccomp profile; a stock kubelet's default is none.
    #[arg(long)]
    seccomp: bool,
    /// Interleaved rounds; 12, or 3 with --quick, when not given.
    #[arg(long)]
    rounds: Option<u32>,
    /// Parts to measure; all when none is named.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 3 } else { 12 })
    }

    fn options(&self) -> Options {
        Options { plugins: self.cni, ..Options::default() }
    }
}

/// Builds, measures, prints, and saves the report.
pub(crate) fn run(layout: &Layout, arguments: &Arguments) -> Result<()> {
    crate::preflight::require_root()?;
    install(arguments.cni)?;
    build(layout)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let report = runtime.block_on(interruptible(measure(layout, arguments)))?;
    report.print();
    super::save(layout, "cri", &report)?;
    let file = layout.repo.join("target/bench/cri.svg");
    crate::process::write_atomic(&file, svg::chart(&report).as_bytes())?;
    println!("saved: {}", file.display());
    Ok(())
}

fn install(plugins: Plugins) -> Result<()> {
    for program in ["containerd", "runc"] {
        if which(program).is_none() {
            bail!("{program} is missing: run `cargo xtask setup`");
        }
    }
    if plugins == Plugins::Reference && !std::path::Path::new("/usr/lib/cni/bridge").is_file() {
        step("installing Debian's reference CNI plugins", || {
            Cmd::new("apt-get")
                .args(["install", "-y", "-qq", "--no-install-recommends", "containernetworking-plugins"])
                .output()
        })?;
    }
    Ok(())
}

fn build(layout: &Layout) -> Result<()> {
    let names = ["keelson-cri", "containerd-shim-keelson-v1", "keelson-cni"];
    step("building keelson-cri, its shim and the CNI plugins", || {
        crate::binaries::build_only(&layout.repo, &names)
    })
}

/// A signal ends the measurement as an error does, so that everything is cleaned up.
async fn interruptible<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut terminate = signal(SignalKind::terminate())?;
    // Cancel-safe: whatever ends first ends the program's work.
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
    }
}

async fn measure(layout: &Layout, arguments: &Arguments) -> Result<Report> {
    let ground = Ground::prepare(layout, "bench").await?;
    let mut report = Report::new(arguments, &ground)?;
    if arguments.wants(Part::Lifecycle) || arguments.wants(Part::Exec) {
        let sides = Sides::start(&ground, arguments).await?;
        if arguments.wants(Part::Lifecycle) {
            report.rows.extend(lifecycle::measure(&sides, arguments).await?);
        }
        if arguments.wants(Part::Exec) {
            report.rows.extend(exec::measure(&sides, arguments).await?);
        }
    }
    if arguments.wants(Part::Pull) {
        report.rows.extend(pull::measure(&ground, arguments.quick, arguments.rounds()).await?);
    }
    if arguments.wants(Part::Memory) {
        let (rows, columns) = memory::measure(&ground, arguments).await?;
        report.rows.extend(rows);
        report.memory = columns;
    }
    Ok(report)
}

/// Both servers, ready, with the workload's image.
struct Sides {
    ours: Driver,
    peer: Driver,
}

impl Sides {
    async fn start(ground: &Ground, arguments: &Arguments) -> Result<Self> {
        println!("==> starting keelson-cri and containerd's plugin");
        let ours = side(ground, Kind::Keelson, arguments).await?;
        let peer = side(ground, Kind::Containerd, arguments).await?;
        Ok(Self { ours, peer })
    }

    /// The order within a round: A B B A.
    fn round(&self) -> [(&Driver, bool); 4] {
        [(&self.ours, true), (&self.peer, false), (&self.peer, false), (&self.ours, true)]
    }
}

/// Starts one side, pulls the image, and runs one cycle that does not count.
async fn side(ground: &Ground, kind: Kind, arguments: &Arguments) -> Result<Driver> {
    let slot = u8::from(kind == Kind::Containerd);
    let host = ground.start(slot, kind, &arguments.options()).await?;
    let handler = if kind == Kind::Keelson { arguments.handler.clone() } else { String::new() };
    let driver = Driver::new(host, handler, arguments.seccomp).await?;
    driver.cycle("warm-up").await.map_err(|error| driver.explain(&error))?;
    println!("    {} at {}", driver.name(), driver.host.endpoint());
    Ok(driver)
}

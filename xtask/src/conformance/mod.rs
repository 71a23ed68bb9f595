//! `cargo xtask conformance cri`: our own suite over CRI v1, one case per promised behaviour; [`cni`] is the same for
//! CNI plugins, [`node`] for the nodes of a cluster; they share the runner, the lists and the reports.
//!
//! It takes any endpoint: a case uses gRPC over the endpoint's unix socket, the streaming URLs it gives, the logs it
//! writes and, inside containers, busybox. In reading order: [`case`], [`context`] (what a case works with), `cases`
//! (the promises, a file per group), [`runner`], [`report`], [`list`]; [`images`] and [`registry`] (what is pulled),
//! [`probe`], [`stream`]; [`start`] (a private containerd or keelson-cri to run against).

#![allow(clippy::large_futures, reason = "a case runs once, and the runner boxes it")]
#![allow(clippy::assigning_clones, reason = "configurations read as assignments")]

mod case;
mod cases;
mod cni;
mod context;
mod html;
mod images;
mod list;
pub(crate) mod node;
mod probe;
mod progress;
mod registry;
mod report;
mod runner;
mod start;
mod stream;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cri_shim_api::v1::image_service_client::ImageServiceClient;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

use self::context::Suite;
use self::probe::Facts;
use crate::paths::Layout;

/// What to check.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum What {
    /// A CRI v1 endpoint: keelson-cri, containerd, CRI-O.
    Cri(Box<Options>),
    /// CNI plugins: any executable, Debian's, ours.
    Cni(Box<cni::Options>),
    /// A node of any cluster, through the Kubernetes API: ours, or one with a stock kubelet.
    Node(Box<node::Options>),
}

/// How to check a CRI.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// The endpoint, `unix:///run/containerd/containerd.sock`.
    #[arg(long)]
    endpoint: Option<String>,
    /// The endpoint of the image service, where it is another one.
    #[arg(long)]
    image_endpoint: Option<String>,
    /// Start this one in namespaces of its own and check it (needs root).
    #[arg(long, value_enum, conflicts_with = "endpoint")]
    start: Option<start::Target>,
    /// RuntimeClass handler of every sandbox.
    #[arg(long, default_value = "")]
    handler: String,
    /// Only cases whose id holds these words; `|` separates alternatives.
    #[arg(long, default_value = "")]
    filter: String,
    /// Print the cases and end.
    #[arg(long)]
    list: bool,
    /// Write JUnit XML.
    #[arg(long)]
    junit: Option<PathBuf>,
    /// Cases beside each other.
    #[arg(long, default_value_t = 6)]
    parallel: usize,
    /// How often a case may be tried; its failures are printed. For a reference whose races are not ours to mend.
    #[arg(long, default_value_t = 1)]
    attempts: u32,
    /// Cases not to run: lines of `group: name = reason`.
    #[arg(long)]
    skip_list: Option<PathBuf>,
    /// Cases that are known to fail: lines of `group: name = reason`.
    #[arg(long)]
    known: Option<PathBuf>,
    /// Cases that must not be skipped: words as of --filter; for a machine that is known to have what they need.
    #[arg(long)]
    never_skip: Option<String>,
    /// Seconds that one case may take.
    #[arg(long, default_value_t = 120)]
    deadline: u64,
    /// Where images come from.
    #[arg(long, value_enum, default_value = "serve")]
    images: Images,
    /// The everyday image: a busybox; served by the suite unless images are preloaded.
    #[arg(long)]
    image: Option<String>,
    /// Port of the suite's registry; a free one when not given.
    #[arg(long, default_value_t = 0)]
    registry_port: u16,
    /// Parent of the pods' cgroups.
    #[arg(long)]
    cgroup_parent: Option<String>,
    /// With --start: take the release binaries as they are.
    #[arg(long)]
    no_build: bool,
    /// Print the cases in which these JUnit files differ, and end.
    #[arg(long, num_args = 2..)]
    compare: Vec<PathBuf>,
}

/// Where images come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Images {
    /// From a registry on 127.0.0.1 that the suite serves over plain HTTP.
    Serve,
    /// The endpoint has the everyday image (`--image`); cases that pull others are skipped.
    Preloaded,
}

/// Runs what was asked for; `false` when a case failed.
pub(crate) fn run(layout: &Layout, what: &What) -> Result<bool> {
    let options = match what {
        What::Cri(options) => options,
        What::Cni(options) => return cni::run(layout, options),
        What::Node(options) => return node::run(layout, options),
    };
    if !options.compare.is_empty() {
        return report::compare(&options.compare).map(|()| true);
    }
    if options.list {
        for case in cases::all().iter().filter(|case| list::matches(&case.id(), &options.filter)) {
            println!("{}", case.id());
        }
        return Ok(true);
    }
    if let Some(target) = options.start {
        return start::run(layout, target, options);
    }
    let Some(endpoint) = &options.endpoint else {
        bail!("name an endpoint (`--endpoint unix:///…`), or let one be started (`--start keelson`)");
    };
    let dir = PathBuf::from(format!("/tmp/keelson-conformance-{}", std::process::id()));
    let result = runtime()?.block_on(async {
        let catalog = catalog(layout, options, &dir).await?;
        check(layout, options, endpoint, catalog, &dir).await
    });
    std::fs::remove_dir_all(&dir).ok();
    result
}

/// Fetches what the images are made from, for a run where there is no network.
pub(crate) fn prepare(work: &Path) -> Result<()> {
    std::fs::create_dir_all(work).with_context(|| format!("creating {}", work.display()))?;
    images::fetch(work).map(drop)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting tokio")
}

/// Serves the images, unless they are there.
async fn catalog(layout: &Layout, options: &Options, dir: &Path) -> Result<images::Catalog> {
    match options.images {
        Images::Preloaded => Ok(images::Catalog::none()),
        Images::Serve => {
            images::Catalog::serve(
                &layout.repo.join("target/conformance"),
                options.registry_port,
                &dir.join("escape"),
            )
            .await
        }
    }
}

/// Runs the suite on an endpoint that serves.
async fn check(
    layout: &Layout,
    options: &Options,
    endpoint: &str,
    catalog: images::Catalog,
    dir: &Path,
) -> Result<bool> {
    let all = cases::all();
    let ids: Vec<String> = all.iter().map(case::Case::id).collect();
    let load =
        |file: &Option<PathBuf>| file.as_deref().map_or(Ok(list::List::new()), |file| list::load(file, &ids));
    let (known, skipped) = (load(&options.known)?, load(&options.skip_list)?);
    let chosen: Vec<case::Case> =
        all.into_iter().filter(|case| list::matches(&case.id(), &options.filter)).collect();
    if chosen.is_empty() {
        bail!("no case matches {:?}; `--list` prints them", options.filter);
    }
    let begun = Instant::now();
    let suite = Arc::new(suite(options, endpoint, catalog, dir).await?);
    println!("checking {} ({} cases)", suite.facts.runtime, chosen.len());
    let manner = runner::Manner { parallel: options.parallel, attempts: options.attempts, bar: false };
    let mut done = runner::run(&suite, chosen, manner, &known, &skipped).await;
    if let Some(filter) = &options.never_skip {
        done = report::without_skips(done, filter);
    }
    remove_images(&suite).await;
    start::remove_cgroups(&suite.cgroup_parent);
    if let Some(file) = &options.junit {
        let file = if file.is_absolute() { file.clone() } else { layout.repo.join(file) };
        report::junit(&file, &format!("CRI v1: {}", suite.facts.runtime), &done)?;
        println!("JUnit: {}", file.display());
    }
    Ok(report::table(&suite.facts.runtime, &done, begun.elapsed()))
}

async fn suite(options: &Options, endpoint: &str, catalog: images::Catalog, dir: &Path) -> Result<Suite> {
    let runtime = RuntimeServiceClient::new(channel(endpoint)?);
    let images = ImageServiceClient::new(channel(options.image_endpoint.as_deref().unwrap_or(endpoint))?);
    let facts = Facts::find(&runtime, &options.handler).await?;
    let run = std::process::id().to_string();
    let mut suite = Suite {
        runtime,
        images,
        facts,
        catalog,
        handler: options.handler.clone(),
        cgroup_parent: options.cgroup_parent.clone().unwrap_or_else(|| format!("/keelson-conformance-{run}")),
        dir: dir.to_owned(),
        image: String::new(),
        run,
        deadline: Duration::from_secs(options.deadline),
        counter: AtomicU64::new(1),
        shared: std::sync::Mutex::default(),
    };
    suite.image = everyday_image(options, &suite).await?;
    Ok(suite)
}

/// Removes what the run pulled.
async fn remove_images(suite: &Suite) {
    let shared = std::mem::take(&mut *suite.shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    let everyday = suite.catalog.reference("conformance/busybox:latest").ok();
    for reference in shared.into_iter().chain(everyday) {
        let image = Some(context::image_spec(&reference));
        // One that is left is an image more on the endpoint, no more.
        suite.images.clone().remove_image(cri_shim_api::v1::RemoveImageRequest { image }).await.ok();
    }
}

async fn everyday_image(options: &Options, suite: &Suite) -> Result<String> {
    if let (Some(image), Images::Preloaded) = (&options.image, options.images) {
        return Ok(image.clone());
    }
    if options.images == Images::Preloaded {
        bail!("--images preloaded needs --image NAME: a busybox that the endpoint has");
    }
    let reference = suite.catalog.reference("conformance/busybox:latest")?;
    let spec = context::image_spec(&reference);
    let request = cri_shim_api::v1::PullImageRequest { image: Some(spec), ..Default::default() };
    let pulled = suite.images.clone().pull_image(request).await.with_context(|| {
        format!(
            "the endpoint cannot pull {reference} from the suite's registry (plain HTTP on a loopback address); \
             configure that, or give it a busybox and say --images preloaded --image NAME"
        )
    })?;
    Ok(pulled.into_inner().image_ref)
}

/// A client of a unix socket.
fn channel(endpoint: &str) -> Result<Channel> {
    let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
    if !path.starts_with('/') {
        bail!("{endpoint:?} is no unix socket; expected unix:///path");
    }
    let socket = PathBuf::from(path);
    let connect = tower::service_fn(move |_: tonic::transport::Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Ok(Endpoint::from_static("http://cri.invalid").connect_with_connector_lazy(connect))
}

//! `cargo xtask conformance node`: what a kubelet promises, as cases, for a node of any cluster.
//!
//! A case makes pods through the Kubernetes API in a namespace of its own and looks at what a user sees: statuses, events,
//! logs, and what programs inside print. Groups have the names of upstream's NodeConformance areas. In reading order:
//! [`api`] (requests), [`board`] (watches), [`pod`] and [`live`] (a pod before and after it is made), [`context`] (what a
//! case works with), [`hanging`] (a file system that hangs), `cases`; runner, lists and reports are those of the other suites.

#![allow(clippy::needless_pass_by_value, reason = "JSON literals are written where they are used")]

pub(crate) mod api;
mod board;
mod cases;
mod context;
mod hanging;
pub(crate) mod live;
mod pod;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use self::api::Api;
use self::board::Board;
use self::context::Suite;
use super::{html, list, report, runner};
use crate::paths::Layout;

/// Label of all that a run makes; its value is the run.
const LABEL: &str = "conformance.keelson.dev/run";

/// How to check a node.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Credentials of the cluster, those of an administrator; the one that `up` wrote when not given.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context, when not the current one.
    #[arg(long)]
    context: Option<String>,
    /// The node to check; the first that is Ready when not given.
    #[arg(long)]
    node: Option<String>,
    /// A busybox that the node has or can pull.
    #[arg(long, default_value = "busybox")]
    image: String,
    /// Only cases whose id holds these words; `|` separates alternatives.
    #[arg(long, default_value = "")]
    filter: String,
    /// Print the cases and end.
    #[arg(long)]
    list: bool,
    /// Write JUnit XML.
    #[arg(long)]
    junit: Option<PathBuf>,
    /// Write the report as one HTML page.
    #[arg(long)]
    html: Option<PathBuf>,
    /// Cases beside each other.
    #[arg(long, default_value_t = 8)]
    parallel: usize,
    /// How often a case may be tried; its failures are printed. For a reference whose races are not ours to mend.
    #[arg(long, default_value_t = 1)]
    attempts: u32,
    /// Cases not to run: lines of `group: name = reason`.
    #[arg(long)]
    skip_list: Option<PathBuf>,
    /// Cases that are known to fail: lines of `group: name = reason`; for the cluster of `up`, ours.
    #[arg(long)]
    known: Option<PathBuf>,
    /// Cases that must not be skipped: words as of --filter; for a node that is known to have what they need.
    #[arg(long)]
    never_skip: Option<String>,
    /// Seconds that one case may take.
    #[arg(long, default_value_t = 180)]
    deadline: u64,
    /// Where the node reads static pods from, when that is a directory of this machine; that of `up` for its cluster.
    #[arg(long)]
    static_pods: Option<PathBuf>,
}

/// Runs what was asked for; `false` when a case failed.
pub(crate) fn run(layout: &Layout, options: &Options) -> Result<bool> {
    let all = cases::all();
    let ids: Vec<String> = all.iter().map(super::case::Case::id).collect();
    if options.list {
        for id in ids.iter().filter(|id| list::matches(id, &options.filter)) {
            println!("{id}");
        }
        return Ok(true);
    }
    let ours = options.kubeconfig.is_none();
    let kubeconfig = options.kubeconfig.clone().unwrap_or_else(|| layout.kubeconfig());
    if !kubeconfig.is_file() {
        bail!(
            "{}: no such kubeconfig; start a cluster (`cargo xtask up`) or name one (`--kubeconfig FILE`)",
            kubeconfig.display()
        );
    }
    let is_ours = ours || same_file(&kubeconfig, &layout.kubeconfig());
    let default_known = is_ours.then(|| layout.repo.join("xtask/src/conformance/node/keelson.txt"));
    let load = |file: Option<&PathBuf>| file.map_or(Ok(list::List::new()), |file| list::load(file, &ids));
    let known = load(options.known.as_ref().or(default_known.as_ref()))?;
    let skipped = load(options.skip_list.as_ref())?;
    let chosen: Vec<_> = all.into_iter().filter(|case| list::matches(&case.id(), &options.filter)).collect();
    if chosen.is_empty() {
        bail!("no case matches {:?}; `--list` prints them", options.filter);
    }
    let manifests = match &options.static_pods {
        Some(directory) => Some(directory.clone()),
        None => is_ours.then(|| layout.data.join("manifests")).filter(|directory| directory.is_dir()),
    };
    super::runtime()?.block_on(async {
        let begun = Instant::now();
        let suite = Arc::new(suite(options, &kubeconfig, manifests).await?);
        let info = &suite.node_object["status"]["nodeInfo"];
        let text = |name: &str| info[name].as_str().unwrap_or_default().to_owned();
        let title =
            format!("node {} ({}, {})", suite.node, text("kubeletVersion"), text("containerRuntimeVersion"));
        println!("checking {title}: {} cases, {} at once", chosen.len(), options.parallel);
        let manner = runner::Manner { parallel: options.parallel, attempts: options.attempts, bar: true };
        let mut done = runner::run(&suite, chosen, manner, &known, &skipped).await;
        if let Some(filter) = &options.never_skip {
            done = report::without_skips(done, filter);
        }
        let absolute =
            |file: &PathBuf| if file.is_absolute() { file.clone() } else { layout.repo.join(file) };
        if let Some(file) = options.junit.as_ref().map(absolute) {
            report::junit(&file, &format!("node conformance: {title}"), &done)?;
            println!("JUnit: {}", file.display());
        }
        if let Some(file) = options.html.as_ref().map(absolute) {
            let facts = [
                text("osImage"),
                text("kernelVersion"),
                text("architecture"),
                format!("image {}", suite.image),
            ];
            html::write(&file, &format!("Node conformance: {title}"), &facts, &done, begun.elapsed())?;
            println!("HTML: {}", file.display());
        }
        Ok(report::table(&title, &done, begun.elapsed()))
    })
}

fn same_file(one: &std::path::Path, other: &std::path::Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

async fn suite(options: &Options, kubeconfig: &std::path::Path, manifests: Option<PathBuf>) -> Result<Suite> {
    let api = Api::open(kubeconfig, options.context.as_deref()).await?;
    let nodes = api.get("/api/v1/nodes").await.context("the cluster does not answer")?;
    let node_object =
        choose(nodes["items"].as_array().map_or(&[][..], Vec::as_slice), options.node.as_deref())?;
    let node = node_object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let run = std::process::id().to_string();
    let board = Board::follow(&api, &run).await?;
    Ok(Suite {
        api,
        board,
        node,
        node_object,
        image: options.image.clone(),
        run,
        deadline: Duration::from_secs(options.deadline),
        limit: Duration::from_secs(options.deadline / 2),
        manifests,
        counter: AtomicU64::new(1),
    })
}

/// The node of that name, or the first that is ready.
fn choose(nodes: &[Value], name: Option<&str>) -> Result<Value> {
    let ready = |node: &&Value| live::condition(node, "Ready")["status"] == "True";
    let found = match name {
        Some(name) => nodes.iter().find(|node| node["metadata"]["name"] == name),
        None => nodes.iter().find(ready),
    };
    let names: Vec<&str> = nodes.iter().filter_map(|node| node["metadata"]["name"].as_str()).collect();
    match (found, name) {
        (Some(node), _) => Ok(node.clone()),
        (None, Some(name)) => bail!("there is no node {name:?}; there are {names:?}"),
        (None, None) => bail!("none of the nodes {names:?} is Ready"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_ready_node_is_taken_or_the_named_one() {
        let node = |name: &str, ready: &str| json!({"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": ready}]}});
        let nodes = [node("a", "False"), node("b", "True")];
        assert_eq!(choose(&nodes, None).unwrap()["metadata"]["name"], "b");
        assert_eq!(choose(&nodes, Some("a")).unwrap()["metadata"]["name"], "a");
        assert!(choose(&nodes, Some("c")).unwrap_err().to_string().contains("[\"a\", \"b\"]"));
        assert!(choose(&nodes[..1], None).is_err());
    }
}

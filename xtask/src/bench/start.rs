//! `bench start`: from `kubectl apply` of the example to all three pods Ready, images present.
//!
//! The clock runs from the start of the kubectl process until the API shows the Deployment with three ready
//! replicas, as a watching client sees it. With a peer the same is done on either node in turn.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize as _, Serialize};
use serde_json::{Value, json};

use super::beside::Beside;
use super::interrupt;
use super::peer::{About, NODE, Peer, TAINT};
use super::stats::{Round, Summary, summary};
use crate::paths::Layout;
use crate::process::write_atomic;
use crate::status::kubectl;

/// Longest wait for one run.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Report {
    runs: u32,
    seconds: Vec<f64>,
    summary: Summary,
    goal_seconds: f64,
    peer: Beside,
    peer_is: Option<About>,
}

/// Repeats apply and delete, and reports the times.
pub(super) fn run(layout: &Layout, runs: u32, mut peer: Option<&mut Peer>) -> Result<()> {
    let rounds = measure(layout, runs, peer.as_deref()).map_err(|error| match peer.as_mut() {
        Some(peer) => peer.explain(error),
        None => error,
    })?;
    let seconds: Vec<f64> = rounds.iter().flat_map(|round| &round.0).copied().collect();
    let summary = summary(&seconds);
    println!(
        "\napply → 3 pods Ready: median {:.3} s (min {:.3}, max {:.3}); goal ≤ 1.5 s",
        summary.median, summary.min, summary.max
    );
    let beside = Beside::of(&rounds);
    println!("{}", beside.line("s"));
    let peer_is = peer.map(|peer| peer.about().clone());
    super::save(layout, "start", &Report { runs, seconds, summary, goal_seconds: 1.5, peer: beside, peer_is })
}

fn measure(layout: &Layout, runs: u32, peer: Option<&Peer>) -> Result<Vec<Round>> {
    let example = layout.repo.join("examples/nginx.yaml");
    let manifests: Vec<(&str, PathBuf)> = if peer.is_some() {
        let ours = super::pods::first_node(layout)?;
        vec![("ours", on_node(layout, &example, &ours)?), ("peer", on_node(layout, &example, NODE)?)]
    } else {
        vec![("", example)]
    };
    let mut rounds = Vec::new();
    // The first run pulls the images and does not count.
    for run in 0..=runs {
        let mut round = Round::default();
        for (number, (whose, manifest)) in manifests.iter().enumerate() {
            interrupt::check()?;
            let manifest = manifest.to_str().context("a checkout path in UTF-8")?;
            // What was applied is taken back, however it went.
            let peer = peer.filter(|_| number > 0);
            let took = once(layout, manifest, peer);
            let deleted = delete(layout, manifest, peer);
            let took = took?.as_secs_f64();
            deleted?;
            let remark = if run == 0 { " (not counted: it pulls)" } else { "" };
            println!("run {run}: {took:.3} s {whose}{remark}");
            let values = if number == 0 { &mut round.0 } else { &mut round.1 };
            values.push(took);
        }
        if run > 0 {
            rounds.push(round);
        }
    }
    Ok(rounds)
}

/// The example with its pods on one node, so that both sides run the same.
fn on_node(layout: &Layout, example: &Path, node: &str) -> Result<PathBuf> {
    let text = std::fs::read_to_string(example).with_context(|| format!("reading {}", example.display()))?;
    let mut items = serde_norway::Deserializer::from_str(&text)
        .map(Value::deserialize)
        .collect::<Result<Vec<Value>, _>>()
        .with_context(|| format!("parsing {}", example.display()))?;
    for item in items.iter_mut().filter(|item| item["kind"] == "Deployment") {
        let spec = &mut item["spec"]["template"]["spec"];
        spec["nodeSelector"] = json!({"kubernetes.io/hostname": node});
        spec["tolerations"] = json!([{"key": TAINT, "operator": "Exists"}]);
    }
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    let file = layout.repo.join(format!("target/bench/example-{node}.json"));
    write_atomic(&file, &serde_json::to_vec_pretty(&list)?)?;
    Ok(file)
}

/// `peer`: whose node the pods are for, where they are not for ours.
fn once(layout: &Layout, manifest: &str, peer: Option<&Peer>) -> Result<Duration> {
    // The watcher is up before the clock starts, so that its own start does not count.
    let mut watcher = Command::new("kubectl")
        .args(["--kubeconfig".as_ref(), layout.kubeconfig().as_os_str()])
        .args([
            "get",
            "deployments",
            "--watch",
            "--output",
            "jsonpath={.metadata.name} {.status.readyReplicas}{'\\n'}",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("starting kubectl get --watch")?;
    let lines = BufReader::new(watcher.stdout.take().context("kubectl without output")?).lines();
    let (ready, all_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if line.trim() == "nginx 3" && ready.send(Instant::now()).is_err() {
                return;
            }
        }
    });
    let begin = Instant::now();
    let applied = kubectl(layout, &["apply", "-f", manifest]);
    let seen = applied.and_then(|_| wait(&all_ready, peer));
    watcher.kill().ok();
    watcher.wait().ok();
    Ok(seen?.duration_since(begin))
}

/// When all were Ready; a signal ends it, and the end of the peer's node.
fn wait(all_ready: &Receiver<Instant>, peer: Option<&Peer>) -> Result<Instant> {
    let end = Instant::now() + LIMIT;
    loop {
        match all_ready.recv_timeout(Duration::from_millis(200)) {
            Ok(seen) => return Ok(seen),
            Err(RecvTimeoutError::Disconnected) => bail!("kubectl get --watch ended"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        interrupt::check()?;
        if peer.is_some_and(Peer::is_gone) {
            bail!("the three pods were not Ready: the peer's node has ended");
        }
        if Instant::now() > end {
            bail!("the three pods were not Ready after {} s", LIMIT.as_secs());
        }
    }
}

/// Deletes and waits until the pods are gone, so that every run starts alike.
fn delete(layout: &Layout, manifest: &str, peer: Option<&Peer>) -> Result<()> {
    kubectl(layout, &["delete", "-f", manifest])?;
    let end = Instant::now() + LIMIT;
    while !kubectl(layout, &["get", "pods", "-l", "app=nginx", "-o", "name"])?.trim().is_empty() {
        // Nobody ends the pods of such a node; they go with it.
        if peer.is_some_and(Peer::is_gone) {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("the pods were not gone {} s after the delete", LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_goes_to_one_node() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::of(directory.path());
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/nginx.yaml");
        let file = on_node(&layout, &example, "bench-peer").unwrap();
        let list: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let pod = &list["items"][0]["spec"]["template"]["spec"];
        assert_eq!(pod["nodeSelector"]["kubernetes.io/hostname"], "bench-peer");
        assert_eq!(pod["containers"][0]["image"], "nginx:1.17.9");
        assert_eq!(list["items"][1]["kind"], "Service");
    }
}

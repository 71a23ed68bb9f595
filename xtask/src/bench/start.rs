//! `bench start`: from `kubectl apply` of the example to all three pods Ready, images present.
//!
//! The clock runs from the start of the kubectl process until the API shows the Deployment with three ready
//! replicas, as a watching client sees it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::stats::{Summary, summary};
use crate::paths::Layout;
use crate::status::kubectl;

/// Longest wait for one run.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Report {
    runs: u32,
    seconds: Vec<f64>,
    summary: Summary,
    goal_seconds: f64,
}

/// Repeats apply and delete, and reports the times.
pub(crate) fn run(layout: &Layout, runs: u32) -> Result<()> {
    let manifest = layout.repo.join("examples/nginx.yaml");
    let manifest = manifest.to_str().context("a checkout path in UTF-8")?;
    let mut seconds = Vec::new();
    // The first run pulls the images and does not count.
    for run in 0..=runs {
        let took = once(layout, manifest)?;
        println!(
            "run {run}: {:.3} s{}",
            took.as_secs_f64(),
            if run == 0 { " (not counted: it pulls)" } else { "" }
        );
        if run > 0 {
            seconds.push(took.as_secs_f64());
        }
        delete(layout, manifest)?;
    }
    let summary = summary(&seconds);
    println!(
        "\napply → 3 pods Ready: median {:.3} s (min {:.3}, max {:.3}); goal ≤ 1.5 s",
        summary.median, summary.min, summary.max
    );
    super::save(layout, "start", &Report { runs, seconds, summary, goal_seconds: 1.5 })
}

fn once(layout: &Layout, manifest: &str) -> Result<Duration> {
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
    let seen =
        applied.and_then(|_| all_ready.recv_timeout(LIMIT).context("the three pods were not Ready in time"));
    watcher.kill().ok();
    watcher.wait().ok();
    Ok(seen?.duration_since(begin))
}

/// Deletes and waits until the pods are gone, so that every run starts alike.
fn delete(layout: &Layout, manifest: &str) -> Result<()> {
    kubectl(layout, &["delete", "-f", manifest])?;
    let end = Instant::now() + LIMIT;
    while !kubectl(layout, &["get", "pods", "-l", "app=nginx", "-o", "name"])?.trim().is_empty() {
        if Instant::now() > end {
            bail!("the pods were not gone {} s after the delete", LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

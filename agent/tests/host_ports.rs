//! The seam for host ports over its real socket, between a pretended plugin and a pretended data plane.
#![allow(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keelson_agent::host_ports::{HostPorts, Request, queue, run};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(20);

/// The seam with a pretended data plane that takes all owners but those whose name has a word in it.
struct Bench {
    dir: tempfile::TempDir,
    cancel: CancellationToken,
    held: Arc<Mutex<HostPorts>>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Bench {
    fn start(dir: tempfile::TempDir) -> Self {
        let (sender, mut requests) = queue();
        let held = Arc::new(Mutex::new(HostPorts::new()));
        let shared = Arc::clone(&held);
        tokio::spawn(async move {
            while let Some(Request { wanted, done }) = requests.recv().await {
                let taken = wanted.keys().filter(|owner| !owner.contains("refused")).cloned().collect();
                *shared.lock().unwrap() = wanted;
                done.send(taken).ok();
            }
        });
        let cancel = CancellationToken::new();
        let task = tokio::spawn(run(dir.path().to_owned(), sender, cancel.clone()));
        Self { dir, cancel, held, task }
    }

    fn owners(&self) -> Vec<String> {
        self.held.lock().unwrap().keys().cloned().collect()
    }

    async fn stop(self) -> tempfile::TempDir {
        self.cancel.cancel();
        self.task.await.unwrap().unwrap();
        self.dir
    }

    /// The plugin's side, in a thread of its own; `end` is what it does between the answer and the end.
    async fn ask(&self, question: &str, end: impl FnOnce(&Path) + Send + 'static) -> String {
        let (dir, question) = (self.dir.path().to_owned(), format!("{question}\n"));
        tokio::task::spawn_blocking(move || {
            let until = Instant::now() + LIMIT;
            let mut stream = loop {
                match UnixStream::connect(dir.join("agent.sock")) {
                    Ok(stream) => break stream,
                    Err(error) => assert!(Instant::now() < until, "{error}"),
                }
                std::thread::yield_now();
            };
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(question.as_bytes()).unwrap();
            let mut answer = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut answer).unwrap();
            end(&dir);
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            // Until the agent has drawn its conclusions.
            stream.read_to_end(&mut Vec::new()).unwrap();
            answer.trim().to_owned()
        })
        .await
        .unwrap()
    }
}

fn record(dir: &Path, name: &str, protocol: u8, carrier: &str) {
    let text = json!({
        "network": "pods", "containerId": "c", "ifname": "eth0", "pod": "default/web", "links": [],
        "claims": [{"protocol": protocol, "hostIP": null, "hostPort": 8080, "target": "10.0.0.2:80"}],
        "carrier": carrier,
    });
    std::fs::write(dir.join(name), text.to_string()).unwrap();
}

fn lab() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test]
async fn ports_are_taken_kept_over_a_restart_and_dropped() {
    let bench = Bench::start(lab());
    record(bench.dir.path(), "a.json", 6, "nftables");
    let answer = bench.ask("take a.json", |dir| record(dir, "a.json", 6, "agent")).await;
    assert_eq!(answer, "taken");
    assert_eq!(bench.owners(), ["a.json"]);
    assert_eq!(bench.ask("check a.json", |_| ()).await, "held");
    let bench = Bench::start(bench.stop().await);
    // Answered only once the records are read.
    assert_eq!(bench.ask("check a.json", |_| ()).await, "held");
    assert_eq!(bench.owners(), ["a.json"]);
    assert_eq!(bench.ask("drop a.json", |_| ()).await, "dropped");
    assert!(bench.owners().is_empty());
    assert!(!bench.stop().await.path().join("agent.sock").exists());
}

#[tokio::test]
async fn a_plugin_that_died_before_it_wrote_the_record_leaves_nothing() {
    let bench = Bench::start(lab());
    record(bench.dir.path(), "a.json", 6, "nftables");
    assert_eq!(bench.ask("take a.json", |_| ()).await, "taken");
    // The next conversation begins after the last one's conclusions.
    bench.ask("check a.json", |_| ()).await;
    assert!(bench.owners().is_empty(), "{:?}", bench.owners());
    bench.stop().await;
}

#[tokio::test]
async fn what_the_data_plane_cannot_have_is_left_to_nftables() {
    let bench = Bench::start(lab());
    record(bench.dir.path(), "sctp.json", 132, "nftables");
    record(bench.dir.path(), "refused.json", 6, "nftables");
    for file in ["sctp.json", "refused.json", "missing.json"] {
        assert_eq!(bench.ask(&format!("take {file}"), |_| ()).await, "no", "{file}");
    }
    bench.ask("check refused.json", |_| ()).await;
    assert!(bench.owners().is_empty(), "{:?}", bench.owners());
    for question in ["take ../a.json", "take", "give a.json", "take a.txt", "take .json"] {
        assert_eq!(bench.ask(question, |_| ()).await, "no", "{question}");
    }
    bench.stop().await;
}

#[tokio::test]
async fn without_a_data_plane_there_is_no_socket() {
    let dir = lab();
    let (sender, requests) = queue();
    drop(requests);
    let cancel = CancellationToken::new();
    let task = tokio::spawn(run(dir.path().to_owned(), sender, cancel.clone()));
    tokio::task::yield_now().await;
    assert!(!dir.path().join("agent.sock").exists());
    cancel.cancel();
    task.await.unwrap().unwrap();
}

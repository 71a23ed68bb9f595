//! Host ports of pods in the service data plane: the seam between the CNI plugin `keelson-portmap` and the proxy.
//!
//! ```text
//! keelson-portmap ─ record (file) ─┐
//!        └─ take, drop (agent.sock) ─▶ this task ─ all ports ─▶ proxy ─▶ maps
//! ```
//! The records are the only state: what the data plane must hold follows from those that say `"carrier": "agent"`. The
//! plugin writes a pod's record, and asks. `taken` is the answer once the maps hold the ports; the plugin then writes that
//! into the record and closes. A record that does not say so by then is not ours, whoever died in between: its ports are
//! in nftables, or its pod is being taken down. So no port is ever in both for longer than this conversation.
//! An agent that starts programs what the records say, and hands back to nftables what the data plane does not take; so
//! does one that has no data plane. While no agent runs, the maps go on, new pods' ports are in nftables, and what is
//! deleted leaves the maps with the next start.

mod records;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Permissions;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use ebpf_common::Protocol;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::chain::chain;
use crate::config::AgentConfig;
use records::Records;

/// Longest conversation: the plugin's own patience with an answer is a second.
const CONVERSATION: Duration = Duration::from_secs(5);
/// Longest wait for the data plane within it.
const PLANE: Duration = Duration::from_millis(800);
/// A look without a reason, for records that went while nobody listened.
const AUDIT: Duration = Duration::from_secs(60);
/// The same after the data plane did not answer in time: what it does with the question is not known.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// A question is a word and a file name.
const LONGEST_QUESTION: u64 = 1024;
/// Requests that wait for the proxy; there is one at a time.
const QUEUE: usize = 1;

/// One port of the node for one port of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// TCP or UDP: sockets of SCTP have no hooks.
    pub protocol: HostProtocol,
    /// Only on this address of the node; absent: on all of them, and on loopback.
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub port: u16,
    /// The pod's address and port; its family is that of the traffic.
    pub target: SocketAddr,
}

/// The protocols that the data plane translates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl From<HostProtocol> for Protocol {
    fn from(protocol: HostProtocol) -> Self {
        match protocol {
            HostProtocol::Tcp => Self::Tcp,
            HostProtocol::Udp => Self::Udp,
        }
    }
}

/// Ports by owner: the file name of a pod's record.
pub type HostPorts = BTreeMap<String, BTreeSet<HostPort>>;

/// What the data plane must hold, wholly; answered with the owners all of whose ports answer now, to clients on the node
/// and to others.
#[derive(Debug)]
pub struct Request {
    /// All host ports.
    pub wanted: HostPorts,
    /// Where the answer goes; whoever asked may have given up.
    pub done: oneshot::Sender<BTreeSet<String>>,
}

/// A queue for [`Request`]s, from [`run`] to the proxy.
pub fn queue() -> (mpsc::Sender<Request>, mpsc::Receiver<Request>) {
    mpsc::channel(QUEUE)
}

/// Where the plugin keeps its records of this network namespace.
pub fn directory(config: &AgentConfig) -> Result<PathBuf> {
    let cni = config.keelson.cni.as_ref();
    let state = cni.and_then(|cni| cni.state_dir.clone()).unwrap_or_else(|| "/run/keelson/cni".into());
    let namespace = cni_plugins_host::netns::own_identity().context("which network namespace is this?")?;
    Ok(state.join("portmap").join(namespace.to_string()))
}

/// Keeps records and data plane together until `cancel`. `plane` that nobody reads: there is no data plane.
pub async fn run(dir: PathBuf, plane: mpsc::Sender<Request>, cancel: CancellationToken) -> Result<()> {
    let mut seam = Seam { records: Records::at(dir.clone()), plane, held: BTreeSet::new(), unsure: false };
    let serve = async {
        // Before there is a data plane nobody is kept waiting: the plugin finds no socket, and uses nftables.
        if !seam.settle().await? {
            info!("no data plane for host ports: they stay in nftables");
            return std::future::pending().await;
        }
        let listener = listen(&dir).with_context(|| format!("listen in {}", dir.display()))?;
        // What was deleted before the socket was there.
        seam.settle().await?;
        seam.serve(&listener).await
    };
    let outcome = tokio::select! {
        // Dropped at any point, the records tell the next agent what was meant.
        () = cancel.cancelled() => Ok(()),
        outcome = serve => outcome,
    };
    // So that plugins need not find out that nobody answers; a socket that stays refuses them as well.
    tokio::fs::remove_file(socket(&dir)).await.ok();
    outcome
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("agent.sock")
}

fn listen(dir: &Path) -> std::io::Result<UnixListener> {
    std::fs::create_dir_all(dir)?;
    let path = socket(dir);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The task's state.
struct Seam {
    records: Records,
    plane: mpsc::Sender<Request>,
    /// Owners that the data plane said it holds.
    held: BTreeSet<String>,
    /// Whether it may hold something else.
    unsure: bool,
}

impl Seam {
    async fn serve(&mut self, listener: &UnixListener) -> Result<()> {
        loop {
            // Both arms are cancel-safe: a connection that was not accepted stays in the queue.
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted.context("accept a plugin's connection")?;
                    // The plugin holds a lock while it asks, so that there is one at a time.
                    match tokio::time::timeout(CONVERSATION, self.talk(stream)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => warn!(error = %chain(error.as_ref()), "a plugin's question about host ports"),
                        Err(_elapsed) => {
                            warn!("a plugin did not end its question about host ports in time");
                            self.settle().await?;
                        }
                    }
                }
                () = tokio::time::sleep(if self.unsure { SECOND_LOOK } else { AUDIT }) => drop(self.settle().await?),
            }
        }
    }

    async fn talk(&mut self, stream: UnixStream) -> Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        (&mut stream).take(LONGEST_QUESTION).read_line(&mut line).await.context("read the question")?;
        let Some((word, file)) = line.trim_end().split_once(' ').filter(|(_, file)| is_record(file)) else {
            stream.write_all(b"no\n").await?;
            anyhow::bail!("{line:?} is no question");
        };
        match word {
            "take" => self.take(&mut stream, file).await,
            "drop" => {
                let mut wanted = self.records.carried().await?;
                wanted.remove(file);
                let answer = if self.program(wanted).await.is_some() { "dropped\n" } else { "no\n" };
                stream.write_all(answer.as_bytes()).await.context("answer")
            }
            "check" => {
                let answer = if self.held.contains(file) { "held\n" } else { "missing\n" };
                stream.write_all(answer.as_bytes()).await.context("answer")
            }
            _ => {
                stream.write_all(b"no\n").await?;
                anyhow::bail!("{line:?} is no question");
            }
        }
    }

    async fn take(&mut self, stream: &mut BufReader<UnixStream>, file: &str) -> Result<()> {
        let mut taken = false;
        if let Some(ports) = self.records.ports_of(file).await? {
            let mut wanted = self.records.carried().await?;
            wanted.insert(file.to_owned(), ports);
            taken = self.program(wanted).await.is_some_and(|held| held.contains(file));
        }
        let answered = stream.write_all(if taken { b"taken\n".as_slice() } else { b"no\n" }).await;
        if answered.is_ok() && taken {
            // Until the plugin has written the record, or has died.
            let _closed: std::io::Result<usize> = stream.read(&mut [0]).await;
        }
        let carried = self.records.carried().await?;
        if !carried.contains_key(file) {
            self.program(carried).await;
        }
        answered.context("answer")
    }

    /// Makes the data plane hold these; the owners that it holds. `None`: it did not answer in time.
    async fn program(&mut self, wanted: HostPorts) -> Option<BTreeSet<String>> {
        let (done, answer) = oneshot::channel();
        let ask = async {
            self.plane.send(Request { wanted, done }).await.ok()?;
            answer.await.ok()
        };
        let held = tokio::time::timeout(PLANE, ask).await.ok().flatten();
        self.unsure = held.is_none();
        self.held.clone_from(held.as_ref()?);
        held
    }

    /// Brings the data plane to what the records say, and the records to what the data plane holds; false: there is no
    /// data plane. The first time this waits until the proxy has heard of all Services.
    async fn settle(&mut self) -> Result<bool> {
        let wanted = self.records.carried().await?;
        let (done, answer) = oneshot::channel();
        let sent = self.plane.send(Request { wanted: wanted.clone(), done }).await.is_ok();
        let answer = if sent { answer.await.ok() } else { None };
        let has_plane = answer.is_some();
        self.unsure = false;
        self.held = answer.unwrap_or_default();
        for owner in wanted.keys().filter(|owner| !self.held.contains(*owner)) {
            match self.records.hand_back(owner).await {
                Ok(()) => info!(%owner, "host ports handed back to nftables"),
                Err(error) => warn!(%owner, error = %chain(error.as_ref()), "host ports are in no table"),
            }
        }
        Ok(has_plane)
    }
}

/// Whether a name is that of a record, and leads nowhere else.
fn is_record(name: &str) -> bool {
    name.strip_suffix(".json").is_some_and(|stem| !stem.is_empty())
        && !name.contains('/')
        && !name.starts_with('.')
}

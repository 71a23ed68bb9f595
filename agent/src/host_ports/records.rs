//! The records of `keelson-portmap`: which pod has which ports of the node, and who carries them.
//!
//! Written by the plugin, replaced in one step, so that they can be read at any time. Changed from here only to hand a
//! pod's ports back, under the lock that every call of the plugin holds.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cni_plugins_host::lock::{Lock, try_lock};
use cni_plugins_host::nft::ports::{self, HostPort as NftPort, Mappings, Scope};
use cni_plugins_host::sysctl;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{HostPort, HostPorts, HostProtocol};

/// Longest wait for calls of the plugin.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at a lock that others hold: calls take milliseconds.
const PAUSE: Duration = Duration::from_millis(20);

/// What a record says that matters here.
#[derive(Debug, Deserialize)]
struct Record {
    claims: BTreeSet<Claim>,
    #[serde(default)]
    links: BTreeSet<String>,
    #[serde(default)]
    carrier: Carrier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Claim {
    protocol: u8,
    #[serde(default, rename = "hostIP")]
    host_ip: Option<IpAddr>,
    host_port: u16,
    target: SocketAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Carrier {
    #[default]
    Nftables,
    Agent,
}

impl Record {
    /// The ports as the data plane knows them; `None` where one of them is of a protocol that it does not translate.
    fn ports(&self) -> Option<BTreeSet<HostPort>> {
        let port = |claim: &Claim| {
            let protocol = match claim.protocol {
                6 => HostProtocol::Tcp,
                17 => HostProtocol::Udp,
                _ => return None,
            };
            let Claim { host_ip, host_port: port, target, .. } = *claim;
            Some(HostPort { protocol, host_ip, port, target })
        };
        self.claims.iter().map(port).collect()
    }

    fn mappings(&self) -> Mappings {
        let port = |claim: &Claim| {
            let Claim { protocol, host_ip, host_port, target } = *claim;
            NftPort { protocol, host_ip, host_port, target }
        };
        Mappings { ports: self.claims.iter().map(port).collect(), links: self.links.clone() }
    }
}

/// The directory of one network namespace.
#[derive(Debug, Clone)]
pub(super) struct Records {
    dir: PathBuf,
}

impl Records {
    pub(super) fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// What the agent carries, by file.
    pub(super) async fn carried(&self) -> Result<HostPorts> {
        self.blocking(|dir| {
            let entries = match fs::read_dir(dir) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
                entries => entries.with_context(|| format!("list {}", dir.display()))?,
            };
            let mut carried = BTreeMap::new();
            for entry in entries {
                let name = entry?.file_name().to_string_lossy().into_owned();
                if let Some(record) = read(dir, &name)?.filter(|record| record.carrier == Carrier::Agent)
                    && let Some(ports) = record.ports()
                {
                    carried.insert(name, ports);
                }
            }
            Ok(carried)
        })
        .await
    }

    /// The ports of one record, whoever carries them; `None` where there is none, or the data plane cannot have them.
    pub(super) async fn ports_of(&self, file: &str) -> Result<Option<BTreeSet<HostPort>>> {
        let file = file.to_owned();
        self.blocking(move |dir| Ok(read(dir, &file)?.and_then(|record| record.ports()))).await
    }

    /// Puts a record's ports into nftables and writes that down; nothing where it is not ours any more.
    pub(super) async fn hand_back(&self, file: &str) -> Result<()> {
        let file = file.to_owned();
        self.blocking(move |dir| {
            let _lock = wait_for_lock(dir)?;
            match read(dir, &file)? {
                Some(record) if record.carrier == Carrier::Agent => {
                    ports::add(&Scope::of(dir), &record.mappings())?;
                    if record.claims.iter().any(|claim| claim.target.is_ipv4()) {
                        for link in &record.links {
                            sysctl::set(&format!("net/ipv4/conf/{link}/route_localnet"), "1")?;
                        }
                    }
                    mark(&dir.join(&file))
                }
                _ => Ok(()),
            }
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let dir = self.dir.clone();
        tokio::task::spawn_blocking(move || work(&dir)).await?
    }
}

/// A record; nothing for other files, one that is just being removed, and what the plugin would not understand either.
fn read(dir: &Path, name: &str) -> Result<Option<Record>> {
    if !super::is_record(name) {
        return Ok(None);
    }
    let path = dir.join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Writes into a record that nftables carries it; all else in it stays.
fn mark(path: &Path) -> Result<()> {
    let change = || -> Result<()> {
        let mut record: Value = serde_json::from_slice(&fs::read(path)?)?;
        record["carrier"] = json!("nftables");
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, serde_json::to_vec(&record)?)?;
        fs::rename(&temporary, path)?;
        Ok(())
    };
    change().with_context(|| format!("write {}", path.display()))
}

fn wait_for_lock(dir: &Path) -> Result<Lock> {
    let path = dir.join("lock");
    let open = || -> std::io::Result<File> {
        OpenOptions::new().create(true).truncate(false).write(true).open(&path)
    };
    let until = Instant::now() + PATIENCE;
    loop {
        let file = open().with_context(|| format!("open {}", path.display()))?;
        if let Some(lock) = try_lock(file).with_context(|| format!("lock {}", path.display()))? {
            return Ok(lock);
        }
        if Instant::now() >= until {
            bail!("a call of keelson-portmap held {} for more than {} s", path.display(), PATIENCE.as_secs());
        }
        // flock has no deadline but a signal, which a process of many threads does not have to give.
        std::thread::sleep(PAUSE);
    }
}

//! What pods hold which ports: a file per pod, written before anything is programmed and removed after everything is gone.
//!
//! All calls in one network namespace take turns ([`Records::open`] holds a lock), so that two pods cannot be given the
//! same port.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, OpenOptions},
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use cni_plugins_host::{
    lock::{self, Lock},
    netns,
    nft::ports::{HostPort, Mappings, Scope},
};
use serde::{Deserialize, Serialize};

use super::PLUGIN;
use crate::{
    call::{Attachment, Call},
    failure::Failure,
    state::StateDir,
};

/// Longest wait for other calls, in seconds.
const PATIENCE: u32 = 30;

/// One port of the host for one port of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Claim {
    /// 6 TCP, 17 UDP, 132 SCTP.
    pub(super) protocol: u8,
    /// Only on this address of the host.
    #[serde(default, rename = "hostIP")]
    pub(super) host_ip: Option<IpAddr>,
    /// The host's port.
    pub(super) host_port: u16,
    /// The pod's address and port.
    pub(super) target: SocketAddr,
}

/// Who carries a pod's ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Carrier {
    /// The table of this host.
    #[default]
    Nftables,
    /// The agent's eBPF programs.
    Agent,
}

/// A pod's ports.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    /// Name of the network.
    pub(super) network: String,
    /// Container id.
    pub(super) container_id: String,
    /// Interface.
    pub(super) ifname: String,
    /// Namespace and name of the pod, for people.
    #[serde(default)]
    pub(super) pod: Option<String>,
    /// Its ports.
    pub(super) claims: BTreeSet<Claim>,
    /// The links that lead to it.
    #[serde(default)]
    pub(super) links: BTreeSet<String>,
    /// Who carries them.
    #[serde(default)]
    pub(super) carrier: Carrier,
    /// The host's network namespace: the directory's name, an inode, may have been another's before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<u64>,
}

impl Claim {
    /// Whether both cannot be had: the same port of the same protocol and family, on one address or on all.
    pub(super) fn clashes_with(&self, other: &Claim) -> bool {
        self.protocol == other.protocol
            && self.host_port == other.host_port
            && self.target.is_ipv4() == other.target.is_ipv4()
            && (self.host_ip.is_none() || other.host_ip.is_none() || self.host_ip == other.host_ip)
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            6 => "tcp",
            17 => "udp",
            _ => "sctp",
        };
        write!(f, "{}/{protocol}", self.host_port)?;
        self.host_ip.map_or(Ok(()), |address| write!(f, " on {address}"))
    }
}

impl Record {
    /// The record of a call.
    pub(super) fn new(call: &Call, claims: BTreeSet<Claim>, links: BTreeSet<String>) -> Self {
        Self {
            network: call.network.clone(),
            container_id: call.container_id.clone(),
            ifname: call.ifname.clone(),
            pod: call.pod(),
            claims,
            links,
            carrier: Carrier::default(),
            host: netns::own_cookie(),
        }
    }

    /// Whether it is this attachment's.
    pub(super) fn is_of(&self, network: &str, attachment: &Attachment) -> bool {
        self.network == network
            && self.container_id == attachment.container_id
            && self.ifname == attachment.ifname
    }

    /// Whose it is.
    pub(super) fn attachment(&self) -> Attachment {
        Attachment { container_id: self.container_id.clone(), ifname: self.ifname.clone() }
    }

    /// What the kernel must have for it.
    pub(super) fn mappings(&self) -> Mappings {
        let port = |claim: &Claim| HostPort {
            protocol: claim.protocol,
            host_ip: claim.host_ip,
            host_port: claim.host_port,
            target: claim.target,
        };
        Mappings { ports: self.claims.iter().map(port).collect(), links: self.links.clone() }
    }

    /// Its host ports of UDP.
    pub(super) fn udp_ports(&self) -> BTreeSet<u16> {
        self.claims.iter().filter(|claim| claim.protocol == 17).map(|claim| claim.host_port).collect()
    }
}

/// The records of this network namespace, locked.
pub(super) struct Records {
    state: StateDir,
    dir: PathBuf,
    _lock: Lock,
}

impl Records {
    /// Opens them, and waits for other calls.
    pub(super) fn open(call: &Call) -> Result<Self, Failure> {
        let state = StateDir::of(call, PLUGIN)?;
        let dir = state.make()?.to_owned();
        let path = dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| failed("open", &path, &error))?;
        let held = lock::lock(file, PATIENCE).map_err(|error| failed("lock", &path, &error))?;
        Ok(Self { state, dir, _lock: held })
    }

    /// The same, or nothing where nobody ever had a port.
    pub(super) fn open_existing(call: &Call) -> Result<Option<Self>, Failure> {
        let state = StateDir::of(call, PLUGIN)?;
        if state.path().join("lock").exists() { Self::open(call).map(Some) } else { Ok(None) }
    }

    /// Where they are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What tells their elements in the kernel from those of others.
    pub(super) fn scope(&self) -> Scope {
        Scope::of(&self.dir)
    }

    /// The file of an attachment, as [`StateDir`] names it.
    pub(super) fn file_name(network: &str, attachment: &Attachment) -> String {
        format!("{network},{},{}.json", attachment.container_id, attachment.ifname)
    }

    /// All records, of all networks. What a killed call left half-written was never programmed, and goes, as do those of a
    /// network namespace that is no more.
    pub(super) fn all(&self) -> Result<Vec<Record>, Failure> {
        let mut all = Vec::new();
        let host = netns::own_cookie();
        let is_ours = |record: &Record| record.host.is_none() || host.is_none() || record.host == host;
        for entry in fs::read_dir(&self.dir).map_err(|error| failed("list", &self.dir, &error))? {
            let path = entry.map_err(|error| failed("list", &self.dir, &error))?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            let record = match extension {
                Some("json") => {
                    let bytes = fs::read(&path).map_err(|error| failed("read", &path, &error))?;
                    serde_json::from_slice(&bytes).ok().filter(is_ours)
                }
                Some("tmp") => None,
                _ => continue,
            };
            match record {
                Some(record) => all.push(record),
                None => match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(failed("remove", &path, &error));
                    }
                    _ => {}
                },
            }
        }
        Ok(all)
    }

    /// Writes the call's record.
    pub(super) fn write(&self, call: &Call, record: &Record) -> Result<(), Failure> {
        self.state.write(call, record)
    }

    /// Removes a record; absence is success.
    pub(super) fn remove(&self, network: &str, attachment: &Attachment) -> Result<(), Failure> {
        self.state.remove(network, attachment)
    }
}

fn failed(step: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::io(&format!("{step} {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_clash_with_each_one() {
        let claim = |host_ip: Option<&str>, target: &str| Claim {
            protocol: 6,
            host_ip: host_ip.map(|text| text.parse().unwrap()),
            host_port: 80,
            target: target.parse().unwrap(),
        };
        let any = claim(None, "10.0.0.2:80");
        assert!(any.clashes_with(&claim(None, "10.0.0.3:81")));
        assert!(any.clashes_with(&claim(Some("192.0.2.1"), "10.0.0.3:80")));
        assert!(!any.clashes_with(&claim(None, "[fd00::3]:80")));
        assert!(
            !claim(Some("192.0.2.1"), "10.0.0.2:80").clashes_with(&claim(Some("192.0.2.2"), "10.0.0.3:80"))
        );
        assert!(!any.clashes_with(&Claim { protocol: 17, ..any }));
        assert!(!any.clashes_with(&Claim { host_port: 81, ..any }));
    }
}

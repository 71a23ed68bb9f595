//! The pod network: which CNI configuration counts, attaching a sandbox to it and detaching it.
//!
//! Input: a configuration directory that is watched, so that a network written later is used at once. Output: addresses.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use cni_plugins_host::invoke::{InvokeError, Invoker, RuntimeArgs, load};
use cni_plugins_host::nft;
use cni_plugins_types::NetworkConfigList;
use cri_shim_api::v1::{PodSandboxConfig, Protocol};
use cri_shim_core::bandwidth::Bandwidth;
use cri_shim_core::record::SandboxRecord;
use futures::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use serde_json::{Value, json};
use tokio::sync::{RwLock, watch};
use tokio_util::sync::CancellationToken;

use crate::config::Cni;
use crate::error::{RuntimeError, chain};
use crate::host::{blocking, process};
use crate::runtime::Runtime;
use crate::telemetry;

/// Name of a pod's interface.
const INTERFACE: &str = "eth0";
/// How long one plugin may take.
const PLUGIN_DEADLINE: Duration = Duration::from_secs(60);

/// How long pods may be kept waiting for the end of an attachment, after which plugins are told what is in use.
const GIVE_WAY: Duration = Duration::from_secs(1);

/// What a pod with a limit may send at once, in bits: as much as the plugins accept, since Kubernetes states only a rate.
const BURST: u32 = i32::MAX as u32;
/// Between the loss of the plugins' table and its return.
const TABLE_PAUSE: Duration = Duration::from_millis(200);
/// Between two tries to watch a configuration directory that was taken away.
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// The network that counts, or why there is none.
pub type Loaded = Result<Arc<NetworkConfigList>, String>;

/// The pod network.
#[derive(Clone, Debug)]
pub struct Network {
    invoker: Invoker,
    current: watch::Receiver<Loaded>,
    /// Held for writing while plugins are told what is in use: what is attached meanwhile would not be among it.
    attaching: Arc<RwLock<()>>,
}

impl Network {
    /// Loads the configuration and follows its changes until `cancel`.
    pub async fn start(cni: &Cni, cancel: CancellationToken) -> anyhow::Result<Self> {
        for directory in [&cni.conf_dir, &cni.cache_dir] {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let changes = watch(&cni.conf_dir)?;
        // Loaded after the watch is set, so that no change falls between.
        let (sender, current) = watch::channel(load_now(cni.conf_dir.clone()).await);
        tokio::spawn(follow(cni.conf_dir.clone(), changes, sender, cancel));
        let invoker = Invoker {
            bin_dirs: vec![cni.bin_dir.clone()],
            cache_dir: cni.cache_dir.clone(),
            deadline: PLUGIN_DEADLINE,
        };
        Ok(Self { invoker, current, attaching: Arc::default() })
    }

    /// The network that counts now, or why there is none.
    pub fn current(&self) -> Loaded {
        self.current.borrow().clone()
    }

    /// Tells when another network counts.
    pub fn changes(&self) -> watch::Receiver<Loaded> {
        self.current.clone()
    }

    /// Attaches a sandbox; its addresses, the primary one (the first of version 4, if any) first.
    pub async fn attach(
        &self,
        list: &NetworkConfigList,
        record: &SandboxRecord,
    ) -> Result<Vec<String>, RuntimeError> {
        let _attaching = self.attaching.read().await;
        let result = telemetry::stage("cni_add", self.invoker.add(list, &arguments(record)))
            .await
            .map_err(|error| failed("setup", record, error))?;
        let mut addresses: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        Ok(addresses.iter().map(ToString::to_string).collect())
    }

    /// Detaches a sandbox, with the configuration it was attached with. One that was never attached is fine.
    ///
    /// A sandbox that never heard its addresses may hold some all the same: its plugins were cut off or failed half-way.
    /// Nothing tells which, so that it is not detached before a network of that name has been asked.
    pub async fn detach(&self, record: &SandboxRecord) -> Result<(), RuntimeError> {
        if record.network.is_empty() {
            return Ok(());
        }
        let mut arguments = arguments(record);
        if !Path::new(&record.netns).exists() {
            arguments.netns = PathBuf::new();
        }
        let current = self.current().ok().filter(|list| list.name == record.network);
        let list = if let Some(list) = current {
            NetworkConfigList::clone(&list)
        } else {
            // Without plugins only what the cache knows is detached.
            let list = unconfigured(&record.network);
            let cached = self.invoker.cached(&list, &arguments);
            let cached = cached.map_err(|error| failed("teardown", record, error))?;
            if cached.is_none() && record.addresses.is_empty() {
                return Err(RuntimeError::NetworkGone { id: record.id.clone(), network: list.name });
            }
            list
        };
        let deleted = telemetry::stage("cni_del", self.invoker.del(&list, &arguments)).await;
        deleted.map_err(|error| failed("teardown", record, error))
    }

    /// Lets the plugins release what belongs to none of these sandboxes, and bring back what of theirs somebody took away.
    pub async fn collect(&self, living: impl FnOnce() -> Vec<String>) {
        let Ok(list) = self.current() else { return };
        let _nothing_attaches = loop {
            // A plugin that hangs holds up nobody else: who waits here keeps new pods waiting.
            match tokio::time::timeout(GIVE_WAY, self.attaching.write()).await {
                Ok(guard) => break guard,
                Err(_elapsed) => tokio::time::sleep(GIVE_WAY).await,
            }
        };
        let valid: Vec<_> = living().into_iter().map(|id| (id, INTERFACE.to_owned())).collect();
        if let Err(error) = self.invoker.gc(&list, &valid).await {
            tracing::warn!(error = %chain(&error), "the pod network could not release what is unused");
        }
    }
}

/// Has the table of our plugins brought back whenever somebody takes it away, as a restart of the service `nftables` does: pods
/// that run would stay without masquerade and host ports.
pub async fn keep_table(runtime: Arc<Runtime>, cancel: CancellationToken) {
    let opened = || -> anyhow::Result<_> {
        let watch = nft::Watch::open()?;
        let readable = process::watched(watch.as_fd().try_clone_to_owned()?)?;
        Ok((watch, readable))
    };
    let (mut watch, readable) = match opened() {
        Ok(opened) => opened,
        Err(error) => {
            let error = format!("{error:#}");
            return tracing::warn!(error, "rules of the pod network that are taken away do not come back");
        }
    };
    loop {
        // Cancel-safe: nothing is read before it is ready.
        let ready = tokio::select! {
            () = cancel.cancelled() => return,
            ready = readable.readable() => ready,
        };
        let Ok(mut ready) = ready else { return };
        ready.clear_ready();
        match watch.lost() {
            Ok(false) => continue,
            Ok(true) => {}
            Err(error) => return tracing::warn!(%error, "changes of nftables are not seen any more"),
        }
        // Who flushes loads rules of its own next; `keelson-cni cleanup` takes records away after the table.
        tokio::time::sleep(TABLE_PAUSE).await;
        tracing::warn!(
            "the table inet {} was taken away, or too much changed at once to tell: what is missing is made again",
            nft::TABLE
        );
        runtime.release_unused().await;
    }
}

/// Follows changes of the configuration directory, which is made when it is missing.
fn watch(directory: &Path) -> anyhow::Result<EventStream<[u8; 4096]>> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let inotify = Inotify::init().context("cannot watch files (inotify)")?;
    let changes = WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::DELETE | WatchMask::DELETE_SELF;
    inotify
        .watches()
        .add(directory, changes)
        .with_context(|| format!("cannot watch {}", directory.display()))?;
    inotify.into_event_stream([0_u8; 4096]).context("cannot watch files (inotify)")
}

/// Loads the configuration again at each change of its directory, until `cancel`.
async fn follow(
    directory: PathBuf,
    mut changes: EventStream<[u8; 4096]>,
    network: watch::Sender<Loaded>,
    cancel: CancellationToken,
) {
    loop {
        // Cancel-safe: an event that is not taken stays in the kernel's queue.
        let event = tokio::select! {
            () = cancel.cancelled() => return,
            event = changes.next() => event,
        };
        let is_watched =
            event.is_some_and(|event| event.is_ok_and(|event| !event.mask.contains(EventMask::IGNORED)));
        if !is_watched {
            // A directory that was removed takes its watch along.
            match watch(&directory) {
                Ok(again) => changes = again,
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "changes of the pod network are not seen");
                    tokio::time::sleep(WATCH_PAUSE).await;
                    continue;
                }
            }
        }
        let loaded = load_now(directory.clone()).await;
        let changed = *network.borrow() != loaded;
        if !changed {
            continue;
        }
        match &loaded {
            Ok(list) => tracing::info!(network = list.name, "pod network configured"),
            Err(reason) => tracing::warn!(reason, "no pod network"),
        }
        drop(network.send_replace(loaded));
    }
}

fn failed(step: &'static str, record: &SandboxRecord, error: InvokeError) -> RuntimeError {
    RuntimeError::Network { step, id: record.id.clone(), source: Box::new(error) }
}

async fn load_now(directory: PathBuf) -> Loaded {
    let loaded = blocking(move || Ok(load(&directory).map(Arc::new).map_err(|error| chain(&error)))).await;
    loaded.unwrap_or_else(|error| Err(error.to_string()))
}

fn unconfigured(name: &str) -> NetworkConfigList {
    NetworkConfigList {
        name: name.to_owned(),
        cni_version: cni_plugins_types::Version::default(),
        disable_check: true,
        disable_gc: true,
        plugins: Vec::new(),
        source: String::new(),
    }
}

fn arguments(record: &SandboxRecord) -> RuntimeArgs {
    let metadata = record.config.metadata.clone().unwrap_or_default();
    let args = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &metadata.namespace),
        ("K8S_POD_NAME", &metadata.name),
        ("K8S_POD_INFRA_CONTAINER_ID", &record.id),
        ("K8S_POD_UID", &metadata.uid),
    ];
    RuntimeArgs {
        container_id: record.id.clone(),
        netns: PathBuf::from(&record.netns),
        ifname: INTERFACE.to_owned(),
        args: args.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        capability_args: capabilities(&record.config),
    }
}

/// What the plugins may want to know, by capability.
fn capabilities(config: &PodSandboxConfig) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    // Checked before the sandbox is made; to detach one it does not matter.
    let bandwidth = Bandwidth::of(&config.annotations).unwrap_or_default();
    let limits = [("ingress", bandwidth.ingress), ("egress", bandwidth.egress)];
    let limits: serde_json::Map<String, Value> = limits
        .iter()
        .filter_map(|(direction, rate)| rate.map(|rate| (direction, rate)))
        .flat_map(|(direction, rate)| {
            [(format!("{direction}Rate"), json!(rate)), (format!("{direction}Burst"), json!(BURST))]
        })
        .collect();
    if !limits.is_empty() {
        all.insert("bandwidth".to_owned(), Value::Object(limits));
    }
    let ports: Vec<Value> = config
        .port_mappings
        .iter()
        .filter(|port| port.host_port > 0)
        .map(|port| {
            json!({
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": match port.protocol() {
                    Protocol::Tcp => "tcp",
                    Protocol::Udp => "udp",
                    Protocol::Sctp => "sctp",
                },
                "hostIP": port.host_ip,
            })
        })
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".to_owned(), Value::Array(ports));
    }
    if let Some(dns) = &config.dns_config {
        let value = json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
        all.insert("dns".to_owned(), value);
    }
    if let Some(linux) = config.linux.as_ref().filter(|linux| !linux.cgroup_parent.is_empty()) {
        all.insert("cgroupPath".to_owned(), json!(linux.cgroup_parent));
    }
    all.insert("io.kubernetes.cri.pod-annotations".to_owned(), json!(config.annotations));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use cri_shim_api::v1::PortMapping;

    #[test]
    fn only_ports_of_the_host_are_mapped() {
        let ports = vec![
            PortMapping { container_port: 80, host_port: 8080, ..PortMapping::default() },
            PortMapping { container_port: 81, ..PortMapping::default() },
        ];
        let config = PodSandboxConfig { port_mappings: ports, ..PodSandboxConfig::default() };
        let all = capabilities(&config);
        let mapped = all["portMappings"].as_array().unwrap();
        assert_eq!((mapped.len(), &mapped[0]["hostPort"]), (1, &json!(8080)));
        assert!(!all.contains_key("bandwidth"));
    }

    #[test]
    fn limits_of_the_pod_reach_the_plugins() {
        let annotations = [("kubernetes.io/egress-bandwidth".to_owned(), "10M".to_owned())].into();
        let config = PodSandboxConfig { annotations, ..PodSandboxConfig::default() };
        let wanted = json!({ "egressRate": 10_000_000, "egressBurst": BURST });
        assert_eq!(capabilities(&config)["bandwidth"], wanted);
    }

    const DEADLINE: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn what_was_attached_half_is_detached_only_by_its_own_network() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name);
        let cni = Cni { conf_dir: place("net.d"), bin_dir: place("bin"), cache_dir: place("cache") };
        for made in [&cni.conf_dir, &cni.bin_dir] {
            std::fs::create_dir_all(made).unwrap();
        }
        let plugin = cni.bin_dir.join("fake");
        std::os::unix::fs::symlink("/bin/false", &plugin).unwrap();
        let network = Network::start(&cni, CancellationToken::new()).await.unwrap();
        let half = SandboxRecord { id: "half".into(), network: "test".into(), ..SandboxRecord::default() };
        // The file of the network was taken away meanwhile.
        let refused = network.detach(&half).await.unwrap_err().to_string();
        assert!(refused.contains("network \"test\" is not configured"), "{refused}");
        // One that was ready is let go: nobody is there who could be asked.
        let ready = SandboxRecord { addresses: vec!["10.0.0.1".into()], ..half.clone() };
        network.detach(&ready).await.unwrap();
        let text = r#"{"cniVersion":"1.1.0","name":"test","plugins":[{"type":"fake"}]}"#;
        std::fs::write(cni.conf_dir.join("x.new"), text).unwrap();
        std::fs::rename(cni.conf_dir.join("x.new"), cni.conf_dir.join("10-test.conflist")).unwrap();
        let mut current = network.current.clone();
        tokio::time::timeout(DEADLINE, current.wait_for(Result::is_ok)).await.unwrap().unwrap();
        let failed = chain(&network.detach(&half).await.unwrap_err());
        assert!(failed.contains("plugin fake failed (DEL)"), "the plugin is asked: {failed}");
        std::fs::remove_file(&plugin).unwrap();
        std::os::unix::fs::symlink("/bin/true", &plugin).unwrap();
        network.detach(&half).await.unwrap();
    }

    #[tokio::test]
    async fn a_network_written_later_is_found_and_lost_again() {
        let directory = tempfile::tempdir().unwrap();
        let conf_dir = directory.path().join("net.d");
        let cni = Cni { conf_dir: conf_dir.clone(), bin_dir: "/bin".into(), cache_dir: conf_dir.clone() };
        let network = Network::start(&cni, CancellationToken::new()).await.unwrap();
        assert!(network.current().unwrap_err().contains("no network config found"));
        let text = r#"{"cniVersion":"1.1.0","name":"test","plugins":[{"type":"none"}]}"#;
        std::fs::write(conf_dir.join("x.new"), text).unwrap();
        std::fs::rename(conf_dir.join("x.new"), conf_dir.join("10-test.conflist")).unwrap();
        let mut current = network.current.clone();
        tokio::time::timeout(DEADLINE, current.wait_for(Result::is_ok)).await.unwrap().unwrap();
        std::fs::remove_file(conf_dir.join("10-test.conflist")).unwrap();
        tokio::time::timeout(DEADLINE, current.wait_for(Result::is_err)).await.unwrap().unwrap();
        // Also when the whole directory goes and comes back, as a network's installer may do it.
        std::fs::remove_dir_all(&conf_dir).unwrap();
        let write = || {
            std::fs::create_dir_all(&conf_dir).unwrap();
            std::fs::write(conf_dir.join("20-test.conflist"), text).unwrap();
        };
        write();
        tokio::time::timeout(DEADLINE, current.wait_for(Result::is_ok)).await.unwrap().unwrap();
    }
}

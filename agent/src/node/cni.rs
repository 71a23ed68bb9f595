//! Writes the CNI configuration once the node has its pod addresses.
//!
//! Input: `spec.podCIDRs` of the node object. Output: `<confDir>/10-keelson.conflist`, replaced in one step, and a
//! request to look at the runtime's health, so that the node becomes Ready at once. Where there is a network between nodes,
//! the list begins with `keelson-vxlan`, which reads ranges and MTU from the state that the role `network` leaves, so that the
//! list never changes; on a node by itself with `keelson-bridge`.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::config::CniConfig;
use crate::network;

/// Name of the file; others with a smaller name would win.
const FILE_NAME: &str = "10-keelson.conflist";

/// Keeps the file right for ever; without a `cni` section somebody else writes it. Where there is a network between
/// nodes, pods wait for it.
pub(super) async fn run(
    config: Option<CniConfig>,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    overlay: Option<watch::Receiver<Option<network::State>>>,
    recheck: Arc<Notify>,
) -> anyhow::Result<()> {
    let Some(config) = config else { return std::future::pending().await };
    let has_overlay = overlay.is_some();
    let mut overlay = overlay.unwrap_or_else(|| watch::channel(None).1);
    let mut written = None;
    loop {
        let ranges = node.borrow_and_update().as_deref().map(pod_ranges).unwrap_or_default();
        let state = *overlay.borrow_and_update();
        if !ranges.is_empty() && state.is_some() == has_overlay {
            let main = state.map_or_else(|| on_bridge(&config, &ranges), |state| on_overlay(&config, state));
            let text = format!("{:#}\n", conflist(&config, main));
            if written.as_ref() != Some(&text) {
                ensure(&config, text.clone(), &ranges).await?;
                recheck.notify_one();
                written = Some(text);
            }
        }
        // Cancel-safe: the receivers keep what was not seen. An error means that the agent is stopping, or that there
        // is no such network.
        tokio::select! {
            Ok(()) = node.changed() => {}
            Ok(()) = overlay.changed() => {}
            else => return std::future::pending().await,
        }
    }
}

async fn ensure(config: &CniConfig, text: String, ranges: &[String]) -> anyhow::Result<()> {
    let path = config.conf_dir.join(FILE_NAME);
    let shown = ranges.join(", ");
    let written = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || replace(&path, &text)).await?
    };
    if written.with_context(|| format!("cannot write the CNI configuration {}", path.display()))? {
        info!(path = %path.display(), ranges = %shown, "CNI configuration written");
    }
    Ok(())
}

/// `podCIDRs`, or the single `podCIDR`; what is not a CIDR is left out with a warning.
fn pod_ranges(node: &Node) -> Vec<String> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let several = spec.pod_cidrs.iter().flatten();
    let ranges: Vec<&String> =
        if several.clone().next().is_some() { several.collect() } else { spec.pod_cidr.iter().collect() };
    let is_cidr = |range: &&&String| {
        let is_good = family(range).is_some();
        if !is_good {
            warn!(%range, "podCIDR of the node is not an address range");
        }
        is_good
    };
    ranges.iter().filter(is_cidr).map(|range| (*range).clone()).collect()
}

fn family(range: &str) -> Option<IpAddr> {
    range.split_once('/').and_then(|(addr, _)| addr.parse().ok())
}

/// The first plugin on a node by itself.
fn on_bridge(config: &CniConfig, ranges: &[String]) -> Value {
    let sets: Vec<Value> = ranges.iter().map(|range| json!([{"subnet": range}])).collect();
    let routes: Vec<Value> = ranges
        .iter()
        .filter_map(|range| family(range))
        .map(|addr| json!({"dst": if addr.is_ipv4() { "0.0.0.0/0" } else { "::/0" }}))
        .collect();
    let mut bridge = json!({
        "type": "keelson-bridge",
        "bridge": config.bridge,
        "isGateway": true,
        "isDefaultGateway": true,
        "hairpinMode": true,
        "ipam": {"type": "keelson-ipam", "dataDir": config.data_dir, "ranges": sets, "routes": routes},
    });
    if config.mtu != 0 {
        bridge["mtu"] = config.mtu.into();
    }
    bridge
}

/// The first plugin where there is a network between nodes, whose packets have at most its MTU.
fn on_overlay(config: &CniConfig, overlay: network::State) -> Value {
    let mut delegate = json!({"bridge": config.bridge});
    if (1..overlay.mtu).contains(&config.mtu) {
        delegate["mtu"] = config.mtu.into();
    }
    json!({
        "type": "keelson-vxlan",
        "delegate": delegate,
        "ipam": {"type": "keelson-ipam", "dataDir": config.data_dir},
    })
}

/// The list: what makes the interface, then what goes on top of it.
fn conflist(config: &CniConfig, mut main: Value) -> Value {
    if let Some(masquerade) = &config.masquerade {
        main["ipMasq"] = true.into();
        main["ipMasqExcept"] = json!(masquerade.except);
    }
    let mut plugins = vec![main];
    if config.bandwidth {
        plugins.push(json!({"type": "keelson-bandwidth", "capabilities": {"bandwidth": true}}));
    }
    if config.host_ports {
        plugins.push(json!({"type": "keelson-portmap", "capabilities": {"portMappings": true}}));
    }
    let own = [("stateDir", &config.state_dir), ("logFile", &config.log_file)];
    for plugin in &mut plugins {
        for (key, path) in own {
            if let Some(path) = path {
                plugin[key] = json!(path);
            }
        }
    }
    json!({"cniVersion": "1.1.0", "name": config.name, "plugins": plugins})
}

/// Tells whether the file had to be written.
fn replace(path: &Path, text: &str) -> io::Result<bool> {
    if std::fs::read_to_string(path).is_ok_and(|current| current == text) {
        return Ok(false);
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // Not `.conflist`: a runtime must not take the half-written file.
    let temporary: PathBuf = path.with_extension("tmp");
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MasqueradeConfig;

    fn config(dir: &Path, mtu: u32) -> CniConfig {
        CniConfig {
            conf_dir: dir.to_owned(),
            name: "pods".to_owned(),
            bridge: "kl-up0".to_owned(),
            data_dir: "/run/ipam".into(),
            state_dir: None,
            log_file: None,
            mtu,
            masquerade: None,
            host_ports: true,
            bandwidth: true,
            netns_dir: None,
        }
    }

    fn node(spec: &Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec})).unwrap()
    }

    #[test]
    fn the_file_is_what_the_plugins_read() {
        let alone = |config: &CniConfig, ranges: &[&str]| {
            let ranges: Vec<String> = ranges.iter().map(|range| (*range).to_owned()).collect();
            conflist(config, on_bridge(config, &ranges))
        };
        let value = alone(&config(Path::new("/x"), 1400), &["10.244.0.0/24", "fd00::/64"]);
        let bridge = &value["plugins"][0];
        assert_eq!(bridge["mtu"], 1400);
        assert_eq!(
            bridge["ipam"]["ranges"],
            json!([[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd00::/64"}]])
        );
        assert_eq!(bridge["ipam"]["routes"], json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]));
        assert!(alone(&config(Path::new("/x"), 0), &[])["plugins"][0].get("mtu").is_none());
        let elsewhere = CniConfig { log_file: Some("/l/cni.log".into()), ..config(Path::new("/x"), 0) };
        assert_eq!(alone(&elsewhere, &[])["plugins"][0]["logFile"], "/l/cni.log");
        let except = vec!["10.244.0.0/16".to_owned()];
        let masquerade = Some(MasqueradeConfig { except });
        let chained = alone(&CniConfig { masquerade, ..config(Path::new("/x"), 0) }, &[]);
        assert_eq!(chained["plugins"][0]["ipMasq"], true);
        assert_eq!(chained["plugins"][0]["ipMasqExcept"], json!(["10.244.0.0/16"]));
        assert_eq!(chained["name"], "pods");
        let capabilities: Vec<&Value> =
            (1..3).map(|index| &chained["plugins"][index]["capabilities"]).collect();
        assert_eq!(capabilities, [&json!({"bandwidth": true}), &json!({"portMappings": true})]);
        let plain = CniConfig { bandwidth: false, host_ports: false, ..config(Path::new("/x"), 0) };
        assert_eq!(alone(&plain, &[])["plugins"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn ranges_come_from_the_list_or_the_single_field() {
        assert_eq!(pod_ranges(&node(&json!({"podCIDR": "10.0.0.0/24"}))), ["10.0.0.0/24"]);
        let both = json!({"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24", "fd00::/64", "junk"]});
        assert_eq!(pod_ranges(&node(&both)), ["10.0.0.0/24", "fd00::/64"]);
        assert!(pod_ranges(&node(&json!({}))).is_empty());
    }

    #[tokio::test]
    async fn written_when_the_range_appears_and_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, receiver) = watch::channel(None);
        let recheck = Arc::new(Notify::new());
        let task = tokio::spawn(run(
            Some(config(&dir.path().join("net.d"), 0)),
            receiver,
            None,
            Arc::clone(&recheck),
        ));
        let path = dir.path().join("net.d").join(FILE_NAME);
        sender.send_replace(Some(Arc::new(node(&json!({})))));
        for range in ["10.0.0.0/24", "10.0.1.0/24"] {
            sender.send_replace(Some(Arc::new(node(&json!({"podCIDR": range})))));
            tokio::time::timeout(std::time::Duration::from_secs(10), recheck.notified()).await.unwrap();
            assert!(std::fs::read_to_string(&path).unwrap().contains(range));
        }
        task.abort();
    }

    #[test]
    fn between_nodes_the_list_leaves_ranges_and_mtu_to_the_state() {
        let masquerade = Some(MasqueradeConfig { except: vec!["10.244.0.0/16".to_owned()] });
        let settings = CniConfig { masquerade, ..config(Path::new("/x"), 0) };
        let state = network::State { mtu: 1450 };
        let value = conflist(&settings, on_overlay(&settings, state));
        let main = &value["plugins"][0];
        assert_eq!((&main["type"], &main["ipMasq"]), (&json!("keelson-vxlan"), &json!(true)));
        assert_eq!(main["delegate"], json!({"bridge": "kl-up0"}));
        assert_eq!(main["ipam"], json!({"type": "keelson-ipam", "dataDir": "/run/ipam"}));
        for (asked, told) in [(1300, json!(1300)), (9000, Value::Null)] {
            assert_eq!(on_overlay(&config(Path::new("/x"), asked), state)["delegate"]["mtu"], told);
        }
    }

    #[tokio::test]
    async fn it_waits_for_the_network_between_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let object = node(&json!({"podCIDR": "10.0.0.0/24"}));
        let (_node, nodes) = watch::channel(Some(Arc::new(object)));
        let (overlay, states) = watch::channel(None);
        let recheck = Arc::new(Notify::new());
        let task = tokio::spawn(run(Some(config(dir.path(), 0)), nodes, Some(states), Arc::clone(&recheck)));
        tokio::task::yield_now().await;
        let path = dir.path().join(FILE_NAME);
        assert!(!path.exists(), "no pod could be attached");
        overlay.send_replace(Some(network::State { mtu: 1450 }));
        tokio::time::timeout(std::time::Duration::from_secs(10), recheck.notified()).await.unwrap();
        let value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(value["plugins"][0]["type"], "keelson-vxlan");
        task.abort();
    }
}

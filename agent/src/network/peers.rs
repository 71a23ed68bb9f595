//! All nodes as peers, from the API server.

use std::collections::BTreeMap;
use std::sync::Arc;

use agent_core::overlay::Peer;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::watch;
use tracing::warn;

use crate::chain::chain;
use crate::sources;

/// Nodes by name.
pub type Peers = BTreeMap<String, Peer>;

/// Keeps `peers` at what the API server has; `None` until all are listed. Nodes write their status every few seconds:
/// only what concerns the overlay wakes anybody up.
pub(super) async fn follow(client: Client, peers: watch::Sender<Option<Arc<Peers>>>) {
    let stream = sources::follow(Api::<Node>::all(client), watcher::Config::default());
    let mut stream = std::pin::pin!(stream);
    let mut listed = Peers::new();
    while let Some(event) = stream.next().await {
        match event {
            Ok(watcher::Event::Init) => listed.clear(),
            Ok(watcher::Event::InitApply(node)) => {
                let peer = Peer::of(&node);
                listed.insert(peer.name.clone(), peer);
            }
            Ok(watcher::Event::InitDone) => replace(&peers, std::mem::take(&mut listed)),
            Ok(watcher::Event::Apply(node)) => change(&peers, Peer::of(&node)),
            Ok(watcher::Event::Delete(node)) => remove(&peers, &node.metadata.name.unwrap_or_default()),
            Err(error) => warn!(error = %chain(&error), "watch of the nodes interrupted"),
        }
    }
}

fn replace(peers: &watch::Sender<Option<Arc<Peers>>>, listed: Peers) {
    peers.send_if_modified(|current| {
        let differs = current.as_deref() != Some(&listed);
        if differs {
            *current = Some(Arc::new(listed));
        }
        differs
    });
}

fn change(peers: &watch::Sender<Option<Arc<Peers>>>, peer: Peer) {
    peers.send_if_modified(|current| {
        let Some(all) = current.as_mut().filter(|all| all.get(&peer.name) != Some(&peer)) else {
            return false;
        };
        Arc::make_mut(all).insert(peer.name.clone(), peer);
        true
    });
}

fn remove(peers: &watch::Sender<Option<Arc<Peers>>>, name: &str) {
    peers.send_if_modified(|current| {
        let Some(all) = current.as_mut().filter(|all| all.contains_key(name)) else { return false };
        Arc::make_mut(all).remove(name);
        true
    });
}

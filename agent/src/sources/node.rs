//! This node's own object, from the API server.

use std::sync::Arc;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::follow;
use crate::chain::chain;

/// This node's object as the API server has it, `None` until seen.
pub type NodeWatch = watch::Receiver<Option<Arc<Node>>>;

/// Keeps `node` at what the API server has, `None` while there is none, until `cancel`.
pub async fn run(
    client: Client,
    node_name: String,
    node: watch::Sender<Option<Arc<Node>>>,
    cancel: CancellationToken,
) {
    let config = watcher::Config::default().fields(&format!("metadata.name={node_name}"));
    let mut stream = std::pin::pin!(follow(Api::<Node>::all(client), config));
    loop {
        // Cancel-safe: a stream and a token.
        let event = tokio::select! {
            () = cancel.cancelled() => return,
            event = stream.next() => event,
        };
        match event {
            None => return,
            Some(Ok(watcher::Event::Apply(mut found) | watcher::Event::InitApply(mut found))) => {
                found.metadata.managed_fields = None;
                node.send_replace(Some(Arc::new(found)));
            }
            Some(Ok(watcher::Event::Delete(_))) => {
                node.send_replace(None);
            }
            Some(Ok(watcher::Event::Init | watcher::Event::InitDone)) => {}
            Some(Err(error)) => warn!(error = %chain(&error), "watch of the node interrupted"),
        }
    }
}

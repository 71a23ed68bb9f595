//! Removes what drivers that have gone for good told of their devices: their ResourceSlices of this node.
//!
//! A driver has gone when it has no plugin that answers at its socket for [`super::DraSettings::patience`]: its registration
//! socket was removed, it died and left its sockets behind, or it told an earlier agent and did not come back. Pods are not
//! given devices then that nobody could make ready. Upstream's kubelet removes all of them when it starts; here those of
//! drivers that come back in time stay.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::resource::v1::ResourceSlice;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::drivers::Presence;
use super::{Dra, ask};

/// How long a socket may take to accept.
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// Between two lists that the API server refused.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

impl Dra {
    /// Looks after the ResourceSlices of this node until `cancel`.
    pub async fn tidy_slices(self, cancel: CancellationToken) {
        // Cancel-safe: whatever is left undone, the next agent finds.
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.tidy() => {}
        }
    }

    async fn tidy(&self) {
        let mut pause = self.0.settings.patience / 6;
        while let Err(problem) = self.expect_earlier().await {
            debug!(%problem, "cannot list the node's ResourceSlices");
            tokio::time::sleep(pause).await;
            // A cluster may have no such kind, or allow nobody to see it.
            pause = (pause * 2).min(LONGEST_PAUSE.max(pause));
        }
        loop {
            let known = self.0.drivers.endpoints();
            if known.is_empty() {
                self.0.drivers.changed().await;
                continue;
            }
            for (name, endpoints) in known {
                self.look_after(&name, &endpoints).await;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Drivers that told of devices here before this agent.
    async fn expect_earlier(&self) -> Result<(), String> {
        let slices: Api<ResourceSlice> = Api::all(self.0.client.clone());
        let own = format!("spec.nodeName={}", self.0.settings.node_name);
        let found = ask(slices.list(&ListParams::default().fields(&own))).await?;
        let drivers: BTreeSet<String> = found.items.into_iter().map(|slice| slice.spec.driver).collect();
        for driver in drivers {
            self.0.drivers.expect(&driver);
        }
        Ok(())
    }

    async fn look_after(&self, name: &str, endpoints: &[PathBuf]) {
        let mut answered = false;
        for endpoint in endpoints {
            let connected = tokio::time::timeout(CONNECT_DEADLINE, UnixStream::connect(endpoint)).await;
            answered |= matches!(connected, Ok(Ok(_)));
        }
        match self.0.drivers.note(name, answered) {
            Presence::Away(since) if since.elapsed() >= self.0.settings.patience => {}
            _ => return,
        }
        let slices: Api<ResourceSlice> = Api::all(self.0.client.clone());
        let of_driver = format!("spec.driver={name},spec.nodeName={}", self.0.settings.node_name);
        let params = ListParams::default().fields(&of_driver);
        match ask(slices.delete_collection(&DeleteParams::default(), &params)).await {
            Ok(_) => {
                info!(driver = %name, "DRA driver has gone: its ResourceSlices of this node are removed");
                self.0.drivers.forget(name);
            }
            Err(problem) => warn!(driver = %name, %problem, "cannot remove a driver's ResourceSlices"),
        }
    }
}

//! Services of the cluster, for service variables.

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Service;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::follow;
use crate::chain::chain;

/// Read access to the services.
#[derive(Clone)]
pub struct Services {
    /// Every service, without the fields that variables do not need.
    pub store: Store<Service>,
    /// The store has been filled once.
    pub synced: watch::Receiver<bool>,
}

/// The services, and the future that keeps them up to date until `cancel`.
pub fn services(client: Client, cancel: CancellationToken) -> (Services, impl Future<Output = ()> + Send) {
    let (store, writer) = reflector::store();
    let (synced_sender, synced) = watch::channel(false);
    let run = async move {
        let api: Api<Service> = Api::all(client);
        let stream = follow(api, watcher::Config::default())
            .map(|event| event.map(|event| event.modify(trim)))
            .reflect(writer);
        let mut stream = std::pin::pin!(stream);
        loop {
            // Cancel-safe: a stream and a token.
            let event = tokio::select! {
                () = cancel.cancelled() => return,
                event = stream.next() => event,
            };
            match event {
                None => return,
                Some(Ok(watcher::Event::InitDone)) => {
                    synced_sender.send_replace(true);
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => warn!(error = %chain(&error), "watch of services interrupted"),
            }
        }
    };
    (Services { store, synced }, run)
}

fn trim(service: &mut Service) {
    service.metadata.managed_fields = None;
    service.metadata.annotations = None;
    service.metadata.labels = None;
    service.status = None;
    if let Some(spec) = &mut service.spec {
        spec.selector = None;
    }
}

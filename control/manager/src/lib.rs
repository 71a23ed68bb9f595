//! Runs the controllers and the scheduler against any Kubernetes API server: watch, decide, write.
//!
//! [`run`] starts one shared [`informer`] per kind; their events put keys into each controller's [`queue`];
//! workers take a key, snapshot the caches, ask `control-decide` for a plan and carry it out through the
//! API. Nothing is kept that cannot be rebuilt: killed at any moment and started again, it goes on.
//!
//! Reading order: [`informer`], [`queue`], `context` (what all controllers share), `write` (patches and
//! errors), `written`, `events`; then one file per controller, named as in upstream's kube-controller-manager.
//!
//! This crate touches nothing but the API server: no files, no kernel, no containers. The only secret it holds is the key
//! that it signs certificates with, where it is given one.

mod attach_detach;
mod certificates;
mod config;
mod context;
mod deployment;
mod endpoints;
mod endpointslice;
mod ephemeral;
mod event_ttl;
mod events;
mod garbage_collector;
mod informer;
mod namespace;
mod node_ipam;
mod node_lifecycle;
mod owners;
mod pod_gc;
mod queue;
mod replicaset;
mod resource_claims;
mod resources;
mod root_ca;
mod scheduler;
mod serviceaccount;
mod slim;
mod taint_eviction;
mod volumes;
mod write;
mod written;

use std::sync::Arc;

use kube::Client;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::config::{Controller, ManagerConfig, ManagerError, SigningAuthority};
use self::context::Context;

/// Runs what the configuration switches on, until `cancel` fires.
///
/// Only a wrong configuration is an error. An API server that is away, slow or restarting is waited for.
pub async fn run(
    client: Client,
    config: ManagerConfig,
    cancel: CancellationToken,
) -> Result<(), ManagerError> {
    let pools = config.pools()?;
    let mut signer = config.signing.as_ref().map(certificates::Signer::new).transpose()?;
    let tasks = TaskTracker::new();
    let context = Arc::new(Context::new(client, config, tasks.clone(), cancel.clone()));
    for controller in Controller::ALL {
        if !context.config.runs(controller) {
            continue;
        }
        match controller {
            Controller::Deployment => deployment::start(&context),
            Controller::ReplicaSet => replicaset::start(&context),
            Controller::EndpointSlice => endpointslice::start(&context),
            Controller::Endpoints => endpoints::start(&context),
            Controller::GarbageCollector => garbage_collector::start(&context),
            Controller::Namespace => namespace::start(&context),
            Controller::ServiceAccount => serviceaccount::start(&context),
            Controller::RootCa => root_ca::start(&context),
            Controller::NodeIpam => node_ipam::start(&context, pools.clone()),
            Controller::NodeLifecycle => node_lifecycle::start(&context),
            Controller::TaintEviction => taint_eviction::start(&context),
            Controller::PodGc => pod_gc::start(&context),
            Controller::EventTtl => event_ttl::start(&context),
            Controller::Certificates => {
                if let Some(signer) = signer.take() {
                    certificates::start(&context, signer);
                }
            }
            Controller::Volumes => volumes::start(&context),
            Controller::EphemeralVolumes => ephemeral::start(&context),
            Controller::ResourceClaims => resource_claims::start(&context),
            Controller::AttachDetach => attach_detach::start(&context),
            Controller::Scheduler => scheduler::start(&context),
        }
    }
    // All handlers are in place: no event can be missed from here on.
    context.start_informers();
    tracing::info!(controllers = %context.config.running_names(), "controllers started");
    cancel.cancelled().await;
    tasks.close();
    tasks.wait().await;
    Ok(())
}

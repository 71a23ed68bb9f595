//! What all controllers share: the client, the caches, the event sink, the tasks.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{Deployment, ReplicaSet},
        certificates::v1::CertificateSigningRequest,
        coordination::v1::Lease,
        core::v1::{
            ConfigMap, Endpoints, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, Service,
            ServiceAccount,
        },
        discovery::v1::EndpointSlice,
        resource::v1::ResourceClaim,
        storage::v1::{CSIDriver, StorageClass, VolumeAttachment},
    },
};
use kube::{Api, Client, core::Resource};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Controller, ManagerConfig},
    events::EventSink,
    informer::{Cached, Informer, Objects},
    queue::{self, Queue},
    resources::Resources,
    slim,
    write::WriteError,
};

/// Shared by all controllers of one process.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) config: ManagerConfig,
    pub(crate) events: EventSink,
    pub(crate) resources: Arc<Resources>,
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
    pub(crate) pods: Arc<Informer<Pod>>,
    pub(crate) nodes: Arc<Informer<Node>>,
    pub(crate) deployments: Arc<Informer<Deployment>>,
    pub(crate) replica_sets: Arc<Informer<ReplicaSet>>,
    pub(crate) services: Arc<Informer<Service>>,
    pub(crate) endpoint_slices: Arc<Informer<EndpointSlice>>,
    pub(crate) endpoints: Arc<Informer<Endpoints>>,
    pub(crate) namespaces: Arc<Informer<Namespace>>,
    pub(crate) service_accounts: Arc<Informer<ServiceAccount>>,
    pub(crate) leases: Arc<Informer<Lease>>,
    pub(crate) certificate_requests: Arc<Informer<CertificateSigningRequest>>,
    pub(crate) claims: Arc<Informer<PersistentVolumeClaim>>,
    pub(crate) volumes: Arc<Informer<PersistentVolume>>,
    pub(crate) storage_classes: Arc<Informer<StorageClass>>,
    pub(crate) attachments: Arc<Informer<VolumeAttachment>>,
    pub(crate) drivers: Arc<Informer<CSIDriver>>,
    pub(crate) resource_claims: Arc<Informer<ResourceClaim>>,
    /// Only those named `kube-root-ca.crt`.
    pub(crate) root_ca_maps: Arc<Informer<ConfigMap>>,
}

impl Context {
    /// Makes everything; nothing is watched before [`Self::start_informers`].
    pub(crate) fn new(
        client: Client,
        config: ManagerConfig,
        tasks: TaskTracker,
        cancel: CancellationToken,
    ) -> Self {
        Context {
            events: EventSink::start(client.clone(), &tasks, cancel.clone()),
            resources: Resources::new(client.clone()),
            client,
            config,
            tasks,
            cancel,
            pods: Informer::new("Pod"),
            nodes: Informer::new("Node"),
            deployments: Informer::new("Deployment"),
            replica_sets: Informer::new("ReplicaSet"),
            services: Informer::new("Service"),
            endpoint_slices: Informer::new("EndpointSlice"),
            endpoints: Informer::new("Endpoints"),
            namespaces: Informer::new("Namespace"),
            service_accounts: Informer::new("ServiceAccount"),
            leases: Informer::new("Lease"),
            certificate_requests: Informer::new("CertificateSigningRequest"),
            claims: Informer::new("PersistentVolumeClaim"),
            volumes: Informer::new("PersistentVolume"),
            storage_classes: Informer::new("StorageClass"),
            attachments: Informer::new("VolumeAttachment"),
            drivers: Informer::new("CSIDriver"),
            resource_claims: Informer::new("ResourceClaim"),
            root_ca_maps: Informer::new("ConfigMap"),
        }
    }

    /// Starts the watches that what runs here needs.
    pub(crate) fn start_informers(&self) {
        self.inform(&self.pods, slim::pod, None);
        self.inform(&self.nodes, slim::node, None);
        if !self.config.controllers {
            return;
        }
        self.inform(&self.deployments, slim::deployment, None);
        self.inform(&self.replica_sets, slim::replica_set, None);
        self.inform(&self.services, slim::service, None);
        self.inform(&self.endpoint_slices, slim::endpoint_slice, None);
        self.inform(&self.endpoints, slim::endpoints, None);
        self.inform(&self.namespaces, slim::namespace, None);
        self.inform(&self.service_accounts, slim::service_account, None);
        self.inform(&self.leases, slim::lease, None);
        if self.config.runs(Controller::Certificates) {
            self.inform(&self.certificate_requests, slim::whole, None);
        }
        let attaches = self.config.runs(Controller::AttachDetach);
        let binds = self.config.runs(Controller::Volumes);
        if binds || attaches || self.config.runs(Controller::EphemeralVolumes) {
            self.inform(&self.claims, slim::whole, None);
        }
        if binds || attaches {
            self.inform(&self.volumes, slim::whole, None);
        }
        if binds {
            self.inform(&self.storage_classes, slim::whole, None);
        }
        if attaches {
            self.inform(&self.attachments, slim::whole, None);
            self.inform(&self.drivers, slim::whole, None);
        }
        if self.config.runs(Controller::ResourceClaims) {
            self.inform(&self.resource_claims, slim::whole, None);
        }
        if self.config.runs(Controller::RootCa) {
            self.inform(&self.root_ca_maps, slim::config_map, Some("metadata.name=kube-root-ca.crt"));
        }
    }

    fn inform<K>(&self, informer: &Arc<Informer<K>>, slim: fn(&mut K), fields: Option<&'static str>)
    where
        K: Cached + Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
    {
        let source = Objects { api: Api::all(self.client.clone()), fields, slim };
        self.tasks.spawn(Arc::clone(informer).run(source, self.cancel.clone()));
    }

    /// The API of one namespace's objects of a kind.
    pub(crate) fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Starts a controller's workers once `ready` is done.
    pub(crate) fn work<K, F>(
        self: &Arc<Self>,
        controller: Controller,
        queue: &Arc<Queue<K>>,
        workers: usize,
        ready: impl Future<Output = ()> + Send + 'static,
        reconcile: impl Fn(K) -> F + Clone + Send + Sync + 'static,
    ) where
        K: Ord + Clone + std::fmt::Debug + Send + 'static,
        F: Future<Output = Result<Option<Duration>, WriteError>> + Send + 'static,
    {
        let (context, queue) = (Arc::clone(self), Arc::clone(queue));
        self.spawn(async move {
            ready.await;
            queue::work(&context.tasks, &context.cancel, controller.name(), &queue, workers, reconcile);
        });
    }

    /// Runs a task until shutdown.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let cancel = self.cancel.clone();
        self.tasks.spawn(async move {
            // Cancel-safe: every task here can be cut off anywhere and started over.
            tokio::select! {
                () = cancel.cancelled() => {}
                () = task => {}
            }
        });
    }
}

/// The time, in one place.
pub(crate) fn now() -> Timestamp {
    Timestamp::now()
}

/// A decided wait as the runtime's duration; what has passed already is no wait.
pub(crate) fn wait(duration: jiff::SignedDuration) -> Duration {
    Duration::try_from(duration).unwrap_or(Duration::ZERO)
}

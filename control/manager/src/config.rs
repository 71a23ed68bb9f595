//! What to run and with which numbers.

use std::{collections::BTreeSet, time::Duration};

use control_decide::{
    cidr::{Cidr, CidrError},
    node_ipam::Pool,
};
use thiserror::Error;

/// Everything this crate can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Controller {
    /// Deployments → ReplicaSets.
    Deployment,
    /// ReplicaSets → pods.
    ReplicaSet,
    /// Services and pods → EndpointSlices.
    EndpointSlice,
    /// Services and pods → Endpoints.
    Endpoints,
    /// Deletes what has lost its owners.
    GarbageCollector,
    /// Empties namespaces that are being deleted.
    Namespace,
    /// Keeps a `default` service account in every namespace.
    ServiceAccount,
    /// Publishes the cluster's CA in every namespace.
    RootCa,
    /// Gives every node its pod address range.
    NodeIpam,
    /// Marks silent nodes and taints unready ones.
    NodeLifecycle,
    /// Evicts pods that do not tolerate their node's taints.
    TaintEviction,
    /// Removes pods that nobody else will.
    PodGc,
    /// Removes events after an hour.
    EventTtl,
    /// Approves and signs certificates of nodes.
    Certificates,
    /// Claims → volumes.
    Volumes,
    /// Ephemeral volumes of pods → claims.
    EphemeralVolumes,
    /// Resource claim templates of pods → claims.
    ResourceClaims,
    /// Volumes of drivers → nodes of pods.
    AttachDetach,
    /// Pods → nodes.
    Scheduler,
}

impl Controller {
    /// All of them.
    pub const ALL: [Controller; 19] = [
        Controller::Scheduler,
        Controller::Deployment,
        Controller::ReplicaSet,
        Controller::EndpointSlice,
        Controller::Endpoints,
        Controller::GarbageCollector,
        Controller::Namespace,
        Controller::ServiceAccount,
        Controller::RootCa,
        Controller::NodeIpam,
        Controller::NodeLifecycle,
        Controller::TaintEviction,
        Controller::PodGc,
        Controller::EventTtl,
        Controller::Certificates,
        Controller::Volumes,
        Controller::EphemeralVolumes,
        Controller::ResourceClaims,
        Controller::AttachDetach,
    ];

    /// The name in logs, metrics and events, as upstream spells it.
    pub fn name(self) -> &'static str {
        match self {
            Controller::Deployment => "deployment-controller",
            Controller::ReplicaSet => "replicaset-controller",
            Controller::EndpointSlice => "endpoint-slice-controller",
            Controller::Endpoints => "endpoint-controller",
            Controller::GarbageCollector => "garbage-collector-controller",
            Controller::Namespace => "namespace-controller",
            Controller::ServiceAccount => "serviceaccount-controller",
            Controller::RootCa => "root-ca-certificate-publisher-controller",
            Controller::NodeIpam => "cidrAllocator",
            Controller::NodeLifecycle => "node-controller",
            Controller::TaintEviction => "taint-eviction-controller",
            Controller::PodGc => "pod-garbage-collector-controller",
            Controller::EventTtl => "event-ttl-controller",
            Controller::Certificates => "certificatesigningrequest-controller",
            Controller::Volumes => "persistentvolume-controller",
            Controller::EphemeralVolumes => "ephemeral-volume-controller",
            Controller::ResourceClaims => "resourceclaim-controller",
            Controller::AttachDetach => "attachdetach-controller",
            Controller::Scheduler => "default-scheduler",
        }
    }
}

/// The configuration of [`crate::run`].
#[derive(Clone, Debug)]
pub struct ManagerConfig {
    /// Run the scheduler.
    pub scheduler: bool,
    /// Run the controllers.
    pub controllers: bool,
    /// Exceptions from the two switches above.
    pub disabled: BTreeSet<Controller>,
    /// The cluster's pod ranges, one per IP family; none: nodes get no range from here.
    pub pod_cidrs: Vec<String>,
    /// Prefix length of a node's part of the IPv4 range.
    pub node_mask_v4: u8,
    /// Prefix length of a node's part of the IPv6 range.
    pub node_mask_v6: u8,
    /// The CA that pods verify the API server with; none: it is not published.
    pub root_ca_pem: Option<String>,
    /// What certificates are signed with; none: requests are left to others.
    pub signing: Option<SigningAuthority>,
    /// How long a node may be silent before it counts as lost.
    pub node_monitor_grace: Duration,
    /// How many ended pods are kept.
    pub terminated_pod_threshold: usize,
    /// How long events are kept.
    pub event_ttl: Duration,
}

impl Default for ManagerConfig {
    fn default() -> Self {
        ManagerConfig {
            scheduler: true,
            controllers: true,
            disabled: BTreeSet::new(),
            pod_cidrs: Vec::new(),
            node_mask_v4: 24,
            node_mask_v6: 64,
            root_ca_pem: None,
            signing: None,
            node_monitor_grace: Duration::from_secs(40),
            terminated_pod_threshold: 12_500,
            event_ttl: Duration::from_secs(3600),
        }
    }
}

/// A certificate authority with its key.
#[derive(Clone)]
pub struct SigningAuthority {
    /// The authority's certificate.
    pub certificate_pem: String,
    /// Its private key.
    pub key_pem: String,
}

impl std::fmt::Debug for SigningAuthority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key is for nobody's log.
        formatter.debug_struct("SigningAuthority").finish_non_exhaustive()
    }
}

/// A configuration that cannot be run.
#[derive(Debug, Error)]
pub enum ManagerError {
    /// The signing authority cannot be used.
    #[error("signing authority")]
    Signer(#[source] rcgen::Error),
    /// A pod range is not an address range.
    #[error("pod range")]
    PodCidr(#[source] CidrError),
    /// A node's part would be larger than the whole range.
    #[error("a node's part of the pod range {range} cannot be a /{mask}")]
    NodeMask {
        /// The configured range.
        range: Cidr,
        /// The configured prefix length of a node's part.
        mask: u8,
    },
}

impl ManagerConfig {
    /// Whether the controller is switched on.
    pub(crate) fn runs(&self, controller: Controller) -> bool {
        let role = if controller == Controller::Scheduler { self.scheduler } else { self.controllers };
        let has_input = match controller {
            Controller::RootCa => self.root_ca_pem.is_some(),
            Controller::Certificates => self.signing.is_some(),
            Controller::NodeIpam => !self.pod_cidrs.is_empty(),
            _ => true,
        };
        role && has_input && !self.disabled.contains(&controller)
    }

    /// The names of what runs, for the log.
    pub(crate) fn running_names(&self) -> String {
        let running = Controller::ALL.into_iter().filter(|controller| self.runs(*controller));
        running.map(Controller::name).collect::<Vec<_>>().join(",")
    }

    /// The pod ranges as numbers.
    pub(crate) fn pools(&self) -> Result<Vec<Pool>, ManagerError> {
        self.pod_cidrs.iter().map(|text| self.pool(text)).collect()
    }

    fn pool(&self, text: &str) -> Result<Pool, ManagerError> {
        let range: Cidr = text.parse().map_err(ManagerError::PodCidr)?;
        let (mask, widest) = if range.is_ipv4() { (self.node_mask_v4, 32) } else { (self.node_mask_v6, 128) };
        if mask < range.prefix() || mask > widest {
            return Err(ManagerError::NodeMask { range, mask });
        }
        Ok(Pool { range, node_prefix: mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_ranges_are_refused_by_name() {
        let with = |range: &str, mask| ManagerConfig {
            pod_cidrs: vec![range.into()],
            node_mask_v4: mask,
            ..ManagerConfig::default()
        };
        assert!(with("10.244.0.0/16", 24).pools().is_ok());
        let error = with("10.244.0.0/16", 8).pools().expect_err("too large");
        assert_eq!(error.to_string(), "a node's part of the pod range 10.244.0.0/16 cannot be a /8");
        assert!(matches!(with("10.244/16", 24).pools(), Err(ManagerError::PodCidr(_))));
    }

    #[test]
    fn roles_and_exceptions_decide_what_runs() {
        let config =
            ManagerConfig { controllers: false, root_ca_pem: Some("pem".into()), ..ManagerConfig::default() };
        assert_eq!(config.running_names(), "default-scheduler");
    }
}

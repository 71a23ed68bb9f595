//! A control plane in this process: API server and controllers over a store in a directory.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]
#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod node;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control_manager::{ManagerConfig, SigningAuthority};
use control_server::pki::{Authority, Identity, LeafRequest, Usage, render_kubeconfig};
use control_server::{Credentials as ServerCredentials, Server, ServerConfig};
use control_store::{RedbOptions, RedbStore, Store};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use rcgen::KeyPair;
use tokio_util::sync::CancellationToken;

/// Nothing here takes longer, on the slowest machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// API server and controllers.
pub(crate) struct ControlPlane {
    pub(crate) authority: Authority,
    pub(crate) endpoint: String,
    pub(crate) admin: Client,
    cancel: CancellationToken,
    store: Arc<dyn Store>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

pub(crate) fn issue(authority: &Authority, name: &str, group: &str, usage: Usage) -> Identity {
    let request = LeafRequest {
        common_name: name.to_owned(),
        organization: Some(group.to_owned()),
        usage,
        names: vec!["127.0.0.1".to_owned()],
    };
    authority.issue(&request, jiff::Timestamp::now()).unwrap()
}

impl ControlPlane {
    pub(crate) async fn start(directory: &Path) -> Self {
        let authority = Authority::load_or_create(directory, jiff::Timestamp::now()).unwrap();
        let store: Arc<dyn Store> =
            Arc::new(RedbStore::open(&RedbOptions::new(directory.join("store.redb"))).unwrap());
        let settings = ServerConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise_address: "10.0.0.1".parse().unwrap(),
            service_range: "10.96.0.0/12".parse().unwrap(),
            node_ports: 30000..=32767,
        };
        let credentials = ServerCredentials {
            authority_pem: authority.certificate_pem().to_owned(),
            serving: issue(&authority, "kube-apiserver", "none", Usage::Server),
            kubelet_client: issue(&authority, "kubelet-client", "none", Usage::Client),
            service_account_key_pem: KeyPair::generate().unwrap().serialize_pem(),
        };
        let server = Server::start(settings, &credentials, Arc::clone(&store)).await.unwrap();
        let endpoint = format!("https://127.0.0.1:{}", server.local_address().port());
        let cancel = CancellationToken::new();
        let stop = cancel.clone();
        let serving = tokio::spawn(async move { server.run(stop).await.unwrap() });
        let identity = issue(&authority, "admin", "system:masters", Usage::Client);
        let kubeconfig = render_kubeconfig("c", &endpoint, authority.certificate_pem(), "admin", &identity);
        let admin = client(&Kubeconfig::from_yaml(&kubeconfig).unwrap()).await;
        let manager = ManagerConfig {
            signing: Some(SigningAuthority {
                certificate_pem: authority.identity().certificate_pem.clone(),
                key_pem: authority.identity().key_pem.clone(),
            }),
            ..ManagerConfig::default()
        };
        let (controlled, stop) = (admin.clone(), cancel.clone());
        let managing =
            tokio::spawn(async move { control_manager::run(controlled, manager, stop).await.unwrap() });
        Self { authority, endpoint, admin, cancel, store, tasks: vec![serving, managing] }
    }

    /// A client with the rights of a node.
    pub(crate) async fn node(&self, name: &str) -> Client {
        let user = format!("system:node:{name}");
        let identity = issue(&self.authority, &user, "system:nodes", Usage::Client);
        let authority = self.authority.certificate_pem();
        let kubeconfig = render_kubeconfig("c", &self.endpoint, authority, &user, &identity);
        client(&Kubeconfig::from_yaml(&kubeconfig).unwrap()).await
    }

    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
        self.store.close().await;
    }
}

pub(crate) async fn client(kubeconfig: &Kubeconfig) -> Client {
    let config = Config::from_custom_kubeconfig(kubeconfig.clone(), &KubeConfigOptions::default()).await;
    Client::try_from(config.unwrap()).unwrap()
}

pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, look: impl Fn() -> F) {
    let begin = Instant::now();
    while !look().await {
        assert!(begin.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

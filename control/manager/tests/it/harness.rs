//! A control plane in this process on a port of its own, and a node whose pods become ready at once.

use std::{fmt::Debug, path::Path, sync::Arc, time::Duration};

use control_manager::{ManagerConfig, SigningAuthority};
use control_server::{
    Credentials, Server, ServerConfig,
    pki::{Authority, Identity, LeafRequest, Usage, render_kubeconfig},
};
use control_store::{RedbOptions, RedbStore, Store};
use futures::StreamExt;
use k8s_openapi::{
    ByteString, NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        core::v1::{Node, Pod},
        discovery::v1::EndpointSlice,
    },
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Nothing a test waits for takes longer.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running control plane.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    endpoint: String,
    manager: Option<Running>,
    server: Running,
    store: Arc<dyn Store>,
    node: Option<JoinHandle<()>>,
    authority: Identity,
    _directory: tempfile::TempDir,
}

struct Running {
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.expect("ends without a panic");
    }
}

/// Bytes as a kubeconfig has them.
pub(crate) fn base64_of(text: &str) -> Value {
    serde_json::to_value(ByteString(text.as_bytes().to_vec())).expect("is text")
}

fn issue(authority: &Authority, name: &str, group: &str, usage: Usage) -> Identity {
    let request = LeafRequest {
        common_name: name.into(),
        organization: Some(group.into()),
        usage,
        names: vec!["127.0.0.1".into()],
    };
    authority.issue(&request, jiff::Timestamp::now()).expect("issues")
}

fn credentials(authority: &Authority) -> Credentials {
    Credentials {
        authority_pem: authority.certificate_pem().to_owned(),
        serving: issue(authority, "kube-apiserver", "none", Usage::Server),
        kubelet_client: issue(authority, "kubelet-client", "none", Usage::Client),
        service_account_key_pem: rcgen::KeyPair::generate().expect("generates").serialize_pem(),
    }
}

async fn start_server(directory: &Path, authority: &Authority) -> (Running, Arc<dyn Store>, String) {
    let store: Arc<dyn Store> =
        Arc::new(RedbStore::open(&RedbOptions::new(directory.join("store.redb"))).expect("opens"));
    let config = ServerConfig {
        listen: "127.0.0.1:0".parse().expect("valid"),
        advertise_address: "10.0.0.1".parse().expect("valid"),
        service_range: "10.96.0.0/12".parse().expect("valid"),
        node_ports: 30000..=32767,
    };
    let server = Server::start(config, &credentials(authority), Arc::clone(&store)).await.expect("starts");
    let endpoint = format!("https://127.0.0.1:{}", server.local_address().port());
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    let task = tokio::spawn(async move { server.run(stop).await.expect("serves") });
    (Running { cancel, task }, store, endpoint)
}

impl Cluster {
    /// Starts server and manager.
    pub(crate) async fn start() -> Self {
        // Another test of this process may have installed it already.
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let authority =
            Authority::load_or_create(directory.path(), jiff::Timestamp::now()).expect("makes a CA");
        let (server, store, endpoint) = start_server(directory.path(), &authority).await;
        let identity = issue(&authority, "admin", "system:masters", Usage::Client);
        let authority_pem = authority.certificate_pem().to_owned();
        let kubeconfig = render_kubeconfig("test", &endpoint, &authority_pem, "admin", &identity);
        let kubeconfig = Kubeconfig::from_yaml(&kubeconfig).expect("is valid");
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        let client = Client::try_from(config.expect("is complete")).expect("makes a client");
        let mut cluster = Cluster {
            client,
            endpoint,
            manager: None,
            server,
            store,
            node: None,
            authority: authority.identity().clone(),
            _directory: directory,
        };
        cluster.wait_for_the_server().await;
        cluster.start_manager();
        cluster
    }

    /// Waits until the server has made what every cluster has; this slice comes last.
    async fn wait_for_the_server(&self) {
        let slices = self.api::<EndpointSlice>("default");
        eventually("the built-in objects", || async {
            slices.get("kubernetes").await.map(|_| ()).map_err(|error| error.to_string())
        })
        .await;
    }

    /// Starts server, manager and one node.
    pub(crate) async fn with_node() -> Self {
        let mut cluster = Self::start().await;
        add_node(&cluster.client).await;
        cluster.node = Some(tokio::spawn(run_pods(cluster.client.clone())));
        cluster
    }

    /// Starts the controllers (again).
    pub(crate) fn start_manager(&mut self) {
        let config = ManagerConfig {
            pod_cidrs: vec!["10.244.0.0/16".into()],
            root_ca_pem: Some(self.authority.certificate_pem.clone()),
            signing: Some(SigningAuthority {
                certificate_pem: self.authority.certificate_pem.clone(),
                key_pem: self.authority.key_pem.clone(),
            }),
            ..ManagerConfig::default()
        };
        let (client, cancel) = (self.client.clone(), CancellationToken::new());
        let stop = cancel.clone();
        let run =
            async move { control_manager::run(client, config, stop).await.expect("valid configuration") };
        self.manager = Some(Running { cancel, task: tokio::spawn(run) });
    }

    /// Stops the controllers in the middle of whatever they do.
    pub(crate) async fn stop_manager(&mut self) {
        if let Some(manager) = self.manager.take() {
            manager.stop().await;
        }
    }

    /// Stops everything.
    pub(crate) async fn stop(mut self) {
        self.stop_manager().await;
        if let Some(node) = self.node.take() {
            node.abort();
        }
        self.server.stop().await;
        self.store.close().await;
    }

    /// A client with a bearer token, or with a certificate and its key.
    pub(crate) async fn client_as(&self, user: &Value) -> Client {
        let authority = base64_of(&self.authority.certificate_pem);
        let kubeconfig = json!({
            "clusters": [{"name": "c", "cluster": {"server": self.endpoint, "certificate-authority-data": authority}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        let kubeconfig: Kubeconfig = serde_json::from_value(kubeconfig).expect("is valid");
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        Client::try_from(config.expect("is complete")).expect("makes a client")
    }

    /// The objects of a kind in a namespace.
    pub(crate) fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// All objects of a kind in the default namespace.
    pub(crate) async fn list<K>(&self) -> Vec<K>
    where
        K: kube::Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + serde::de::DeserializeOwned,
    {
        self.api::<K>("default").list(&kube::api::ListParams::default()).await.expect("lists").items
    }

    /// Applies a merge patch in the default namespace.
    pub(crate) async fn patch<K>(&self, name: &str, patch: Value)
    where
        K: kube::Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + serde::de::DeserializeOwned,
    {
        let patched =
            self.api::<K>("default").patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.expect("patches");
    }
}

/// Waits until `look` finds what it looks for; fails with the last thing it saw.
pub(crate) async fn eventually<T, F>(what: &str, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let mut last = String::new();
    let found = async {
        loop {
            match look().await {
                Ok(found) => return found,
                Err(seen) => last = seen,
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let found = tokio::time::timeout(DEADLINE, found).await.ok();
    found.unwrap_or_else(|| panic!("not in time: {what}; last seen: {last}"))
}

/// A Deployment named `web` of one container.
pub(crate) fn deployment(replicas: i32, image: &str, cpu: &str) -> Deployment {
    let labels = json!({"app": "web"});
    let container = json!({"name": "main", "image": image, "resources": {"requests": {"cpu": cpu}}});
    serde_json::from_value(json!({
        "metadata": {"name": "web"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }))
    .expect("is a Deployment")
}

/// Waits until the rollout of `web` is complete, as `kubectl rollout status` does.
pub(crate) async fn rolled_out(cluster: &Cluster, replicas: i32) {
    eventually("the rollout to be complete", || async {
        let deployment = cluster.api::<Deployment>("default").get("web").await.map_err(|e| e.to_string())?;
        let status = deployment.status.clone().unwrap_or_default();
        let counts = [status.replicas, status.updated_replicas, status.available_replicas];
        let settled =
            counts == [Some(replicas); 3] && status.observed_generation == deployment.metadata.generation;
        if settled { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
}

async fn add_node(client: &Client) {
    let nodes: Api<Node> = Api::all(client.clone());
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "fake"}});
    let node = serde_json::from_value(node).expect("is a Node");
    nodes.create(&PostParams::default(), &node).await.expect("registers");
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let ready = json!({"type": "Ready", "status": "True", "lastHeartbeatTime": now});
    let status = json!({"status": {
        "allocatable": {"cpu": "2", "memory": "4Gi", "pods": "110"},
        "conditions": [ready],
    }});
    nodes.patch_status("fake", &PatchParams::default(), &Patch::Merge(status)).await.expect("reports");
}

/// What a kubelet does, as far as the API can tell.
async fn run_pods(client: Client) {
    let everywhere: Api<Pod> = Api::all(client.clone());
    let params = WatchParams::default().fields("spec.nodeName=fake");
    loop {
        let Ok(events) = everywhere.watch(&params, "0").await else { continue };
        let mut events = events.boxed();
        while let Some(Ok(event)) = events.next().await {
            if let WatchEvent::Added(pod) | WatchEvent::Modified(pod) = event {
                run_pod(&client, &pod).await;
            }
        }
    }
}

async fn run_pod(client: &Client, pod: &Pod) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let name = pod.name_any();
    // Whatever fails here is overtaken by a newer event.
    if pod.metadata.deletion_timestamp.is_some() {
        pods.delete(&name, &DeleteParams::default().grace_period(0)).await.ok();
    } else if pod.status.as_ref().and_then(|status| status.pod_ip.as_ref()).is_none() {
        let last = pod.uid().unwrap_or_default().bytes().fold(0_u8, u8::wrapping_add);
        let address = format!("10.244.0.{last}");
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let ready = json!({"type": "Ready", "status": "True", "lastTransitionTime": now});
        let status = json!({"status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [ready],
        }});
        pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await.ok();
    }
}

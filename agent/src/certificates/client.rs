//! The client of the API server, whose certificate may change while it is used.
//!
//! Input: the kubeconfig and, with `rotateCertificates`, the newest certificate of the agent's own. Output: a client that
//! stays the same for those who hold it; requests that begin after a change go over new connections with the new
//! certificate, those under way end on the old ones.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::BoxFuture;
use http::{Request, Response};
use kube::client::Body;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::directory;
use super::follow::{self, Seen};
use super::store::{Pair, Store};
use crate::config::AgentConfig;
use crate::files;
use crate::pace::Pace;

/// How the agent proves to the API server who it is. Clones share it.
#[derive(Clone)]
pub struct Credentials {
    kubeconfig: PathBuf,
    /// Whether the agent renews its own certificate; it is then kept there.
    own: Option<Store>,
    inner: Arc<RwLock<Client>>,
    /// `kubeAPIQPS` and `kubeAPIBurst`.
    pace: Option<Pace>,
    /// What the files held before they were loaded.
    seen: Seen,
}

impl Credentials {
    /// Reads what the configuration names.
    pub async fn load(config: &AgentConfig) -> anyhow::Result<Self> {
        let kubeconfig = config.keelson.kubeconfig.clone();
        let own = renews(config).then(|| client_store(config));
        let seen = Seen::of(&files_of(&kubeconfig, own.as_ref()));
        let client = build(&kubeconfig, own.as_ref()).await?;
        let pace = config.api_rate().map(Pace::new);
        Ok(Self { kubeconfig, own, inner: Arc::new(RwLock::new(client)), pace, seen })
    }

    /// The client for everybody.
    pub fn client(&self) -> Client {
        let following = Following { current: Arc::clone(&self.inner), pace: self.pace.clone() };
        Client::new(following, "default")
    }

    /// Reads everything again; what cannot be used changes nothing.
    pub async fn reload(&self) -> anyhow::Result<()> {
        let client = build(&self.kubeconfig, self.own.as_ref()).await?;
        *self.inner.write().unwrap_or_else(PoisonError::into_inner) = client;
        Ok(())
    }

    /// The certificate that is used now, where it is one that the agent can read.
    pub(super) fn current(&self) -> anyhow::Result<Option<Pair>> {
        if let Some(pair) = self.own.as_ref().and_then(usable) {
            return Ok(Some(pair));
        }
        let user = user_of(&read_kubeconfig(&self.kubeconfig)?);
        let pem = match (user.client_certificate_data, user.client_certificate) {
            (Some(data), _) => Some(String::from_utf8(STANDARD.decode(data)?)?),
            (None, Some(path)) => files::read(Path::new(&path))?,
            (None, None) => None,
        };
        pem.map(|pem| Pair::parse(&pem)).transpose()
    }

    /// Uses what the files hold whenever they change, until `cancel`
    pub async fn follow(self, cancel: CancellationToken) {
        let reload = async || match self.reload().await {
            Ok(()) => {
                info!(kubeconfig = %self.kubeconfig.display(), "credentials for the API server read again");
                true
            }
            Err(error) => {
                warn!("the former credentials for the API server stay: {error:#}");
                false
            }
        };
        follow::follow(|| files_of(&self.kubeconfig, self.own.as_ref()), self.seen.clone(), reload, cancel)
            .await;
    }
}

/// A client that is whatever client is the current one.
#[derive(Clone)]
struct Following {
    current: Arc<RwLock<Client>>,
    pace: Option<Pace>,
}

/// Heartbeats must not wait for anything, and events have a pace of their own.
fn is_paced(request: &Request<Body>) -> bool {
    let path = request.uri().path();
    let is_node_status = path.starts_with("/api/v1/nodes/") && path.ends_with("/status");
    let is_event = path.starts_with("/api/v1/") && path.split('/').any(|part| part == "events");
    !is_node_status && !is_event && !path.starts_with("/apis/coordination.k8s.io/")
}

impl tower::Service<Request<Body>> for Following {
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(
        &mut self,
        _context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Self::Error>> {
        // The current client waits for itself when it sends.
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let pace = self.pace.clone().filter(|_| is_paced(&request));
        let current = Arc::clone(&self.current);
        Box::pin(async move {
            if let Some(pace) = pace {
                pace.wait().await;
            }
            let client = current.read().unwrap_or_else(PoisonError::into_inner).clone();
            client.send(request).await
        })
    }
}

/// Whether the agent asks for its certificates itself.
pub(super) fn renews(config: &AgentConfig) -> bool {
    config.rotate_certificates || config.bootstraps()
}

/// Where the agent's own client certificates are.
pub(super) fn client_store(config: &AgentConfig) -> Store {
    Store::new(directory(config), "kubelet-client")
}

/// The newest own certificate, while it is valid.
pub(super) fn usable(store: &Store) -> Option<Pair> {
    store.current().filter(|pair| pair.validity.holds(jiff::Timestamp::now()))
}

/// The files that a client is made of.
fn files_of(path: &Path, own: Option<&Store>) -> Vec<PathBuf> {
    let mut files = vec![path.to_owned()];
    files.extend(own.map(Store::current_path));
    if let Ok(kubeconfig) = read_kubeconfig(path) {
        let user = user_of(&kubeconfig);
        files.extend([user.client_certificate, user.client_key].into_iter().flatten().map(PathBuf::from));
    }
    files.retain(|file| file.parent().is_some_and(Path::exists));
    files
}

/// A kubeconfig file, with its paths made absolute.
pub(super) fn read_kubeconfig(path: &Path) -> anyhow::Result<Kubeconfig> {
    Kubeconfig::read_from(path).with_context(|| format!("kubeconfig {} cannot be used", path.display()))
}

/// The user of the kubeconfig's current context.
fn user_of(kubeconfig: &Kubeconfig) -> AuthInfo {
    let current = kubeconfig.current_context.as_deref().unwrap_or_default();
    let context = kubeconfig.contexts.iter().find(|context| context.name == current);
    let user = context.and_then(|context| context.context.as_ref()?.user.clone()).unwrap_or_default();
    let found = kubeconfig.auth_infos.iter().find(|info| info.name == user);
    found.and_then(|info| info.auth_info.clone()).unwrap_or_default()
}

/// A client by a kubeconfig, with the agent's own certificate where it has one.
async fn build(path: &Path, own: Option<&Store>) -> anyhow::Result<Client> {
    let mut kubeconfig = read_kubeconfig(path)?;
    if let Some(store) = own.filter(|store| usable(store).is_some()) {
        let link = store.current_path().display().to_string();
        for info in kubeconfig.auth_infos.iter_mut().filter_map(|info| info.auth_info.as_mut()) {
            info.client_certificate_data = None;
            info.client_key_data = None;
            info.client_certificate = Some(link.clone());
            info.client_key = Some(link.clone());
        }
    }
    of_kubeconfig(kubeconfig).await.with_context(|| format!("kubeconfig {} cannot be used", path.display()))
}

/// A client by a kubeconfig.
pub(super) async fn of_kubeconfig(kubeconfig: Kubeconfig) -> anyhow::Result<Client> {
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Client::try_from(config).context("the API client cannot be made")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_and_events_do_not_wait() {
        let is_paced = |path: &str| is_paced(&Request::builder().uri(path).body(Body::empty()).unwrap());
        for path in
            ["/api/v1/namespaces/a/pods/b/status", "/api/v1/nodes/n", "/api/v1/namespaces/events-of/pods"]
        {
            assert!(is_paced(path), "{path}");
        }
        for path in [
            "/api/v1/nodes/n/status",
            "/api/v1/namespaces/default/events",
            "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n",
        ] {
            assert!(!is_paced(path), "{path}");
        }
    }
}

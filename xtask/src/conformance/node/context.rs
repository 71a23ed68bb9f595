//! What a case works with: a namespace of its own, pods in it, and a registry of what it made beyond, so that the runner
//! removes it also when the case fails or is cut off.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::super::case::skip;
use super::super::runner::World;
use super::LABEL;
use super::api::{Api, Refused, refusal};
use super::board::{Board, Kind};
use super::live::Live;
use super::pod::Pod;

/// What all cases share.
pub(crate) struct Suite {
    /// The cluster's API.
    pub(crate) api: Api,
    /// What its watches tell.
    pub(crate) board: Arc<Board>,
    /// The node under test.
    pub(crate) node: String,
    /// The node's object, as it was when the run began.
    pub(crate) node_object: Value,
    /// The everyday image: a busybox.
    pub(crate) image: String,
    /// Tells this run's objects from others'.
    pub(crate) run: String,
    /// How long one case may take.
    pub(crate) deadline: Duration,
    /// How long one thing may be waited for.
    pub(crate) limit: Duration,
    /// Where the node reads static pods from, when this machine is the node.
    pub(crate) manifests: Option<PathBuf>,
    /// Counts cases.
    pub(crate) counter: AtomicU64,
}

impl World for Suite {
    type Context = T;

    fn context(self: &Arc<Self>) -> Result<T> {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let inner = Inner {
            suite: Arc::clone(self),
            namespace: format!("node-{}-{number}", self.run),
            made: OnceCell::new(),
            pods: AtomicU64::new(1),
            leftovers: Mutex::default(),
        };
        Ok(T { inner: Arc::new(inner) })
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn clean_up(context: T) -> Result<()> {
        context.clean_up().await
    }
}

/// One run of one case.
#[derive(Clone)]
pub(crate) struct T {
    inner: Arc<Inner>,
}

struct Inner {
    suite: Arc<Suite>,
    namespace: String,
    made: OnceCell<()>,
    pods: AtomicU64,
    /// Paths of objects outside the namespace.
    leftovers: Mutex<Vec<String>>,
}

impl T {
    /// What all cases share.
    pub(crate) fn suite(&self) -> &Arc<Suite> {
        &self.inner.suite
    }

    /// The cluster's API.
    pub(crate) fn api(&self) -> &Api {
        &self.inner.suite.api
    }

    /// Name of the node under test.
    pub(crate) fn node(&self) -> &str {
        &self.inner.suite.node
    }

    /// The node's first address.
    pub(crate) fn node_address(&self) -> Result<IpAddr> {
        let addresses = self.inner.suite.node_object["status"]["addresses"].as_array();
        let mut internal = addresses.into_iter().flatten().filter(|address| address["type"] == "InternalIP");
        let first = internal.find_map(|address| address["address"].as_str()?.parse().ok());
        first.context("the node tells no InternalIP")
    }

    /// The node's label, or nothing.
    pub(crate) fn node_label(&self, key: &str) -> &str {
        self.inner.suite.node_object["metadata"]["labels"][key].as_str().unwrap_or_default()
    }

    /// The case's namespace; with the first use it is made, and pods can be made in it.
    pub(crate) async fn namespace(&self) -> Result<&str> {
        self.inner.made.get_or_try_init(|| self.make_namespace()).await?;
        Ok(&self.inner.namespace)
    }

    async fn make_namespace(&self) -> Result<()> {
        let (suite, name) = (self.suite(), &self.inner.namespace);
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {LABEL: suite.run, "pod-security.kubernetes.io/enforce": "privileged"}}});
        suite.api.post("/api/v1/namespaces", &namespace).await?;
        let waited = suite.board.wait("what every namespace gets", suite.limit, |seen| {
            for (kind, what) in
                [(Kind::Account, "default service account"), (Kind::RootCertificate, "kube-root-ca.crt")]
            {
                if seen.all(kind, name).next().is_none() {
                    return Err(format!("{name} has no {what}"));
                }
            }
            Ok(())
        });
        waited.await
    }

    /// Path of a resource of the core group in the namespace.
    pub(crate) async fn path(&self, plural: &str) -> Result<String> {
        Ok(format!("/api/v1/namespaces/{}/{plural}", self.namespace().await?))
    }

    /// Remembers an object outside the namespace to remove, by its path.
    pub(crate) fn remember(&self, path: &str) {
        self.inner.leftovers.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
    }

    /// Makes an object that belongs to no namespace, below `path`.
    pub(crate) async fn make(&self, path: &str, object: &Value) -> Result<Value> {
        let made = self.api().post(path, object).await?;
        self.remember(&format!("{path}/{}", made["metadata"]["name"].as_str().unwrap_or_default()));
        Ok(made)
    }

    /// A name that no other case has, for what belongs to no namespace.
    pub(crate) fn unique(&self, base: &str) -> String {
        format!("{base}-{}", self.inner.namespace)
    }

    /// Makes a ConfigMap.
    pub(crate) async fn config_map(&self, name: &str, data: Value) -> Result<()> {
        let object =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data});
        self.api().post(&self.path("configmaps").await?, &object).await.map(drop)
    }

    /// Makes a Secret of texts.
    pub(crate) async fn secret(&self, name: &str, data: Value) -> Result<()> {
        let object =
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data});
        self.api().post(&self.path("secrets").await?, &object).await.map(drop)
    }

    /// A pod with one container `main` that runs a shell script once.
    pub(crate) fn pod(&self, script: &str) -> Pod {
        let name = format!("p{}", self.inner.pods.fetch_add(1, Ordering::Relaxed));
        let labels = BTreeMap::from([(LABEL, self.inner.suite.run.as_str())]);
        Pod::new(&name, json!(labels), self.node(), &self.inner.suite.image, script)
    }

    /// A pod that waits to be looked into, and ends at once when it is asked to.
    pub(crate) fn idle(&self) -> Pod {
        self.pod(IDLE)
    }

    /// Makes a pod.
    pub(crate) async fn run(&self, pod: Pod) -> Result<Live> {
        let made = self.api().post(&self.path("pods").await?, &pod.object).await.context("making the pod")?;
        Ok(Live::new(self, made))
    }

    /// Makes a pod that must be refused.
    pub(crate) async fn refused(&self, pod: Pod) -> Result<Refused> {
        refusal("the pod", self.api().post(&self.path("pods").await?, &pod.object).await)
    }

    /// Makes a pod and waits until it is ready.
    pub(crate) async fn ready(&self, pod: Pod) -> Result<Live> {
        let live = self.run(pod).await?;
        live.ready().await?;
        Ok(live)
    }

    /// Runs a pod to its end, which must be a good one, and gives the log of `main`.
    pub(crate) async fn output(&self, pod: Pod) -> Result<String> {
        let live = self.run(pod).await?;
        let ended = live.ended().await?;
        let log = live.log("container=main").await?;
        if ended["status"]["phase"] != "Succeeded" {
            bail!("the pod failed: {}; log: {log:?}", super::live::summary(&ended));
        }
        Ok(log)
    }

    /// Skips unless this machine is the node.
    pub(crate) fn need_local(&self) -> Result<IpAddr> {
        let address = self.node_address()?;
        match std::net::TcpListener::bind((address, 0)) {
            Ok(_) => Ok(address),
            Err(_) => skip(format!("the node's address {address} is not this machine's")),
        }
    }

    async fn clean_up(&self) -> Result<()> {
        let leftovers =
            std::mem::take(&mut *self.inner.leftovers.lock().unwrap_or_else(PoisonError::into_inner));
        for path in leftovers.iter().rev() {
            self.api().remove(path).await.with_context(|| format!("removing {path}"))?;
        }
        if !self.inner.made.initialized() {
            return Ok(());
        }
        let (suite, name) = (self.suite(), &self.inner.namespace);
        suite.api.remove(&format!("/api/v1/namespaces/{name}")).await.context("removing the namespace")?;
        let gone = suite.board.wait("the end of the namespace", suite.limit, |seen| {
            match seen.life(Kind::Namespace, "", name) {
                Some(life) if !life.gone => {
                    let left: Vec<&str> = seen
                        .all(Kind::Pod, name)
                        .filter_map(|pod| pod["metadata"]["name"].as_str())
                        .collect();
                    Err(format!("it is there, with pods {left:?}"))
                }
                _ => Ok(()),
            }
        });
        gone.await
    }
}

/// Ends at the first SIGTERM.
pub(crate) const IDLE: &str = "trap 'exit 0' TERM; sleep 3600 & wait";

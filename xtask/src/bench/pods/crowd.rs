//! Many pods alike, watched.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{attentive, in_time};
use crate::bench::{interrupt, peer};
use crate::paths::Layout;
use crate::process::ProcessId;

/// Tells our pods from others.
const LABEL: &str = "app=keelson-bench";
const IMAGE: &str = "busybox";

/// What the pods do.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Sleep.
    Idle,
    /// Serve a page, and are asked for it, and for the outcome of a command.
    Probed,
}

/// The cluster's node, and our pods on it.
pub(super) struct Crowd {
    client: kube::Client,
    pods: Api<Pod>,
    node: Node,
    /// The process that the node lives by, where it is one that may end.
    watched: Option<ProcessId>,
}

impl Crowd {
    /// On the first of our nodes of the cluster that is up; what an earlier measurement left goes first.
    pub(super) async fn open(layout: &Layout) -> Result<Self> {
        let path = layout.kubeconfig();
        let file = Kubeconfig::read_from(&path).with_context(|| {
            format!("reading {} (is the cluster up? cargo xtask up --detach)", path.display())
        })?;
        let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        let client = kube::Client::try_from(config)?;
        let nodes =
            Api::<Node>::all(client.clone()).list(&ListParams::default()).await.context("list nodes")?;
        let ours = |node: &Node| node.metadata.name.as_deref() != Some(peer::NODE);
        let node = nodes.items.into_iter().find(ours).context("the cluster has no node")?;
        let crowd = Self { pods: Api::default_namespaced(client.clone()), client, node, watched: None };
        crowd.clear().await?;
        Ok(crowd)
    }

    /// The same on the peer's node. Only one of the two has pods at a time: they have the same names.
    pub(super) async fn on_peer(&self, watched: Option<ProcessId>) -> Result<Self> {
        let node = Api::<Node>::all(self.client.clone()).get(peer::NODE).await.context("the peer's node")?;
        Ok(Self { client: self.client.clone(), pods: self.pods.clone(), node, watched })
    }

    /// The node's name.
    pub(super) fn node(&self) -> &str {
        self.node.metadata.name.as_deref().unwrap_or_default()
    }

    /// How many more pods the node takes.
    pub(super) async fn room(&self) -> Result<usize> {
        let status = self.node.status.clone().unwrap_or_default();
        let most = status.allocatable.and_then(|all| all.get("pods")?.0.parse::<usize>().ok());
        let here = ListParams::default().fields(&format!("spec.nodeName={}", self.node()));
        let pods = Api::<Pod>::all(self.client.clone()).list(&here).await.context("list pods")?.items.len();
        let room = most.unwrap_or(110).saturating_sub(pods);
        ensure!(room > 0, "the node is full: it has {pods} pods already");
        Ok(room)
    }

    /// Makes pods at once; the time until the last is seen to be Ready.
    pub(super) async fn start(&self, count: usize, kind: Kind) -> Result<Duration> {
        let version = self.version().await?;
        let events = self.pods.watch(&WatchParams::default().labels(LABEL), &version).await?;
        let mut events = std::pin::pin!(events);
        let begin = Instant::now();
        let made = async {
            let all = (0..count).map(|number| async move {
                self.pods.create(&PostParams::default(), &self.pod(number, kind)).await
            });
            futures::stream::iter(all)
                .buffer_unordered(32)
                .try_collect::<Vec<_>>()
                .await
                .context("create pods")
        };
        let ready = async {
            let mut ready = BTreeSet::new();
            while ready.len() < count {
                match events.next().await.context("the watch ended")?? {
                    WatchEvent::Added(pod) | WatchEvent::Modified(pod) if is_ready(&pod) => {
                        ready.insert(pod.metadata.name.unwrap_or_default());
                    }
                    WatchEvent::Error(error) => bail!("the watch failed: {}", error.message),
                    _ => {}
                }
            }
            Ok(begin.elapsed())
        };
        attentive("pods Ready", self.watched, async { Ok(tokio::try_join!(made, ready)?.1) }).await
    }

    /// Ends one container after the other, from outside; the time until each one's end is seen.
    pub(super) async fn exits(&self) -> Result<Vec<Duration>> {
        let listed = self.pods.list(&ListParams::default().labels(LABEL)).await?;
        let version = listed.metadata.resource_version.clone().unwrap_or_default();
        let events = self.pods.watch(&WatchParams::default().labels(LABEL), &version).await?;
        let mut events = std::pin::pin!(events);
        let processes = processes()?;
        let mut all = Vec::new();
        for pod in listed.items {
            interrupt::check()?;
            let name = pod.metadata.name.clone().unwrap_or_default();
            let id = container_id(&pod).with_context(|| format!("{name} has no container"))?;
            let pid = processes.get(&id).with_context(|| format!("no process of container {id}"))?;
            let begin = Instant::now();
            kill(Pid::from_raw(*pid), Signal::SIGKILL).context("end a container")?;
            let told = async {
                loop {
                    match events.next().await.context("the watch ended")?? {
                        WatchEvent::Modified(pod)
                            if pod.metadata.name.as_ref() == Some(&name) && has_ended(&pod) =>
                        {
                            return Ok(begin.elapsed());
                        }
                        _ => {}
                    }
                }
            };
            all.push(attentive("the end of a container", self.watched, told).await?);
        }
        Ok(all)
    }

    /// Milliseconds of so many looks at the node's container metrics; none where a peer has none.
    pub(super) async fn cadvisor(&self, looks: usize) -> Result<Vec<f64>> {
        let mut all = Vec::new();
        for _ in 0..looks {
            let path = format!("/api/v1/nodes/{}/proxy/metrics/cadvisor", self.node());
            let request = hyper::Request::get(path).body(Vec::new())?;
            let begin = Instant::now();
            let text = self.client.request_text(request).await.context("ask for /metrics/cadvisor")?;
            all.push(begin.elapsed().as_secs_f64() * 1000.0);
            if !text.contains("container_cpu_usage_seconds_total") {
                // A kubelet that asks its runtime needs one that can tell, and containerd 1.6 cannot.
                ensure!(self.watched.is_some(), "the node tells nothing of containers");
                println!("  /metrics/cadvisor of the peer tells nothing of containers");
                return Ok(Vec::new());
            }
            // Whatever the node computes once in a while is not asked for again and again within it.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(all)
    }

    /// Removes our pods and waits until they are gone, as a part of a measurement.
    pub(super) async fn clear(&self) -> Result<()> {
        attentive("pods gone", self.watched, self.remove()).await
    }

    /// The same at the end of everything, which a signal does not stop.
    pub(super) async fn clear_at_last(&self) -> Result<()> {
        in_time("pods gone", self.remove()).await
    }

    async fn remove(&self) -> Result<()> {
        let ours = ListParams::default().labels(LABEL);
        let version = self.version().await?;
        let events = self.pods.watch(&WatchParams::default().labels(LABEL), &version).await?;
        let mut events = std::pin::pin!(events);
        let quickly = DeleteParams { grace_period_seconds: Some(1), ..DeleteParams::default() };
        self.pods.delete_collection(&quickly, &ours).await.context("delete pods")?;
        let mut left = self.names().await?;
        while !left.is_empty() {
            if let WatchEvent::Deleted(pod) = events.next().await.context("the watch ended")?? {
                left.remove(&pod.metadata.name.unwrap_or_default());
            }
        }
        Ok(())
    }

    async fn names(&self) -> Result<BTreeSet<String>> {
        let listed = self.pods.list(&ListParams::default().labels(LABEL)).await?;
        Ok(listed.items.into_iter().filter_map(|pod| pod.metadata.name).collect())
    }

    async fn version(&self) -> Result<String> {
        let listed = self.pods.list(&ListParams::default().labels(LABEL)).await.context("list pods")?;
        listed.metadata.resource_version.context("a list without resourceVersion")
    }

    fn pod(&self, number: usize, kind: Kind) -> Pod {
        let mut container = json!({"name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
            "command": ["sleep", "1000000"]});
        if matches!(kind, Kind::Probed) {
            let every = |what: &str, how: serde_json::Value| {
                let mut probe = json!({"periodSeconds": 10, "timeoutSeconds": 5});
                probe[what] = how;
                probe
            };
            container["command"] =
                json!(["sh", "-c", "echo well > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"]);
            container["readinessProbe"] = every("httpGet", json!({"port": 8080, "path": "/"}));
            container["livenessProbe"] = every("exec", json!({"command": ["true"]}));
        }
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("bench-{number}"), "labels": {"app": "keelson-bench"}},
            "spec": {"nodeName": self.node(), "restartPolicy": "Never", "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 1, "containers": [container]},
        });
        serde_json::from_value(pod).unwrap_or_default()
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn has_ended(pod: &Pod) -> bool {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let mut states = statuses.into_iter().flatten().filter_map(|status| status.state.as_ref());
    states.any(|state| state.terminated.is_some())
}

fn container_id(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    Some(status.container_id.as_ref()?.rsplit('/').next()?.to_owned())
}

/// The first process of each container of this machine: container ids are in the names of their cgroups.
fn processes() -> Result<BTreeMap<String, i32>> {
    let mut first: BTreeMap<String, i32> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let cgroups = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let last = |line: &str| {
            let name = line.rsplit('/').next()?.trim_end_matches(".scope");
            let id = name.rsplit('-').next()?;
            (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| id.to_owned())
        };
        if let Some(id) = cgroups.lines().find_map(last) {
            let known = first.entry(id).or_insert(pid);
            *known = pid.min(*known);
        }
    }
    Ok(first)
}

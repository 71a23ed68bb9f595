//! Nothing may be left of what was removed: not on disk, not in containerd, not in the kernel.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::ListRequest;
use containerd_client::services::v1::leases_client::LeasesClient;

use super::cri::{Cri, PATIENCE, names, shims, walk};

/// Directories that are empty when there is no pod; what was removed goes from them a moment after the answer.
const EMPTY: [&str; 13] = [
    "netns",
    "state/sandboxes",
    "state/containers",
    "state/probes",
    "state/runc/keelson",
    "state/exec",
    "state/checkpoints",
    "state/shims",
    "state/image-mounts",
    "root/sandboxes",
    "root/containers",
    "root/journal/sandboxes",
    "root/journal/containers",
];

impl Cri {
    /// Fails unless nothing of any sandbox or container is left anywhere.
    pub async fn assert_nothing_left(&self) {
        let dir = self.dir().to_owned();
        let marker = dir.display().to_string();
        // A shim ends by itself a moment after its last container was deleted.
        settles("shims", || shims(&marker).iter().map(ToString::to_string).collect()).await;
        for sub in EMPTY {
            settles(sub, || below(&dir.join("cri").join(sub))).await;
        }
        settles("what is attached to the network", || names(&dir.join("attached"))).await;
        let ours = dir.join("cri").display().to_string();
        settles("mounts", || {
            let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
            mounts.lines().filter(|line| line.contains(&ours)).map(str::to_owned).collect()
        })
        .await;
        settles("cgroups", || self.pods_cgroups()).await;
        self.nothing_in_containerd().await;
    }

    async fn nothing_in_containerd(&self) {
        let client =
            keelson_cri::containerd::Client::new(&self.containerd.socket(), "keelson").expect("client");
        assert!(client.containers(Vec::new()).await.expect("listed").is_empty(), "containers are left");
        assert!(client.tasks().await.expect("listed").is_empty(), "tasks are left");
        let ours = vec![format!("labels.\"{}\"", keelson_cri::runtime::KIND_LABEL)];
        assert!(client.snapshots(ours).await.expect("listed").is_empty(), "snapshots are left");
        let request = client.request(ListRequest::default(), PATIENCE);
        let leases = LeasesClient::new(client.channel()).list(request).await.expect("listed").into_inner();
        assert!(leases.leases.is_empty(), "leases are left: {:?}", leases.leases);
    }

    /// Cgroups of pods below this test's own; the parents themselves are the test's, as they are a kubelet's.
    fn pods_cgroups(&self) -> Vec<String> {
        let own = |cgroup: &Path| cgroup.components().count() + 1;
        let all = self.cgroups();
        let left = all.iter().flat_map(|cgroup| {
            walk(cgroup).into_iter().filter(|path| path.components().count() > own(cgroup))
        });
        left.map(|path| path.display().to_string()).collect()
    }
}

/// Everything in a directory and below, files included.
fn below(directory: &Path) -> Vec<String> {
    let mut left: Vec<PathBuf> = names(directory).iter().map(|name| directory.join(name)).collect();
    left.extend(walk(directory).into_iter().skip(1));
    left.iter().map(|path| path.display().to_string()).collect()
}

/// Waits until a list is empty.
pub async fn settles(what: &str, mut list: impl FnMut() -> Vec<String>) {
    let begun = tokio::time::Instant::now();
    loop {
        let left = list();
        if left.is_empty() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "left, {what}: {left:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

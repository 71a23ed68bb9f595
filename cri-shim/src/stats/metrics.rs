//! ListMetricDescriptors and ListPodSandboxMetrics: the figures under the names that the kubelet serves.

use std::collections::BTreeMap;
use std::sync::Arc;

use cri_shim_api::v1::{ContainerMetrics, MetricDescriptor, PodSandboxMetrics};
use cri_shim_core::metrics::{self, ContainerFigures, DiskFigures, Labels};
use cri_shim_core::record::{ContainerRecord, SandboxRecord};
use cri_shim_core::stats::InterfaceCounters;
use futures::future::{join_all, try_join_all};

use crate::clock;
use crate::error::RuntimeError;
use crate::host::cgroup::Hierarchies;
use crate::host::{blocking, figures};
use crate::runtime::Runtime;
use crate::state::{Container, Sandbox};
use crate::stats::last::LastFigures;

/// Most threads that read for one request.
const MOST_LANES: usize = 4;

/// A sandbox with what is read of it.
struct Subject {
    sandbox: SandboxRecord,
    cgroup: String,
    containers: Vec<(ContainerRecord, LastFigures, Option<DiskFigures>)>,
}

/// What all containers have in common.
#[derive(Clone)]
struct Node {
    hierarchies: Hierarchies,
    page_sizes: Vec<String>,
    /// Names of disks that were met.
    devices: BTreeMap<(u32, u32), String>,
}

impl Runtime {
    /// The metrics there are.
    pub fn metric_descriptors() -> Vec<MetricDescriptor> {
        metrics::ALL.iter().map(|descriptor| descriptor.to_cri()).collect()
    }

    /// The metrics of every ready sandbox and of its running containers.
    pub async fn sandbox_metrics(&self) -> Result<Vec<PodSandboxMetrics>, RuntimeError> {
        let directory = self.snapshot_directory().await;
        let disk = blocking(move || Ok(directory.and_then(|path| figures::file_system(&path)))).await?;
        let sandboxes = self.ready_sandboxes(None);
        let subjects = join_all(sandboxes.iter().map(|sandbox| self.subject(sandbox, disk.as_ref()))).await;
        let node = Node {
            page_sizes: self.hierarchies.page_sizes(),
            hierarchies: self.hierarchies.clone(),
            devices: BTreeMap::new(),
        };
        // Side by side: most of it is the kernel's work, for which any processor will do.
        let lanes = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_LANES);
        let mut subjects = subjects.into_iter();
        let share = subjects.len().div_ceil(lanes).max(1);
        let lane = |_| {
            let (share, mut node) = (subjects.by_ref().take(share).collect::<Vec<_>>(), node.clone());
            blocking(move || Ok(share.iter().map(|subject| read(subject, &mut node)).collect::<Vec<_>>()))
        };
        Ok(try_join_all((0..lanes).map(lane)).await?.into_iter().flatten().collect())
    }

    async fn subject(&self, sandbox: &Arc<Sandbox>, disk: Option<&DiskFigures>) -> Subject {
        let with_disk = async |container: Arc<Container>| {
            let layer = self.writable_layer(&container).await;
            let used = layer.and_then(|layer| layer.used_bytes).map(|used| used.value);
            let disk = disk.zip(used).map(|(disk, used)| DiskFigures { used, ..disk.clone() });
            (container.record.get(), container.last_figures.clone(), disk)
        };
        let containers = join_all(self.running_containers_of(sandbox).into_iter().map(with_disk)).await;
        let cgroup = self.pod_cgroups(sandbox).into_iter().next().unwrap_or_default();
        Subject { sandbox: sandbox.record.get(), cgroup, containers }
    }
}

fn read(subject: &Subject, node: &mut Node) -> PodSandboxMetrics {
    let record = &subject.sandbox;
    let interfaces = if record.host_network() {
        Vec::new()
    } else {
        or_silent(figures::interfaces_of(record.pid, &record.netns))
    };
    let mut container_metrics = Vec::with_capacity(subject.containers.len());
    for (container, last, disk) in &subject.containers {
        if node.hierarchies.exists(&container.cgroup) {
            let figures = container_figures(container, last, disk.clone(), node);
            container_metrics.push(ContainerMetrics {
                container_id: container.id.clone(),
                metrics: metrics::of_container(container_labels(subject, container), &figures),
            });
        }
    }
    PodSandboxMetrics {
        pod_sandbox_id: record.id.clone(),
        metrics: metrics::of_sandbox(sandbox_labels(subject), &interfaces),
        container_metrics,
    }
}

/// A pod without any interface has no traffic; its counters are there all the same.
fn or_silent(interfaces: Vec<InterfaceCounters>) -> Vec<InterfaceCounters> {
    if interfaces.is_empty() {
        return vec![InterfaceCounters { name: "eth0".to_owned(), ..InterfaceCounters::default() }];
    }
    interfaces
}

fn container_figures(
    record: &ContainerRecord,
    last: &LastFigures,
    disk: Option<DiskFigures>,
    node: &mut Node,
) -> ContainerFigures {
    let details = node.hierarchies.details(&record.cgroup, last.files(), &node.page_sizes);
    ContainerFigures {
        usage: node.hierarchies.usage(&record.cgroup, last.files()),
        processes: figures::processes(&node.hierarchies.processes(&record.cgroup)),
        device_names: figures::device_names(&details.devices, &mut node.devices),
        details,
        disk,
        resources: record.resources.clone().unwrap_or_default(),
        started_at: record.started_at,
        now: clock::now(),
    }
}

fn sandbox_labels(subject: &Subject) -> Labels {
    let metadata = subject.sandbox.config.metadata.clone().unwrap_or_default();
    Labels {
        cgroup: subject.cgroup.clone(),
        id: subject.sandbox.id.clone(),
        namespace: metadata.namespace,
        pod: metadata.name,
        ..Labels::default()
    }
}

fn container_labels(subject: &Subject, record: &ContainerRecord) -> Labels {
    let image = record.config.image.clone().unwrap_or_default();
    let named = [image.user_specified_image, image.image].into_iter().find(|name| !name.is_empty());
    Labels {
        cgroup: record.cgroup.clone(),
        id: record.id.clone(),
        image: named.unwrap_or_else(|| record.image_ref.clone()),
        container: record.config.metadata.as_ref().map(|one| one.name.clone()).unwrap_or_default(),
        ..sandbox_labels(subject)
    }
}

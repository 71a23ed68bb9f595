//! ListMetricDescriptors and ListPodSandboxMetrics: the figures under the names that the kubelet serves.

use std::collections::BTreeMap;
use std::sync::Arc;

use cri_shim_api::v1::{ContainerMetrics, MetricDescriptor, PodSandboxMetrics};
use cri_shim_core::metrics::{self, ContainerFigures, DiskFigures, Labels};
use cri_shim_core::record::{ContainerRecord, SandboxRecord};
use cri_shim_core::stats::InterfaceCounters;
use futures::future::join_all;

use crate::clock;
use crate::error::RuntimeError;
use crate::host::cgroup::Hierarchies;
use crate::host::{blocking, figures};
use crate::runtime::Runtime;
use crate::state::{Container, Sandbox};

/// A sandbox with what is read of it.
struct Subject {
    sandbox: SandboxRecord,
    cgroup: String,
    containers: Vec<(ContainerRecord, Option<DiskFigures>)>,
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
        let hierarchies = self.hierarchies.clone();
        blocking(move || {
            let mut devices = BTreeMap::new();
            Ok(subjects.iter().map(|subject| read(subject, &hierarchies, &mut devices)).collect())
        })
        .await
    }

    async fn subject(&self, sandbox: &Arc<Sandbox>, disk: Option<&DiskFigures>) -> Subject {
        let with_disk = async |container: Arc<Container>| {
            let layer = self.writable_layer(&container).await;
            let used = layer.and_then(|layer| layer.used_bytes).map(|used| used.value);
            let disk = disk.zip(used).map(|(disk, used)| DiskFigures { used, ..disk.clone() });
            (container.record.get(), disk)
        };
        let containers = join_all(self.running_containers_of(sandbox).into_iter().map(with_disk)).await;
        let cgroup = self.pod_cgroups(sandbox).into_iter().next().unwrap_or_default();
        Subject { sandbox: sandbox.record.get(), cgroup, containers }
    }
}

fn read(
    subject: &Subject,
    hierarchies: &Hierarchies,
    devices: &mut BTreeMap<(u32, u32), String>,
) -> PodSandboxMetrics {
    let record = &subject.sandbox;
    let interfaces = if record.host_network() {
        Vec::new()
    } else {
        or_silent(figures::interfaces_of(record.pid, &record.netns))
    };
    PodSandboxMetrics {
        pod_sandbox_id: record.id.clone(),
        metrics: metrics::of_sandbox(sandbox_labels(subject), &interfaces),
        container_metrics: subject
            .containers
            .iter()
            .filter(|(container, _)| hierarchies.exists(&container.cgroup))
            .map(|(container, disk)| ContainerMetrics {
                container_id: container.id.clone(),
                metrics: metrics::of_container(
                    container_labels(subject, container),
                    &container_figures(container, disk.clone(), hierarchies, devices),
                ),
            })
            .collect(),
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
    disk: Option<DiskFigures>,
    hierarchies: &Hierarchies,
    devices: &mut BTreeMap<(u32, u32), String>,
) -> ContainerFigures {
    let details = hierarchies.details(&record.cgroup);
    ContainerFigures {
        usage: hierarchies.usage(&record.cgroup),
        processes: figures::processes(&hierarchies.processes(&record.cgroup)),
        device_names: figures::device_names(&details.devices, devices),
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

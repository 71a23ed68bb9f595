//! A container as CRI's `ContainerConfig`. Pure: paths, variables and values are passed in.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use agent_core::env::ProcessEnv;
use agent_core::qos::ContainerCgroup;
use cri_shim_api::v1;
use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};

use super::labels;
use crate::devices::Allocation;
use crate::numa::Sets;

/// What a container depends on beside its spec.
#[derive(Debug, Clone)]
pub struct ContainerInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container.
    pub container: &'a Container,
    /// Restart count.
    pub attempt: u32,
    /// Image reference that the image service returned.
    pub image_ref: &'a str,
    /// Environment, command and arguments.
    pub process: ProcessEnv,
    /// Host path of each volume mount, by its index, subPath resolved.
    pub mount_paths: &'a HashMap<usize, ResolvedMount>,
    /// What device plugins ask for.
    pub allocation: &'a Allocation,
    /// Processors it may run on, and nodes of its memory; empty: all.
    pub sets: &'a Sets,
    /// Managed /etc/hosts.
    pub hosts_file: &'a Path,
    /// File behind the termination message path.
    pub message_file: &'a Path,
    /// Resource values.
    pub cgroup: ContainerCgroup,
    /// Limits of huge pages by the size of a page, as the kernel names it.
    pub huge_pages: BTreeMap<String, u64>,
    /// Security context.
    pub security: v1::LinuxContainerSecurityContext,
}

/// Where a volume mount points at on the node.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedMount {
    /// Host path.
    pub path: PathBuf,
    /// The volume is read-only whatever the mount says.
    pub read_only: bool,
    /// Of an image volume, the image instead of a path.
    pub image: Option<v1::ImageSpec>,
    /// … and the path inside it.
    pub image_sub_path: String,
}

impl ResolvedMount {
    /// A path on the node.
    pub fn path(path: PathBuf, read_only: bool) -> Self {
        Self { path, read_only, image: None, image_sub_path: String::new() }
    }

    /// An image's files.
    pub fn image(image: v1::ImageSpec, sub_path: String) -> Self {
        Self { path: PathBuf::new(), read_only: true, image: Some(image), image_sub_path: sub_path }
    }
}

/// Log file of an instance relative to the sandbox's log directory.
pub fn log_path(container: &str, attempt: u32) -> String {
    format!("{container}/{attempt}.log")
}

/// The configuration for CreateContainer.
pub fn container_config(input: ContainerInput<'_>) -> v1::ContainerConfig {
    let container = input.container;
    let (mut mounts, annotations) = (mounts(&input), annotations(&input));
    let namespaces = input.security.namespace_options.as_ref();
    if let Some(users) = namespaces.and_then(|namespaces| namespaces.userns_options.as_ref()) {
        // Files belong to the same ids inside as on the node.
        for mount in mounts.iter_mut().filter(|mount| mount.image.is_none()) {
            mount.uid_mappings.clone_from(&users.uids);
            mount.gid_mappings.clone_from(&users.gids);
        }
    }
    let envs = input
        .process
        .variables
        .iter()
        .map(|(key, value)| v1::KeyValue { key: key.clone(), value: value.clone() });
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: container.name.clone(), attempt: input.attempt }),
        image: Some(v1::ImageSpec {
            image: input.image_ref.to_owned(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..v1::ImageSpec::default()
        }),
        envs: envs.collect(),
        mounts,
        command: input.process.command,
        args: input.process.args,
        working_dir: container.working_dir.clone().unwrap_or_default(),
        labels: labels::container_labels(input.pod, &container.name),
        annotations,
        devices: devices(input.allocation),
        cdi_devices: input
            .allocation
            .cdi_devices
            .iter()
            .map(|name| v1::CdiDevice { name: name.clone() })
            .collect(),
        log_path: log_path(&container.name, input.attempt),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources {
                cpuset_cpus: input.sets.cpus.clone(),
                cpuset_mems: input.sets.mems.clone(),
                hugepage_limits: huge_pages(input.huge_pages),
                ..resources(input.cgroup)
            }),
            security_context: Some(input.security),
        }),
        stop_signal: stop_signal(container),
        ..v1::ContainerConfig::default()
    }
}

/// Resource values as the CRI has them.
pub fn resources(values: ContainerCgroup) -> v1::LinuxContainerResources {
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    v1::LinuxContainerResources {
        cpu_shares: signed(values.cpu_shares),
        cpu_quota: values.cpu_quota.map_or(0, |(quota, _)| signed(quota)),
        cpu_period: values.cpu_quota.map_or(0, |(_, period)| signed(period)),
        memory_limit_in_bytes: values.memory_max.map_or(0, signed),
        oom_score_adj: i64::from(values.oom_score_adj),
        memory_swap_limit_in_bytes: values.memory.with_swap.map_or(0, signed),
        unified: values.memory.files(),
        ..v1::LinuxContainerResources::default()
    }
}

fn huge_pages(limits: BTreeMap<String, u64>) -> Vec<v1::HugepageLimit> {
    limits.into_iter().map(|(page_size, limit)| v1::HugepageLimit { page_size, limit }).collect()
}

/// The agent's own annotations win: others could make it take the container for another.
fn annotations(input: &ContainerInput<'_>) -> BTreeMap<String, String> {
    let mut all = input.allocation.annotations.clone();
    all.extend(labels::container_annotations(input.pod, input.container, input.attempt));
    all
}

fn devices(allocation: &Allocation) -> Vec<v1::Device> {
    let device = |(container_path, host_path, permissions): &(String, String, String)| v1::Device {
        container_path: container_path.clone(),
        host_path: host_path.clone(),
        permissions: permissions.clone(),
    };
    allocation.devices.iter().map(device).collect()
}

fn stop_signal(container: &Container) -> i32 {
    let wanted = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.as_deref());
    wanted.and_then(v1::Signal::from_str_name).unwrap_or_default() as i32
}

fn mounts(input: &ContainerInput<'_>) -> Vec<v1::Mount> {
    let mut mounts: Vec<v1::Mount> = input
        .container
        .volume_mounts
        .iter()
        .flatten()
        .enumerate()
        .filter_map(|(index, mount)| Some(volume_mount(mount, input.mount_paths.get(&index)?)))
        .collect();
    let asked = input.allocation.mounts.iter();
    mounts.extend(asked.map(|(container_path, host_path, readonly)| v1::Mount {
        readonly: *readonly,
        ..plain_mount(container_path, Path::new(host_path))
    }));
    let is_mounted = |path: &str, mounts: &[v1::Mount]| {
        mounts.iter().any(|mount| mount.container_path.trim_end_matches('/') == path)
    };
    if !is_mounted("/etc/hosts", &mounts) {
        mounts.push(plain_mount("/etc/hosts", input.hosts_file));
    }
    let message_path = labels::message_path(input.container);
    if !is_mounted(message_path, &mounts) {
        mounts.push(plain_mount(message_path, input.message_file));
    }
    mounts
}

fn plain_mount(container_path: &str, host_path: &Path) -> v1::Mount {
    v1::Mount {
        container_path: container_path.to_owned(),
        host_path: host_path.to_string_lossy().into_owned(),
        ..v1::Mount::default()
    }
}

fn volume_mount(mount: &VolumeMount, resolved: &ResolvedMount) -> v1::Mount {
    let propagation = match mount.mount_propagation.as_deref() {
        Some("HostToContainer") => v1::MountPropagation::PropagationHostToContainer,
        Some("Bidirectional") => v1::MountPropagation::PropagationBidirectional,
        _ => v1::MountPropagation::PropagationPrivate,
    };
    // A path relative to the root of the container, as upstream makes it.
    let container_path = if mount.mount_path.starts_with('/') {
        mount.mount_path.clone()
    } else {
        format!("/{}", mount.mount_path)
    };
    let readonly = mount.read_only.unwrap_or(false) || resolved.read_only;
    v1::Mount {
        container_path,
        host_path: resolved.path.to_string_lossy().into_owned(),
        readonly,
        propagation: propagation as i32,
        image: resolved.image.clone(),
        image_sub_path: resolved.image_sub_path.clone(),
        recursive_read_only: readonly && mount.recursive_read_only.as_deref() == Some("Enabled"),
        ..v1::Mount::default()
    }
}

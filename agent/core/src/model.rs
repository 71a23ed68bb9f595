//! The vocabulary of the pod loop: what a pod should be, what it is, and what the agent remembers about it.
//!
//! Pure data; iteration is ordered everywhere, so that equal inputs give equal plans.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec, PodStatus, ResourceStatus};
use serde::{Deserialize, Serialize};

use crate::backoff::BackOff;
use crate::resize::{Applied, Blocked};

/// A pod as it should be.
#[derive(Debug, Clone)]
pub struct DesiredPod {
    /// The API object; for a pod found only in the CRI, one made from its labels.
    pub pod: Arc<Pod>,
    /// What to do with it.
    pub fate: Fate,
    /// Its ephemeral containers, in the shape of all others.
    pub ephemeral: Vec<Ephemeral>,
    /// Why its containers keep the resources they have, though it wants others.
    pub resize_blocked: Option<Blocked>,
    /// Of a static pod, the object that shows it in the API, once there is one.
    pub mirror: Option<Arc<Pod>>,
    /// The list of the API that this is from, or a change since; they are counted.
    pub list: u64,
}

/// An ephemeral container: added to a pod that exists, started once.
#[derive(Debug, Clone, PartialEq)]
pub struct Ephemeral {
    /// The container.
    pub container: Container,
    /// The container whose processes it sees.
    pub target: Option<String>,
}

/// What to do with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Run it as its restart policy says.
    Run,
    /// Never start it (or stop it) and report it Failed.
    Fail {
        /// `OutOfcpu`, `DeadlineExceeded`, …
        reason: String,
        /// For people.
        message: String,
        /// Seconds for its containers to end, where the node ends them to protect itself; else the pod's own.
        grace: Option<i64>,
    },
    /// End it, remove everything, then let the API object go.
    Terminate {
        /// Seconds between the stop signal and the kill.
        grace: i64,
        /// The API object is gone already.
        gone: bool,
    },
}

/// A pod as it is.
#[derive(Debug, Clone, Default)]
pub struct ObservedPod {
    /// Newest first.
    pub sandboxes: Vec<ObservedSandbox>,
    /// Every instance of every container, newest first.
    pub containers: Vec<ObservedContainer>,
}

/// A sandbox the CRI lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedSandbox {
    /// CRI id.
    pub id: String,
    /// `metadata.attempt`.
    pub attempt: u32,
    /// SANDBOX_READY.
    pub ready: bool,
    /// Creation.
    pub created_at: Timestamp,
    /// Addresses, first one first; empty with host network.
    pub ips: Vec<String>,
}

/// A container the CRI lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedContainer {
    /// CRI id, without scheme.
    pub id: String,
    /// Name in the pod spec.
    pub name: String,
    /// Number of restarts before this instance.
    pub attempt: u32,
    /// Annotation `io.kubernetes.container.hash`.
    pub hash: String,
    /// Sandbox it belongs to.
    pub sandbox_id: String,
    /// State.
    pub state: RunState,
    /// Image as the runtime names it.
    pub image: String,
    /// Image id or digest as the runtime names it.
    pub image_id: String,
    /// Creation.
    pub created_at: Timestamp,
    /// Start, once started.
    pub started_at: Option<Timestamp>,
    /// End, once ended.
    pub finished_at: Option<Timestamp>,
    /// Exit code, once ended.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, ….
    pub reason: String,
    /// The runtime's message, or the container's termination message.
    pub message: String,
    /// Log file.
    pub log_path: String,
    /// Who its first process was started as, where the runtime tells.
    pub user: Option<StartedAs>,
}

/// Ids of a container's first process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartedAs {
    /// User.
    pub uid: i64,
    /// Group.
    pub gid: i64,
    /// All supplemental groups.
    pub groups: Vec<i64>,
}

/// CRI container states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Made, never started; the start step goes on or the agent died in between.
    Created,
    /// Runs.
    Running,
    /// Ended.
    Exited,
    /// The runtime lost it; treated as running until killed.
    Unknown,
}

/// What the agent knows beyond the CRI: its steps, failures and probe results.
#[derive(Debug, Clone, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact by itself")]
pub struct PodMemory {
    /// Pod cgroup.
    pub cgroup: Step,
    /// Volumes.
    pub volumes: Step,
    /// ResourceClaims, made ready for the coming sandbox.
    pub claims: Step,
    /// The pod may have ResourceClaims that are to be undone.
    pub claims_held: bool,
    /// What the statuses of its containers say of their devices, by the containers' names.
    pub device_health: BTreeMap<String, Vec<ResourceStatus>>,
    /// Creation of the newest sandbox.
    pub sandbox: Step,
    /// Sandboxes that StopPodSandbox has succeeded for.
    pub stopped_sandboxes: BTreeSet<String>,
    /// By container name.
    pub containers: BTreeMap<String, ContainerMemory>,
    /// Steps that run now.
    pub busy: BTreeSet<StepKey>,
    /// Attempt number of containers whose start step runs now.
    pub starting: BTreeMap<String, u32>,
    /// Service variables can be built.
    pub services_synced: bool,
    /// Volumes, cgroup and sandboxes are all gone (end of a terminating pod).
    pub released: Released,
    /// The API has the last status.
    pub status_written: bool,
    /// Nothing of it starts again: that was decided, whether or not the API knows.
    pub over: bool,
}

/// What of a finished or terminating pod has been given back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Released {
    /// Volumes torn down.
    pub volumes: bool,
    /// Cgroup removed.
    pub cgroup: bool,
    /// API object deleted.
    pub api: bool,
}

/// Progress of a pod-level step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Step {
    /// Not tried since the agent started.
    #[default]
    Todo,
    /// Done.
    Done,
    /// Failed; tried again at the given time.
    Failed {
        /// When to try again.
        retry_at: Timestamp,
    },
}

/// What the agent remembers about a container name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ContainerMemory {
    /// Image for the next start.
    pub image: ImageState,
    /// The last start failed before or at the runtime.
    pub start_failure: Option<StartFailure>,
    /// Back-off of restarts.
    pub restart_backoff: BackOff,
    /// Back-off of pulls.
    pub pull_backoff: BackOff,
    /// Probe results.
    pub probes: ProbeResults,
    /// Resources of the newest instance, where they are known.
    pub applied: Option<Applied>,
}

/// Where the image of a container stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ImageState {
    /// Not looked at for the coming start.
    #[default]
    Unknown,
    /// There.
    Present {
        /// The image reference to create the container with.
        image_ref: String,
    },
    /// Not there.
    Failed {
        /// `ErrImagePull`, `ErrImageNeverPull`, `InvalidImageName`, `ErrImageInspect`.
        reason: String,
        /// For people.
        message: String,
        /// When.
        at: Timestamp,
    },
}

/// Why a container did not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartFailure {
    /// `CreateContainerConfigError`, `CreateContainerError`, `RunContainerError`, `PostStartHookError`.
    pub reason: String,
    /// For people.
    pub message: String,
    /// When.
    pub at: Timestamp,
}

/// Probe results of one container instance; persisted, so that a restart of the agent keeps readiness.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeResults {
    /// The instance they belong to.
    pub container_id: String,
    /// The startup probe has succeeded.
    pub started: bool,
    /// The readiness probe's state.
    pub ready: bool,
    /// Liveness or startup failure: kill it.
    #[serde(skip)]
    pub failed: Option<ProbeFailure>,
}

/// A probe that says: kill it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeFailure {
    /// `liveness` or `startup`.
    pub probe: &'static str,
    /// The probe's own grace period.
    pub grace: Option<i64>,
}

/// Names the steps that may run at the same time, at most once each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum StepKey {
    /// Pod cgroup made or removed.
    Cgroup,
    /// Volumes mounted or torn down.
    Volumes,
    /// ResourceClaims made ready or undone.
    Claims,
    /// A sandbox made, stopped or removed.
    Sandbox,
    /// The image of a container.
    Image(String),
    /// Start, kill or removal of a container's instances.
    Container(String),
    /// Removal of an old container instance.
    Garbage(String),
    /// Deletion of the API object.
    Api,
}

/// A `Host`-independent view of a container in a spec, with the part of the pod it belongs to.
#[derive(Debug, Clone, Copy)]
pub struct ContainerSpec<'a> {
    /// The container.
    pub container: &'a Container,
    /// Its part.
    pub kind: ContainerKind,
}

/// The part of the pod a container belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerKind {
    /// Runs once, in order, before the others.
    Init,
    /// Init container that keeps running.
    Sidecar,
    /// The pod's work.
    Main,
    /// Added to look into a running pod; decides nothing about it.
    Ephemeral,
}

/// Whether `container`, found among the init containers, is a sidecar.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Init containers and sidecars in order, then main containers.
pub fn containers(spec: &PodSpec) -> impl Iterator<Item = ContainerSpec<'_>> {
    let init = spec.init_containers.iter().flatten().map(|container| ContainerSpec {
        container,
        kind: if is_sidecar(container) { ContainerKind::Sidecar } else { ContainerKind::Init },
    });
    init.chain(spec.containers.iter().map(|container| ContainerSpec { container, kind: ContainerKind::Main }))
}

/// The ephemeral containers of a pod.
pub fn ephemeral_containers(spec: &PodSpec) -> Vec<Ephemeral> {
    let converted = |given: &EphemeralContainer| {
        let given = given.clone();
        Ephemeral {
            target: given.target_container_name.filter(|target| !target.is_empty()),
            container: Container {
                args: given.args,
                command: given.command,
                env: given.env,
                env_from: given.env_from,
                image: given.image,
                image_pull_policy: given.image_pull_policy,
                name: given.name,
                security_context: given.security_context,
                stdin: given.stdin,
                stdin_once: given.stdin_once,
                termination_message_path: given.termination_message_path,
                termination_message_policy: given.termination_message_policy,
                tty: given.tty,
                volume_devices: given.volume_devices,
                volume_mounts: given.volume_mounts,
                working_dir: given.working_dir,
                ..Container::default()
            },
        }
    };
    spec.ephemeral_containers.iter().flatten().map(converted).collect()
}

/// The container of that name in any part of a pod.
pub fn find_container(spec: &PodSpec, name: &str) -> Option<Container> {
    let ephemeral = || ephemeral_containers(spec).into_iter().map(|found| found.container);
    let found = containers(spec).map(|entry| entry.container).find(|container| container.name == name);
    found.cloned().or_else(|| ephemeral().find(|container| container.name == name))
}

/// `spec.restartPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartPolicy {
    /// The default.
    Always,
    /// Only after a failure.
    OnFailure,
    /// Never.
    Never,
}

impl RestartPolicy {
    /// The pod's policy.
    pub fn of(spec: &PodSpec) -> Self {
        match spec.restart_policy.as_deref() {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            _ => Self::Always,
        }
    }

    /// Whether a container that ended with `exit_code` starts again.
    pub fn restarts(self, exit_code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => exit_code != 0,
            Self::Never => false,
        }
    }

    /// The container's own policy, or else the pod's.
    pub fn of_container(spec: &PodSpec, container: &Container) -> Self {
        match container.restart_policy.as_deref() {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            Some("Always") => Self::Always,
            _ => Self::of(spec),
        }
    }
}

/// Whether a container of `kind` that ended with `exit_code` starts again: by its rules, its policy, or the pod's.
pub fn restarts(spec: &PodSpec, entry: ContainerSpec<'_>, exit_code: i32) -> bool {
    let container = entry.container;
    match entry.kind {
        ContainerKind::Ephemeral => false,
        ContainerKind::Sidecar => true,
        ContainerKind::Init if exit_code == 0 => false,
        ContainerKind::Init => {
            rule_says_restart(container, exit_code)
                || RestartPolicy::of_container(spec, container) != RestartPolicy::Never
        }
        ContainerKind::Main => {
            rule_says_restart(container, exit_code)
                || RestartPolicy::of_container(spec, container).restarts(exit_code)
        }
    }
}

/// The first rule that matches the exit code decides; rules can only say `Restart`.
fn rule_says_restart(container: &Container, exit_code: i32) -> bool {
    container.restart_policy_rules.iter().flatten().any(|rule| {
        let Some(codes) = &rule.exit_codes else { return false };
        let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
        let matches = if codes.operator == "NotIn" { !listed } else { listed };
        matches && rule.action == "Restart"
    })
}

impl DesiredPod {
    /// The pod with what becomes of it.
    pub fn new(pod: Arc<Pod>, fate: Fate) -> Self {
        let ephemeral = pod.spec.as_ref().map(ephemeral_containers).unwrap_or_default();
        Self { pod, fate, ephemeral, resize_blocked: None, mirror: None, list: 0 }
    }

    /// Containers of every part: init containers and sidecars, main containers, ephemeral ones.
    pub fn entries(&self) -> impl Iterator<Item = ContainerSpec<'_>> {
        containers(self.spec()).chain(self.ephemeral.iter().map(Ephemeral::entry))
    }

    /// Whether it comes from the node itself.
    pub fn is_static(&self) -> bool {
        is_static(&self.pod)
    }

    /// The pod's spec.
    pub fn spec(&self) -> &PodSpec {
        /// An API pod always has one; a pod rebuilt from CRI labels is given one.
        static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
        self.pod.spec.as_ref().unwrap_or(&EMPTY)
    }

    /// `metadata.uid`.
    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    /// `metadata.name`.
    pub fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    /// `metadata.namespace`.
    pub fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// `<name>_<namespace>(<uid>)`, as upstream's messages name a pod.
    pub fn described(&self) -> String {
        format!("{}_{}({})", self.name(), self.namespace(), self.uid())
    }

    /// The status the API has.
    pub fn api_status(&self) -> Option<&PodStatus> {
        self.pod.status.as_ref()
    }
}

/// Whether the pod comes from the node itself: the API only shows it.
pub fn is_static(pod: &Pod) -> bool {
    let source = pod.metadata.annotations.as_ref().and_then(|all| all.get("kubernetes.io/config.source"));
    source.is_some_and(|source| source != "api")
}

impl Ephemeral {
    /// As an entry of the pod.
    pub fn entry(&self) -> ContainerSpec<'_> {
        ContainerSpec { container: &self.container, kind: ContainerKind::Ephemeral }
    }
}

impl ObservedPod {
    /// The newest instance of `name`, leaving out one that a running start step is making.
    pub fn newest(&self, name: &str, memory: &PodMemory) -> Option<&ObservedContainer> {
        let starting = memory.starting.get(name);
        self.containers.iter().find(|instance| {
            instance.name == name && starting.is_none_or(|attempt| instance.attempt < *attempt)
        })
    }

    /// All instances of `name`, newest first.
    pub fn instances<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a ObservedContainer> {
        self.containers.iter().filter(move |instance| instance.name == name)
    }

    /// The newest sandbox when it can take containers.
    pub fn usable_sandbox(&self, host_network: bool) -> Option<&ObservedSandbox> {
        self.sandboxes.first().filter(|sandbox| sandbox.ready && (host_network || !sandbox.ips.is_empty()))
    }

    /// Containers that may have processes.
    pub fn alive(&self) -> impl Iterator<Item = &ObservedContainer> {
        self.containers.iter().filter(|instance| instance.is_alive())
    }

    /// Sorts as the other methods expect.
    pub fn sort(&mut self) {
        self.sandboxes
            .sort_by(|a, b| (b.attempt, b.created_at, &b.id).cmp(&(a.attempt, a.created_at, &a.id)));
        self.containers.sort_by(|a, b| {
            (&a.name, b.attempt, b.created_at, &b.id).cmp(&(&b.name, a.attempt, a.created_at, &a.id))
        });
    }
}

impl ObservedContainer {
    /// Was made from another definition than `container`'s. An instance without a hash is taken as it is.
    pub fn is_outdated(&self, container: &Container) -> bool {
        !self.hash.is_empty() && self.hash != crate::hash::container_hash(container)
    }

    /// May have processes.
    pub fn is_alive(&self) -> bool {
        matches!(self.state, RunState::Running | RunState::Unknown)
    }
}

impl PodMemory {
    /// Memory of a container, empty when there is none.
    pub fn container(&self, name: &str) -> ContainerMemory {
        self.containers.get(name).cloned().unwrap_or_default()
    }

    /// A start or kill of the container runs.
    pub fn container_busy(&self, name: &str) -> bool {
        self.busy.contains(&StepKey::Container(name.to_owned()))
    }
}

impl ContainerMemory {
    /// What of the resources of `running` is to change.
    pub fn resize(&self, running: &ObservedContainer, container: &Container) -> Vec<&'static str> {
        let applied = self.applied.as_ref().filter(|applied| applied.attempt == running.attempt);
        applied.map(|applied| applied.differences(container)).unwrap_or_default()
    }

    /// Results of the given instance, initial ones when they are about another.
    pub fn probes_of(&self, instance: &ObservedContainer) -> ProbeResults {
        if self.probes.container_id == instance.id {
            self.probes.clone()
        } else {
            ProbeResults { container_id: instance.id.clone(), ..ProbeResults::default() }
        }
    }
}

impl Step {
    /// Whether it should be tried now; otherwise when.
    pub fn due(&self, now: Timestamp) -> Result<(), Option<Timestamp>> {
        match self {
            Self::Todo => Ok(()),
            Self::Done => Err(None),
            Self::Failed { retry_at } if *retry_at <= now => Ok(()),
            Self::Failed { retry_at } => Err(Some(*retry_at)),
        }
    }
}

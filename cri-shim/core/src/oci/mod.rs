//! CRI configuration to OCI runtime specification.
//!
//! Input: what CRI asked for, the image's defaults, facts of the node and paths that the caller has already resolved.
//! Output: a complete specification, or an error that names the field. One file per part: [`process`] (arguments,
//! environment), [`caps`], [`mounts`], [`namespaces`] with [`userns`], [`resources`], [`devices`], [`seccomp`] with its
//! table in `seccomp_table`, [`labels`] (AppArmor, SELinux), and [`cdi`] (vendors' devices). Nothing here looks at the
//! node.

pub mod caps;
pub mod cdi;
pub mod container;
pub mod devices;
pub mod labels;
pub mod mounts;
pub mod namespaces;
pub mod process;
pub mod resources;
pub mod sandbox;
pub mod seccomp;
mod seccomp_table;
pub mod userns;

use oci_spec::OciSpecError;

/// Version of the runtime specification that is written.
const OCI_VERSION: &str = "1.0.2";
/// Annotation by which the runc shim puts a pod's containers into one shim.
pub const SANDBOX_ID_ANNOTATION: &str = "io.kubernetes.cri.sandbox-id";
/// Annotation that tells sandboxes from containers.
pub const TYPE_ANNOTATION: &str = "io.kubernetes.cri.container-type";

/// What the node can do, found out once at start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "independent findings, each read by itself")]
pub struct NodeFacts {
    /// Whether the only cgroup hierarchy is version 2.
    pub cgroup_v2: bool,
    /// Whether the hugetlb controller is there.
    pub hugetlb: bool,
    /// Whether swap limits can be set.
    pub swap_limits: bool,
    /// Whether the kernel filters system calls.
    pub seccomp: bool,
    /// Whether AppArmor is on.
    pub apparmor: bool,
    /// Whether our default AppArmor profile is loaded.
    pub apparmor_default: bool,
    /// Whether SELinux is on.
    pub selinux: bool,
    /// Whether bind mounts can be made read-only with everything below them.
    pub recursive_readonly: bool,
    /// The lowest OOM score adjustment that may be set (without CAP_SYS_RESOURCE: our own).
    pub lowest_oom_score: i32,
    /// The capabilities that can be given at all, without the prefix `CAP_`.
    pub capabilities: Vec<String>,
}

/// A configuration that cannot be turned into a specification.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A required part is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Neither the container nor its image says what to run.
    #[error("no command specified: neither the container nor the image has one")]
    NoCommand,
    /// A capability no kernel knows.
    #[error("unknown capability {0:?}")]
    UnknownCapability(String),
    /// A privileged container in a sandbox that was not made for one.
    #[error("no privileged container allowed in a sandbox that is not privileged")]
    PrivilegedInPlainSandbox,
    /// A combination or feature this runtime does not offer.
    #[error("{field}: {problem}")]
    Unsupported {
        /// The CRI field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A value that means nothing.
    #[error("{field}: {problem}")]
    Invalid {
        /// The CRI field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A mount whose propagation the node's mount table does not allow.
    #[error("mount {path:?}: propagation {wanted} needs the host mount to be {needed}")]
    Propagation {
        /// The host path.
        path: String,
        /// What was asked for.
        wanted: &'static str,
        /// What the mount below it must be.
        needed: &'static str,
    },
    /// A seccomp profile that is no valid JSON of the specification's form.
    #[error("seccomp profile {path:?} is not valid")]
    SeccompProfile {
        /// Its path.
        path: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// A vendor's device that cannot be given.
    #[error(transparent)]
    Cdi(#[from] cdi::CdiError),
    /// A part that the specification's own types refuse.
    #[error("the OCI specification cannot be built")]
    Build(#[from] OciSpecError),
}

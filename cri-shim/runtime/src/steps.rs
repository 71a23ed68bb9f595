//! The steps of setting up a process, as the child reports them and the parent words them.

use rustix::io::Errno;

/// A step that can fail in the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Session,
    EnterCgroup,
    Rlimit,
    OomScore,
    JoinNamespace,
    NewNamespace,
    BecomeRoot,
    Fork,
    Keyring,
    Loopback,
    Hostname,
    Domainname,
    Sysctl,
    PrivateMounts,
    AttachRoot,
    MountTarget,
    MountMake,
    Mount,
    Device,
    DeviceLink,
    Terminal,
    MaskedPath,
    ReadonlyPath,
    RootPropagation,
    RootReadonly,
    PivotRoot,
    Personality,
    Scheduler,
    IoPriority,
    Stdio,
    NoNewPrivileges,
    Apparmor,
    Selinux,
    CloseFiles,
    Seccomp,
    BoundingSet,
    Groups,
    Gid,
    Uid,
    Capabilities,
    AmbientCapabilities,
    WorkingDirectory,
    FindProgram,
    CreateHook,
    CreateHookStatus,
    StartHook,
    StartHookStatus,
    Exec,
}

/// All steps in the order of their numbers.
const STEPS: [Step; 48] = [
    Step::Session,
    Step::EnterCgroup,
    Step::Rlimit,
    Step::OomScore,
    Step::JoinNamespace,
    Step::NewNamespace,
    Step::BecomeRoot,
    Step::Fork,
    Step::Keyring,
    Step::Loopback,
    Step::Hostname,
    Step::Domainname,
    Step::Sysctl,
    Step::PrivateMounts,
    Step::AttachRoot,
    Step::MountTarget,
    Step::MountMake,
    Step::Mount,
    Step::Device,
    Step::DeviceLink,
    Step::Terminal,
    Step::MaskedPath,
    Step::ReadonlyPath,
    Step::RootPropagation,
    Step::RootReadonly,
    Step::PivotRoot,
    Step::Personality,
    Step::Scheduler,
    Step::IoPriority,
    Step::Stdio,
    Step::NoNewPrivileges,
    Step::Apparmor,
    Step::Selinux,
    Step::CloseFiles,
    Step::Seccomp,
    Step::BoundingSet,
    Step::Groups,
    Step::Gid,
    Step::Uid,
    Step::Capabilities,
    Step::AmbientCapabilities,
    Step::WorkingDirectory,
    Step::FindProgram,
    Step::CreateHook,
    Step::CreateHookStatus,
    Step::StartHook,
    Step::StartHookStatus,
    Step::Exec,
];

impl Step {
    /// The step with that number.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        STEPS.get(usize::from(number)).copied()
    }
}

/// A step that failed in the child: which of its kind, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) step: Step,
    /// The place in the plan's list, where the step works on one.
    pub(crate) index: u16,
    pub(crate) errno: Errno,
}

/// For `?` in the child.
pub(crate) type Outcome<T> = Result<T, Failure>;

/// Names the step that an error belongs to.
pub(crate) trait At<T> {
    /// The only thing of its kind.
    fn at(self, step: Step) -> Outcome<T>;
    /// One of a list.
    fn at_index(self, step: Step, index: usize) -> Outcome<T>;
}

impl<T> At<T> for Result<T, Errno> {
    fn at(self, step: Step) -> Outcome<T> {
        self.at_index(step, 0)
    }

    fn at_index(self, step: Step, index: usize) -> Outcome<T> {
        // Lists are far shorter (the parent refuses longer ones).
        self.map_err(|errno| Failure { step, index: u16::try_from(index).unwrap_or(u16::MAX), errno })
    }
}

/// The `oom_score_adj` is lower than this host may set; the process keeps the caller's.
pub(crate) const WARN_OOM_SCORE: u32 = 1;
/// A hard limit is above what this host may set; the process keeps the host's.
pub(crate) const WARN_RLIMIT: u32 = 2;

/// The warnings in words.
pub(crate) fn warnings(bits: u32) -> Vec<String> {
    let mut texts = Vec::new();
    if bits & WARN_OOM_SCORE != 0 {
        texts.push(
            "process.oomScoreAdj: lowering it needs CAP_SYS_RESOURCE, which this host has not".to_owned(),
        );
    }
    if bits & WARN_RLIMIT != 0 {
        texts.push(
            "process.rlimits: raising a hard limit needs CAP_SYS_RESOURCE, which this host has not"
                .to_owned(),
        );
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_s_number_leads_back_to_it() {
        for (number, step) in STEPS.iter().enumerate() {
            assert_eq!(usize::from(*step as u8), number);
        }
    }
}

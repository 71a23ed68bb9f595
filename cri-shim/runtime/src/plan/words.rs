//! What the child reported, in words.

use std::io;

use super::ContainerPlan;
use super::mounts::shown;
use super::process::ProcessPlan;
use crate::error::Error;
use crate::hooks::{AtStart, Hooks};
use crate::host::join::JoinPlan;
use crate::steps::{Failure, Step};

impl ContainerPlan {
    /// The error that a failure of this plan's process is.
    pub(crate) fn error(&self, failure: Failure) -> Error {
        let index = usize::from(failure.index);
        let text = match failure.step {
            Step::JoinNamespace => {
                let list = self.join.get(index).or(match &self.user {
                    Some(super::UserNamespace::Join(namespace)) => Some(namespace),
                    _ => None,
                });
                format!("join the namespace {}", list.map_or("", |join| join.path.as_str()))
            }
            Step::Sysctl => {
                let path = self.sysctls.get(index).map(|(path, _)| path.to_string_lossy());
                format!("linux.sysctl: write {}", path.unwrap_or_default())
            }
            Step::MountTarget | Step::MountMake | Step::Mount => self.mount_text(failure.step, index),
            Step::Device => {
                let path = self.devices.get(index).map(|device| shown(&device.path));
                format!("make the device {}", path.unwrap_or_default())
            }
            Step::DeviceLink => {
                let name = self.links.get(index).map(|link| link.name.to_string_lossy());
                format!("make the link {}", name.unwrap_or_default())
            }
            Step::ReadonlyPath => {
                format!(
                    "linux.readonlyPaths: {}",
                    self.readonly_paths.get(index).map(shown).unwrap_or_default()
                )
            }
            Step::MaskedPath => {
                let path = self.masks.as_ref().and_then(|masks| masks.paths.get(index));
                format!("linux.maskedPaths: {}", path.map(shown).unwrap_or_default())
            }
            Step::CreateHook | Step::CreateHookStatus => {
                let hook = self.hooks.as_ref().and_then(|hooks| hooks.create_container.get(index));
                let name = hook.map_or("hooks.createContainer", |hook| hook.name.as_str());
                return hook_error(
                    name,
                    failure,
                    &self.hooks.as_ref().map(Hooks::output).unwrap_or_default(),
                );
            }
            _ => return self.process.error(failure),
        };
        Error::Step { step: text, source: source(failure) }
    }

    fn mount_text(&self, step: Step, index: usize) -> String {
        let Some(mount) = self.mounts.get(index) else {
            return format!("mount {index}");
        };
        let what = match step {
            Step::MountTarget => "make the mount point",
            Step::MountMake => "make the file system",
            _ => "attach",
        };
        format!("mount {} on {}: {what}", mount.what, shown(&mount.target))
    }
}

impl JoinPlan {
    /// The error that a failure of this plan's process is.
    pub(crate) fn error(&self, failure: Failure) -> Error {
        if failure.step == Step::JoinNamespace {
            return Error::Step {
                step: "join the container's namespaces".to_owned(),
                source: source(failure),
            };
        }
        self.process.error(failure)
    }
}

impl ProcessPlan {
    fn error(&self, failure: Failure) -> Error {
        if matches!(failure.step, Step::Exec | Step::FindProgram) {
            return Error::Exec {
                program: self.program.clone(),
                problem: exec_problem(&self.program, failure),
                source: source(failure),
            };
        }
        let text = match failure.step {
            Step::WorkingDirectory => format!("process.cwd: enter {}", self.cwd.to_string_lossy()),
            Step::Rlimit => format!("process.rlimits[{}]: set", failure.index),
            Step::Apparmor => {
                let profile = self.apparmor.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
                format!("process.apparmorProfile: set {:?}", profile.trim_start_matches("exec "))
            }
            step => plain(step).to_owned(),
        };
        Error::Step { step: text, source: source(failure) }
    }
}

/// The error that a hook of the child is.
fn hook_error(name: &str, failure: Failure, output: &str) -> Error {
    let problem = match failure.step {
        Step::CreateHookStatus | Step::StartHookStatus => {
            format!("ended with status {}", failure.errno.raw_os_error())
        }
        _ if failure.errno == rustix::io::Errno::TIMEDOUT => "has not ended in time".to_owned(),
        _ => source(failure).to_string(),
    };
    let output = output.trim();
    let told = if output.is_empty() { String::new() } else { format!(": {output}") };
    Error::Hook { hook: name.to_owned(), problem: format!("{problem}{told}") }
}

/// The error of a process that was ready and could not become its program.
pub(crate) fn start_error(program: &str, hooks: Option<&AtStart>, failure: Failure) -> Error {
    if matches!(failure.step, Step::StartHook | Step::StartHookStatus) {
        let name = hooks.map_or("hooks.startContainer", |hooks| hooks.name(usize::from(failure.index)));
        return hook_error(name, failure, "");
    }
    if failure.step == Step::Exec {
        return Error::Exec {
            program: program.to_owned(),
            problem: exec_problem(program, failure),
            source: source(failure),
        };
    }
    Error::Step { step: plain(failure.step).to_owned(), source: source(failure) }
}

/// As users of other runtimes know it.
fn exec_problem(program: &str, failure: Failure) -> String {
    use rustix::io::Errno;
    match failure.errno {
        Errno::NOENT | Errno::NOTDIR if failure.step == Step::FindProgram => {
            if program.contains('/') {
                format!("stat {program}: no such file or directory")
            } else {
                "executable file not found in $PATH".to_owned()
            }
        }
        Errno::NOENT => "no such file or directory".to_owned(),
        Errno::ACCESS | Errno::PERM => "permission denied".to_owned(),
        Errno::NOEXEC => "exec format error".to_owned(),
        Errno::ISDIR => "is a directory".to_owned(),
        errno => io::Error::from(errno).to_string(),
    }
}

fn source(failure: Failure) -> io::Error {
    io::Error::from_raw_os_error(failure.errno.raw_os_error())
}

/// Steps that work on one thing only, or whose list says nothing to the user.
fn plain(step: Step) -> &'static str {
    match step {
        Step::Session => "start a session",
        Step::EnterCgroup => "enter the cgroup",
        Step::OomScore => "process.oomScoreAdj: set",
        Step::NewNamespace => "make a namespace",
        Step::BecomeRoot => "become root in the user namespace",
        Step::Fork => "fork in the user namespace",
        Step::Keyring => "join the session keyring",
        Step::Loopback => "bring the loopback interface up",
        Step::Hostname => "hostname: set",
        Step::Domainname => "domainname: set",
        Step::PrivateMounts => "part from the host's mounts",
        Step::AttachRoot => "attach the root file system",
        Step::Terminal => "make a terminal (is devpts mounted on /dev/pts?)",
        Step::RootPropagation => "linux.rootfsPropagation: set",
        Step::RootReadonly => "root.readonly: set",
        Step::PivotRoot => "change to the root file system",
        Step::Personality => "linux.personality: set",
        Step::Scheduler => "process.scheduler: set",
        Step::IoPriority => "process.ioPriority: set",
        Step::Stdio => "set the standard streams",
        Step::NoNewPrivileges => "process.noNewPrivileges: set",
        Step::Selinux => "process.selinuxLabel: set",
        Step::CloseFiles => "close files",
        Step::Seccomp => "linux.seccomp: install the filter",
        Step::BoundingSet => "process.capabilities.bounding: set",
        Step::Groups => "process.user.additionalGids: set",
        Step::Gid => "process.user.gid: set",
        Step::Uid => "process.user.uid: set",
        Step::Capabilities => "process.capabilities: set",
        Step::AmbientCapabilities => "process.capabilities.ambient: set",
        _ => "set up the process",
    }
}

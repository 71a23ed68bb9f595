//! Which namespaces a process is in: new ones, the sandbox's or the host's.

use std::path::PathBuf;

use cri_shim_api::v1::{NamespaceMode, NamespaceOption};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};

use super::{SpecError, userns};

/// Paths a container joins; nothing means the host's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxNamespaces {
    /// The pinned network namespace.
    pub network: Option<PathBuf>,
    /// The pause process's IPC namespace.
    pub ipc: Option<PathBuf>,
    /// The pause process's UTS namespace.
    pub uts: Option<PathBuf>,
    /// The PID namespace to join, when the container does not get its own.
    pub pid: PidNamespace,
    /// The pod's user namespace.
    pub user: Option<PathBuf>,
}

/// Where a container's processes are counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PidNamespace {
    /// Its own.
    #[default]
    New,
    /// The one at this path: the pod's, or another container's.
    Join(PathBuf),
    /// The host's.
    Host,
}

/// The options, where absent parts mean what CRI says they mean.
pub fn options(options: Option<&NamespaceOption>) -> Result<NamespaceOption, SpecError> {
    userns::IdMaps::of(options)?;
    Ok(options.cloned().unwrap_or_default())
}

/// The namespaces of the pause process. With users of its own the pod's network must belong to them, so it is made in the
/// same moment and pinned at `netns` afterwards.
pub fn for_sandbox(
    options: &NamespaceOption,
    netns: Option<PathBuf>,
    own_users: bool,
) -> Result<Vec<LinuxNamespace>, SpecError> {
    let mut all = vec![new(LinuxNamespaceType::Mount)?];
    if own_users {
        all.push(new(LinuxNamespaceType::User)?);
    }
    if options.pid() != NamespaceMode::Node {
        all.push(new(LinuxNamespaceType::Pid)?);
    }
    if options.ipc() != NamespaceMode::Node {
        all.push(new(LinuxNamespaceType::Ipc)?);
    }
    if let Some(path) = netns {
        all.push(if own_users {
            new(LinuxNamespaceType::Network)?
        } else {
            join(LinuxNamespaceType::Network, path)?
        });
        // On the host's network the pod has the host's name, too.
        all.push(new(LinuxNamespaceType::Uts)?);
    }
    Ok(all)
}

/// The namespaces of a container.
pub fn for_container(
    sandbox: SandboxNamespaces,
    own_cgroup_view: bool,
) -> Result<Vec<LinuxNamespace>, SpecError> {
    let mut all = vec![new(LinuxNamespaceType::Mount)?];
    match sandbox.pid {
        PidNamespace::New => all.push(new(LinuxNamespaceType::Pid)?),
        PidNamespace::Join(path) => all.push(join(LinuxNamespaceType::Pid, path)?),
        PidNamespace::Host => {}
    }
    let joined = [
        // First, so that the others are joined with the rights it gives.
        (LinuxNamespaceType::User, sandbox.user),
        (LinuxNamespaceType::Ipc, sandbox.ipc),
        (LinuxNamespaceType::Uts, sandbox.uts),
        (LinuxNamespaceType::Network, sandbox.network),
    ];
    for (kind, path) in joined {
        if let Some(path) = path {
            all.push(join(kind, path)?);
        }
    }
    if own_cgroup_view {
        all.push(new(LinuxNamespaceType::Cgroup)?);
    }
    Ok(all)
}

fn new(kind: LinuxNamespaceType) -> Result<LinuxNamespace, SpecError> {
    Ok(LinuxNamespaceBuilder::default().typ(kind).build()?)
}

fn join(kind: LinuxNamespaceType, path: PathBuf) -> Result<LinuxNamespace, SpecError> {
    Ok(LinuxNamespaceBuilder::default().typ(kind).path(path).build()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cri_shim_api::v1::UserNamespace;

    fn kinds(all: &[LinuxNamespace]) -> Vec<LinuxNamespaceType> {
        all.iter().map(LinuxNamespace::typ).collect()
    }

    #[test]
    fn a_host_network_sandbox_has_neither_network_nor_uts_namespace() {
        let all = for_sandbox(&NamespaceOption::default(), None, false).unwrap();
        assert_eq!(
            kinds(&all),
            [LinuxNamespaceType::Mount, LinuxNamespaceType::Pid, LinuxNamespaceType::Ipc]
        );
        let netns = || Some("/run/netns/a".into());
        let all = for_sandbox(&NamespaceOption::default(), netns(), false).unwrap();
        assert!(kinds(&all).contains(&LinuxNamespaceType::Uts));
        let all = for_sandbox(&NamespaceOption::default(), netns(), true).unwrap();
        assert!(kinds(&all).contains(&LinuxNamespaceType::User));
        assert!(
            all.iter().all(|namespace| namespace.path().is_none()),
            "the network is the pod's users' own"
        );
    }

    #[test]
    fn a_user_namespace_is_refused_by_name() {
        let user = UserNamespace { mode: NamespaceMode::Pod.into(), ..UserNamespace::default() };
        let wanted = NamespaceOption { userns_options: Some(user), ..NamespaceOption::default() };
        assert!(options(Some(&wanted)).unwrap_err().to_string().contains("userns_options"));
    }
}

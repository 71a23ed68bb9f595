//! Which namespaces are made and which are joined.

use std::path::Path;

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespace, LinuxNamespaceType};
use rustix::fs::{Mode, OFlags};

use super::UserNamespace;
use crate::error::Error;
use crate::host::namespaces::Join;

/// The namespaces of a container.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    pub(crate) join: Vec<Join>,
    pub(crate) pids: Option<Join>,
    pub(crate) user: Option<UserNamespace>,
    /// `CLONE_NEW*` to make, but user and cgroup.
    pub(crate) new: u32,
    pub(crate) new_cgroup: bool,
    /// Whether names of the host can be set without the host noticing.
    pub(crate) has_uts: bool,
}

/// Opens those to join.
pub(crate) fn plan(linux: &Linux) -> Result<Namespaces, Error> {
    let mut plan = Namespaces::default();
    for (at, namespace) in linux.namespaces().iter().flatten().enumerate() {
        let field = format!("linux.namespaces[{at}]");
        let list = linux.namespaces().as_deref().unwrap_or_default();
        if list.iter().take(at).any(|earlier| earlier.typ() == namespace.typ()) {
            return Err(Error::spec(field, format!("{} is given twice", namespace.typ())));
        }
        add(&mut plan, namespace, linux, &field)?;
    }
    if plan.new & flag(LinuxNamespaceType::Mount) == 0 {
        return Err(Error::spec("linux.namespaces", "a mount namespace of the container's own is needed"));
    }
    if plan.user.is_some() {
        // The helper makes the process, so it must be in the PID namespace itself, before it changes its user.
        plan.join.extend(plan.pids.take());
    } else if !maps_empty(linux.uid_mappings().as_ref()) || !maps_empty(linux.gid_mappings().as_ref()) {
        return Err(Error::spec("linux.uidMappings", "need a user namespace"));
    }
    Ok(plan)
}

fn maps_empty(maps: Option<&Vec<LinuxIdMapping>>) -> bool {
    maps.is_none_or(Vec::is_empty)
}

fn add(plan: &mut Namespaces, namespace: &LinuxNamespace, linux: &Linux, field: &str) -> Result<(), Error> {
    let kind = namespace.typ();
    let path = namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty());
    plan.has_uts |= kind == LinuxNamespaceType::Uts;
    match (kind, path) {
        (LinuxNamespaceType::Time, _) => {
            return Err(Error::spec(format!("{field}.type"), "time namespaces are not offered"));
        }
        (LinuxNamespaceType::Mount, Some(_)) => {
            return Err(Error::spec(format!("{field}.path"), "mount namespaces cannot be joined"));
        }
        (LinuxNamespaceType::User, None) => {
            let maps = |maps: Option<&Vec<LinuxIdMapping>>, field: &str| {
                let maps = maps.filter(|maps| !maps.is_empty());
                maps.map(|maps| id_map(maps)).ok_or_else(|| Error::spec(field, "is missing"))
            };
            plan.user = Some(UserNamespace::New {
                uid_map: maps(linux.uid_mappings().as_ref(), "linux.uidMappings")?,
                gid_map: maps(linux.gid_mappings().as_ref(), "linux.gidMappings")?,
            });
        }
        (LinuxNamespaceType::User, Some(path)) => plan.user = Some(UserNamespace::Join(open(path, kind)?)),
        (LinuxNamespaceType::Pid, Some(path)) => plan.pids = Some(open(path, kind)?),
        (_, Some(path)) => plan.join.push(open(path, kind)?),
        (LinuxNamespaceType::Cgroup, None) => plan.new_cgroup = true,
        (_, None) => plan.new |= flag(kind),
    }
    Ok(())
}

/// `oci_spec` numbers the kinds as the kernel does.
fn flag(kind: LinuxNamespaceType) -> u32 {
    kind as u32
}

fn open(path: &Path, kind: LinuxNamespaceType) -> Result<Join, Error> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(Error::step(format!("open the {kind} namespace {}", path.display())))?;
    Ok(Join { file, kind: flag(kind), path: path.display().to_string() })
}

/// Mappings as `/proc/PID/uid_map` takes them.
pub(crate) fn id_map(maps: &[LinuxIdMapping]) -> String {
    maps.iter().fold(String::new(), |text, map| {
        text + &format!("{} {} {}\n", map.container_id(), map.host_id(), map.size())
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxBuilder, LinuxNamespaceBuilder};

    use super::*;

    fn linux(kinds: &[LinuxNamespaceType]) -> Linux {
        let list = kinds
            .iter()
            .map(|kind| LinuxNamespaceBuilder::default().typ(*kind).build().unwrap())
            .collect::<Vec<_>>();
        LinuxBuilder::default().namespaces(list).build().unwrap()
    }

    #[test]
    fn new_ones_become_flags() {
        use LinuxNamespaceType::{Cgroup, Ipc, Mount, Pid};
        let plan = plan(&linux(&[Mount, Pid, Ipc, Cgroup])).unwrap();
        assert_eq!(plan.new.cast_signed(), libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC);
        assert!(plan.new_cgroup && !plan.has_uts && plan.join.is_empty());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        use LinuxNamespaceType::{Mount, Pid, Time, User};
        let text = |kinds: &[LinuxNamespaceType]| plan(&linux(kinds)).unwrap_err().to_string();
        assert_eq!(text(&[Pid]), "linux.namespaces: a mount namespace of the container's own is needed");
        assert_eq!(text(&[Mount, Pid, Pid]), "linux.namespaces[2]: pid is given twice");
        assert_eq!(text(&[Mount, Time]), "linux.namespaces[1].type: time namespaces are not offered");
        assert_eq!(text(&[Mount, User]), "linux.uidMappings: is missing");
    }
}

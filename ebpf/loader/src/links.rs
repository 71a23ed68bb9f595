//! Attaches the programs to the cgroup: links are pinned, and a program is replaced in its link, so that there is no
//! moment without one.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{Program, ProgramError},
};
use thiserror::Error;

use crate::{pins::PinDir, sys};

/// One hook: the program's name in the object and the kernel's number of the attach type.
struct Hook {
    program: &'static str,
    attach_type: u32,
}

/// Back-translation comes first, so that no connection is ever translated one way only.
const HOOKS: [Hook; 10] = [
    Hook { program: "kl_getpeername4", attach_type: 29 },
    Hook { program: "kl_getpeername6", attach_type: 30 },
    Hook { program: "kl_recvmsg4", attach_type: 19 },
    Hook { program: "kl_recvmsg6", attach_type: 20 },
    Hook { program: "kl_sendmsg4", attach_type: 14 },
    Hook { program: "kl_sendmsg6", attach_type: 15 },
    Hook { program: "kl_connect4", attach_type: 10 },
    Hook { program: "kl_connect6", attach_type: 11 },
    Hook { program: "kl_post_bind4", attach_type: 12 },
    Hook { program: "kl_post_bind6", attach_type: 13 },
];

/// A program cannot be loaded or attached.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The object has no such program.
    #[error("the BPF object has no program {0}")]
    Absent(&'static str),
    /// The kernel refused a program.
    #[error("the kernel does not load program {name}")]
    Load {
        /// Which program.
        name: &'static str,
        /// Why; carries the verifier's log.
        #[source]
        source: ProgramError,
    },
    /// The cgroup cannot be opened.
    #[error("cannot open cgroup {}", path.display())]
    Cgroup {
        /// Which directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A device cannot be noted.
    #[error("cannot write the map of devices")]
    Device(#[source] aya::maps::MapError),
    /// A link could not be made, updated or pinned.
    #[error("cannot {action} the link of {name}")]
    Link {
        /// What was tried.
        action: &'static str,
        /// Which program.
        name: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What attaching did, per hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// New links.
    pub created: usize,
    /// Links of an earlier process whose program was replaced in place.
    pub updated: usize,
}

/// Loads every program into the kernel.
pub(crate) fn load(object: &mut Ebpf) -> Result<(), LinkError> {
    for hook in &HOOKS {
        let name = hook.program;
        let program = object.program_mut(name).ok_or(LinkError::Absent(name))?;
        let failed = |source| LinkError::Load { name, source };
        match program {
            Program::CgroupSock(program) => program.load().map_err(failed)?,
            Program::CgroupSockAddr(program) => program.load().map_err(failed)?,
            _ => return Err(LinkError::Absent(name)),
        }
    }
    Ok(())
}

/// Makes every hook of the cgroup run the loaded programs.
pub(crate) fn attach(object: &Ebpf, pins: &PinDir, cgroup_dir: &Path) -> Result<Attached, LinkError> {
    let no_cgroup = |source| LinkError::Cgroup { path: cgroup_dir.to_owned(), source };
    let cgroup = File::open(cgroup_dir).map_err(no_cgroup)?;
    // The kernel's cgroup id is the inode number of its directory.
    let cgroup_id = cgroup.metadata().map_err(no_cgroup)?.ino();
    let mut attached = Attached::default();
    for hook in &HOOKS {
        let name = hook.program;
        let program = object.program(name).ok_or(LinkError::Absent(name))?;
        let program = program.fd().map_err(|source| LinkError::Load { name, source })?.as_fd();
        let pin = pins.link(name);
        if update(&pin, program, hook, cgroup_id)? {
            attached.updated += 1;
        } else {
            create(&pin, program, hook, cgroup.as_fd())?;
            attached.created += 1;
        }
    }
    Ok(attached)
}

/// Puts the program into the pinned link; false where there is none that still hangs on this cgroup.
fn update(pin: &Path, program: BorrowedFd<'_>, hook: &Hook, cgroup_id: u64) -> Result<bool, LinkError> {
    let name = hook.program;
    let link = match sys::get_pinned(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(LinkError::Link { action: "open", name, source }),
    };
    let info =
        sys::link_info(link.as_fd()).map_err(|source| LinkError::Link { action: "inspect", name, source })?;
    if info.cgroup_id != cgroup_id || info.attach_type != hook.attach_type {
        return Ok(false);
    }
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(true),
        // The cgroup went away and took the attachment along.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        Err(source) => Err(LinkError::Link { action: "update", name, source }),
    }
}

/// Attaches and pins, replacing the pin of a link that is of no use any more.
fn create(pin: &Path, program: BorrowedFd<'_>, hook: &Hook, cgroup: BorrowedFd<'_>) -> Result<(), LinkError> {
    let name = hook.program;
    let failed = |action| move |source| LinkError::Link { action, name, source };
    let link = sys::link_create(program, cgroup, hook.attach_type).map_err(failed("create"))?;
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("replace")(error)),
        _ => {}
    }
    sys::pin(link.as_fd(), pin).map_err(failed("pin"))
}

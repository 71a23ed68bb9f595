//! Processes that hold something: user namespaces with given maps, a place in a cgroup.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::fork::{Forked, fork};
use super::link::{self, Message, Received};
use super::sys;
use crate::error::Error;

/// How long a child may take to make a user namespace.
const LIMIT: Duration = Duration::from_secs(30);

/// Makes a user namespace with these maps and gives it; no process stays in it.
pub(crate) fn user_namespace(uid_map: &str, gid_map: &str) -> Result<OwnedFd, Error> {
    let child = fork(0, None, None, |socket| wait_in_new_namespace(&socket))?;
    let namespace = open(&child, uid_map, gid_map);
    child.discard();
    namespace
}

/// Makes a process that does nothing until it is discarded, or its maker ends.
pub(crate) fn placeholder() -> Result<Forked, Error> {
    fork(0, None, None, |socket| {
        keep_only(&socket);
        link::wait_for_go(socket.as_fd());
        sys::exit(0)
    })
}

/// Lets go of everything that the maker had open: connections of its clients, sockets of other processes in the making.
fn keep_only(socket: &OwnedFd) {
    let kept = socket.as_raw_fd();
    sys::close_range(3, kept - 1);
    sys::close_range(kept + 1, i32::MAX);
}

fn wait_in_new_namespace(socket: &OwnedFd) -> Infallible {
    keep_only(socket);
    if sys::unshare(libc::CLONE_NEWUSER.cast_unsigned()).is_ok()
        && link::send(socket.as_fd(), Message::MapMe).is_ok()
    {
        link::wait_for_go(socket.as_fd());
    }
    sys::exit(0)
}

fn open(child: &Forked, uid_map: &str, gid_map: &str) -> Result<OwnedFd, Error> {
    match link::receive(&child.socket, LIMIT).map_err(Error::step("make a user namespace"))? {
        Received::Message(Message::MapMe, None) => {}
        _ => {
            return Err(Error::Unavailable {
                feature: "user namespaces",
                reason: "the kernel refuses to make one (user.max_user_namespaces?)".to_owned(),
            });
        }
    }
    write_maps(child.pid, uid_map, gid_map)?;
    let path = format!("/proc/{}/ns/user", child.pid);
    rustix::fs::open(path.as_str(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(Error::step(format!("open {path}")))
}

/// Writes the id maps of a process that has just made its user namespace.
pub(crate) fn write_maps(pid: i32, uid_map: &str, gid_map: &str) -> Result<(), Error> {
    for (name, map, field) in
        [("uid_map", uid_map, "linux.uidMappings"), ("gid_map", gid_map, "linux.gidMappings")]
    {
        // The kernel takes the whole map in one write or not at all.
        std::fs::write(format!("/proc/{pid}/{name}"), map)
            .map_err(Error::step(format!("{field}: write {name}")))?;
    }
    Ok(())
}

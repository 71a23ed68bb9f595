//! The file in which the agent leaves the state of the network between nodes for `keelson-vxlan`.
//!
//! Written in one step, so that a plugin that reads meanwhile sees the old state or the new one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;

pub use cni_plugins_types::overlay::{FORMAT, State, StateError};

use crate::{
    file,
    netlink::{Netlink, NetlinkError, Step},
};

/// The file's name in the directory of the plugins' records.
pub const FILE_NAME: &str = "overlay.json";
/// What the agent's routes are told from others by (`ip route show proto 76`).
pub const ROUTE_PROTOCOL: u8 = 76;
/// The main table's number.
const MAIN_TABLE: u32 = 254;
/// Kinds of the links that carry it.
const TUNNELS: [&str; 2] = ["vxlan", "wireguard"];
/// Largest file that is read.
const MAX_SIZE: u64 = 1 << 20;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why there is no state to go by.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// It is not there: the agent has not come so far.
    #[error("{} does not exist: the agent has not set up the overlay (yet)", .0.display())]
    Absent(PathBuf),
    /// It could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What it says is of no use.
    #[error("{}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: StateError,
    },
}

/// Reads the state, checked, of this boot.
pub fn read(path: &Path) -> Result<State, OverlayError> {
    let unreadable = |source| OverlayError::Read { path: path.to_owned(), source };
    let text = match file::read_regular(path, MAX_SIZE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(OverlayError::Absent(path.to_owned()));
        }
        text => text.map_err(unreadable)?,
    };
    let boot_id = boot_id().map_err(unreadable)?;
    State::parse(&text, &boot_id).map_err(|source| OverlayError::State { path: path.to_owned(), source })
}

/// Replaces the state, of this boot, unless the file says it already; tells whether it was written. For one writer.
pub fn write(path: &Path, state: &State) -> io::Result<bool> {
    let state = State { version: FORMAT, boot_id: boot_id()?, ..state.clone() };
    let mut text = serde_json::to_vec_pretty(&state)?;
    text.push(b'\n');
    if fs::read(path).is_ok_and(|current| current == text) {
        return Ok(false);
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)?;
    Ok(true)
}

/// Removes the state; absence is success.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The tunnel's device that a state names, whatever else it says and of whichever boot it is.
pub fn device(path: &Path) -> Option<String> {
    let state: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    state["device"].as_str().map(str::to_owned)
}

/// Takes the network between nodes out of the calling thread's namespace: the agent's routes, and the device if it is a
/// tunnel; tells what went.
pub fn take_down(device: Option<&str>) -> Result<Vec<String>, NetlinkError> {
    let netlink = Netlink::open()?;
    let mut gone = Vec::new();
    for v6 in [false, true] {
        let routes = netlink.routes(v6)?;
        for route in routes.iter().filter(|it| it.protocol == ROUTE_PROTOCOL && it.table == MAIN_TABLE) {
            netlink.run_one(Step::delete_route_of(ROUTE_PROTOCOL, route.dst))?;
            gone.push(format!("route to {}", route.dst));
        }
    }
    if let Some(name) = device
        && let Some(link) = netlink.link(name)?
        && link.kind.is_some_and(|kind| TUNNELS.contains(&kind.as_str()))
        && netlink.delete_link(name)?
    {
        gone.push(format!("interface {name}"));
    }
    Ok(gone)
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            ready: true,
            mtu: 1450,
            pod_cidrs: vec!["10.244.3.0/24".parse().unwrap()],
            ..State::default()
        }
    }

    #[test]
    fn it_is_replaced_when_it_differs_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni/overlay.json");
        assert!(matches!(read(&path), Err(OverlayError::Absent(_))));
        assert!(write(&path, &state()).unwrap());
        assert!(!write(&path, &state()).unwrap(), "nothing changed");
        assert_eq!(read(&path).unwrap().mtu, 1450);
        assert!(write(&path, &State { mtu: 1400, ..state() }).unwrap());
        assert_eq!(read(&path).unwrap().mtu, 1400);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
    }

    #[test]
    fn an_earlier_boots_state_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let old = State { version: FORMAT, boot_id: "another".to_owned(), ..state() };
        fs::write(&path, serde_json::to_vec(&old).unwrap()).unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(&error, OverlayError::State { source: StateError::OtherBoot, .. }), "{error}");
    }
}

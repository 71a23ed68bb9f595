//! DEL, GC and what else takes pairs away.
//!
//! Deleting a veth pair costs the kernel tens of milliseconds, most of it waiting for other processors, and
//! hardly more for a hundred pairs. So DEL stops the pair's traffic, gives the addresses back, moves the
//! host's end into the device group [`DOOMED`] and answers. A detached child waits [`GATHER`] for other
//! DELs and then deletes the whole group. The mark is in the kernel: should the child be killed, the next
//! DEL, GC or an ADD of the same attachment finishes its work.

use std::{fs::OpenOptions, thread, time::Duration};

use cni_plugins_host::{
    detach,
    lock::try_lock,
    netlink::{Link, LinkChange, LinkRef, Netlink, Step},
};
use nix::errno::Errno;

use super::{config::BridgeConfig, ipam, names};
use crate::{call::Call, failure::Failure, plugins::masquerade, state::StateDir};

/// Device group of links that are going to be deleted; the number has no other meaning.
const DOOMED: u32 = 0x6b6c_0d1e;
/// How long the child waits for other DELs.
const GATHER: Duration = Duration::from_millis(60);
/// How many links one message batch changes.
const BATCH: usize = 64;

/// Takes the pair away by the name of its host end, then the addresses; either being gone is success. The
/// pair first: a released address must not be in use any more.
pub(super) fn del(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let netlink = Netlink::open()?;
    let name = names::host_interface(&call.network, &call.container_id, &call.ifname);
    let stopped = stop(&netlink, &name, &format!("{}:{}:{}", call.network, call.container_id, call.ifname));
    // Also when the list has lost the key since.
    let is_masked = config.ip_masq || masquerade::is_recorded(call)?;
    let unmasked = if is_masked { masquerade::detach(call) } else { Ok(()) };
    let released = ipam::delegate(call, config);
    if stopped? {
        delete_later(call, &netlink)?;
    }
    unmasked?;
    released.map(|_| ())
}

/// Removes this network's pairs that no valid attachment explains, then the addresses.
pub(super) fn gc(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let valid = call.valid_attachments()?;
    let netlink = Netlink::open()?;
    let links = netlink.links()?;
    let bridge = links.iter().find(|link| link.name == config.bridge).map(|bridge| bridge.index);
    let kept = names::valid_names(&call.network, &valid);
    let stale: Vec<&Link> = links
        .iter()
        .filter(|link| names::is_stale(link, &call.network, bridge, &kept) && link.group != DOOMED)
        .collect();
    let deleted = doom(&netlink, &stale).and_then(|()| delete_doomed(&netlink));
    let is_masked = config.ip_masq || masquerade::has_records(call)?;
    let unmasked = if is_masked { masquerade::collect(call) } else { Ok(()) };
    let released = ipam::delegate(call, config);
    deleted?;
    unmasked?;
    released.map(|_| ())
}

/// Deletes what an earlier DEL, of whatever attachment, left to its child, when the pod's interface is that. Tells whether
/// it was.
pub(super) fn finish_removal(host: &Netlink, inside: &Netlink, found: &Link) -> Result<bool, Failure> {
    let peer = found.peer.map(|index| host.link_by_index(index)).transpose()?.flatten();
    // An index alone may be of a link in another namespace.
    if let Some(doomed) = peer.filter(|peer| peer.group == DOOMED && peer.peer == Some(found.index)) {
        host.delete_link(&doomed.name)?;
    }
    // The child may have been faster.
    Ok(inside.link(&found.name)?.is_none())
}

/// Removes every pair and bridge that these plugins made in this network namespace; returns their names.
pub(crate) fn cleanup() -> Result<Vec<String>, Failure> {
    let netlink = Netlink::open()?;
    let links = netlink.links()?;
    let pairs: Vec<&Link> = links.iter().filter(|link| names::is_ours(link)).collect();
    doom(&netlink, &pairs)?;
    delete_doomed(&netlink)?;
    let mut removed: Vec<String> = pairs.iter().map(|link| format!("link {}", link.name)).collect();
    for bridge in links.iter().filter(|link| link.alias == names::BRIDGE_ALIAS) {
        let in_use = links.iter().any(|link| {
            link.controller == Some(bridge.index)
                && !names::is_ours(link)
                && link.alias != names::BRIDGE_ALIAS
        });
        if in_use {
            removed.push(format!("kept: bridge {} has ports of others", bridge.name));
        } else if netlink.delete_link(&bridge.name)? {
            removed.push(format!("link {}", bridge.name));
        }
    }
    Ok(removed)
}

/// Stops a pair's traffic by taking the host's end down, and marks it; tells whether there was one.
///
/// Disabling the bridge's port would be cheaper, but the kernel enables it again when it comes to see (up
/// to a second later) that the pod's end came up.
fn stop(netlink: &Netlink, name: &str, attachment: &str) -> Result<bool, Failure> {
    let alias = format!("{}{attachment}", names::GONE);
    let mark =
        LinkChange { up: Some(false), group: Some(DOOMED), alias: Some(&alias), ..LinkChange::default() };
    Ok(netlink.run_one(Step::set_link(LinkRef::Name(name), &mark).tolerating(Errno::ENODEV))?)
}

/// Has a child delete the group, unless one is about to.
fn delete_later(call: &Call, netlink: &Netlink) -> Result<(), Failure> {
    let state = StateDir::of(call, "bridge")?;
    let waiting = state.make().and_then(|dir| {
        let path = dir.join("sweep");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let locked = file.and_then(try_lock);
        locked.map_err(|error| Failure::io(&format!("lock {}", path.display()), &error))
    });
    let started = match waiting {
        // That one lets go of its lock before it deletes, so it takes in what was marked until now.
        Ok(None) => return Ok(()),
        Ok(Some(lock)) => detach::run(move || {
            thread::sleep(GATHER);
            drop(lock);
            // Nobody is left to tell; the next DEL or GC tries again.
            drop(Netlink::open().map(|netlink| delete_doomed(&netlink)));
        })
        .is_ok(),
        Err(_) => false,
    };
    if started { Ok(()) } else { delete_doomed(netlink) }
}

fn doom(netlink: &Netlink, links: &[&Link]) -> Result<(), Failure> {
    let mark = LinkChange { group: Some(DOOMED), ..LinkChange::default() };
    for batch in links.chunks(BATCH) {
        let steps = batch
            .iter()
            .map(|link| Step::set_link(LinkRef::Index(link.index), &mark).tolerating(Errno::ENODEV));
        netlink.run(steps.collect())?;
    }
    Ok(())
}

fn delete_doomed(netlink: &Netlink) -> Result<(), Failure> {
    netlink.run_one(Step::delete_group(DOOMED))?;
    Ok(())
}

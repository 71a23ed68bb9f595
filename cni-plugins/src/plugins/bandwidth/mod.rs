//! `keelson-bandwidth`: limits what a pod receives (ingress) and sends (egress). Chained behind the plugin
//! that made the pod's veth pair, whose result it hands on.
//!
//! Both are token buckets, each where the packets are being *sent*, so that a full bucket makes the sender
//! wait instead of dropping what arrived: ingress on the host's end of the pair, egress on the pod's end.
//! The usual other way for egress, an `ifb` device per pod to which the host's end mirrors what it
//! receives, needs two more kernel modules, a third device to make and delete for each pod, and queues
//! packets that the pod's sockets believe are sent. `sch_tbf` alone is in every kernel from 6.1 on that we
//! met. The price: a container with CAP_NET_ADMIN can lift its own egress limit; CHECK finds that.

mod config;

use cni_plugins_host::{
    netlink::{Link, Netlink, NetlinkError, Step, TokenBucket},
    netns,
};
use cni_plugins_types::CniResult;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use self::config::{BandwidthConfig, Limits};
use crate::{
    call::{Attachment, Call, Command},
    failure::Failure,
    state::StateDir,
};

/// Directory of the records.
const PLUGIN: &str = "bandwidth";

/// Where limits are.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    netns: String,
    inode: u64,
    /// Name of the host's end.
    host_interface: String,
    /// Its index: a later link of that name is not ours.
    host_index: u32,
    ingress: bool,
    egress: bool,
}

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    let state = StateDir::of(call, PLUGIN)?;
    match call.command {
        Command::Add => add(call, &BandwidthConfig::of(call)?, &state).map(Some),
        Command::Del => remove(&state, &call.network, &Attachment::of(call)).map(|()| None),
        Command::Check => check(call, &BandwidthConfig::of(call)?).map(|()| None),
        Command::Gc => gc(call, &state).map(|()| None),
        Command::Status => status(call).map(|()| None),
        Command::Version => Ok(None),
    }
}

fn add(call: &Call, config: &BandwidthConfig, state: &StateDir) -> Result<CniResult, Failure> {
    let result = call.require_prev_result()?;
    let limits = config.limits()?;
    if limits.ingress.or(limits.egress).is_none() {
        return Ok(result);
    }
    let (pod, host) = (Netlink::open_in(&call.netns)?, Netlink::open()?);
    let (inside, outside) = pair(call, &pod, &host)?;
    let record = Record {
        netns: call.netns.to_string_lossy().into_owned(),
        inode: netns::identity(&call.netns)?,
        host_interface: outside.name.clone(),
        host_index: outside.index,
        ingress: limits.ingress.is_some(),
        egress: limits.egress.is_some(),
    };
    state.write(call, &record)?;
    let set = |netlink: &Netlink, link: &Link, bucket: Option<TokenBucket>| match bucket {
        Some(bucket) => netlink.run(vec![Step::set_token_bucket(link.index, bucket)]).map(|_| ()),
        None => Ok(()),
    };
    let limited = set(&host, &outside, limits.ingress).and_then(|()| set(&pod, &inside, limits.egress));
    if let Err(error) = limited {
        let undone = remove(state, &call.network, &Attachment::of(call));
        let failures: Vec<String> = undone.err().map(|undo| undo.to_string()).into_iter().collect();
        return Err(told(error).with_undo_failures(&failures));
    }
    Ok(result)
}

/// Takes the limits away that a record tells of, and the record. Links that are gone need nothing.
fn remove(state: &StateDir, network: &str, attachment: &Attachment) -> Result<(), Failure> {
    let record: Option<Record> = state.read(network, attachment)?;
    if let Some(record) = record {
        let host = Netlink::open()?;
        if record.ingress {
            let link = host.link_by_index(record.host_index)?;
            if link.is_some_and(|link| link.name == record.host_interface) {
                clear(&host, record.host_index)?;
            }
        }
        let path = std::path::Path::new(&record.netns);
        if record.egress && netns::probe(path)? && netns::identity(path)? == record.inode {
            let pod = Netlink::open_in(path)?;
            if let Some(link) = pod.link(&attachment.ifname)? {
                clear(&pod, link.index)?;
            }
        }
    }
    state.remove(network, attachment)
}

fn clear(netlink: &Netlink, index: u32) -> Result<(), Failure> {
    match netlink.run_one(Step::delete_root_qdisc(index)) {
        // The link went meanwhile, or has only the discipline it was made with.
        Err(error) if error.is(Errno::ENODEV) || error.is(Errno::EINVAL) => Ok(()),
        cleared => Ok(cleared.map(|_| ())?),
    }
}

fn check(call: &Call, config: &BandwidthConfig) -> Result<(), Failure> {
    call.require_prev_result()?;
    let Limits { ingress, egress } = config.limits()?;
    if ingress.or(egress).is_none() {
        return Ok(());
    }
    let (pod, host) = (Netlink::open_in(&call.netns)?, Netlink::open()?);
    let (inside, outside) = pair(call, &pod, &host)?;
    for (what, netlink, link, limit) in
        [("ingress", &host, &outside, ingress), ("egress", &pod, &inside, egress)]
    {
        let Some(limit) = limit else { continue };
        let found = netlink.root_qdisc(link.index)?;
        if found.as_ref().and_then(|qdisc| qdisc.rate) != Some(limit.rate) {
            let found = found.map_or("no queueing discipline".to_owned(), |qdisc| match qdisc.rate {
                Some(rate) => format!("a limit of {} bits/s", rate * 8),
                None => format!("the queueing discipline {}", qdisc.kind),
            });
            return Err(Failure::different(format!(
                "{what}: {} has {found}, not a limit of {} bits/s",
                link.name,
                limit.rate * 8
            )));
        }
    }
    Ok(())
}

fn gc(call: &Call, state: &StateDir) -> Result<(), Failure> {
    let valid = call.valid_attachments()?;
    let mut first_failure = None;
    for stale in state.list(&call.network)?.into_iter().filter(|found| !valid.contains(found)) {
        if let Err(failure) = remove(state, &call.network, &stale) {
            first_failure.get_or_insert(failure);
        }
    }
    first_failure.map_or(Ok(()), Err)
}

fn status(call: &Call) -> Result<(), Failure> {
    // The runtime gives STATUS no limits of a pod; the list's own must be right.
    BandwidthConfig::of(call)?.limits()?;
    Netlink::open()?;
    Ok(())
}

/// The pod's end of its veth pair, and the host's.
fn pair(call: &Call, pod: &Netlink, host: &Netlink) -> Result<(Link, Link), Failure> {
    let inside = pod
        .link(&call.ifname)?
        .ok_or_else(|| Failure::config(format!("CNI_IFNAME: the pod has no interface {}", call.ifname)))?;
    let outside = match inside.peer.filter(|_| inside.kind.as_deref() == Some("veth")) {
        Some(index) => host.link_by_index(index)?.filter(|link| link.kind.as_deref() == Some("veth")),
        None => None,
    };
    let outside = outside.ok_or_else(|| {
        Failure::config(format!(
            "CNI_IFNAME: {} is not a veth with its other end on the host, which limits need",
            call.ifname
        ))
    })?;
    Ok((inside, outside))
}

fn told(error: NetlinkError) -> Failure {
    if error.is(Errno::ENOENT) || error.is(Errno::EOPNOTSUPP) {
        return Failure::unsupported("bandwidth", &"tbf", "this kernel has no sch_tbf");
    }
    error.into()
}

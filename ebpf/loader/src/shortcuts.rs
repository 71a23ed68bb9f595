//! Pods of one bridge that hand their packets straight to each other: a program on the host's side of each pod's link
//! (TCX), and a hash of the pods' link addresses.
//!
//! A pod is in both or in neither. Whoever's programs stand on its link besides want to see its packets: then the bridge
//! carries them. The hash holds true for a while after it was last looked at ([`TRUST`]), so that nothing is sent to pods
//! that came and went while nobody was there to follow them.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
    programs::SchedClassifier,
};
use ebpf_common::{LinkAddress, PodLink};

use crate::{
    devices::{TCX_EGRESS, TCX_INGRESS, update},
    pins::PinDir,
    sys,
};

/// The hash of pods.
pub(crate) type ShortcutMap = HashMap<MapData, LinkAddress, PodLink>;

/// How long what was written holds true without being written again.
pub(crate) const TRUST: Duration = Duration::from_secs(90);
const PROGRAM: &str = "kl_pod";
const PIN: &str = "pod-";

/// The host's side of a pod's link, a port of the pods' bridge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodPort {
    /// The kernel's number.
    pub index: u32,
    /// The address that the pod's side has.
    pub address: [u8; 6],
}

/// Loads the program. A kernel that does not take it has a bridge.
pub(crate) fn load(object: &mut Ebpf) {
    if let Some(Err(error)) = program(object).map(SchedClassifier::load) {
        tracing::info!(error = &error as &dyn std::error::Error, "pods' packets take the bridge");
    }
}

fn program(object: &mut Ebpf) -> Option<&mut SchedClassifier> {
    object.program_mut(PROGRAM)?.try_into().ok()
}

/// Makes exactly these pods hand their packets to each other; how many of them do.
pub(crate) fn serve(object: &mut Ebpf, pins: &PinDir, map: &mut ShortcutMap, ports: &[PodPort]) -> usize {
    let program = program(object).and_then(|program| program.fd().ok());
    let wanted = match &program {
        Some(program) => attached(program.as_fd(), pins, ports),
        None => BTreeMap::new(),
    };
    // What is gone or has moved first: nothing is to be sent there.
    for (address, link) in map.iter().filter_map(Result::ok).collect::<Vec<_>>() {
        if wanted.get(&address).copied() != link.index_for(&address)
            && let Err(error) = map.remove(&address)
        {
            tracing::warn!(?address, %error, "packets may be handed to a pod that is gone");
        }
    }
    for (pin, index) in pod_pins(&pins.links()) {
        if !wanted.values().any(|other| *other == index)
            && let Err(error) = release(&pin)
        {
            tracing::warn!(index, %error, "cannot take the packet program off a pod's link");
        }
    }
    let written = wanted.iter().filter(|(address, index)| {
        let link = PodLink::new(address, **index);
        map.get(address, 0).is_ok_and(|present| present == link) || map.insert(*address, link, 0).is_ok()
    });
    written.count()
}

/// Puts the program on the pods' links; those where it is alone, each with its address.
fn attached(program: BorrowedFd<'_>, pins: &PinDir, ports: &[PodPort]) -> BTreeMap<LinkAddress, u32> {
    let mut wanted: BTreeMap<LinkAddress, Option<u32>> = BTreeMap::new();
    for port in ports {
        // Of two with one address the bridge knows which one spoke last.
        wanted
            .entry(LinkAddress::new(port.address))
            .and_modify(|taken| *taken = None)
            .or_insert(Some(port.index));
    }
    let served = wanted.into_iter().filter_map(|(address, index)| {
        let index = index?;
        match attach(program, &pins.link(&format!("{PIN}{index}-in")), index) {
            Ok(true) => Some((address, index)),
            Ok(false) => None,
            Err(error) => {
                tracing::debug!(index, %error, "a pod's packets take the bridge");
                None
            }
        }
    });
    served.collect()
}

/// Whether the program is on the link now, and nobody else's is.
fn attach(program: BorrowedFd<'_>, pin: &Path, index: u32) -> io::Result<bool> {
    let own = match sys::get_pinned(pin) {
        Ok(link) => sys::link_info(link.as_fd())?.id,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let foreign = |id: &u32| *id == 0 || *id != own;
    if sys::links_on_device(index, TCX_INGRESS)?.iter().any(foreign)
        || !sys::links_on_device(index, TCX_EGRESS)?.is_empty()
    {
        return Ok(false);
    }
    if update(pin, program, index, TCX_INGRESS)? {
        return Ok(true);
    }
    let link = sys::link_create_on_device(program, index, TCX_INGRESS, 0)?;
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::pin(link.as_fd(), pin)?;
    Ok(true)
}

fn release(pin: &Path) -> io::Result<()> {
    if let Ok(link) = sys::get_pinned(pin)
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        tracing::debug!(pin = %pin.display(), %error, "the pod had gone already");
    }
    fs::remove_file(pin)
}

/// The pins of pods' links, with the index of each.
fn pod_pins(links: &Path) -> Vec<(PathBuf, u32)> {
    let entries = fs::read_dir(links).into_iter().flatten().flatten();
    let pins = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let (index, _) = name.strip_prefix(PIN)?.split_once('-')?;
        Some((entry.path(), index.parse().ok()?))
    });
    pins.collect()
}

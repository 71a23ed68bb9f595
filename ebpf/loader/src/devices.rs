//! Puts the packet programs on network devices: pinned TCX links where the kernel has them (6.6), filters of a clsact
//! qdisc elsewhere. A program is replaced in place; other programs on the device are left alone, ours comes beside them.
//!
//! What a device's settings were before stands in the device map before they are changed, so that whoever takes the
//! programs off can put them back.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
    programs::{
        SchedClassifier, TcAttachType, Xdp,
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
    },
};
use ebpf_common::{DeviceEntry, NetAddr, map_names};

use crate::{links::LinkError, maps::pinned, pins::PinDir, sys};

pub(crate) const TCX_INGRESS: u32 = 46;
pub(crate) const TCX_EGRESS: u32 = 47;
const XDP: u32 = 37;
/// Only where the driver itself runs the program.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
/// How filters of ours are told from others.
const PRIORITY: u16 = 75;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 1);
/// Pins that stand for a filter: they hold the program, and name the device.
const FILTER: &str = "clsact-";
const LINK: &str = "tcx-";
const EARLY: &str = "xdp-";
const EARLY_PROGRAM: &str = "kl_early";
/// Every packet program.
const PROGRAMS: [&str; 7] = [
    "kl_arrive_outer",
    "kl_arrive_inner",
    "kl_leave",
    "kl_bare_outer",
    "kl_bare_inner",
    "kl_bare_leave",
    OWN_ERRORS,
];
/// What runs where the node talks to itself.
const OWN_ERRORS: &str = "kl_come_back";
const LOOPBACK: &str = "lo";
/// What the kernel calls the driver of a bridge.
const BRIDGE: &str = "bridge";

/// The device map.
pub(crate) type DeviceMap = HashMap<MapData, u32, DeviceEntry>;

/// A network device whose packets are looked at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Device {
    /// The kernel's number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Where it leads.
    pub side: Side,
    /// Its packets start with an Ethernet header.
    pub ethernet: bool,
    /// Address of its own behind which clients are hidden from the IPv4 backends that it leads to.
    pub source_v4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub source_v6: Option<Ipv6Addr>,
    /// Frames that go from wire to wire are handled in the driver, where it can do that.
    pub early: bool,
}

/// Where a device leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Out of the node: clients there are outside.
    Outer,
    /// To pods.
    Inner,
}

/// A packet program, for trying it on frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketHook {
    /// In the driver of a device that leads outside.
    Early,
    /// Arriving from outside.
    Outer,
    /// Arriving from pods.
    Inner,
    /// Leaving.
    Leave,
}

/// Runs a program on a frame that arrives at the device of this number, so many times.
pub(crate) fn try_out(
    object: &mut Ebpf,
    hook: PacketHook,
    device: u32,
    frame: &[u8],
    repeat: u32,
) -> Result<sys::TestRun, LinkError> {
    let failed = |name| move |source| LinkError::Load { name, source };
    let tried = |name| move |source| LinkError::Link { action: "try", name, source };
    if hook == PacketHook::Early {
        // The start of the context: where the data begins and ends, and the device.
        let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let context: Vec<u8> = [0, len, 0, device, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        let fd = early(object)?.fd().map_err(failed(EARLY_PROGRAM))?;
        return sys::test_run(fd.as_fd(), frame, &context, repeat).map_err(tried(EARLY_PROGRAM));
    }
    let name = match hook {
        PacketHook::Outer => "kl_arrive_outer",
        PacketHook::Inner => "kl_arrive_inner",
        PacketHook::Leave | PacketHook::Early => "kl_leave",
    };
    // The start of the context: the device is the eleventh word.
    let mut context = [0_u8; 192];
    context[40..44].copy_from_slice(&device.to_ne_bytes());
    let fd = classifier(object, name)?.fd().map_err(failed(name))?;
    sys::test_run(fd.as_fd(), frame, &context, repeat).map_err(tried(name))
}

/// One of a device's two directions.
#[derive(Clone, Copy)]
struct Direction {
    suffix: &'static str,
    tcx: u32,
    clsact: TcAttachType,
}

const LEAVING: Direction = Direction { suffix: "out", tcx: TCX_EGRESS, clsact: TcAttachType::Egress };
const ARRIVING: Direction = Direction { suffix: "in", tcx: TCX_INGRESS, clsact: TcAttachType::Ingress };

/// Loads the programs into the kernel.
pub(crate) fn load(object: &mut Ebpf) -> Result<(), LinkError> {
    for name in PROGRAMS {
        classifier(object, name)?.load().map_err(|source| LinkError::Load { name, source })?;
    }
    // A kernel that does not take it has the others.
    if let Err(error) = early(object)
        .and_then(|program| program.load().map_err(|source| LinkError::Load { name: EARLY_PROGRAM, source }))
    {
        tracing::info!(error = &error as &dyn std::error::Error, "no packets are handled in drivers (XDP)");
    }
    Ok(())
}

fn early(object: &mut Ebpf) -> Result<&mut Xdp, LinkError> {
    let name = EARLY_PROGRAM;
    let program = object.program_mut(name).ok_or(LinkError::Absent(name))?;
    program.try_into().map_err(|source| LinkError::Load { name, source })
}

/// Puts the driver's program on a device, or takes it off; whether it is there now.
fn attach_early(object: &mut Ebpf, pins: &PinDir, device: &Device) -> io::Result<bool> {
    let pin = pins.link(&format!("{EARLY}{}-in", device.index));
    if !device.early || !device.ethernet || device.side != Side::Outer {
        if pin.exists() {
            release(&pin)?;
        }
        return Ok(false);
    }
    let Ok(program) = early(object) else {
        return Ok(false);
    };
    let Ok(fd) = program.fd() else {
        return Ok(false);
    };
    let fd = fd.as_fd();
    if let Ok(link) = sys::get_pinned(&pin) {
        if sys::device_link_info(link.as_fd())?.0 == device.index
            && sys::link_update(link.as_fd(), fd).is_ok()
        {
            return Ok(true);
        }
        fs::remove_file(&pin)?;
    }
    let link = sys::link_create_on_device(fd, device.index, XDP, XDP_FLAGS_DRV_MODE)?;
    sys::pin(link.as_fd(), &pin)?;
    Ok(true)
}

fn classifier<'o>(object: &'o mut Ebpf, name: &'static str) -> Result<&'o mut SchedClassifier, LinkError> {
    let program = object.program_mut(name).ok_or(LinkError::Absent(name))?;
    program.try_into().map_err(|source| LinkError::Load { name, source })
}

/// Makes exactly these devices run the programs; returns those that could not be served, with the reason.
pub(crate) fn serve(
    object: &mut Ebpf,
    pins: &PinDir,
    map: &mut DeviceMap,
    devices: &[Device],
) -> Vec<(String, LinkError)> {
    let mut wanted: BTreeSet<u32> = devices.iter().map(|device| device.index).collect();
    let loopback = nix::net::if_::if_nametoindex(LOOPBACK).ok().filter(|_| !devices.is_empty());
    wanted.extend(loopback);
    for (pin, index) in device_pins(&pins.links()) {
        if !wanted.contains(&index)
            && let Err(error) = release(&pin)
        {
            tracing::warn!(pin = %pin.display(), %error, "cannot take a packet program off a device");
        }
    }
    let known: Vec<(u32, DeviceEntry)> = map.iter().filter_map(Result::ok).collect();
    for (index, entry) in known.iter().filter(|(index, _)| !wanted.contains(index)) {
        restore(*index, entry);
        if let Err(error) = map.remove(index) {
            tracing::warn!(index, %error, "cannot forget a device");
        }
    }
    let mut failed = Vec::new();
    for device in devices {
        let before = known.iter().find(|(index, _)| *index == device.index).map(|(_, entry)| *entry);
        if let Err(error) = serve_one(object, pins, map, device, before) {
            failed.push((device.name.clone(), error));
        }
    }
    if let Some(index) = loopback
        && let Err(error) = attach(object, pins, LOOPBACK, index, ARRIVING, OWN_ERRORS)
    {
        failed.push((LOOPBACK.to_owned(), error));
    }
    failed
}

fn serve_one(
    object: &mut Ebpf,
    pins: &PinDir,
    map: &mut DeviceMap,
    device: &Device,
    before: Option<DeviceEntry>,
) -> Result<(), LinkError> {
    let mut entry = entry(device, before.unwrap_or_default());
    match attach_early(object, pins, device) {
        Ok(true) => entry.flags |= DeviceEntry::FLAG_XDP,
        Ok(false) => {}
        // Another program is there, or the driver cannot: the later hooks do the same.
        Err(error) => {
            tracing::info!(device = %device.name, %error, "packets are not handled in this driver (XDP)");
        }
    }
    if before != Some(entry) {
        map.insert(device.index, entry, 0).map_err(LinkError::Device)?;
    }
    if let Err(error) = prepare(&device.name) {
        tracing::warn!(device = %device.name, %error, "hidden clients may not be served through this device");
    }
    for direction in [LEAVING, ARRIVING] {
        let name = match (direction.suffix, device.side, device.ethernet) {
            ("out", _, true) => "kl_leave",
            ("out", _, false) => "kl_bare_leave",
            (_, Side::Outer, true) => "kl_arrive_outer",
            (_, Side::Inner, true) => "kl_arrive_inner",
            (_, Side::Outer, false) => "kl_bare_outer",
            (_, Side::Inner, false) => "kl_bare_inner",
        };
        attach(object, pins, &device.name, device.index, direction, name)?;
    }
    Ok(())
}

/// What the map says of a device; settings that were noted once stay noted.
fn entry(device: &Device, before: DeviceEntry) -> DeviceEntry {
    let noted = |noted: u32, name: &str| {
        if noted != 0 { noted } else { setting(&device.name, name).map_or(0, |value| value + 1) }
    };
    DeviceEntry {
        source_v4: device.source_v4.map(|v4| NetAddr::from(std::net::IpAddr::V4(v4))).unwrap_or_default(),
        source_v6: device.source_v6.map(|v6| NetAddr::from(std::net::IpAddr::V6(v6))).unwrap_or_default(),
        flags: if device.side == Side::Outer { DeviceEntry::FLAG_OUTER } else { 0 } | tracked(&device.name),
        accept_local_before: noted(before.accept_local_before, "accept_local"),
        rp_filter_before: noted(before.rp_filter_before, "rp_filter"),
        padding: 0,
    }
}

/// Flags for a bridge whose packets pass netfilter (`br_netfilter`) before they get to its programs.
fn tracked(device: &str) -> u32 {
    if sys::driver(device).is_none_or(|driver| driver != BRIDGE) {
        return 0;
    }
    let families = [("iptables", DeviceEntry::FLAG_TRACKED_V4), ("ip6tables", DeviceEntry::FLAG_TRACKED_V6)];
    let calls = families.into_iter().filter(|(name, _)| {
        fs::read_to_string(format!("/proc/sys/net/bridge/bridge-nf-call-{name}"))
            .is_ok_and(|value| value.trim() == "1")
    });
    calls.fold(0, |flags, (_, flag)| flags | flag)
}

fn setting_path(device: &str, name: &str) -> PathBuf {
    Path::new("/proc/sys/net/ipv4/conf").join(device).join(name)
}

fn setting(device: &str, name: &str) -> Option<u32> {
    fs::read_to_string(setting_path(device, name)).ok()?.trim().parse().ok()
}

/// The stack routes what the programs rewrote, and must not refuse it for coming from an address of this node.
fn prepare(device: &str) -> io::Result<()> {
    if setting(device, "accept_local") != Some(1) {
        fs::write(setting_path(device, "accept_local"), "1")?;
    }
    let strict = |name: &str| setting(name, "rp_filter");
    // Strict filtering would want the node's own address to come through the loopback device; loose keeps the rest.
    if strict(device) == Some(1) || strict("all") == Some(1) && strict(device) == Some(0) {
        fs::write(setting_path(device, "rp_filter"), "2")?;
    }
    Ok(())
}

/// Puts back what [`prepare`] changed, where nobody changed it since.
fn restore(index: u32, entry: &DeviceEntry) {
    let Ok(device) = nix::net::if_::if_indextoname(index) else {
        return;
    };
    let device = device.to_string_lossy();
    for (name, before, ours) in
        [("accept_local", entry.accept_local_before, 1), ("rp_filter", entry.rp_filter_before, 2)]
    {
        if before == 0 || before == ours + 1 || setting(&device, name) != Some(ours) {
            continue;
        }
        if let Err(error) = fs::write(setting_path(&device, name), (before - 1).to_string()) {
            tracing::warn!(%device, name, %error, "cannot put a device's setting back");
        }
    }
}

/// Puts the settings of all devices back that a set of pinned maps knows.
pub(crate) fn restore_all(maps: &Path) {
    let Ok(map) = pinned::<DeviceMap>(maps, map_names::DEVICES) else {
        return;
    };
    for (index, entry) in map.iter().filter_map(Result::ok) {
        restore(index, &entry);
    }
}

fn attach(
    object: &mut Ebpf,
    pins: &PinDir,
    device: &str,
    index: u32,
    direction: Direction,
    name: &'static str,
) -> Result<(), LinkError> {
    let failed = |action| move |source| LinkError::Link { action, name, source };
    let pin = pins.link(&format!("{LINK}{}-{}", index, direction.suffix));
    let program = classifier(object, name)?;
    let fd = program.fd().map_err(|source| LinkError::Load { name, source })?.as_fd();
    if update(&pin, fd, index, direction.tcx).map_err(failed("update"))? {
        return Ok(());
    }
    match sys::link_create_on_device(fd, index, direction.tcx, 0) {
        Ok(link) => {
            match fs::remove_file(&pin) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("replace")(error));
                }
                _ => {}
            }
            sys::pin(link.as_fd(), &pin).map_err(failed("pin"))
        }
        // A kernel without TCX does not know the attach type.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            filter(program, pins, (device, index), direction, name)
        }
        Err(error) => Err(failed("create")(error)),
    }
}

/// Puts the program into the pinned link; false where there is none that still hangs on the device.
pub(crate) fn update(pin: &Path, program: BorrowedFd<'_>, index: u32, attach_type: u32) -> io::Result<bool> {
    let link = match sys::get_pinned(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if sys::device_link_info(link.as_fd())? != (index, attach_type) {
        return Ok(false);
    }
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(true),
        // The device went away and took the attachment along.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The older way: a filter of the device's clsact qdisc, which stays when its maker goes.
fn filter(
    program: &mut SchedClassifier,
    pins: &PinDir,
    (device, index): (&str, u32),
    direction: Direction,
    name: &'static str,
) -> Result<(), LinkError> {
    let failed = |source| LinkError::Load { name, source };
    // One that is there already serves.
    drop(qdisc_add_clsact(device));
    let handle = FILTER_HANDLE;
    let options = TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle, ..NlOptions::default() });
    let link = match program.attach_with_options(device, direction.clsact, options) {
        Ok(link) => link,
        Err(_taken) => {
            let old = SchedClassifierLink::attached(device, direction.clsact, PRIORITY, handle, None)
                .map_err(|source| LinkError::Link { action: "find", name, source })?;
            program.attach_to_link(old).map_err(failed)?
        }
    };
    let link = program.take_link(link).map_err(failed)?;
    // Dropped, it would take the filter off.
    std::mem::forget(link);
    let pin = pins.link(&format!("{FILTER}{}-{}", index, direction.suffix));
    match fs::remove_file(&pin) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(LinkError::Link { action: "replace", name, source });
        }
        _ => {}
    }
    let fd = program.fd().map_err(failed)?.as_fd();
    sys::pin(fd, &pin).map_err(|source| LinkError::Link { action: "pin", name, source })
}

/// Takes the program behind a pin off its device.
pub(crate) fn release(pin: &Path) -> io::Result<()> {
    let (name, index) = parts(pin).unwrap_or_default();
    if name.starts_with(FILTER) {
        let direction = if name.ends_with("-in") { TcAttachType::Ingress } else { TcAttachType::Egress };
        if let Ok(device) = nix::net::if_::if_indextoname(index) {
            let link = SchedClassifierLink::attached(
                &device.to_string_lossy(),
                direction,
                PRIORITY,
                FILTER_HANDLE,
                None,
            );
            // Dropping the link detaches it.
            drop(link);
        }
    } else if let Ok(link) = sys::get_pinned(pin)
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        tracing::debug!(pin = %pin.display(), %error, "the device had gone already");
    }
    fs::remove_file(pin)
}

/// The pins of packet programs, with the index of the device of each.
pub(crate) fn device_pins(links: &Path) -> Vec<(PathBuf, u32)> {
    let entries = fs::read_dir(links).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.path(), parts(&entry.path())?.1))).collect()
}

/// The kernel's numbers of our links on a device.
pub(crate) fn own_links(pins: &PinDir, index: u32) -> io::Result<Vec<u32>> {
    let of_device = device_pins(&pins.links())
        .into_iter()
        .filter(|(pin, other)| *other == index && parts(pin).is_some_and(|(name, _)| name.starts_with(LINK)));
    of_device.map(|(pin, _)| Ok(sys::link_info(sys::get_pinned(&pin)?.as_fd())?.id)).collect()
}

/// How a device is served, by its pins: `TCX` or `clsact`, and `XDP`.
pub(crate) fn how(links: &Path, index: u32) -> Vec<&'static str> {
    let pins = device_pins(links).into_iter().filter(|(_, other)| *other == index);
    let kinds: BTreeSet<&'static str> = pins
        .filter_map(|(pin, _)| {
            let (name, _) = parts(&pin)?;
            Some(if name.starts_with(EARLY) {
                "XDP"
            } else if name.starts_with(LINK) {
                "TCX"
            } else {
                "clsact"
            })
        })
        .collect();
    kinds.into_iter().collect()
}

/// Name and device of a pin of ours.
fn parts(pin: &Path) -> Option<(String, u32)> {
    let name = pin.file_name()?.to_str()?;
    let rest = [LINK, FILTER, EARLY].into_iter().find_map(|start| name.strip_prefix(start))?;
    let (index, _) = rest.split_once('-')?;
    Some((name.to_owned(), index.parse().ok()?))
}

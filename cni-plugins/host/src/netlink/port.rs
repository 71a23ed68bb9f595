//! Bridge ports: options, VLANs.

use super::{
    Step,
    codec::{Message, find},
};

const RTM_SETLINK: u16 = 19;
const RTM_DELLINK: u16 = 17;
const AF_BRIDGE: u8 = 7;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;

const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const IFLA_BRPORT_LOCKED: u16 = 39;
/// `BR_STATE_DISABLED`: the port neither takes nor gives packets.
const DISABLED: u8 = 0;
/// `BR_STATE_FORWARDING`.
const FORWARDING: u8 = 3;

const VLAN_PVID: u16 = 2;
const VLAN_UNTAGGED: u16 = 4;
const VLAN_RANGE_BEGIN: u16 = 8;
const VLAN_RANGE_END: u16 = 16;

/// What to change of a port; absent fields stay.
#[derive(Debug, Clone, Copy, Default)]
pub struct PortOptions {
    /// Packets may leave where they came in.
    pub hairpin: Option<bool>,
    /// It exchanges packets with ports that are not isolated only (and with the host).
    pub isolated: Option<bool>,
    /// Only source addresses with an entry for this port may send; nothing is learned.
    pub locked: Option<bool>,
}

/// How a link is a port.
#[allow(clippy::struct_excessive_bools, reason = "they are the kernel's independent flags")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortState {
    /// Packets may leave where they came in.
    pub hairpin: bool,
    /// Exchanges packets with ports that are not isolated only.
    pub isolated: bool,
    /// Only known source addresses may send.
    pub locked: bool,
    /// Whether packets pass.
    pub forwarding: bool,
    /// Whether it was disabled.
    pub disabled: bool,
}

/// VLAN ids from `first` to `last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VlanRange {
    /// Lowest.
    pub first: u16,
    /// Highest.
    pub last: u16,
}

impl PortOptions {
    pub(super) fn append_to(self, data: Message) -> Message {
        // Learning would unlock a locked port for whatever it sends.
        data.when(self.hairpin, |data, on| data.u8(IFLA_BRPORT_MODE, on.into()))
            .when(self.isolated, |data, on| data.u8(IFLA_BRPORT_ISOLATED, on.into()))
            .when(self.locked, |data, on| {
                data.u8(IFLA_BRPORT_LEARNING, (!on).into()).u8(IFLA_BRPORT_LOCKED, on.into())
            })
    }
}

impl PortState {
    pub(super) fn read(data: &[u8]) -> Self {
        let byte = |kind| find(data, kind).and_then(|payload| payload.first().copied()).unwrap_or(0);
        let state = byte(IFLA_BRPORT_STATE);
        Self {
            hairpin: byte(IFLA_BRPORT_MODE) != 0,
            isolated: byte(IFLA_BRPORT_ISOLATED) != 0,
            locked: byte(IFLA_BRPORT_LOCKED) != 0,
            forwarding: state == FORWARDING,
            disabled: state == DISABLED,
        }
    }
}

impl Step {
    /// Makes a port a member of VLANs: untagged of `untagged`, tagged of `tagged`.
    pub fn add_port_vlans(index: u32, untagged: Option<u16>, tagged: &[VlanRange]) -> Self {
        let mut infos: Vec<(u16, u16)> =
            untagged.map(|vlan| (VLAN_PVID | VLAN_UNTAGGED, vlan)).into_iter().collect();
        for range in tagged {
            if range.first == range.last {
                infos.push((0, range.first));
            } else {
                infos.extend([(VLAN_RANGE_BEGIN, range.first), (VLAN_RANGE_END, range.last)]);
            }
        }
        Step::new(format!("set the VLANs of bridge port {index}"), vlan_message(RTM_SETLINK, index, &infos))
    }

    /// Takes a port out of a VLAN.
    pub fn remove_port_vlan(index: u32, vlan: u16) -> Self {
        let message = vlan_message(RTM_DELLINK, index, &[(0, vlan)]);
        Step::new(format!("take bridge port {index} out of VLAN {vlan}"), message)
    }
}

fn vlan_message(kind: u16, index: u32, infos: &[(u16, u16)]) -> Message {
    let mut header = [0; 16];
    header[0] = AF_BRIDGE;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    Message::new(kind, 0).header(&header).nested(IFLA_AF_SPEC, |spec| {
        infos.iter().fold(spec, |spec, (flags, vlan)| {
            let mut info = [0; 4];
            info[..2].copy_from_slice(&flags.to_ne_bytes());
            info[2..].copy_from_slice(&vlan.to_ne_bytes());
            spec.attr(IFLA_BRIDGE_VLAN_INFO, &info)
        })
    })
}

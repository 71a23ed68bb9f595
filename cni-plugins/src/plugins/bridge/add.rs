//! ADD: addresses, bridge, veth pair, addresses and routes in the pod; taken back when a step fails.

use std::{fs::File, os::fd::AsRawFd};

use cni_plugins_host::{
    netlink::{Link, LinkChange, LinkRef, Netlink, NetlinkError, PortOptions, Step, VethPair, format_mac},
    netns,
    undo::UndoList,
};
use cni_plugins_types::{CniResult, ErrorCode, Interface, IpNet};
use nix::errno::Errno;

use super::{
    config::{BridgeConfig, Mode},
    gateway, ipam, names, pod, remove,
};
use crate::{call::Call, failure::Failure, plugins::masquerade};

/// MTU where the host has no default route.
const FALLBACK_MTU: u32 = 1500;
/// The VLAN that every port of a bridge is in from the start.
const DEFAULT_VLAN: u16 = 1;

/// Attaches the pod.
pub(super) fn add(call: &Call, config: &BridgeConfig) -> Result<CniResult, Failure> {
    let is_netns = netns::probe(&call.netns).map_err(|error| Failure::from(error).within("CNI_NETNS"))?;
    if !is_netns {
        return Err(Failure::new(
            ErrorCode::UnknownContainer,
            format!("CNI_NETNS: {} is not a network namespace", call.netns.display()),
        ));
    }
    let requested_mac = config.mac(call)?;
    call.prev_result()?;
    let host = Netlink::open()?;
    let inside = Netlink::open_in(&call.netns)?;
    let host_name = names::host_interface(&call.network, &call.container_id, &call.ifname);
    // Before anything is taken: undoing must not touch what a successful ADD of this attachment holds.
    if let Some(found) = inside.link(&call.ifname)?
        && !remove::finish_removal(&host, &inside, &found)?
    {
        return Err(Failure::interface_exists(format!(
            "CNI_IFNAME: {} exists already in {}",
            call.ifname,
            call.netns.display()
        )));
    }
    let mut undo = UndoList::new();
    let attachment = Attachment { call, config, host: &host, inside: &inside, host_name, requested_mac };
    match attachment.attach(&mut undo) {
        Ok(result) => Ok(result),
        Err(failure) => Err(failure.with_undo_failures(&undo.run())),
    }
}

struct Attachment<'a> {
    call: &'a Call,
    config: &'a BridgeConfig,
    host: &'a Netlink,
    inside: &'a Netlink,
    host_name: String,
    requested_mac: Option<[u8; 6]>,
}

impl<'a> Attachment<'a> {
    fn attach(&self, undo: &mut UndoList<'a>) -> Result<CniResult, Failure> {
        let (call, config, host) = (self.call, self.config, self.host);
        ipam::require(call, config)?;
        let release = move || ipam::release(call, config);
        if ipam::may_leave_some(config) {
            undo.push("release addresses", release);
        }
        let mut result = ipam::delegate(call, config)?.unwrap_or_default();
        if !ipam::may_leave_some(config) {
            undo.push("release addresses", release);
        }
        pod::require_families(&result)?;
        pod::require_mtu(&result, config.mtu)?;
        // With the subnet's prefix, which mode "routed" is about to take off.
        let addresses: Vec<IpNet> = result.ips.iter().map(|ip| ip.address).collect();
        gateway::complete(config, &mut result);
        gateway::require_other_than_pods(config, &result)?;
        if !config.dns.is_empty() {
            result.dns = config.dns.clone();
        }
        let bridge = match config.mode {
            Mode::Bridge => Some(gateway::prepare_bridge(config, host, &result)?),
            Mode::Routed => None,
        };
        let mac = self.requested_mac.unwrap_or_else(|| names::mac_of_attachment(&result, &self.host_name));
        let mtu = self.mtu(bridge.as_ref())?;
        pod::require_mtu(&result, mtu)?;
        let name = self.host_name.clone();
        undo.push("delete the veth pair", move || host.delete_link(&name).map(|_| ()));
        let (port, bridge) = self.create_pair(bridge.as_ref(), mac, mtu)?;
        if bridge.is_some() {
            self.configure_port(&port, mac)?;
        } else {
            gateway::prepare_routes(config, host, &port, &result)?;
        }
        pod::configure(call, config, self.inside, &result, self.requested_mac)?;
        if config.ip_masq {
            undo.push("end the masquerade", move || masquerade::detach(call));
            masquerade::attach(call, &addresses, &config.ip_masq_except)?;
        }
        self.describe(&mut result, bridge.as_ref(), &port, mac, mtu);
        Ok(result)
    }

    /// Makes the pair; returns the host's end, and the bridge as it is with that port. As the pod has no such interface, a host end with this name is left over from a
    /// killed call for the same attachment.
    fn create_pair(
        &self,
        bridge: Option<&Link>,
        mac: [u8; 6],
        mtu: u32,
    ) -> Result<(Link, Option<Link>), Failure> {
        let netns = File::open(&self.call.netns)
            .map_err(|error| Failure::io("open the network namespace", &error))?;
        let pair = VethPair {
            host_name: &self.host_name,
            bridge_index: bridge.map(|bridge| bridge.index),
            host_mac: None,
            peer_name: &self.call.ifname,
            peer_mac: Some(mac),
            peer_netns: Some(netns.as_raw_fd()),
            mtu,
        };
        match self.try_create(&pair) {
            Err(error) if error.is(Errno::EEXIST) => {
                self.host.delete_link(&self.host_name)?;
                Ok(self.try_create(&pair)?)
            }
            Err(error) if error.is(Errno::EINVAL) || error.is(Errno::ERANGE) => Err(Failure::config(
                format!("mtu {mtu} or CNI_IFNAME {}: {}", self.call.ifname, Failure::from(error).message()),
            )),
            created => Ok(created?),
        }
    }

    /// One system call: the pair, its alias, the port's options, and what came of it. The bridge is read after the port has
    /// joined, from which its MTU follows.
    fn try_create(&self, pair: &VethPair<'_>) -> Result<(Link, Option<Link>), NetlinkError> {
        let this = LinkRef::Name(&self.host_name);
        let alias = names::alias(&self.call.network, &self.call.container_id, &self.call.ifname);
        let alias = LinkChange { alias: Some(&alias), ..LinkChange::default() };
        let mut steps = vec![Step::create_veth(pair), Step::set_link(this, &alias)];
        let options = PortOptions {
            hairpin: self.config.hairpin_mode.then_some(true),
            isolated: self.config.port_isolation.then_some(true),
            locked: self.config.macspoofchk.then_some(true),
        };
        if options.hairpin.or(options.isolated).or(options.locked).is_some() {
            steps.push(Step::set_port(this, &options));
        }
        steps.push(Step::get_link(this));
        steps.extend(pair.bridge_index.map(|index| Step::get_link(LinkRef::Index(index))));
        let answers = self.host.run(steps)?;
        let mut links = answers.iter().flatten().filter_map(|body| Link::read(body));
        let port = links.next().filter(|link| link.name == self.host_name);
        let port = port.ok_or_else(|| NetlinkError::Request {
            step: format!("find link {}", self.host_name),
            source: Errno::ENODEV.into(),
        })?;
        Ok((port, links.next()))
    }

    /// VLANs and the address the pod may send with; what the kernel silently ignored is refused.
    fn configure_port(&self, port: &Link, mac: [u8; 6]) -> Result<(), Failure> {
        let state = port.port.unwrap_or_default();
        if self.config.macspoofchk && !state.locked {
            return Err(Failure::unsupported("macspoofchk", &true, "locked bridge ports need Linux 5.18"));
        }
        if self.config.port_isolation && !state.isolated {
            return Err(Failure::unsupported("portIsolation", &true, "isolated ports need Linux 4.18"));
        }
        let (untagged, trunk) = (self.config.untagged(), self.config.trunk()?);
        let mut steps = Vec::new();
        if self.config.separates_vlans() {
            steps.push(Step::add_port_vlans(port.index, untagged, &trunk));
            if !self.config.preserve_default_vlan && untagged != Some(DEFAULT_VLAN) {
                steps.push(Step::remove_port_vlan(port.index, DEFAULT_VLAN).tolerating(Errno::ENOENT));
            }
        }
        if self.config.macspoofchk {
            let vlans = trunk.iter().flat_map(|range| range.first..=range.last).map(Some);
            // Without VLANs an entry has none; with them each VLAN has its own.
            let own =
                if self.config.separates_vlans() { Some(untagged.unwrap_or(DEFAULT_VLAN)) } else { None };
            for vlan in std::iter::once(own).chain(vlans) {
                steps.push(Step::add_static_forwarding(port.index, mac, vlan));
            }
        }
        match self.host.run(steps) {
            Err(error) if self.config.separates_vlans() && error.is(Errno::EOPNOTSUPP) => {
                Err(gateway::no_vlan_filtering(self.config))
            }
            done => Ok(done.map(|_| ())?),
        }
    }

    fn mtu(&self, bridge: Option<&Link>) -> Result<u32, Failure> {
        if self.config.mtu != 0 {
            return Ok(self.config.mtu);
        }
        for v6 in [false, true] {
            for index in self.host.default_links(v6)? {
                if bridge.is_none_or(|bridge| bridge.index != index)
                    && let Some(link) = self.host.link_by_index(index)?.filter(|link| !link.loopback)
                {
                    return Ok(link.mtu.min(65_535));
                }
            }
        }
        Ok(FALLBACK_MTU)
    }

    fn describe(&self, result: &mut CniResult, bridge: Option<&Link>, port: &Link, mac: [u8; 6], mtu: u32) {
        let on_host = |link: &Link| Interface {
            name: link.name.clone(),
            mac: format_mac(&link.mac),
            mtu: Some(link.mtu),
            ..Interface::default()
        };
        let in_pod = Interface {
            name: self.call.ifname.clone(),
            mac: format_mac(&mac),
            mtu: Some(mtu),
            sandbox: self.call.netns.to_string_lossy().into_owned(),
            ..Interface::default()
        };
        result.interfaces = bridge.map(on_host).into_iter().chain([on_host(port), in_pod]).collect();
        let index = u32::try_from(result.interfaces.len() - 1).unwrap_or_default();
        for ip in &mut result.ips {
            ip.interface = Some(index);
        }
    }
}

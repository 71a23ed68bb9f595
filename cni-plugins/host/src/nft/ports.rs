//! Host ports: connections to a port of this host go to a pod. A few map elements per port.
//!
//! Knows nothing of who may have which port: the caller keeps that, and asks for changes under a lock of its own.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
};

use super::{
    NftError, TABLE,
    attributes::Attributes,
    expression::{Family, value},
    is_absent,
    layout::{self, POD_LINKS, PORTS, port_map},
    route,
    wire::{Message, Socket, flag, kind},
};

/// Elements of one message: its list must fit 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 400;

/// One mapped port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// Number of the protocol: 6 TCP, 17 UDP, 132 SCTP.
    pub protocol: u8,
    /// The host's address; absent means every one.
    pub host_ip: Option<IpAddr>,
    /// The host's port.
    pub host_port: u16,
    /// Address and port of the pod; its family is the one of the traffic.
    pub target: SocketAddr,
}

/// Host ports, and the links behind which their pods are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mappings {
    /// The ports.
    pub ports: BTreeSet<HostPort>,
    /// What comes from these links is masqueraded on its way to a host port.
    pub links: BTreeSet<String>,
}

impl Mappings {
    /// Adds all of another.
    pub fn extend(&mut self, other: &Mappings) {
        self.ports.extend(&other.ports);
        self.links.extend(other.links.iter().cloned());
    }
}

/// Maps `more`. May be repeated.
pub fn add(more: &Mappings) -> Result<(), NftError> {
    let run = || -> io::Result<()> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        let elements = all_elements(more, kind::NEW_ELEMENTS, flag::CREATE);
        match socket.commit(&elements) {
            Err(error) if is_absent(&error) => socket.commit(&[layout::messages(), elements].concat()),
            other => other,
        }
    };
    run().map_err(|source| NftError::new("map host ports", source))?;
    if serves_loopback(more) { route::hold(layout::STAND_IN) } else { Ok(()) }
}

/// Ends what is in `gone` and not in `rest`.
pub fn remove(gone: &Mappings, rest: &Mappings) -> Result<(), NftError> {
    let keys = |mappings: &Mappings| -> BTreeSet<(u8, u16)> {
        mappings.ports.iter().map(|port| (port.protocol, port.host_port)).collect()
    };
    let (kept, kept_maps) = (keys(rest), rest.ports.iter().map(map_element).collect::<BTreeSet<_>>());
    let run = || -> io::Result<()> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        let mut messages = Vec::new();
        for (map, elements) in
            by_map(gone.ports.iter().filter(|port| !kept_maps.contains(&map_element(port))))
        {
            messages.extend(lists(map, kind::DEL_ELEMENTS, 0, &elements, false));
        }
        let ports: Vec<Entry> =
            keys(gone).difference(&kept).map(|key| Entry { key: port_key(*key), data: Vec::new() }).collect();
        messages.extend(lists(PORTS, kind::DEL_ELEMENTS, 0, &ports, false));
        let links: Vec<Entry> = gone.links.difference(&rest.links).map(|link| link_entry(link)).collect();
        messages.extend(lists(POD_LINKS, kind::DEL_ELEMENTS, 0, &links, false));
        if messages.is_empty() {
            return Ok(());
        }
        match socket.commit(&messages) {
            // Something of it is gone already, maybe all: what must be there is known.
            Err(error) if is_absent(&error) => {
                if socket.table_exists()? {
                    replace_with(&mut socket, rest)
                } else {
                    Ok(())
                }
            }
            other => other,
        }
    };
    run().map_err(|source| NftError::new("end host ports", source))?;
    if serves_loopback(gone) && !serves_loopback(rest) { route::release(layout::STAND_IN) } else { Ok(()) }
}

/// Makes `all` the only mappings, in one step.
pub fn replace(all: &Mappings) -> Result<(), NftError> {
    let run = || -> io::Result<()> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        if all.ports.is_empty() && !socket.table_exists()? {
            return Ok(());
        }
        replace_with(&mut socket, all)
    };
    run().map_err(|source| NftError::new("bring host ports in order", source))?;
    if serves_loopback(all) { route::hold(layout::STAND_IN) } else { route::release(layout::STAND_IN) }
}

/// Whether these need for connections to `::1` what is not in the table.
fn serves_loopback(mappings: &Mappings) -> bool {
    mappings
        .ports
        .iter()
        .any(|port| port.target.is_ipv6() && port.host_ip.is_none_or(|address| address.is_loopback()))
}

fn replace_with(socket: &mut Socket, all: &Mappings) -> io::Result<()> {
    let mut messages = layout::messages();
    let maps = [Family::V4, Family::V6]
        .into_iter()
        .flat_map(|family| [port_map(family, true), port_map(family, false)]);
    for set in maps.chain([PORTS, POD_LINKS]) {
        let mut message = Message::nft(kind::DEL_ELEMENTS, 0);
        message.body.text(1, TABLE).text(2, set);
        messages.push(message);
    }
    messages.extend(all_elements(all, kind::NEW_ELEMENTS, flag::CREATE));
    socket.commit(&messages)
}

/// Whether all of `wanted` are mapped.
pub fn present(wanted: &Mappings) -> Result<bool, NftError> {
    let run = || -> io::Result<bool> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        // A question that names elements is answered with them, or with "no such element".
        for message in all_elements(wanted, kind::GET_ELEMENTS, 0) {
            match socket.get(&message, 4) {
                Ok(_) => {}
                Err(error) if is_absent(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    };
    run().map_err(|source| NftError::new("look at host ports", source))
}

/// Key and, in maps, data of an element.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    key: Vec<u8>,
    data: Vec<u8>,
}

fn all_elements(mappings: &Mappings, message: u16, flags: u16) -> Vec<Message> {
    let with_data = message == kind::NEW_ELEMENTS;
    // Asked for one by one: an answer of many elements may not fit.
    let each = if message == kind::GET_ELEMENTS { 1 } else { ELEMENTS_PER_MESSAGE };
    let mut all = Vec::new();
    let mut put = |set: &str, entries: &[Entry], with_data: bool| {
        for chunk in entries.chunks(each) {
            all.push(list(set, message, flags, chunk, with_data));
        }
    };
    for (map, elements) in by_map(mappings.ports.iter()) {
        put(map, &elements, with_data);
    }
    let keys: BTreeSet<(u8, u16)> =
        mappings.ports.iter().map(|port| (port.protocol, port.host_port)).collect();
    let ports: Vec<Entry> =
        keys.into_iter().map(|key| Entry { key: port_key(key), data: Vec::new() }).collect();
    put(PORTS, &ports, false);
    let links: Vec<Entry> = mappings.links.iter().map(|link| link_entry(link)).collect();
    put(POD_LINKS, &links, false);
    all
}

fn lists(set: &str, message: u16, flags: u16, entries: &[Entry], with_data: bool) -> Vec<Message> {
    entries.chunks(ELEMENTS_PER_MESSAGE).map(|chunk| list(set, message, flags, chunk, with_data)).collect()
}

fn list(set: &str, message: u16, flags: u16, entries: &[Entry], with_data: bool) -> Message {
    let mut message = Message::nft(message, flags);
    message.body.text(1, TABLE).text(2, set).nest(3, |list: &mut Attributes| {
        for entry in entries {
            list.nest(1, |element| {
                value(element, 1, &entry.key);
                if with_data {
                    value(element, 2, &entry.data);
                }
            });
        }
    });
    message
}

fn by_map<'a>(
    ports: impl Iterator<Item = &'a HostPort>,
) -> std::collections::BTreeMap<&'static str, Vec<Entry>> {
    let mut all = std::collections::BTreeMap::<_, Vec<Entry>>::new();
    for port in ports {
        let (map, entry) = map_element(port);
        all.entry(map).or_default().push(entry);
    }
    all
}

/// The map, and the element in it.
fn map_element(port: &HostPort) -> (&'static str, Entry) {
    let family = if port.target.is_ipv4() { Family::V4 } else { Family::V6 };
    let mut key = field(&[port.protocol]);
    if let Some(address) = port.host_ip {
        key.extend(octets(address));
    }
    key.extend(field(&port.host_port.to_be_bytes()));
    let mut data = octets(port.target.ip());
    data.extend(field(&port.target.port().to_be_bytes()));
    (port_map(family, port.host_ip.is_some()), Entry { key, data })
}

fn port_key((protocol, port): (u8, u16)) -> Vec<u8> {
    [field(&[protocol]), field(&port.to_be_bytes())].concat()
}

fn link_entry(link: &str) -> Entry {
    let mut key = link.as_bytes().to_vec();
    key.resize(16, 0);
    Entry { key, data: Vec::new() }
}

/// A field of a concatenation: padded to four bytes.
fn field(bytes: &[u8]) -> Vec<u8> {
    let mut field = bytes.to_vec();
    field.resize(bytes.len().next_multiple_of(4), 0);
    field
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_laid_out_as_registers_are_loaded() {
        let mut port =
            HostPort { protocol: 6, host_ip: None, host_port: 8080, target: "10.1.2.3:80".parse().unwrap() };
        let (map, entry) = map_element(&port);
        assert_eq!((map, entry.key.len()), ("map4", 8));
        assert_eq!(entry.key, [6, 0, 0, 0, 0x1f, 0x90, 0, 0]);
        assert_eq!(entry.data, [10, 1, 2, 3, 0, 80, 0, 0]);
        port.target = "[fd00::3]:80".parse().unwrap();
        port.host_ip = Some("fd00::1".parse().unwrap());
        let (map, entry) = map_element(&port);
        assert_eq!((map, entry.key.len(), entry.data.len()), ("map6_ip", 24, 20));
    }
}

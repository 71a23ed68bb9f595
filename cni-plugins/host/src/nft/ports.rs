//! Host ports: connections to a port of this host go to a pod. A few map elements per port.
//!
//! Knows nothing of who may have which port: the caller keeps that in records, and asks for changes under a lock of its own.
//! There may be several directories of records whose callers know nothing of each other: every element says in its comment
//! which one explains it ([`Scope`]), and nobody takes away what is another's.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::Path,
};

use super::{
    NftError, TABLE,
    attributes::{Attributes, find, read},
    comment,
    expression::{Family, value},
    is_absent,
    layout::{self, POD_LINKS, PORTS, port_map},
    route,
    wire::{Message, Socket, flag, kind},
};

/// Elements of one message: its list must fit 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 250;
/// How often a change is tried that others get in the way of.
const TRIES: usize = 10;

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

    fn elements(&self) -> BTreeSet<Element> {
        let mut all: BTreeSet<Element> = self.ports.iter().map(map_element).collect();
        all.extend(self.ports.iter().map(port_element));
        all.extend(self.links.iter().map(|link| link_element(link)));
        all
    }
}

/// The directory of records that elements come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope(String);

impl Scope {
    /// That of a directory, by whatever path.
    pub fn of(records: &Path) -> Self {
        let records = std::fs::canonicalize(records).unwrap_or_else(|_| records.to_owned());
        Self(super::part(&records.to_string_lossy()))
    }
}

/// Maps `more`. May be repeated. A port that another scope has mapped fails with `EEXIST` or `EBUSY`.
pub fn add(scope: &Scope, more: &Mappings) -> Result<(), NftError> {
    let more = more.elements();
    let run = || -> io::Result<()> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        let elements = messages(kind::NEW_ELEMENTS, &more, Some(scope));
        match socket.commit(&elements) {
            Err(error) if is_absent(&error) => socket.commit(&[layout::messages(), elements].concat()),
            other => other,
        }
    };
    run().map_err(|source| NftError::new("map host ports", source))?;
    if serves_loopback(&more) { route::hold(layout::STAND_IN) } else { Ok(()) }
}

/// Ends what is in `gone` and not in `rest`, which is all else that the scope explains.
pub fn remove(scope: &Scope, gone: &Mappings, rest: &Mappings) -> Result<(), NftError> {
    let (gone, rest) = (gone.elements(), rest.elements());
    let held = settle("end host ports", |held| {
        let ended: Vec<&Element> = gone.difference(&rest).collect();
        if !held.exists {
            return Vec::new();
        }
        if ended.iter().any(|element| !held.elements.contains_key(&element.place)) {
            // Something of it is gone already, maybe more than that: what must be there is known.
            return held.to_become(scope, &rest);
        }
        let free = held.free_for(scope);
        // With the last of all mappings go links that another scope could have needed.
        let is_last = rest.is_empty() && held.others(scope).next().is_none();
        let ended: BTreeSet<&Place> = ended.into_iter().map(|element| &element.place).collect();
        let places = free.into_iter().filter(|place| is_last || ended.contains(place));
        messages(kind::DEL_ELEMENTS, &elements_at(places), None)
    })?;
    let is_needed =
        !serves_loopback(&gone) || serves_loopback(&rest) || held.serves_loopback_of_others(scope);
    if is_needed { Ok(()) } else { route::release(layout::STAND_IN) }
}

/// Makes `all` the only mappings of the scope, in one step; what no scope explains goes, too.
pub fn replace(scope: &Scope, all: &Mappings) -> Result<(), NftError> {
    let all = all.elements();
    let held = settle("bring host ports in order", |held| {
        if held.exists || !all.is_empty() { held.to_become(scope, &all) } else { Vec::new() }
    })?;
    if serves_loopback(&all) {
        route::hold(layout::STAND_IN)
    } else if held.serves_loopback_of_others(scope) {
        Ok(())
    } else {
        route::release(layout::STAND_IN)
    }
}

/// Whether all of `wanted` are mapped.
pub fn present(wanted: &Mappings) -> Result<bool, NftError> {
    let run = || -> io::Result<bool> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        // A question that names elements is answered with them, or with "no such element". Asked one by one, since an
        // answer of many elements may not fit.
        for element in &wanted.elements() {
            let question = list(kind::GET_ELEMENTS, 0, element.place.0, &[element], None);
            match socket.get(&question, 4) {
                Ok(_) => {}
                Err(error) if is_absent(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    };
    run().map_err(|source| NftError::new("look at host ports", source))
}

/// Whether any port of the host is mapped: answers of pods are rewritten on their way back then.
pub fn any() -> Result<bool, NftError> {
    let run = || -> io::Result<bool> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        Ok(!Held::list(&mut socket)?.elements.is_empty())
    };
    run().map_err(|source| NftError::new("look at host ports", source))
}

/// Looks at the table and carries out what `plan` makes of it, again when somebody has changed it in between; what was
/// there before.
fn settle(step: &str, plan: impl Fn(&Held) -> Vec<Message>) -> Result<Held, NftError> {
    let run = || -> io::Result<Held> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        let mut left = TRIES;
        loop {
            let held = Held::list(&mut socket)?;
            let messages = plan(&held);
            if messages.is_empty() {
                return Ok(held);
            }
            left -= 1;
            match socket.commit(&messages) {
                Err(error) if left > 0 && is_absent(&error) => {}
                other => return other.map(|()| held),
            }
        }
    };
    run().map_err(|source| NftError::new(step, source))
}

/// Set or map, and the key in it.
type Place = (&'static str, Vec<u8>);

/// An element; without data in sets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Element {
    place: Place,
    data: Vec<u8>,
}

/// What the table has.
#[derive(Debug, Default)]
struct Held {
    /// Whether it is there at all.
    exists: bool,
    /// Data and comment of its elements.
    elements: BTreeMap<Place, (Vec<u8>, String)>,
}

impl Held {
    fn list(socket: &mut Socket) -> io::Result<Self> {
        let mut held = Self { exists: true, ..Self::default() };
        let maps = [Family::V4, Family::V6].map(|family| [port_map(family, true), port_map(family, false)]);
        for set in maps.into_iter().flatten().chain([PORTS, POD_LINKS]) {
            let mut message = Message::nft(kind::GET_ELEMENTS, 0);
            message.body.text(1, TABLE).text(2, set);
            let objects = match socket.dump(&message) {
                Err(error) if is_absent(&error) => return Ok(Self::default()),
                other => other?,
            };
            for object in objects {
                let elements = read(find(&object, 3).unwrap_or_default());
                held.elements.extend(elements.filter_map(|(_, one)| parse(set, one)));
            }
        }
        Ok(held)
    }

    /// The messages that make `wanted` the scope's, leaving alone what another explains.
    fn to_become(&self, scope: &Scope, wanted: &BTreeSet<Element>) -> Vec<Message> {
        let is_right = |element: &&Element| {
            let held = self.elements.get(&element.place);
            held.is_some_and(|(data, comment)| {
                *data == element.data && (*comment == scope.0 || !is_map(element.place.0))
            })
        };
        let right: BTreeSet<&Place> = wanted.iter().filter(is_right).map(|element| &element.place).collect();
        let free = self.free_for(scope);
        let wrong = elements_at(free.difference(&right).copied());
        let missing = wanted.iter().filter(|element| {
            let place = &element.place;
            !right.contains(place) && (free.contains(place) || !self.elements.contains_key(place))
        });
        let mut all = layout::messages();
        all.extend(messages(kind::DEL_ELEMENTS, &wrong, None));
        all.extend(messages(kind::NEW_ELEMENTS, missing, Some(scope)));
        all
    }

    /// What is there and no other scope needs. Sets serve all scopes alike: a port is needed by whoever maps it, a link
    /// perhaps by whoever maps anything.
    fn free_for(&self, scope: &Scope) -> BTreeSet<&Place> {
        let others: BTreeSet<Vec<u8>> = self.others(scope).map(|(_, key)| port_of(key)).collect();
        let is_free = |((set, key), (_, comment)): &(&Place, &(Vec<u8>, String))| match *set {
            PORTS => !others.contains(key),
            POD_LINKS => others.is_empty(),
            _ => comment.is_empty() || *comment == scope.0,
        };
        self.elements.iter().filter(is_free).map(|(place, _)| place).collect()
    }

    /// Ports that other scopes map.
    fn others(&self, scope: &Scope) -> impl Iterator<Item = &Place> {
        let is_anothers = |comment: &str| !comment.is_empty() && comment != scope.0;
        let maps = self.elements.iter().filter(|((set, _), _)| is_map(set));
        maps.filter(move |(_, (_, comment))| is_anothers(comment)).map(|(place, _)| place)
    }

    fn serves_loopback_of_others(&self, scope: &Scope) -> bool {
        self.others(scope).any(is_for_loopback)
    }
}

/// Elements to be deleted, which need no data.
fn elements_at<'a>(places: impl Iterator<Item = &'a Place>) -> Vec<Element> {
    places.map(|place| Element { place: place.clone(), data: Vec::new() }).collect()
}

fn parse(set: &'static str, element: &[u8]) -> Option<(Place, (Vec<u8>, String))> {
    let key = find(find(element, 1)?, 1)?;
    let data = find(element, 2).and_then(|data| find(data, 1)).unwrap_or_default();
    Some(((set, key.to_vec()), (data.to_vec(), comment::read(element))))
}

/// Whether these need for connections to `::1` what is not in the table.
fn serves_loopback(elements: &BTreeSet<Element>) -> bool {
    elements.iter().any(|element| is_for_loopback(&element.place))
}

fn is_for_loopback((set, key): &Place) -> bool {
    *set == port_map(Family::V6, false)
        || *set == port_map(Family::V6, true) && key.get(4..20) == Some(&Ipv6Addr::LOCALHOST.octets())
}

fn is_map(set: &str) -> bool {
    set != PORTS && set != POD_LINKS
}

/// Protocol and port in a map's key, which may have an address between them.
fn port_of(key: &[u8]) -> Vec<u8> {
    [key.get(..4), key.get(key.len().saturating_sub(4)..)].into_iter().flatten().flatten().copied().collect()
}

/// Messages about elements, none of them longer than it may be.
fn messages<'a>(
    message: u16,
    elements: impl IntoIterator<Item = &'a Element>,
    scope: Option<&Scope>,
) -> Vec<Message> {
    let mut by_set = BTreeMap::<&'static str, Vec<&Element>>::new();
    for element in elements {
        by_set.entry(element.place.0).or_default().push(element);
    }
    let flags = if message == kind::NEW_ELEMENTS { flag::CREATE } else { 0 };
    let chunks = by_set
        .iter()
        .flat_map(|(set, elements)| elements.chunks(ELEMENTS_PER_MESSAGE).map(move |chunk| (*set, chunk)));
    chunks.map(|(set, chunk)| list(message, flags, set, chunk, scope)).collect()
}

fn list(message: u16, flags: u16, set: &str, elements: &[&Element], scope: Option<&Scope>) -> Message {
    let mut message = Message::nft(message, flags);
    message.body.text(1, TABLE).text(2, set).nest(3, |list: &mut Attributes| {
        for element in elements {
            list.nest(1, |attributes| {
                value(attributes, 1, &element.place.1);
                if let Some(scope) = scope.filter(|_| is_map(set)) {
                    value(attributes, 2, &element.data);
                    comment::put(attributes, &scope.0);
                }
            });
        }
    });
    message
}

/// The element of a map for a port.
fn map_element(port: &HostPort) -> Element {
    let family = if port.target.is_ipv4() { Family::V4 } else { Family::V6 };
    let mut key = field(&[port.protocol]);
    if let Some(address) = port.host_ip {
        key.extend(octets(address));
    }
    key.extend(field(&port.host_port.to_be_bytes()));
    let mut data = octets(port.target.ip());
    data.extend(field(&port.target.port().to_be_bytes()));
    Element { place: (port_map(family, port.host_ip.is_some()), key), data }
}

fn port_element(port: &HostPort) -> Element {
    let key = [field(&[port.protocol]), field(&port.host_port.to_be_bytes())].concat();
    Element { place: (PORTS, key), data: Vec::new() }
}

fn link_element(link: &str) -> Element {
    let mut key = link.as_bytes().to_vec();
    key.resize(16, 0);
    Element { place: (POD_LINKS, key), data: Vec::new() }
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

    fn port(host_port: u16, host_ip: Option<&str>, target: &str) -> HostPort {
        let host_ip = host_ip.map(|text| text.parse().unwrap());
        HostPort { protocol: 6, host_ip, host_port, target: target.parse().unwrap() }
    }

    #[test]
    fn keys_are_laid_out_as_registers_are_loaded() {
        let element = map_element(&port(8080, None, "10.1.2.3:80"));
        assert_eq!(element.place, ("map4", vec![6, 0, 0, 0, 0x1f, 0x90, 0, 0]));
        assert_eq!(element.data, [10, 1, 2, 3, 0, 80, 0, 0]);
        let element = map_element(&port(8080, Some("fd00::1"), "[fd00::3]:80"));
        assert_eq!((element.place.0, element.place.1.len(), element.data.len()), ("map6_ip", 24, 20));
        assert_eq!(port_of(&element.place.1), port_element(&port(8080, None, "10.1.2.3:80")).place.1);
    }

    #[test]
    fn what_another_directory_explains_is_left_alone() {
        let (ours, theirs) = (Scope("ours".to_owned()), Scope("theirs".to_owned()));
        let mappings = |ports: &[HostPort]| {
            Mappings { ports: ports.iter().copied().collect(), ..Mappings::default() }.elements()
        };
        let mine = mappings(&[port(1, Some("192.0.2.1"), "10.0.0.2:80"), port(2, None, "10.0.0.2:80")]);
        let other = mappings(&[port(1, Some("192.0.2.2"), "10.0.0.3:80")]);
        let mut held = Held { exists: true, ..Held::default() };
        for (elements, scope) in [(&other, &theirs), (&mine, &ours)] {
            let entries = elements.iter().map(|one| (one.place.clone(), (one.data.clone(), scope.0.clone())));
            held.elements.extend(entries);
        }
        let taken = |scope: &Scope| {
            let free = held.free_for(scope);
            free.into_iter().map(|(set, key)| (*set, key[key.len() - 3])).collect::<Vec<_>>()
        };
        // Both need port 1 itself.
        assert_eq!(taken(&ours), [("map4", 2), ("map4_ip", 1), ("ports", 2)]);
        assert_eq!(taken(&theirs), [("map4_ip", 1)]);
    }
}

//! Cluster addresses and node ports of Services.
//!
//! The sets in memory are rebuilt from the stored Services at start and changed only here. A write reserves what it needs before its
//! transaction; the [`Reservation`] gives it back unless it is committed, and on commit frees what the update gave up. So no two Services ever
//! hold the same port, whatever order their writes commit in.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    ops::RangeInclusive,
    sync::{Arc, Mutex, PoisonError},
};

use control_api::status::FieldError;
use serde_json::{Value, json};

use crate::random::Random;

/// A range of IPv4 addresses, such as `10.96.0.0/12`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Range {
    base: u32,
    prefix: u8,
}

impl std::str::FromStr for Ipv4Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not an IPv4 range such as 10.96.0.0/12");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_not_an_address| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_not_a_number| wrong())?;
        if !(8..=28).contains(&prefix) {
            return Err(format!("the prefix length of \"{text}\" must be between 8 and 28"));
        }
        let base = address.to_bits() & !Self::host_mask(prefix);
        if base != address.to_bits() {
            return Err(format!(
                "\"{text}\" has host bits set; did you mean {}/{prefix}?",
                Ipv4Addr::from_bits(base)
            ));
        }
        Ok(Self { base, prefix })
    }
}

impl Ipv4Range {
    fn host_mask(prefix: u8) -> u32 {
        u32::MAX >> prefix
    }

    /// The address at an offset from the start.
    pub fn nth(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base.wrapping_add(offset & Self::host_mask(self.prefix)))
    }

    /// Whether the address may be given to a Service: inside, and neither the first nor the last.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        let mask = Self::host_mask(self.prefix);
        let host = address.to_bits() & mask;
        address.to_bits() & !mask == self.base && host != 0 && host != mask
    }

    /// How many addresses may be given out.
    fn size(self) -> u32 {
        Self::host_mask(self.prefix) - 1
    }

    /// Size of the lower band, which is left to addresses that users choose (KEP-3070).
    fn static_band(self) -> u32 {
        (self.size() / 16).clamp(16, 256).min(self.size() / 2)
    }
}

impl std::fmt::Display for Ipv4Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from_bits(self.base), self.prefix)
    }
}

/// Addresses and ports, held by a Service or handed out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Held {
    addresses: BTreeSet<Ipv4Addr>,
    ports: BTreeSet<u16>,
}

/// Hands out cluster addresses and node ports.
#[derive(Clone, Debug)]
pub(crate) struct Allocator {
    addresses: Ipv4Range,
    ports: RangeInclusive<u16>,
    held: Arc<Mutex<Held>>,
}

/// What a write has reserved.
#[derive(Debug)]
pub(crate) struct Reservation {
    held: Arc<Mutex<Held>>,
    taken: Held,
    freed: Held,
}

impl Reservation {
    /// The write is stored: keep what it took, free what it gave up.
    pub(crate) fn commit(mut self) {
        self.taken = std::mem::take(&mut self.freed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.addresses.retain(|address| !self.taken.addresses.contains(address));
        held.ports.retain(|port| !self.taken.ports.contains(port));
    }
}

impl Allocator {
    /// An allocator with everything free.
    pub(crate) fn new(addresses: Ipv4Range, ports: RangeInclusive<u16>) -> Self {
        Self { addresses, ports, held: Arc::default() }
    }

    /// The address of the `kubernetes` Service: the first of the range.
    pub(crate) fn api_server_address(&self) -> Ipv4Addr {
        self.addresses.nth(1)
    }

    /// Note what a stored Service holds, at start.
    pub(crate) fn adopt(&self, service: &Value) {
        let holds = holds(service);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.addresses.extend(holds.addresses);
        held.ports.extend(holds.ports);
    }

    /// Give back what a removed Service held.
    pub(crate) fn release(&self, service: &Value) {
        let (held, taken) = (Arc::clone(&self.held), holds(service));
        drop(Reservation { held, taken, freed: Held::default() });
    }

    /// Reserve what the Service names and fill in what it leaves open. What `old` holds is kept or, on commit, freed.
    pub(crate) fn reserve(
        &self,
        service: &mut Value,
        old: Option<&Value>,
        random: Random,
    ) -> Result<Reservation, Vec<FieldError>> {
        let before = old.map(holds).unwrap_or_default();
        let mut reservation =
            Reservation { held: Arc::clone(&self.held), taken: Held::default(), freed: Held::default() };
        let mut errors = Vec::new();
        if let Err(error) = self.reserve_address(service, &before, &mut reservation.taken, random) {
            errors.push(error);
        }
        self.reserve_ports(service, &before, &mut reservation.taken, random, &mut errors);
        if !errors.is_empty() {
            return Err(errors);
        }
        let after = holds(service);
        reservation.freed = Held {
            addresses: before.addresses.difference(&after.addresses).copied().collect(),
            ports: before.ports.difference(&after.ports).copied().collect(),
        };
        Ok(reservation)
    }

    fn reserve_address(
        &self,
        service: &mut Value,
        before: &Held,
        taken: &mut Held,
        random: Random,
    ) -> Result<(), FieldError> {
        let wanted = text(service, "/spec/clusterIP").to_owned();
        if text(service, "/spec/type") == "ExternalName" || wanted == "None" {
            return Ok(());
        }
        let fail = |why: String| FieldError::invalid("spec.clusterIPs", json!([wanted]), why);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted.is_empty() {
            let address = self.free_address(&held, random).ok_or_else(|| {
                fail(format!("failed to allocate an address: the range {} is full", self.addresses))
            })?;
            service["spec"]["clusterIP"] = json!(address.to_string());
            service["spec"]["clusterIPs"] = json!([address.to_string()]);
            held.addresses.insert(address);
            taken.addresses.insert(address);
            return Ok(());
        }
        // Whether it is an address at all is for validation to say.
        let Ok(address) = wanted.parse::<Ipv4Addr>() else { return Ok(()) };
        if before.addresses.contains(&address) {
            return Ok(());
        }
        if !self.addresses.contains(address) {
            return Err(fail(format!(
                "failed to allocate IP {address}: the provided IP is not in the valid range. The range of valid IPs is {}",
                self.addresses
            )));
        }
        if !held.addresses.insert(address) {
            return Err(fail(format!("failed to allocate IP {address}: provided IP is already allocated")));
        }
        taken.addresses.insert(address);
        Ok(())
    }

    fn free_address(&self, held: &Held, random: Random) -> Option<Ipv4Addr> {
        let (size, band) = (self.addresses.size(), self.addresses.static_band());
        let upper = u64::from(size - band);
        let start = u32::try_from(random.below(upper)).unwrap_or(0);
        let above = (0..size - band).map(|step| band + 1 + (start + step) % (size - band));
        above
            .chain(1..=band)
            .map(|offset| self.addresses.nth(offset))
            .find(|address| *address != self.api_server_address() && !held.addresses.contains(address))
    }

    fn reserve_ports(
        &self,
        service: &mut Value,
        before: &Held,
        taken: &mut Held,
        random: Random,
        errors: &mut Vec<FieldError>,
    ) {
        if !has_node_ports(service) {
            return;
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let ports = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
        for (index, port) in ports.into_iter().flatten().enumerate() {
            let field = format!("spec.ports[{index}].nodePort");
            let wanted = port.get("nodePort").and_then(Value::as_u64).unwrap_or(0);
            if wanted == 0 {
                match self.free_port(&held, random) {
                    Some(free) => {
                        port["nodePort"] = json!(free);
                        held.ports.insert(free);
                        taken.ports.insert(free);
                    }
                    None => errors.push(FieldError::invalid(
                        field,
                        0,
                        "failed to allocate a nodePort: range is full",
                    )),
                }
                continue;
            }
            let wanted = match u16::try_from(wanted) {
                Ok(number) if self.ports.contains(&number) => number,
                _ => {
                    let (first, last) = (self.ports.start(), self.ports.end());
                    let why = format!(
                        "provided port is not in the valid range. The range of valid ports is {first}-{last}"
                    );
                    errors.push(FieldError::invalid(field, wanted, why));
                    continue;
                }
            };
            // The same number may serve several protocols of one Service.
            if before.ports.contains(&wanted) || taken.ports.contains(&wanted) {
                continue;
            }
            if held.ports.insert(wanted) {
                taken.ports.insert(wanted);
            } else {
                errors.push(FieldError::invalid(field, wanted, "provided port is already allocated"));
            }
        }
    }

    fn free_port(&self, held: &Held, random: Random) -> Option<u16> {
        let (first, last) = (*self.ports.start(), *self.ports.end());
        let size = u64::from(last - first) + 1;
        // The lower band is left to ports that users choose (KEP-3668).
        let band = (size / 32).clamp(16, 128).min(size / 2);
        let start = random.below(size - band);
        let above = (0..size - band).map(|step| band + (start + step) % (size - band));
        above
            .chain(0..band)
            .filter_map(|offset| u16::try_from(u64::from(first) + offset).ok())
            .find(|port| !held.ports.contains(port))
    }
}

/// Keep the address and ports of a Service where a full update leaves them out.
pub(super) fn carry_over(new: &mut Value, old: &Value) {
    let external = text(new, "/spec/type") == "ExternalName";
    if !external && text(new, "/spec/clusterIP").is_empty() && !text(old, "/spec/clusterIP").is_empty() {
        for field in ["clusterIP", "clusterIPs"] {
            if let (Some(value), Some(spec)) =
                (old["spec"].get(field), new.get_mut("spec").and_then(Value::as_object_mut))
            {
                spec.insert(field.to_owned(), value.clone());
            }
        }
    }
    if !has_node_ports(new) {
        // They belong to the type that is given up.
        for port in new.pointer_mut("/spec/ports").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(port) = port.as_object_mut().filter(|_| has_node_ports(old)) {
                port.remove("nodePort");
            }
        }
        return;
    }
    let same = |a: &Value, b: &Value| {
        let protocol =
            |port: &Value| port.get("protocol").and_then(Value::as_str).unwrap_or("TCP").to_owned();
        a.get("port") == b.get("port") && protocol(a) == protocol(b)
    };
    let olds = old.pointer("/spec/ports").and_then(Value::as_array);
    for port in new.pointer_mut("/spec/ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let open = port.get("nodePort").and_then(Value::as_u64).unwrap_or(0) == 0;
        let before = olds.into_iter().flatten().find(|before| same(before, port));
        if let Some(number) = before.and_then(|before| before.get("nodePort")).filter(|_| open) {
            port["nodePort"] = number.clone();
        }
    }
}

fn has_node_ports(service: &Value) -> bool {
    matches!(text(service, "/spec/type"), "NodePort" | "LoadBalancer")
}

/// The addresses and ports in a Service.
fn holds(service: &Value) -> Held {
    let list = |pointer: &str| service.pointer(pointer).and_then(Value::as_array).into_iter().flatten();
    let addresses = list("/spec/clusterIPs").filter_map(|address| address.as_str()?.parse().ok());
    let first = text(service, "/spec/clusterIP").parse().ok();
    let ports = list("/spec/ports").filter_map(|port| u16::try_from(port.get("nodePort")?.as_u64()?).ok());
    Held { addresses: addresses.chain(first).collect(), ports: ports.filter(|port| *port != 0).collect() }
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocator() -> Allocator {
        Allocator::new("10.96.0.0/12".parse().unwrap(), 30000..=32767)
    }

    fn service(node_port: u16) -> Value {
        json!({"spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": node_port}]}})
    }

    #[test]
    fn a_port_is_held_until_its_service_goes() {
        let (allocator, random) = (allocator(), Random::default());
        let mut first = service(30000);
        allocator.reserve(&mut first, None, random).unwrap().commit();
        let errors = allocator.reserve(&mut service(30000), None, random).unwrap_err();
        assert_eq!(
            errors[0].to_string(),
            "spec.ports[0].nodePort: Invalid value: 30000: provided port is already allocated"
        );
        allocator.release(&first);
        drop(allocator.reserve(&mut service(30000), None, random).unwrap());
        allocator.reserve(&mut service(30000), None, random).unwrap().commit();
    }

    #[test]
    fn an_update_keeps_what_it_has_and_frees_what_it_drops() {
        let (allocator, random) = (allocator(), Random::default());
        let mut old = service(30000);
        allocator.reserve(&mut old, None, random).unwrap().commit();
        let mut new = service(30001);
        carry_over(&mut new, &old);
        assert_eq!(new["spec"]["clusterIP"], old["spec"]["clusterIP"]);
        allocator.reserve(&mut new, Some(&old), random).unwrap().commit();
        allocator.reserve(&mut service(30000), None, random).unwrap().commit();
        assert!(allocator.reserve(&mut service(30001), None, random).is_err());
    }

    #[test]
    fn ranges_are_checked() {
        let (allocator, random) = (allocator(), Random::default());
        assert!(allocator.reserve(&mut service(80), None, random).is_err());
        let mut outside = json!({"spec": {"type": "ClusterIP", "clusterIP": "192.168.0.1"}});
        assert!(allocator.reserve(&mut outside, None, random).is_err());
        assert_eq!(
            "10.96.0.1/12".parse::<Ipv4Range>().unwrap_err(),
            "\"10.96.0.1/12\" has host bits set; did you mean 10.96.0.0/12?"
        );
        let mut open = json!({"spec": {"type": "ClusterIP"}});
        allocator.reserve(&mut open, None, random).unwrap().commit();
        let address: Ipv4Addr = open["spec"]["clusterIP"].as_str().unwrap().parse().unwrap();
        assert!(
            address.to_bits() - Ipv4Addr::new(10, 96, 0, 0).to_bits() > 256,
            "{address} is in the static band"
        );
    }
}

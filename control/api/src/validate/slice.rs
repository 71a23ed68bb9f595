//! Endpoints and EndpointSlices.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;

use super::{Errors, names, path::Path};
use crate::{
    status::FieldError,
    value::{int, list, text},
};

const MAX_ENDPOINTS: usize = 1000;
const MAX_ADDRESSES: usize = 100;
const BAD_ADDRESS: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";

/// Checks an EndpointSlice.
pub(super) fn endpoint_slice(errors: &mut Errors, object: &Value) {
    let kind = text(object, "/addressType");
    let at = Path::new("addressType");
    if kind.is_empty() {
        errors.required(&at);
    }
    errors.one_of(&at, kind, &["FQDN", "IPv4", "IPv6"]);
    let endpoints = list(object, "/endpoints");
    let all = Path::new("endpoints");
    if endpoints.len() > MAX_ENDPOINTS {
        errors.push(FieldError::too_long(&all, MAX_ENDPOINTS));
        return;
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let at = all.index(index);
        let addresses = list(endpoint, "/addresses");
        let at_addresses = at.child("addresses");
        if addresses.is_empty() {
            errors.push(FieldError::required(&at_addresses, "must contain at least 1 address"));
        } else if addresses.len() > MAX_ADDRESSES {
            errors.push(FieldError::too_long(&at_addresses, MAX_ADDRESSES));
        }
        for (index, address) in addresses.iter().enumerate() {
            let at = at_addresses.index(index);
            slice_address(errors, &at, kind, address.as_str().unwrap_or_default());
        }
        let hostname = text(endpoint, "/hostname");
        if !hostname.is_empty() {
            errors.syntax(&at.child("hostname"), hostname, names::label_1123(hostname));
        }
    }
    ports(errors, &Path::new("ports"), object, true);
}

/// What may not change in an EndpointSlice.
pub(super) fn update(errors: &mut Errors, new: &Value, old: &Value) {
    errors.immutable(&Path::new("addressType"), new.get("addressType"), old.get("addressType"));
}

/// Checks Endpoints.
pub(super) fn endpoints(errors: &mut Errors, object: &Value) {
    let all = Path::new("subsets");
    for (index, subset) in list(object, "/subsets").iter().enumerate() {
        let at = all.index(index);
        if list(subset, "/addresses").is_empty() && list(subset, "/notReadyAddresses").is_empty() {
            let why = "must specify `addresses` or `notReadyAddresses`";
            errors.push(FieldError::required(&at, why));
        }
        for key in ["addresses", "notReadyAddresses"] {
            let at = at.child(key);
            for (index, address) in list(subset, &format!("/{key}")).iter().enumerate() {
                let ip = text(address, "/ip");
                if ip.parse::<IpAddr>().is_err() {
                    errors.invalid(&at.index(index).child("ip"), ip, BAD_ADDRESS);
                }
            }
        }
        ports(errors, &at.child("ports"), subset, false);
    }
}

fn slice_address(errors: &mut Errors, at: &Path<'_>, kind: &str, address: &str) {
    let fits = match kind {
        "IPv4" => address.parse::<Ipv4Addr>().is_ok(),
        "IPv6" => address.parse::<Ipv6Addr>().is_ok(),
        "FQDN" => names::subdomain_1123(address).is_none(),
        _ => true,
    };
    if !fits {
        let why = match kind {
            "IPv4" => "must be a valid IPv4 address",
            "IPv6" => "must be a valid IPv6 address",
            _ => "must be a fully qualified domain name",
        };
        errors.invalid(at, address, why);
    }
}

fn ports(errors: &mut Errors, at: &Path<'_>, holder: &Value, optional: bool) {
    let ports = list(holder, "/ports");
    let mut seen: Vec<&str> = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let at = at.index(index);
        let name = text(port, "/name");
        if !name.is_empty() {
            errors.syntax(&at.child("name"), name, names::label_1123(name));
        } else if ports.len() > 1 && !optional {
            errors.required(&at.child("name"));
        }
        if seen.contains(&name) && optional {
            errors.push(FieldError::duplicate(&at.child("name"), name));
        }
        seen.push(name);
        match int(port, "/port") {
            Some(number) => errors.port(&at.child("port"), number),
            None if !optional => errors.required(&at.child("port")),
            None => {}
        }
        errors.one_of(&at.child("protocol"), text(port, "/protocol"), &["SCTP", "TCP", "UDP"]);
    }
}

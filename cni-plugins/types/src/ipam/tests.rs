//! What users of the allocator rely on: never a held or excluded address, rotation, clear exhaustion.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn config(json: &str) -> IpamConfig {
    serde_json::from_str(json).unwrap()
}

fn set(json: &str) -> RangeSet {
    config(json).range_sets().unwrap().remove(0)
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn first_address_is_after_the_gateway() {
    let set = set(r#"{"subnet":"10.244.0.0/24"}"#);
    let given = set.allocate(None, |_| false).unwrap();
    assert_eq!(given.address.to_string(), "10.244.0.2/24");
    assert_eq!(given.gateway, Some(addr("10.244.0.1")));
}

#[test]
fn rotates_past_the_end_to_the_start() {
    let set = set(r#"{"subnet":"10.0.0.0/29","exclude":["10.0.0.3","10.0.0.4/31"]}"#);
    let mut last = None;
    let mut order = Vec::new();
    for _ in 0..3 {
        let given = set.allocate(last, |_| false).unwrap().address.addr();
        last = Some(given);
        order.push(given.to_string());
    }
    assert_eq!(order, ["10.0.0.2", "10.0.0.6", "10.0.0.2"]);
}

#[test]
fn a_full_set_says_which_range() {
    let set = set(r#"{"subnet":"10.0.0.0/30"}"#);
    let error = set.allocate(None, |held| held == addr("10.0.0.2")).unwrap_err();
    assert_eq!(error.to_string(), "no IP addresses available in range 10.0.0.1-10.0.0.2");
}

#[test]
fn requested_addresses_are_checked() {
    let set = set(r#"{"subnet":"10.0.0.0/24"}"#);
    assert!(set.find(addr("10.0.0.9")).is_some());
    for refused in ["10.0.0.1", "10.0.0.0", "10.0.0.255", "10.0.1.1", "::1"] {
        assert!(set.find(addr(refused)).is_none(), "{refused}");
    }
}

#[test]
fn subnets_without_hosts_are_named() {
    let refused = |json: &str| config(json).range_sets().unwrap_err().to_string();
    for (subnet, kind) in [
        ("0.0.0.0/0", "unspecified"),
        ("::/64", "unspecified"),
        ("127.0.0.0/8", "loopback"),
        ("224.0.0.0/24", "multicast"),
        ("ff02::/64", "multicast"),
        ("::ffff:10.0.0.0/120", "IPv4-mapped"),
    ] {
        let error = refused(&format!(r#"{{"subnet":"{subnet}"}}"#));
        assert!(error.contains(&format!("ipam.subnet: {subnet} has {kind} addresses")), "{error}");
    }
    let error = refused(r#"{"subnet":"10.0.0.0/24","gateway":"10.0.0.255"}"#);
    assert!(error.contains("ipam.gateway: 10.0.0.255 is the broadcast address"), "{error}");
    let error = refused(r#"{"subnet":"10.0.0.0/24","gateway":"10.0.0.0"}"#);
    assert!(error.contains("ipam.gateway: 10.0.0.0 is the network address"), "{error}");
    assert!(config(r#"{"subnet":"fd00::/64","gateway":"fd00::"}"#).range_sets().is_ok());
}

#[test]
fn large_exclusions_are_skipped_at_once() {
    let set = set(r#"{"subnet":"fd00::/64","exclude":["fd00::/65"]}"#);
    let given = set.allocate(None, |_| false).unwrap();
    assert_eq!(given.address.to_string(), "fd00::8000:0:0:0/64");
    let whole = config(r#"{"subnet":"fd00::/64","exclude":["fd00::/64"]}"#).range_sets().unwrap().remove(0);
    assert!(whole.allocate(None, |_| false).is_err());
}

#[test]
fn bad_ranges_are_named() {
    let cases = [
        ("{}", "ipam: no ranges are configured: give ranges, subnet or addresses"),
        (r#"{"ranges":[[]]}"#, "ipam: no ranges are configured: give ranges, subnet or addresses"),
        (
            r#"{"subnet":"10.0.0.7/24"}"#,
            "ipam.subnet: 10.0.0.7/24 is not a network address; did you mean 10.0.0.0/24?",
        ),
        (r#"{"subnet":"10.0.0.0/31"}"#, "ipam.subnet: 10.0.0.0/31 is too small to allocate from"),
        (
            r#"{"subnet":"10.0.0.0/24","rangeStart":"10.0.1.1"}"#,
            "ipam.rangeStart: 10.0.1.1 is not usable in subnet 10.0.0.0/24",
        ),
        (
            r#"{"ranges":[[{"subnet":"10.0.0.0/24"}],[{"subnet":"10.1.0.0/24"},{"subnet":"10.2.0.0/32"}]]}"#,
            "ipam.ranges[1][1].subnet: 10.2.0.0/32 is too small to allocate from",
        ),
        (
            r#"{"ranges":[[{"subnet":"10.0.0.0/24"}],[{"subnet":"10.0.0.0/16"}]]}"#,
            "ipam: subnets 10.0.0.0/24 and 10.0.0.0/16 overlap or are of different families in one set of ranges",
        ),
    ];
    for (json, message) in cases {
        assert_eq!(config(json).range_sets().unwrap_err().to_string(), message, "{json}");
    }
}

#[test]
fn overlaps_are_found_wherever_they_are() {
    let refused = |subnets: &[&str]| {
        let sets: Vec<String> = subnets.iter().map(|net| format!(r#"[{{"subnet":"{net}"}}]"#)).collect();
        let error = config(&format!(r#"{{"ranges":[{}]}}"#, sets.join(","))).range_sets().err();
        error.map(|error| error.to_string())
    };
    assert_eq!(refused(&["10.0.9.0/24", "fd00::/64", "10.0.0.0/24", "10.0.3.0/24", "fd01::/64"]), None);
    for subnets in [
        ["10.0.9.0/24", "fd00::/64", "10.0.0.0/16", "10.1.0.0/24"],
        ["10.0.0.0/16", "10.0.1.0/24", "10.0.9.0/24", "fd00::/64"],
        ["fd00::/56", "10.0.0.0/24", "10.0.1.0/24", "fd00::/64"],
        ["10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/24", "10.0.0.0/24"],
    ] {
        assert!(refused(&subnets).is_some_and(|told| told.contains("overlap")), "{subnets:?}");
    }
}

#[test]
fn two_sets_give_dual_stack() {
    let sets =
        config(r#"{"ranges":[[{"subnet":"10.0.0.0/24"}],[{"subnet":"fd00::/64"}]]}"#).range_sets().unwrap();
    let given: Vec<String> =
        sets.iter().map(|set| set.allocate(None, |_| false).unwrap().address.to_string()).collect();
    assert_eq!(given, ["10.0.0.2/24", "fd00::2/64"]);
}

proptest! {
    #[test]
    fn gives_a_free_address_exactly_while_there_is_one(
        prefix in 26_u8..=30,
        held_hosts in proptest::collection::btree_set(0_u32..64, 0..64),
        last_host in proptest::option::of(0_u32..64),
        gateway_host in 1_u32..3,
    ) {
        let base = 0x0a00_0000_u32;
        let host = |h: u32| IpAddr::V4((base + h).into());
        let size = 1_u32 << (32 - prefix);
        let json = format!(r#"{{"subnet":"10.0.0.0/{prefix}","gateway":"{}"}}"#, host(gateway_host));
        let set = set(&json);
        let held: BTreeSet<IpAddr> = held_hosts.iter().map(|h| host(*h)).collect();
        let free: BTreeSet<IpAddr> =
            (1..size - 1).filter(|h| *h != gateway_host).map(host).filter(|a| !held.contains(a)).collect();
        match set.allocate(last_host.map(host), |a| held.contains(&a)) {
            Ok(given) => {
                prop_assert!(free.contains(&given.address.addr()));
                prop_assert_eq!(given.address.prefix_len(), prefix);
                // Nothing free lies between the last one given and this one.
                if let Some(last) = last_host.filter(|h| (1..size - 1).contains(h)).map(host) {
                    let after: Option<&IpAddr> = free.iter().find(|a| **a > last);
                    prop_assert_eq!(Some(&given.address.addr()), after.or(free.first()));
                }
            }
            Err(_) => prop_assert!(free.is_empty()),
        }
    }

    #[test]
    fn allocating_until_exhaustion_gives_each_address_once(prefix in 26_u8..=29, start in 2_u32..6, len in 1_u32..40) {
        let size = 1_u32 << (32 - prefix);
        let end = (start + len).min(size - 2);
        prop_assume!(start <= end);
        let json = format!(r#"{{"subnet":"10.0.0.0/{prefix}","rangeStart":"10.0.0.{start}","rangeEnd":"10.0.0.{end}"}}"#);
        let set = set(&json);
        let mut held = BTreeSet::new();
        let mut last = None;
        while let Ok(given) = set.allocate(last, |a| held.contains(&a)) {
            prop_assert!(held.insert(given.address.addr()));
            last = Some(given.address.addr());
        }
        prop_assert_eq!(held.len(), (end - start + 1) as usize);
    }
}

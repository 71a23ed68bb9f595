//! What users of the log rely on: never one address for two, nothing lost by a kill, nothing held after
//! a boot. The log's text is the disk; every operation reads it anew, as every plugin call does.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::ipam::IpamConfig;

const BOOT: &str = "5c6b2c6e-0000-4000-8000-000000000001";

fn sets(json: &str) -> Vec<RangeSet> {
    let config: IpamConfig = serde_json::from_str(json).unwrap();
    config.range_sets().unwrap()
}

fn owner(number: u8) -> Owner {
    Owner { container_id: format!("c{number}"), ifname: "eth0".to_owned() }
}

fn request<'a>(owner: &'a Owner, sets: &'a [RangeSet], wanted: &'a [IpAddr]) -> Request<'a> {
    Request { owner, netns: "/run/netns/x", pod: "", sets, fixed: &[], wanted }
}

/// A log on an imagined disk.
#[derive(Default)]
struct Disk(String);

impl Disk {
    fn open(&mut self, boot: &str) -> Leases {
        // What is not there yet.
        if self.0.is_empty() {
            self.0 = Leases::default().snapshot(boot);
        }
        let mut loaded = Leases::load(&self.0, boot).unwrap();
        self.0.truncate(loaded.complete);
        if loaded.stale {
            self.0 = loaded.leases.snapshot(boot);
        }
        loaded.leases
    }

    fn commit(&mut self, leases: &mut Leases, changes: &[Change], boot: &str) {
        for change in changes {
            self.0.push_str(&change.line());
            self.0.push('\n');
            leases.apply(change);
        }
        if leases.is_long() {
            self.0 = leases.snapshot(boot);
        }
    }
}

fn addrs(given: &[Allocation]) -> Vec<String> {
    given.iter().map(|given| given.address.addr().to_string()).collect()
}

#[test]
fn an_attachment_that_asks_again_gets_what_it_holds() {
    let (mut disk, one) = (Disk::default(), owner(1));
    let sets = sets(r#"{"ranges":[[{"subnet":"10.0.0.0/24"}],[{"subnet":"fd00::/64"}]]}"#);
    let mut leases = disk.open(BOOT);
    let (given, changes) = leases.take(&request(&one, &sets, &[])).unwrap();
    disk.commit(&mut leases, &changes, BOOT);
    assert_eq!(addrs(&given), ["10.0.0.2", "fd00::2"]);
    let leases = disk.open(BOOT);
    let (again, changes) = leases.take(&request(&one, &sets, &[])).unwrap();
    assert_eq!((again, changes), (given, Vec::new()));
    assert!(disk.0.ends_with("+ c1 eth0 /run/netns/x - 10.0.0.2,fd00::2\n"), "{}", disk.0);
}

#[test]
fn a_freed_address_rests_and_a_boot_frees_all() {
    let mut disk = Disk::default();
    let sets = sets(r#"{"subnet":"10.0.0.0/24"}"#);
    for (number, expected) in [(1, "10.0.0.2"), (2, "10.0.0.3")] {
        let mut leases = disk.open(BOOT);
        let (given, changes) = leases.take(&request(&owner(number), &sets, &[])).unwrap();
        assert_eq!(addrs(&given), [expected]);
        disk.commit(&mut leases, &changes, BOOT);
        let release = leases.release(&owner(number)).unwrap();
        disk.commit(&mut leases, &[release], BOOT);
    }
    let mut leases = disk.open(BOOT);
    let (given, changes) = leases.take(&request(&owner(3), &sets, &[])).unwrap();
    assert_eq!(addrs(&given), ["10.0.0.4"]);
    disk.commit(&mut leases, &changes, BOOT);
    let leases = disk.open("another boot");
    assert_eq!(leases.iter().count(), 0);
    let (given, _) = leases.take(&request(&owner(4), &sets, &[])).unwrap();
    assert_eq!(addrs(&given), ["10.0.0.5"]);
}

#[test]
fn a_pod_gets_the_address_it_had_while_it_is_free() {
    let mut disk = Disk::default();
    let sets = sets(r#"{"subnet":"10.0.0.0/24"}"#);
    let mut leases = disk.open(BOOT);
    for number in [1, 2] {
        let owner = owner(number);
        let pod = format!("shop/db-{number}");
        let (_, changes) = leases.take(&Request { pod: &pod, ..request(&owner, &sets, &[]) }).unwrap();
        disk.commit(&mut leases, &changes, BOOT);
    }
    // Also over a boot.
    let mut leases = disk.open("next");
    let again = owner(7);
    let (given, changes) = leases.take(&Request { pod: "shop/db-2", ..request(&again, &sets, &[]) }).unwrap();
    assert_eq!(addrs(&given), ["10.0.0.3"]);
    disk.commit(&mut leases, &changes, "next");
    let other = owner(8);
    let (given, _) = leases.take(&Request { pod: "shop/db-2", ..request(&other, &sets, &[]) }).unwrap();
    assert_ne!(addrs(&given), ["10.0.0.3"]);
}

#[test]
fn wanted_and_fixed_addresses_are_checked_against_what_is_held() {
    let mut disk = Disk::default();
    let sets = sets(r#"{"subnet":"10.0.0.0/24","exclude":["10.0.0.64/26"]}"#);
    let mut leases = disk.open(BOOT);
    let nine = ["10.0.0.9".parse().unwrap()];
    let (given, changes) = leases.take(&request(&owner(1), &sets, &nine)).unwrap();
    assert_eq!(addrs(&given), ["10.0.0.9"]);
    disk.commit(&mut leases, &changes, BOOT);
    assert_eq!(
        leases.take(&request(&owner(2), &sets, &nine)).unwrap_err(),
        AllocateError::NotAvailable(nine[0])
    );
    let fixed = [StaticAddress { address: "10.0.0.9/24".parse().unwrap(), gateway: None }];
    let two = owner(2);
    let refused = leases.take(&Request { fixed: &fixed, ..request(&two, &[], &[]) }).unwrap_err();
    assert_eq!(refused, AllocateError::NotAvailable(nine[0]));
    for outside in ["10.0.1.1", "10.0.0.1", "10.0.0.70", "fd00::1"] {
        let outside = [outside.parse().unwrap()];
        let refused = leases.take(&request(&owner(2), &sets, &outside)).unwrap_err();
        assert_eq!(refused, AllocateError::Outside(outside[0]));
    }
}

#[test]
fn a_line_nobody_writes_is_named() {
    let text = format!("{MAGIC} {BOOT}\n+ c1 eth0 - - 10.0.0.2\n+ c1 eth0 nonsense\n");
    let error = Leases::load(&text, BOOT).unwrap_err();
    assert_eq!(error.line, 3);
    // In a log of another boot nothing is held anyway.
    assert!(Leases::load(&text, "next").unwrap().stale);
}

#[test]
fn what_does_not_begin_as_a_log_is_refused() {
    let text = format!("{FAMILY}10 {BOOT}\n+ c1 eth0 - - 10.0.0.2\n");
    let nuls = "\0".repeat(5000);
    let half = format!("{MAGIC} ");
    for left in [&text, "", "\n", "\0\0\0\n", &nuls, "rubbish\n", &text[..5], &half, &format!("{half}\n")] {
        let refused = Leases::load(left, BOOT).unwrap_err();
        assert!(refused.line == 1 && refused.text.len() <= TOLD, "{left:?}");
    }
}

#[test]
fn a_word_that_would_break_a_later_snapshot_is_not_taken() {
    // At a line's end a carriage return is no part of the line, so it must not stand for a pod in the middle of one.
    let text = format!("{MAGIC} {BOOT}\n+ c1 eth0 /n \r 10.0.0.2\n- c1 eth0\n");
    assert_eq!(Leases::load(&text, BOOT).unwrap_err().line, 2);
    let text = format!("{MAGIC} {BOOT}\n~ 10.0.0.2 a\u{a0}b\n");
    assert_eq!(Leases::load(&text, BOOT).unwrap_err().line, 2);
}

#[derive(Debug, Clone)]
enum Op {
    Add(u8),
    AddKilled(u8, usize),
    Del(u8),
    Gc(Vec<u8>),
    Boot,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0_u8..12).prop_map(Op::Add),
        2 => (0_u8..12, 0_usize..60).prop_map(|(number, cut)| Op::AddKilled(number, cut)),
        4 => (0_u8..12).prop_map(Op::Del),
        1 => proptest::collection::vec(0_u8..12, 0..6).prop_map(Op::Gc),
        1 => Just(Op::Boot),
    ]
}

proptest! {
    /// Calls are serial under the store's lock, so every interleaving of processes is some sequence of
    /// whole calls and of calls killed while they append.
    #[test]
    fn no_interleaving_gives_one_address_twice(ops in proptest::collection::vec(op(), 1..400)) {
        let sets = sets(r#"{"ranges":[[{"subnet":"10.0.0.0/28","exclude":["10.0.0.5"]}],[{"subnet":"fd00::/124"}]]}"#);
        let mut disk = Disk::default();
        let mut boot = 0;
        // What users believe they hold.
        let mut believed: BTreeMap<Owner, Vec<IpAddr>> = BTreeMap::new();
        for op in ops {
            let boot_id = format!("boot{boot}");
            let mut leases = disk.open(&boot_id);
            match op {
                Op::Add(number) => match leases.take(&request(&owner(number), &sets, &[])) {
                    Ok((given, changes)) => {
                        disk.commit(&mut leases, &changes, &boot_id);
                        let addrs: Vec<IpAddr> = given.iter().map(|given| given.address.addr()).collect();
                        let before = believed.insert(owner(number), addrs.clone());
                        prop_assert!(before.is_none_or(|before| before == addrs));
                    }
                    Err(error) => {
                        prop_assert!(matches!(error, AllocateError::Exhausted(_)));
                        prop_assert_eq!(leases.iter().filter(|lease| lease.owner != owner(number)).count(), 12);
                    }
                },
                Op::AddKilled(number, cut) => {
                    if let Ok((_, changes)) = leases.take(&request(&owner(number), &sets, &[])) {
                        let text: String = changes.iter().map(|change| change.line() + "\n").collect();
                        disk.0.push_str(&text[..cut.min(text.len())]);
                    }
                }
                Op::Del(number) => {
                    let change = leases.release(&owner(number));
                    disk.commit(&mut leases, change.as_slice(), &boot_id);
                    believed.remove(&owner(number));
                }
                Op::Gc(kept) => {
                    let kept: Vec<Owner> = kept.into_iter().map(owner).collect();
                    let changes = leases.release_all_but(|lease| kept.contains(&lease.owner));
                    disk.commit(&mut leases, &changes, &boot_id);
                    believed.retain(|owner, _| kept.contains(owner));
                }
                Op::Boot => {
                    boot += 1;
                    believed.clear();
                }
            }
            let now = disk.open(&format!("boot{boot}"));
            let mut seen = BTreeMap::new();
            for lease in now.iter() {
                for addr in &lease.addrs {
                    prop_assert_eq!(seen.insert(*addr, lease.owner.clone()), None, "{} is held twice", addr);
                }
            }
            for (owner, addrs) in &believed {
                prop_assert_eq!(now.held_by(owner), addrs.as_slice());
            }
        }
        prop_assert!(disk.0.lines().count() < 400);
    }
}

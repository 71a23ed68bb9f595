//! The store across calls, crashes and boots.

use cni_plugins_types::ipam::IpamConfig;

use super::*;

fn set(json: &str) -> RangeSet {
    serde_json::from_str::<IpamConfig>(json).unwrap().range_sets().unwrap().remove(0)
}

fn small() -> RangeSet {
    set(r#"{"subnet":"10.0.0.0/29"}"#)
}

fn owner(id: &str) -> Owner {
    Owner { container_id: id.to_owned(), ifname: "eth0".to_owned() }
}

fn give(store: &Store, id: &str) -> String {
    store.allocate(&owner(id), 0, &small(), None).unwrap().address.addr().to_string()
}

#[test]
fn addresses_are_sticky_distinct_and_rotate() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(give(&store, "a"), "10.0.0.2");
    assert_eq!(give(&store, "a"), "10.0.0.2");
    assert_eq!(give(&store, "b"), "10.0.0.3");
    store.release(&owner("a")).unwrap();
    store.release(&owner("a")).unwrap();
    assert_eq!(give(&store, "c"), "10.0.0.4");
    assert_eq!(store.held_by(&owner("b")).unwrap(), ["10.0.0.3".parse::<IpAddr>().unwrap()]);
}

#[test]
fn exhaustion_names_the_range_and_ends_with_a_release() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for id in ["a", "b", "c", "d", "e"] {
        give(&store, id);
    }
    let failure = store.allocate(&owner("f"), 0, &small(), None).unwrap_err();
    assert!(
        failure.to_string().contains("no IP addresses available in range 10.0.0.1-10.0.0.6"),
        "{failure}"
    );
    store.release(&owner("c")).unwrap();
    assert_eq!(give(&store, "f"), "10.0.0.4");
}

#[test]
fn a_call_killed_between_its_links_is_completed_or_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    give(&store, "a");
    fs::remove_file(dir.path().join("10.0.0.2")).unwrap();
    assert!(store.held_by(&owner("a")).unwrap().is_empty());
    assert_eq!(give(&store, "a"), "10.0.0.2");
    // The half-done record of "a" loses against a holder that came in between.
    fs::remove_file(dir.path().join("10.0.0.2")).unwrap();
    let wanted = Some("10.0.0.2".parse().unwrap());
    store.allocate(&owner("b"), 0, &small(), wanted).unwrap();
    assert_eq!(give(&store, "a"), "10.0.0.3");
    store.release(&owner("a")).unwrap();
    store.release(&owner("b")).unwrap();
    assert!(store.owner_files().unwrap().is_empty());
}

#[test]
fn records_of_an_earlier_boot_are_dropped_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    give(&store, "a");
    drop(store);
    let own = dir.path().join("own.0.a.eth0");
    let text = fs::read_to_string(&own).unwrap();
    let boot_id = text.lines().nth(2).unwrap().to_owned();
    fs::write(&own, text.replace(&boot_id, "earlier")).unwrap();
    fs::write(dir.path().join("boot"), "earlier").unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert!(store.owner_files().unwrap().is_empty());
    assert!(!dir.path().join("10.0.0.2").exists());
    assert_eq!(give(&store, "b"), "10.0.0.3");
}

#[test]
fn gc_keeps_only_the_valid() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    give(&store, "a");
    give(&store, "b");
    store.release_all_but(|owner| owner.container_id == "b").unwrap();
    assert!(store.held_by(&owner("a")).unwrap().is_empty());
    assert_eq!(store.held_by(&owner("b")).unwrap().len(), 1);
}

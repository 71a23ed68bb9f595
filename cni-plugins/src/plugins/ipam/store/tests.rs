//! The store on a real file system: parallel users, killed writers, other boots, many records.

use std::{collections::BTreeSet, fmt::Write as _, net::IpAddr};

use cni_plugins_types::ipam::{
    IpamConfig, RangeSet,
    leases::{Owner, Request},
};

use super::*;

fn sets() -> Vec<RangeSet> {
    let config: IpamConfig = serde_json::from_str(r#"{"subnet":"10.0.0.0/16"}"#).unwrap();
    config.range_sets().unwrap()
}

fn owner(number: usize) -> Owner {
    Owner { container_id: format!("c{number}"), ifname: "eth0".to_owned() }
}

fn take(dir: &Path, number: usize) -> IpAddr {
    let (owner, sets) = (owner(number), sets());
    let request = Request { owner: &owner, netns: "", pod: "", sets: &sets, fixed: &[], wanted: &[] };
    let mut store = Store::open(dir).unwrap();
    let (given, changes) = store.leases().take(&request).unwrap();
    store.commit(&changes).unwrap();
    given[0].address.addr()
}

#[test]
fn parallel_users_get_different_addresses() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let given: Vec<IpAddr> = std::thread::scope(|scope| {
        let users: Vec<_> = (0..8)
            .map(|user| scope.spawn(move || (0..20).map(|n| take(dir, user * 100 + n)).collect::<Vec<_>>()))
            .collect();
        users.into_iter().flat_map(|user| user.join().unwrap()).collect()
    });
    assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), 160);
    assert_eq!(Store::open(dir).unwrap().leases().iter().count(), 160);
}

#[test]
fn half_a_line_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let first = take(dir.path(), 1);
    let file = dir.path().join("leases");
    let whole = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("{whole}+ c2 eth0 - - 10.0.")).unwrap();
    let second = take(dir.path(), 3);
    assert_ne!(first, second);
    let text = fs::read_to_string(&file).unwrap();
    assert_eq!(text.lines().count(), 3, "{text}");
}

#[test]
fn another_boot_frees_everything() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("leases");
    fs::write(&file, "keelson-ipam 1 an-earlier-boot\n+ c1 eth0 - - 10.0.0.2\n").unwrap();
    assert_eq!(Store::open(dir.path()).unwrap().leases().iter().count(), 0);
    assert!(!fs::read_to_string(&file).unwrap().contains("10.0.0.2\n+"));
}

#[test]
fn a_log_that_lost_its_beginning_while_pods_run_is_refused_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    take(dir.path(), 1);
    let file = dir.path().join("leases");
    for left in ["", "\n", "\0\0\0\0", "\0\0\n+ c1 eth0 - - 10.0.0.2\n", "rubbish\n", "keelson-ip"] {
        fs::write(&file, left).unwrap();
        let failure = Store::open(dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(failure.contains("leases: line 1 is not understood"), "{left:?}: {failure}");
        assert_eq!(fs::read_to_string(&file).unwrap(), left);
    }
    fs::remove_file(&file).unwrap();
    take(dir.path(), 1);
}

#[test]
fn what_a_crash_left_is_told_by_its_time() {
    let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    let (now, uptime) = (at(10_000), Duration::from_secs(1000));
    assert!(is_before_boot(at(8000), now, uptime));
    for this_boot in [8999, 9000, 9500, 10_000, 20_000] {
        assert!(!is_before_boot(at(this_boot), now, uptime), "{this_boot}");
    }
    // A clock that begins at 1970.
    assert!(!is_before_boot(at(5), at(30), uptime));
}

#[test]
fn a_pipe_in_the_place_of_a_file_is_refused_at_once() {
    for name in ["leases", "lock"] {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join(name);
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let failure = Store::open(dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(failure.contains(&pipe.display().to_string()), "{failure}");
    }
}

#[test]
fn a_damaged_log_is_refused_by_line() {
    let dir = tempfile::tempdir().unwrap();
    take(dir.path(), 1);
    let file = dir.path().join("leases");
    let whole = fs::read_to_string(&file).unwrap();
    fs::write(&file, whole + "nonsense\n").unwrap();
    let failure = Store::open(dir.path()).map(|_| ()).unwrap_err().to_string();
    assert!(failure.contains("leases: line 3 is not understood: \"nonsense\""), "{failure}");
}

#[test]
fn ten_thousand_stale_records_go_at_once() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path()).unwrap());
    let file = dir.path().join("leases");
    let mut text = fs::read_to_string(&file).unwrap();
    for number in 0..10_000_u32 {
        let addr = IpAddr::from((0x0a00_0002 + number).to_be_bytes());
        writeln!(text, "+ c{number} eth0 - - {addr}").unwrap();
    }
    fs::write(&file, text).unwrap();
    let started = std::time::Instant::now();
    let mut store = Store::open(dir.path()).unwrap();
    let changes = store.leases().release_all_but(|lease| lease.owner == owner(7));
    assert_eq!(changes.len(), 9_999);
    store.commit(&changes).unwrap();
    eprintln!("GC of 10,000 records: {:?}", started.elapsed());
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.leases().iter().map(|lease| &lease.owner).collect::<Vec<_>>(), [&owner(7)]);
    assert!(fs::metadata(&file).unwrap().len() < 4096);
}

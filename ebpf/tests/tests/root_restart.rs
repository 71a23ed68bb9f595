//! The programs outlive whoever loaded them, and updates never show a half-made service.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use ebpf_common::Protocol::Tcp;
use ebpf_loader::{Change, OpenError, PinError, ServiceTable};
use ebpf_tests::{
    arena::Arena,
    servers::{Server, ask_tcp},
    tables::{at, filler, ips, key, service},
};

/// Starts the fixture and waits until it has attached; returns it and how it started.
fn start_fixture(arena: &Arena, vip: SocketAddr, backends: &[SocketAddr]) -> Result<(Child, String)> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_lb-fixture"))
        .arg(&arena.pin_dir)
        .arg(&arena.cgroup)
        .arg(vip.to_string())
        .args(backends.iter().map(ToString::to_string))
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("stdout")?).read_line(&mut line)?;
    Ok((child, line.trim().to_owned()))
}

#[test]
fn killed_and_restarted_the_data_plane_never_stops_answering() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2"]))?;
    let backends = [at("10.244.0.1:8080"), at("10.244.0.2:8080")];
    let _servers = backends.map(|address| Server::tcp(address).unwrap());
    let vip = at("10.96.0.10:80");
    let (mut child, how) = start_fixture(&arena, vip, &backends)?;
    assert_eq!(how, "fresh");
    assert_eq!(ask_tcp(vip)?.1, vip);
    let done = AtomicBool::new(false);
    let connects = AtomicU64::new(0);
    std::thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(|| -> std::io::Result<()> {
            while !done.load(Ordering::Acquire) {
                assert_eq!(ask_tcp(vip)?.1, vip);
                connects.fetch_add(1, Ordering::AcqRel);
            }
            Ok(())
        });
        for _ in 0..3 {
            child.kill()?;
            child.wait()?;
            let before = connects.load(Ordering::Acquire);
            wait_for(|| connects.load(Ordering::Acquire) > before + 20 || load.is_finished());
            let how;
            (child, how) = start_fixture(&arena, vip, &backends)?;
            assert_eq!(how, "adopted");
        }
        done.store(true, Ordering::Release);
        load.join().unwrap()?;
        Ok(())
    })?;
    child.kill()?;
    child.wait()?;
    assert!(connects.load(Ordering::Acquire) > 60);
    assert!(ebpf_loader::unload(&arena.pin_dir)?);
    assert!(!arena.pin_dir.exists());
    assert!(ask_tcp(vip).is_err(), "unloaded, the address leads nowhere");
    Ok(())
}

#[test]
fn replacing_all_backends_under_load_fails_no_connection() -> Result<()> {
    let addresses: Vec<String> = (1..=8).map(|n| format!("10.244.0.{n}")).collect();
    let arena = Arena::enter(&ips(&addresses.iter().map(String::as_str).collect::<Vec<_>>()))?;
    let backends: Vec<SocketAddr> = addresses.iter().map(|text| at(&format!("{text}:8080"))).collect();
    let vip = at("10.96.0.10:80");
    let mut plane = arena.open()?;
    plane.replace_all(&ServiceTable::from([(key("web"), service(Tcp, &[vip], &backends[..4]))]));
    plane.attach()?;
    let _servers: Vec<Server> = backends.iter().map(|address| Server::tcp(*address).unwrap()).collect();
    let done = AtomicBool::new(false);
    let connects = std::thread::scope(|scope| -> Result<u64> {
        let load = scope.spawn(|| -> std::io::Result<u64> {
            let mut connects = 0;
            while !done.load(Ordering::Acquire) {
                ask_tcp(vip)?;
                connects += 1;
            }
            Ok(connects)
        });
        let until = Instant::now() + Duration::from_secs(3);
        let mut flips = 0_usize;
        while Instant::now() < until && !load.is_finished() {
            flips += 1;
            let offset = flips % 5;
            let chosen = &backends[offset..offset + 1 + flips % 3];
            let report = plane.apply(&[Change::Upsert(key("web"), service(Tcp, &[vip], chosen))]);
            assert!(report.refused.is_empty(), "{:?}", report.refused);
        }
        done.store(true, Ordering::Release);
        println!("{flips} replacements");
        Ok(load.join().unwrap()?)
    })?;
    println!("{connects} connections, none failed");
    assert!(connects > 100);
    Ok(())
}

#[test]
fn other_sizes_move_everything_to_new_maps_without_a_gap() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let _server = Server::tcp(at("10.244.0.1:8080"))?;
    let vip = at("10.96.0.10:80");
    let table = ServiceTable::from([(key("web"), service(Tcp, &[vip], &[at("10.244.0.1:8080")]))]);
    let mut small = arena.open()?;
    small.replace_all(&table);
    small.attach()?;
    let open_socket = std::net::TcpStream::connect(vip)?;
    let busy = arena.open().err().context("a second owner must be refused")?;
    assert!(matches!(busy.downcast_ref(), Some(OpenError::Pins(PinError::Busy { .. }))), "{busy:?}");
    drop(small);
    let mut config = arena.config();
    config.capacity.services *= 2;
    let mut large = ebpf_loader::DataPlane::open(config)?;
    assert!(!large.adopted());
    assert_eq!(ask_tcp(vip)?.1, vip, "the old maps answer while the new ones are filled");
    large.replace_all(&table);
    let attached = large.attach()?;
    assert_eq!((attached.created, attached.updated), (0, 10));
    assert_eq!(ask_tcp(vip)?.1, vip);
    assert_eq!(open_socket.peer_addr()?, vip, "sockets opened before still know whom they dialled");
    assert!(!arena.pin_dir.join("maps-next").exists());
    Ok(())
}

#[test]
fn a_full_map_is_reported_and_what_is_there_goes_on() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let _server = Server::tcp(at("10.244.0.1:8080"))?;
    let vip = at("10.96.0.10:80");
    let mut config = arena.config();
    config.capacity.backends = 100;
    let mut plane = ebpf_loader::DataPlane::open(config)?;
    let mut table = filler(50, 3);
    table.insert(key("a-first"), service(Tcp, &[vip], &[at("10.244.0.1:8080")]));
    let report = plane.replace_all(&table);
    plane.attach()?;
    assert!(!report.refused.is_empty());
    let text = report.refused[0].1.to_string();
    assert!(text.contains("backends") && text.contains("of 100"), "{text}");
    assert_eq!(ask_tcp(vip)?.0, "10.244.0.1:8080");
    // Room is made: those who waited come in without being asked for again.
    let removed: Vec<Change> =
        table.keys().filter(|k| k.0.starts_with("filler/1")).cloned().map(Change::Remove).collect();
    let report = plane.apply(&removed);
    assert!(report.written > 0, "{report:?}");
    Ok(())
}

/// Waits for a condition; gives up, and lets the assertions that follow speak, after a deadline.
fn wait_for(condition: impl Fn() -> bool) {
    let until = Instant::now() + ebpf_tests::servers::DEADLINE;
    while !condition() && Instant::now() < until {
        std::thread::yield_now();
    }
}

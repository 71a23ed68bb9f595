//! `down`, also after the supervisor was killed, leaves no trace.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::b_walk::deployed;
use crate::support::{pid_of, said, xtask};

/// Sockets of the running shims, which containerd 1.6 keeps outside of its own directories.
fn shim_sockets() -> Vec<String> {
    let bundles = fs::read_dir("/run/keelson/up/containerd/io.containerd.runtime.v2.task/keelson").unwrap();
    let addresses =
        bundles.flatten().filter_map(|bundle| fs::read_to_string(bundle.path().join("address")).ok());
    let sockets: Vec<String> = addresses.map(|address| address.trim().replace("unix://", "")).collect();
    assert!(!sockets.is_empty(), "pods run");
    sockets
}

#[track_caller]
fn nothing_left(sockets: &[String]) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let left: Vec<&str> = mounts
        .lines()
        .filter(|line| line.contains("/run/keelson/up/") || line.contains("/target/up/"))
        .collect();
    assert!(left.is_empty(), "mounts: {left:#?}");
    assert!(!Path::new("/run/keelson/up").exists(), "the run directory");
    let links = said(&Command::new("ip").args(["-o", "link"]).output().unwrap());
    assert!(!links.contains("kl-up0"), "links: {links}");
    let routes = said(&Command::new("ip").args(["route", "show", "table", "all"]).output().unwrap());
    assert!(!routes.contains("10.96.0.0/12") && !routes.contains("10.244."), "routes: {routes}");
    assert!(!Path::new("/sys/fs/bpf/keelson/up").exists(), "BPF pins");
    for hierarchy in ["cpu", "memory", "pids", "unified", "systemd", ""] {
        let dir = Path::new("/sys/fs/cgroup").join(hierarchy).join("keelson/up");
        assert!(!dir.exists(), "cgroup {}", dir.display());
    }
    for socket in sockets {
        assert!(!Path::new(socket).exists(), "a shim's socket: {socket}");
    }
    let processes = said(&Command::new("ps").args(["-eo", "args"]).output().unwrap());
    for name in ["/target/up/", "/run/keelson/up"] {
        assert!(!processes.contains(name), "process {name}: {processes}");
    }
}

#[test]
fn a_clean() {
    deployed();
    let sockets = shim_sockets();
    let output = xtask(&["down"]);
    assert!(output.status.success(), "{}", said(&output));
    nothing_left(&sockets);
}

#[test]
fn b_after_the_supervisor_was_killed() {
    let output = xtask(&["up", "--detach", "--no-build"]);
    assert!(output.status.success(), "{}", said(&output));
    deployed();
    let sockets = shim_sockets();
    let supervisor = pid_of("supervisor").expect("it runs").to_string();
    assert!(Command::new("kill").args(["-9", &supervisor]).status().unwrap().success());
    let output = xtask(&["down"]);
    assert!(output.status.success(), "{}", said(&output));
    nothing_left(&sockets);
}

#[test]
fn c_a_second_down_is_fine() {
    let output = xtask(&["down"]);
    assert!(output.status.success());
    assert!(said(&output).contains("nothing was up"), "{}", said(&output));
}

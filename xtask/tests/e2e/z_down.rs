//! `down`, also after the supervisor was killed, leaves no trace.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::b_walk::deployed;
use crate::support::{pid_of, said, xtask};

#[track_caller]
fn nothing_left() {
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
    let open = fs::read_to_string("/proc/net/unix").unwrap();
    for socket in fs::read_dir("/run/containerd/s").into_iter().flatten().flatten() {
        let path = socket.path().display().to_string();
        assert!(open.contains(&path), "a shim's socket that nobody listens on: {path}");
    }
    let processes = said(&Command::new("ps").args(["-eo", "args"]).output().unwrap());
    for name in ["/target/up/", "/run/keelson/up"] {
        assert!(!processes.contains(name), "process {name}: {processes}");
    }
}

#[test]
fn a_clean() {
    deployed();
    let output = xtask(&["down"]);
    assert!(output.status.success(), "{}", said(&output));
    nothing_left();
}

#[test]
fn b_after_the_supervisor_was_killed() {
    let output = xtask(&["up", "--detach", "--no-build"]);
    assert!(output.status.success(), "{}", said(&output));
    deployed();
    let supervisor = pid_of("supervisor").expect("it runs").to_string();
    assert!(Command::new("kill").args(["-9", &supervisor]).status().unwrap().success());
    let output = xtask(&["down"]);
    assert!(output.status.success(), "{}", said(&output));
    nothing_left();
}

#[test]
fn c_a_second_down_is_fine() {
    let output = xtask(&["down"]);
    assert!(output.status.success());
    assert!(said(&output).contains("nothing was up"), "{}", said(&output));
}

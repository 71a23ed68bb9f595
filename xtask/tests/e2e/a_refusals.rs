//! What must be found before anything starts.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::support::{repo, said, xtask};

/// `up` must fail, name `cause`, and start nothing.
#[track_caller]
fn refuses(causes: &[&str]) {
    let output = xtask(&["up", "--detach", "--no-build"]);
    let text = said(&output);
    assert!(!output.status.success(), "up should refuse: {text}");
    for cause in causes {
        assert!(text.contains(cause), "`{cause}` is not named: {text}");
    }
    let status = said(&xtask(&["status"]));
    assert!(status.contains("nothing runs"), "something was started: {status}");
}

#[test]
fn a_clean_start() {
    let output = xtask(&["down"]);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn not_root() {
    let copy = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir()
        .unwrap();
    let program = copy.path().join("xtask");
    std::fs::copy(env!("CARGO_BIN_EXE_xtask"), &program).unwrap();
    // The temporary folder may itself be closed to others; then the start fails, which is no refusal of ours.
    let output = Command::new(&program).arg("up").current_dir(repo()).uid(65534).gid(65534).output();
    let text = said(&output.expect("the copy can be run by everybody"));
    assert!(text.contains("needs root"), "{text}");
}

#[test]
fn port_6443_taken() {
    let _holder = TcpListener::bind("127.0.0.1:6443").unwrap();
    refuses(&["port 6443", "the Kubernetes API", &format!("pid {}", std::process::id())]);
}

#[test]
fn port_10250_taken() {
    let _holder = TcpListener::bind("0.0.0.0:10250").unwrap();
    refuses(&["port 10250", "the kubelet API"]);
}

/// A route that is taken away again when the test ends.
struct Route(&'static str);

impl Route {
    fn add(prefix: &'static str) -> Self {
        let added = Command::new("ip").args(["route", "add", prefix, "dev", "lo"]).status().unwrap();
        assert!(added.success());
        Self(prefix)
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        Command::new("ip").args(["route", "del", self.0, "dev", "lo"]).status().ok();
    }
}

#[test]
fn a_route_over_the_pod_range() {
    let _route = Route::add("10.244.7.0/24");
    refuses(&["10.244.7.0/24", "pod range 10.244.0.0/16"]);
}

#[test]
fn a_route_over_the_service_range() {
    let _route = Route::add("10.100.0.0/16");
    refuses(&["10.100.0.0/16", "service range 10.96.0.0/12"]);
}

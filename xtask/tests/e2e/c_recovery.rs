//! kill -9 of each component: containers and open connections live on, and afterwards everything works as before.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use crate::b_walk::{cluster_ip, deployed, removed};
use crate::support::{answers_from_all, get, kubectl, pid_of, pods, wait_for, wait_kubectl};

/// A connection that stays open and can be asked again.
struct Kept(TcpStream);

impl Kept {
    fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        Self(stream)
    }

    fn ask(&mut self) {
        self.0.write_all(b"GET / HTTP/1.1\r\nHost: nginx\r\n\r\n").expect("the connection is open");
        // The page comes in one piece or in several; its last line ends it.
        let mut text = String::new();
        while !text.contains("</html>") {
            let mut buffer = [0; 4096];
            let count = self.0.read(&mut buffer).expect("an answer");
            assert!(count > 0, "the connection was closed after: {text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    }
}

fn containers() -> String {
    kubectl(&[
        "get",
        "pods",
        "-l",
        "app=nginx",
        "-o",
        "jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{\"\\n\"}{end}",
    ])
}

fn kill_and_check(component: &str) {
    let names = deployed();
    let address = format!("{}:80", cluster_ip());
    let before = containers();
    let mut kept = Kept::open(&address);
    kept.ask();
    let pid = pid_of(component).expect("it runs");
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill").success());
    kept.ask();
    answers_from_all(&address, &names);
    wait_for(&format!("{component} started again"), Duration::from_secs(30), || match pid_of(component) {
        Some(new) if new != pid => Ok(()),
        other => Err(format!("{other:?}")),
    });
    kept.ask();
    wait_kubectl("the API", &["get", "nodes"], |table| table.contains(" Ready"));
    assert_eq!(before, containers(), "no container may be restarted by the death of {component}");
    // The same commands work: replace a pod, look into one, read its log.
    kubectl(&["delete", "pod", &names[0]]);
    wait_kubectl(
        "replaced",
        &["get", "deployment", "nginx", "-o", "jsonpath={.status.readyReplicas}"],
        |n| n == "3",
    );
    let now = wait_for("three pods", Duration::from_secs(60), || {
        let now = pods("default", "app=nginx");
        if now.len() == 3 { Ok(now) } else { Err(format!("{now:?}")) }
    });
    for name in &now {
        assert!(kubectl(&["exec", name, "--", "hostname"]).contains(name.as_str()));
        kubectl(&["logs", name, "--tail=1"]);
    }
    answers_from_all(&address, &now);
}

#[test]
fn agent() {
    kill_and_check("agent");
}

#[test]
fn containerd() {
    kill_and_check("containerd");
}

#[test]
fn control_plane() {
    kill_and_check("control");
}

#[test]
fn cri() {
    kill_and_check("cri");
}

#[test]
fn z_all_at_once() {
    let names = deployed();
    let address = format!("{}:80", cluster_ip());
    let mut kept = Kept::open(&address);
    kept.ask();
    for component in ["agent", "cri", "control"] {
        let pid = pid_of(component).expect("it runs").to_string();
        assert!(Command::new("kill").args(["-9", &pid]).status().expect("kill").success());
    }
    for _ in 0..20 {
        get(&address).expect("the data plane needs none of them");
    }
    kept.ask();
    wait_kubectl(
        "ready again",
        &["get", "deployment", "nginx", "-o", "jsonpath={.status.readyReplicas}"],
        |n| n == "3",
    );
    assert_eq!(names, pods("default", "app=nginx"));
    removed();
}

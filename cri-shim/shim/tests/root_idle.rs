//! A shim at rest does nothing, and still takes care of what loses its parent. Needs root.

mod support;

use support::node::{Node, Wanted};
use support::{processes_with, wait_for};

/// Whether the main thread of a process waits for events without a time limit.
fn waits_for_ever(pid: i32) -> bool {
    // The number of the call and its arguments; the fourth of epoll's calls is the limit, -1 for none.
    let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let mut words = call.split_ascii_whitespace();
    let number = words.next().and_then(|number| number.parse::<i64>().ok());
    let epoll = [libc::SYS_epoll_wait, libc::SYS_epoll_pwait].map(Some);
    epoll.contains(&number) && words.nth(3).is_some_and(|limit| limit.ends_with("ffffffff"))
}

#[tokio::test(flavor = "multi_thread")]
async fn it_sleeps_until_something_happens_and_reaps_what_is_left_to_it() {
    let node = Node::start().await;
    // In the host's PID namespace, so that what loses its parent comes to the shim.
    let adapt = |spec: &mut serde_json::Value| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
        namespaces.retain(|namespace| namespace["type"] != "pid");
    };
    let script = "while :; do if [ -e /tmp/go ]; then (sh -c 'echo $$ > /tmp/left; exec sleep 987654' &); rm /tmp/go; fi; sleep 0.1; done";
    let (id, _) = node.run(script, &Wanted { adapt: Some(adapt), ..Wanted::default() }).await;
    let shims = node.shims();
    assert_eq!(shims.len(), 1);
    let shim = shims[0];
    wait_for("the shim looks again and again", || waits_for_ever(shim));

    // It is asleep when one process is left to it, and when that ends.
    let tmp = node.dir().join("rootfs/tmp");
    std::fs::write(tmp.join("go"), "").expect("written");
    let left = tmp.join("left");
    wait_for("no process is left alone", || {
        std::fs::read_to_string(&left).is_ok_and(|pid| pid.ends_with('\n'))
    });
    let pid: i32 = std::fs::read_to_string(&left).expect("read").trim().parse().expect("a pid");
    let parent = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().find_map(|line| line.strip_prefix("PPid:\t")?.parse::<i32>().ok())
    };
    wait_for("it does not come to the shim", || parent() == Some(shim));
    wait_for("the shim does not rest", || waits_for_ever(shim));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .expect("killed");
    wait_for("it is not reaped", || parent().is_none());
    node.kill(&id, "", 9).await.expect("killed");
    assert_eq!(node.wait(&id, "").await, 137);
    node.delete(&id).await.expect("deleted");
    assert!(processes_with("987654").is_empty());
}

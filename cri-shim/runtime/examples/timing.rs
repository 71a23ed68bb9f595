//! How long containers and additional processes take to make, alone and beside runc. Needs root and busybox-static.
#![allow(clippy::print_stdout, reason = "a measurement for people")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use cri_shim_runtime::wait::reap;
use cri_shim_runtime::{Created, Exec, Stdio};
use serde_json::json;

use support::{Bundle, create, plain, spec, start, unique};

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or_default();
    println!("{what:<28} median {:>9.2?}  p90 {:>9.2?}", at(50), at(90));
}

fn main() {
    let bundle = Bundle::new();
    let (mut created, mut started, mut ended, mut deleted, mut execs) =
        (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..100 {
        let mut value = plain(&["true"], &unique());
        // As in a pod: the network namespace is there already.
        value["linux"]["namespaces"].as_array_mut().expect("a list").pop();
        let begun = Instant::now();
        let Created { container, pending, pidfd, .. } =
            create(&bundle, &value, Stdio::null()).expect("created");
        created.push(begun.elapsed());
        let begun = Instant::now();
        pending.start().expect("started");
        started.push(begun.elapsed());
        let begun = Instant::now();
        reap(&pidfd, true).expect("reaped");
        ended.push(begun.elapsed());
        let begun = Instant::now();
        container.delete(support::PATIENCE).expect("deleted");
        deleted.push(begun.elapsed());
    }
    let mut value = plain(&["sleep", "1000"], &unique());
    value["process"]["noNewPrivileges"] = json!(true);
    let running = start(&bundle, &value, Stdio::null());
    let mut process = spec(&value).process().clone().expect("a process");
    process.set_args(Some(vec!["true".to_owned()]));
    let mut whole = vec![];
    for _ in 0..200 {
        let begun = Instant::now();
        let exec = Exec { process: &process, stdio: Stdio::null(), subreaper: false };
        let child = running.container.exec(exec).expect("executed");
        execs.push(begun.elapsed());
        reap(&child.pidfd, true).expect("reaped");
        whole.push(begun.elapsed());
    }
    show("create", created);
    show("start", started);
    show("end", ended);
    show("delete", deleted);
    show("exec until it runs", execs);
    show("exec of true until it ended", whole);
}

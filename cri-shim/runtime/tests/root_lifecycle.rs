//! Create, start, exec, signals, removal, errors: against the real kernel.

mod support;

use cri_shim_runtime::wait::reap;
use cri_shim_runtime::{Container, Created, Error, Stdio};
use serde_json::json;

use support::{Bundle, Output, create, exec, plain, run, start, unique, wait_until};

/// The processes and cgroups that a container with this id has left.
fn left(id: &str) -> Vec<String> {
    let mut found = Vec::new();
    for top in std::fs::read_dir("/sys/fs/cgroup").expect("read").flatten() {
        let path = top.path().join(id);
        if path.exists() {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn a_program_runs_and_its_status_is_told() {
    let bundle = Bundle::new();
    let id = unique();
    let (text, exit) = run(&bundle, &plain(&["sh", "-c", "echo hello $HOME $$ $(hostname); exit 7"], &id));
    assert_eq!(text, "hello /root 1 box\n");
    assert_eq!((exit.status, exit.signal), (7, None));
    assert!(left(&id).is_empty(), "{:?}", left(&id));
}

#[test]
fn a_created_container_waits_and_ends_with_its_maker() {
    let bundle = Bundle::new();
    let id = unique();
    let (output, stdio) = Output::new();
    let Created { container, pending, pidfd, .. } =
        create(&bundle, &plain(&["echo", "ran"], &id), stdio).unwrap();
    assert_eq!(container.pids().unwrap(), [container.pid]);
    drop(pending);
    assert_eq!(reap(&pidfd, true).unwrap().unwrap().status, 1);
    assert_eq!(output.text(), "");
    container.delete(support::PATIENCE).unwrap();
    assert!(left(&id).is_empty());
}

#[test]
fn exec_runs_in_the_container_and_by_another_process_too() {
    let bundle = Bundle::new();
    let id = unique();
    let value = plain(&["sleep", "1000"], &id);
    let running = start(&bundle, &value, Stdio::null());
    let json = serde_json::to_string(&running.container).unwrap();
    let taken_up: Container = serde_json::from_str(&json).unwrap();
    let mut process = value["process"].clone();
    process["args"] = json!(["sh", "-c", "hostname; readlink /proc/1/exe; exit 3"]);
    let (text, exit) = exec(&taken_up, &process);
    assert_eq!(text, "box\n/bin/busybox\n");
    assert_eq!(exit.status, 3);
    running.container.kill(15).unwrap();
    running.container.kill(9).unwrap();
    assert_eq!(reap(&running.pidfd, true).unwrap().unwrap().signal, Some(9));
    assert!(matches!(taken_up.pidfd(), Err(Error::NotRunning(_))));
    assert!(matches!(taken_up.kill(9), Err(Error::NotRunning(_))));
}

#[test]
fn a_program_that_is_not_there_is_told_as_users_know_it() {
    let bundle = Bundle::new();
    std::fs::write(bundle.rootfs().join("bin/text"), "no program").unwrap();
    let rights = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    let chain = |args: &[&str]| {
        let id = unique();
        let result = create(&bundle, &plain(args, &id), Stdio::null());
        let error = match result {
            Ok(created) => {
                let error = created.pending.start().unwrap_err();
                reap(&created.pidfd, true).unwrap();
                created.container.delete(support::PATIENCE).unwrap();
                error
            }
            Err(error) => error,
        };
        assert!(left(&id).is_empty());
        error.chain()
    };
    assert_eq!(chain(&["nope"]), "exec: \"nope\": executable file not found in $PATH");
    assert_eq!(chain(&["/bin/nope"]), "exec: \"/bin/nope\": stat /bin/nope: no such file or directory");
    assert_eq!(chain(&["/bin/text"]), "exec: \"/bin/text\": permission denied");
    std::fs::set_permissions(bundle.rootfs().join("bin/text"), rights(0o755)).unwrap();
    assert_eq!(chain(&["/bin/text"]), "exec: \"/bin/text\": exec format error");
    assert_eq!(chain(&["/bin"]), "exec: \"/bin\": is a directory");
}

#[test]
fn a_failed_step_is_named_and_nothing_is_left() {
    let bundle = Bundle::new();
    let id = unique();
    let mut value = plain(&["true"], &id);
    value["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/data", "type": "bind", "source": "/nonexistent/dir", "options": ["rbind"]}),
    );
    let error = create(&bundle, &value, Stdio::null()).unwrap_err().chain();
    assert!(error.starts_with("mount /nonexistent/dir on /data: open the source: No such file"), "{error}");
    value["mounts"][7] = json!({"destination": "/data", "type": "nofs", "source": "x"});
    let error = create(&bundle, &value, Stdio::null()).unwrap_err().chain();
    assert!(error.starts_with("mount nofs on /data: make the file system: No such device"), "{error}");
    value["mounts"][7] = json!({"destination": "/proc/self", "type": "tmpfs", "source": "x"});
    let error = create(&bundle, &value, Stdio::null()).unwrap_err().chain();
    assert!(error.starts_with("mount tmpfs on /proc/self: "), "{error}");
    value["mounts"].as_array_mut().unwrap().pop();
    value["linux"]["sysctl"] = json!({"kernel.nonsense": "1"});
    let error = create(&bundle, &value, Stdio::null()).unwrap_err().chain();
    assert!(error.starts_with("linux.sysctl: write /proc/sys/kernel/nonsense: No such file"), "{error}");
    assert!(left(&id).is_empty());
}

#[test]
fn delete_ends_what_still_runs() {
    let bundle = Bundle::new();
    let id = unique();
    let mut value = plain(&["sh", "-c", "sleep 1000 & sleep 1001 & wait"], &id);
    // Without a PID namespace of its own nothing but the cgroup knows what belongs to it.
    value["linux"]["namespaces"] = json!([{"type": "mount"}]);
    value["hostname"] = json!("");
    let running = start(&bundle, &value, Stdio::null());
    wait_until("three processes", || running.container.pids().unwrap().len() == 3);
    running.container.kill(9).unwrap();
    reap(&running.pidfd, true).unwrap();
    running.container.delete(support::PATIENCE).unwrap();
    assert!(left(&id).is_empty());
    running.container.delete(support::PATIENCE).unwrap();
}

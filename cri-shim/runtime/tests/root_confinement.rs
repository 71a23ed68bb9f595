//! Terminals, limits, freezing, system call filters, mounts: what a user would notice.

mod support;

use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::Ordering;

use cri_shim_runtime::wait::reap;
use cri_shim_runtime::{Created, Exec, Stdio, WindowSize, sealed};
use oci_spec::runtime::{LinuxResources, Process};
use serde_json::json;

use support::{Bundle, Running, create, exec, plain, run, start, unique, wait_until};

/// Reads a terminal until the process on it is gone (then the kernel says EIO).
fn read_terminal(master: std::os::fd::OwnedFd) -> String {
    let mut text = Vec::new();
    let mut file = std::fs::File::from(master);
    let mut part = [0; 1024];
    while let Ok(length) = file.read(&mut part) {
        if length == 0 {
            break;
        }
        text.extend(&part[..length]);
    }
    String::from_utf8_lossy(&text).replace('\r', "")
}

#[test]
fn a_terminal_is_the_controlling_one_and_has_its_size() {
    let bundle = Bundle::new();
    let mut value = plain(
        &[
            "sh",
            "-c",
            "tty; stty size; test -c /dev/console && echo console; echo x > /dev/tty; read line; echo got $line",
        ],
        &unique(),
    );
    value["process"]["terminal"] = json!(true);
    value["process"]["user"]["uid"] = json!(1000);
    let size = Some(WindowSize { rows: 33, columns: 99 });
    let Created { container, pending, pidfd, console, .. } =
        create(&bundle, &value, Stdio::Terminal { size }).unwrap_or_else(|error| panic!("{}", error.chain()));
    // Removed also when a check below fails.
    let running = Running { container, pidfd, warnings: Vec::new() };
    pending.start().unwrap();
    let master = console.unwrap();
    std::fs::File::from(master.try_clone().unwrap()).write_all(b"hello\n").unwrap();
    let text = read_terminal(master);
    // The terminal's echo of what is typed may come between any of the lines.
    for line in ["/dev/pts/0", "33 99", "console", "x", "got hello"] {
        assert!(text.lines().any(|printed| printed == line), "{line} in {text}");
    }
    reap(&running.pidfd, true).unwrap();
}

#[test]
fn an_additional_process_has_a_terminal_of_its_own() {
    let bundle = Bundle::new();
    let value = plain(&["sleep", "1000"], &unique());
    let running = start(&bundle, &value, Stdio::null());
    let mut process = value["process"].clone();
    process["args"] = json!(["sh", "-c", "tty; stty size"]);
    process["terminal"] = json!(true);
    process["consoleSize"] = json!({"height": 11, "width": 22});
    let process: Process = serde_json::from_value(process).unwrap();
    let stdio = Stdio::Terminal { size: None };
    let child = running.container.exec(Exec { process: &process, stdio, subreaper: false }).unwrap();
    assert_eq!(read_terminal(child.console.unwrap()), "/dev/pts/0\n11 22\n");
    assert_eq!(reap(&child.pidfd, true).unwrap().unwrap().status, 0);
}

#[test]
fn the_memory_limit_kills_and_is_told() {
    let bundle = Bundle::new();
    let mut value = plain(&["sh", "-c", "read x; dd if=/dev/zero of=/dev/null bs=200M count=1"], &unique());
    value["linux"]["resources"]["memory"] = json!({"limit": 33_554_432, "swap": 33_554_432});
    let (reader, writer) = std::io::pipe().unwrap();
    let stdio = Stdio::Fds { stdin: Some(reader.into()), stdout: None, stderr: None };
    let running = start(&bundle, &value, stdio);
    let mut watch = running.container.oom_watch().unwrap();
    assert_eq!(watch.kills().unwrap(), Some(0));
    drop(writer);
    reap(&running.pidfd, true).unwrap();
    wait_until("a kill by the limit", || watch.kills().unwrap().is_some_and(|kills| kills > 0));
    let stats = running.container.stats().unwrap();
    assert_eq!(stats.memory_limit, Some(33_554_432));
    assert!(stats.oom_kills.unwrap() > 0 && stats.memory_peak.unwrap() > 16_777_216);
}

#[test]
fn in_version_1_a_kill_is_told_after_its_cgroup_is_gone() {
    if !Path::new("/sys/fs/cgroup/memory").is_dir() {
        // Version 2 counts in the cgroup above, too.
        return;
    }
    let ended = |by_limit: bool| {
        let bundle = Bundle::new();
        let words = ["sh", "-c", "read x; dd if=/dev/zero of=/dev/null bs=200M count=1"];
        let mut value = plain(&words, &unique());
        value["linux"]["resources"]["memory"] = json!({"limit": 33_554_432, "swap": 33_554_432});
        let (reader, writer) = std::io::pipe().unwrap();
        let stdio = Stdio::Fds { stdin: Some(reader.into()), stdout: None, stderr: None };
        let running = start(&bundle, &value, stdio);
        let watch = running.container.oom_watch().unwrap();
        if !by_limit {
            running.container.kill(9).unwrap();
        }
        drop(writer);
        reap(&running.pidfd, true).unwrap();
        running.container.delete(support::PATIENCE).unwrap();
        watch
    };
    let (mut other, mut limited) = (ended(false), ended(true));
    wait_until("the kill is told", || {
        assert_eq!(limited.kills().unwrap(), None);
        limited.told.load(Ordering::Acquire)
    });
    assert_eq!(other.kills().unwrap(), None);
    assert!(!other.told.load(Ordering::Acquire));
}

#[test]
fn limits_can_be_changed_and_processes_frozen() {
    let bundle = Bundle::new();
    let running = start(&bundle, &plain(&["sh", "-c", "while true; do :; done"], &unique()), Stdio::null());
    let container = &running.container;
    let resources: LinuxResources = serde_json::from_value(
        json!({"pids": {"limit": 7}, "memory": {"limit": 50_331_648, "swap": 50_331_648}, "cpu": {"quota": 50_000, "period": 100_000}}),
    )
    .unwrap();
    container.update(&resources).unwrap();
    let more: LinuxResources =
        serde_json::from_value(json!({"memory": {"limit": 100_663_296, "swap": 100_663_296}})).unwrap();
    container.update(&more).unwrap();
    let stats = container.stats().unwrap();
    assert_eq!((stats.pids_limit, stats.memory_limit), (Some(7), Some(100_663_296)));
    container.pause().unwrap();
    let used = container.stats().unwrap().cpu_usage_ns.unwrap();
    // For as long as the loop would need to be seen, if it ran: we are given as much ourselves.
    let own = || {
        let figures = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        figures.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let enough = own() + 100_000_000;
    while own() < enough {}
    assert_eq!(container.stats().unwrap().cpu_usage_ns.unwrap(), used);
    container.resume().unwrap();
    wait_until("it runs again", || container.stats().unwrap().cpu_usage_ns.unwrap() > used);
    container.pause().unwrap();
    // Dropped frozen: removal thaws.
}

#[test]
fn a_filter_forbids_and_is_kept_for_the_next() {
    let bundle = Bundle::new();
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
            {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"},
        ],
    });
    let mut value = plain(&["sh", "-c", "mkdir /tmp/x; hostname other; echo $?"], &unique());
    value["linux"]["seccomp"] = profile;
    let (text, _) = run(&bundle, &value);
    assert!(text.contains("Operation not supported") && text.contains("Bad system call"), "{text}");
    let cache = bundle.dir().join("filters");
    for _ in 0..2 {
        let spec = support::spec(&value);
        let create = cri_shim_runtime::Create {
            id: "x",
            spec: &spec,
            bundle: bundle.dir(),
            rootfs: &bundle.rootfs(),
            stdio: Stdio::null(),
            cgroups: cri_shim_runtime::cgroup::CgroupDriver::Cgroupfs,
            seccomp_cache: Some(&cache),
        };
        let created = create.create().unwrap();
        drop(created.pending);
        reap(&created.pidfd, true).unwrap();
        created.container.delete(support::PATIENCE).unwrap();
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
    }
}

#[test]
fn mount_points_are_made_inside_the_root_only() {
    let bundle = Bundle::new();
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), bundle.rootfs().join("escape")).unwrap();
    let mut value = plain(&["sh", "-c", "cat /escape/in/name; ls /secret"], &unique());
    let mounts = value["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/escape/in/name", "type": "bind", "source": "/etc/hostname", "options": ["bind"]}));
    mounts
        .push(json!({"destination": "/secret", "type": "tmpfs", "source": "tmpfs", "options": ["size=4k"]}));
    let (text, exit) = run(&bundle, &value);
    assert_eq!(text, std::fs::read_to_string("/etc/hostname").unwrap());
    assert_eq!(exit.status, 0);
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    // A link where /proc should be is no way to choose another place for it.
    std::fs::remove_dir(bundle.rootfs().join("proc")).unwrap();
    std::os::unix::fs::symlink("/tmp", bundle.rootfs().join("proc")).unwrap();
    let error = create(&bundle, &plain(&["true"], &unique()), Stdio::null()).unwrap_err().chain();
    assert!(error.starts_with("mount proc on /proc: make the mount point: "), "{error}");
}

/// Takes mounts away with the test.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        drop(std::process::Command::new("umount").args(["-l", "-R"]).arg(&self.0).status());
    }
}

#[test]
fn recursive_read_only_and_two_way_propagation() {
    let bundle = Bundle::new();
    let volume = bundle.dir().join("volume");
    std::fs::create_dir_all(volume.join("sub")).unwrap();
    let tmpfs = |path: &std::path::Path, options: &str| {
        let status =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", options, "x"]).arg(path).status();
        assert!(status.unwrap().success());
    };
    tmpfs(&volume, "size=1m");
    let _guard = Unmount(volume.clone());
    assert!(
        std::process::Command::new("mount").arg("--make-shared").arg(&volume).status().unwrap().success()
    );
    std::fs::create_dir_all(volume.join("sub")).unwrap();
    tmpfs(&volume.join("sub"), "size=1m");
    let mut value = plain(
        &[
            "sh",
            "-c",
            "touch /ro/x; touch /rro/sub/x; touch /ro/sub/y && echo wrote; mkdir /two/new && mount -t tmpfs x /two/new && touch /two/new/f; sleep 1000",
        ],
        &unique(),
    );
    let caps = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    value["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    let mounts = value["mounts"].as_array_mut().unwrap();
    for (place, options) in [
        ("/ro", json!(["rbind", "ro", "rprivate"])),
        ("/rro", json!(["rbind", "rro", "rprivate"])),
        ("/two", json!(["rbind", "rshared"])),
    ] {
        mounts.push(json!({"destination": place, "type": "bind", "source": volume, "options": options}));
    }
    value["linux"]["rootfsPropagation"] = json!("rshared");
    let running = start(&bundle, &value, Stdio::null());
    wait_until("the container's mount on the host", || volume.join("new/f").exists());
    let mut process = value["process"].clone();
    process["args"] =
        json!(["sh", "-c", "test -e /ro/sub/y && ! test -e /ro/x && ! test -e /rro/sub/x; echo $?"]);
    assert_eq!(exec(&running.container, &process).0, "0\n");
    // Nothing of the container's own mounts came to the host.
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(&bundle.rootfs().display().to_string()), "{table}");
}

#[test]
fn orphans_come_to_a_subreaper() {
    let bundle = Bundle::new();
    let value = plain(&["sleep", "1000"], &unique());
    let running = start(&bundle, &value, Stdio::null());
    let mut process = value["process"].clone();
    process["args"] = json!(["sh", "-c", "(sleep 1000 &); exec sleep 1000"]);
    let process: Process = serde_json::from_value(process).unwrap();
    let child =
        running.container.exec(Exec { process: &process, stdio: Stdio::null(), subreaper: true }).unwrap();
    let orphan = || {
        let children = format!("/proc/{}/task/{}/children", child.pid, child.pid);
        !std::fs::read_to_string(children).unwrap_or_default().trim().is_empty()
    };
    wait_until("the orphan is its child", orphan);
    running.container.kill_all(9).unwrap();
    reap(&child.pidfd, true).unwrap();
}

#[test]
fn a_pod_s_namespaces_are_joined() {
    let bundle = Bundle::new();
    let sandbox = start(&bundle, &plain(&["sleep", "1000"], &unique()), Stdio::null());
    let path = |kind: &str| format!("/proc/{}/ns/{kind}", sandbox.container.pid);
    let links = |pid: i32, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let other = Bundle::new();
    let mut value = plain(&["sleep", "1000"], &unique());
    value["hostname"] = json!("");
    value["linux"]["namespaces"] = json!([
        {"type": "pid", "path": path("pid")}, {"type": "ipc", "path": path("ipc")}, {"type": "uts", "path": path("uts")},
        {"type": "network", "path": path("net")}, {"type": "mount"},
    ]);
    let running = start(&other, &value, Stdio::null());
    for kind in ["pid", "ipc", "uts", "net"] {
        assert_eq!(links(running.container.pid, kind), links(sandbox.container.pid, kind), "{kind}");
    }
    assert_ne!(links(running.container.pid, "mnt"), links(sandbox.container.pid, "mnt"));
    let mut process = value["process"].clone();
    process["args"] = json!(["sh", "-c", "ps | grep -c 'sleep 1000'; hostname"]);
    let (text, _) = exec(&running.container, &process);
    assert!(text.ends_with("box\n"), "{text}");
    // The caller itself still makes children in its own namespace.
    let here = std::process::Command::new("readlink").arg("/proc/self/ns/pid").output().unwrap().stdout;
    assert_eq!(
        String::from_utf8_lossy(&here).trim(),
        links(std::process::id().cast_signed(), "pid").to_str().unwrap()
    );
}

/// Whether a file system can be mounted with other owners: all that tests run on but an older kernel's tmpfs.
fn maps_owners(directory: &std::path::Path) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next(), numbers.next());
    version >= (Some(6), Some(3)) || rustix::fs::statfs(directory).expect("a file system").f_type != TMPFS
}

#[test]
fn a_pod_s_user_namespace_is_joined() {
    let bundle = Bundle::new();
    let map = json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
    let mut value = plain(&["sleep", "1000"], &unique());
    value["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    value["linux"]["uidMappings"] = map.clone();
    value["linux"]["gidMappings"] = map;
    for part in ["", "proc", "sys", "dev", "bin"] {
        std::os::unix::fs::chown(bundle.rootfs().join(part), Some(200_000), Some(200_000)).unwrap();
    }
    let sandbox = start(&bundle, &value, Stdio::null());
    let path = |kind: &str| format!("/proc/{}/ns/{kind}", sandbox.container.pid);
    let mut value = plain(
        &["sh", "-c", "cat /proc/self/uid_map; id -u; cat /proc/sys/kernel/hostname; touch /mapped/f"],
        &unique(),
    );
    value["hostname"] = json!("");
    value["linux"]["namespaces"] = json!([
        {"type": "pid"}, {"type": "ipc", "path": path("ipc")}, {"type": "uts", "path": path("uts")},
        {"type": "network", "path": path("net")}, {"type": "mount"}, {"type": "user", "path": path("user")},
        {"type": "cgroup"},
    ]);
    let volume = tempfile::tempdir().unwrap();
    if !maps_owners(volume.path()) {
        #[allow(clippy::print_stderr, reason = "a test that is left out says so")]
        {
            eprintln!("skipped: {} is a tmpfs, which maps owners since Linux 6.3", volume.path().display());
        }
        return;
    }
    value["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/mapped", "type": "bind", "source": volume.path(), "options": ["rbind", "ridmap"]}),
    );
    let (text, exit) = run(&bundle, &value);
    assert_eq!(exit.status, 0, "{text}");
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words, ["0", "200000", "65536", "0", "box"]);
    // Written by the container's root through the mapped mount: the host's root owns it.
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(volume.path().join("f")).unwrap());
    assert_eq!(owner, 0);
}

#[test]
fn the_program_of_the_caller_cannot_be_written_when_sealed() {
    assert!(!sealed::is_sealed(), "tests run from their build directory");
    let program = sealed::own_program().unwrap();
    let path = sealed::path(&program);
    let flags = rustix::fs::fstatvfs(&program).unwrap().f_flag;
    assert!(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY), "{flags:?}");
    let listed = std::process::Command::new(&path).arg("--list").output().unwrap();
    assert!(String::from_utf8_lossy(&listed.stdout).contains("orphans_come_to_a_subreaper: test"));
}

#[test]
fn device_rules_hold() {
    let bundle = Bundle::new();
    let mut value = plain(
        &[
            "sh",
            "-c",
            "mknod /tmp/mem c 1 1; mknod /tmp/null c 1 3; head -c1 /tmp/mem; echo x > /tmp/null && echo fine",
        ],
        &unique(),
    );
    value["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    let (text, _) = run(&bundle, &value);
    assert!(text.contains("/tmp/mem: Operation not permitted") && text.ends_with("fine\n"), "{text}");
}

#[test]
fn a_cgroup_in_use_is_not_taken() {
    let bundle = Bundle::new();
    let value = plain(&["sleep", "1000"], &unique());
    let running = start(&bundle, &value, Stdio::null());
    let error = create(&bundle, &value, Stdio::null()).unwrap_err().chain();
    assert!(
        error.starts_with("linux.cgroupsPath: ") && error.ends_with("is in use by 1 processes"),
        "{error}"
    );
    assert_eq!(running.container.pids().unwrap(), [running.container.pid]);
}

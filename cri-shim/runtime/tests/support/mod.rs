//! A busybox root file system, specifications as containerd writes them, and containers that end with the test.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cri_shim_runtime::cgroup::CgroupDriver;
use cri_shim_runtime::wait::{Exit, reap};
use cri_shim_runtime::{Child, Container, Create, Created, Error, Exec, Stdio};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A name that no other test on this machine has.
pub fn unique() -> String {
    format!("keelson-rt-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// A directory with a root file system that has busybox under all its names.
pub struct Bundle {
    dir: tempfile::TempDir,
}

impl Bundle {
    /// Makes one.
    pub fn new() -> Self {
        assert!(rustix_is_root(), "this test needs root");
        let dir = tempfile::Builder::new().prefix("keelson-rt-").tempdir().expect("temp dir");
        let rootfs = dir.path().join("rootfs");
        for part in ["bin", "dev", "proc", "sys", "etc", "tmp", "root", "run"] {
            std::fs::create_dir_all(rootfs.join(part)).expect("made");
        }
        std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static is installed");
        let list = Command::new("/bin/busybox").arg("--list").output().expect("runs").stdout;
        for applet in String::from_utf8_lossy(&list).lines().filter(|applet| *applet != "busybox") {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).expect("linked");
        }
        std::fs::write(
            rootfs.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .expect("written");
        Self { dir }
    }

    /// Its root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// The directory around it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

fn rustix_is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nUid:\t0\t0"))
}

/// The capabilities that containers have by default.
pub const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// The usual specification, as JSON to be changed.
pub fn plain(args: &[&str], id: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": args,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=box"],
            "cwd": "/",
            "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": false,
        },
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "cgroupsPath": format!("/{id}"),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
            ],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// A specification of its JSON.
pub fn spec(value: &Value) -> Spec {
    serde_json::from_value(value.clone()).expect("a specification")
}

/// A container that is killed and removed when dropped.
pub struct Running {
    /// The container.
    pub container: Container,
    /// Its first process.
    pub pidfd: OwnedFd,
    /// What it was created with.
    pub warnings: Vec<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let killed = self.container.kill_all(9);
        let deleted = self.container.delete(PATIENCE);
        drop(reap(&self.pidfd, true));
        if !std::thread::panicking() {
            killed.expect("killed");
            deleted.expect("deleted");
        }
    }
}

/// Creates a container of `value` with the id that its cgroup path has.
pub fn create(bundle: &Bundle, value: &Value, stdio: Stdio) -> Result<Created, Error> {
    let id =
        value["linux"]["cgroupsPath"].as_str().expect("a path").trim_start_matches('/').replace('/', "-");
    let create = Create {
        id: &id,
        spec: &spec(value),
        bundle: bundle.dir(),
        rootfs: &bundle.rootfs(),
        stdio,
        cgroups: CgroupDriver::Cgroupfs,
        seccomp_cache: None,
    };
    create.create()
}

/// Creates and starts one.
pub fn start(bundle: &Bundle, value: &Value, stdio: Stdio) -> Running {
    let created = create(bundle, value, stdio).unwrap_or_else(|error| panic!("{}", error.chain()));
    let Created { container, pending, pidfd, warnings, .. } = created;
    let running = Running { container, pidfd, warnings };
    pending.start().unwrap_or_else(|error| panic!("{}", error.chain()));
    running
}

/// Streams of which the output is kept.
pub struct Output {
    reader: std::io::PipeReader,
}

impl Output {
    /// A pipe for standard output and error, and the streams to give to a process.
    pub fn new() -> (Self, Stdio) {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let other = writer.try_clone().expect("copied");
        (Self { reader }, Stdio::Fds { stdin: None, stdout: Some(writer.into()), stderr: Some(other.into()) })
    }

    /// Everything until its writers are gone.
    pub fn text(mut self) -> String {
        let mut text = String::new();
        self.reader.read_to_string(&mut text).expect("text");
        text
    }
}

/// Runs a container to its end: what it printed, and how it ended.
pub fn run(bundle: &Bundle, value: &Value) -> (String, Exit) {
    let (output, stdio) = Output::new();
    let running = start(bundle, value, stdio);
    let text = output.text();
    (text, reap(&running.pidfd, true).expect("reaped").expect("ended"))
}

/// Runs a process in a container to its end.
pub fn exec(container: &Container, process: &Value) -> (String, Exit) {
    let (output, stdio) = Output::new();
    let process: Process = serde_json::from_value(process.clone()).expect("a process");
    let child: Result<Child, Error> = container.exec(Exec { process: &process, stdio, subreaper: false });
    let child = child.unwrap_or_else(|error| panic!("{}", error.chain()));
    let text = output.text();
    (text, reap(&child.pidfd, true).expect("reaped").expect("ended"))
}

/// Waits for something to become true.
pub fn wait_until(what: &str, mut check: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !check() {
        assert!(begun.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

//! A containerd in a temporary directory, ended with everything it started when dropped. What a test run that was itself
//! killed has left (its process id is in the names) goes when the next one starts.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

/// Beginning of the directories' names; the process id follows. Short, since paths of sockets are.
const DIRECTORIES: &str = "klcri-";
/// Beginnings of the names of the tests' cgroups; the process id follows.
const CGROUPS: [&str; 2] = ["keelson-cri-test-", "keelson-shim-test-"];

/// A running containerd.
pub struct Containerd {
    child: Child,
    dir: tempfile::TempDir,
}

impl Containerd {
    /// Starts one and waits until its socket accepts.
    pub fn start() -> Self {
        static SWEPT: Once = Once::new();
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        SWEPT.call_once(sweep);
        let prefix = format!("{DIRECTORIES}{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().expect("temp dir");
        // A pod's own root is nobody here and must get through.
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("opened");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            path("root"),
            path("state"),
            path("containerd.sock"),
            path("opt"),
        );
        std::fs::write(dir.path().join("config.toml"), config).expect("written");
        let this = Self { child: spawn(dir.path()), dir };
        this.wait_until_listening();
        this
    }

    /// Kills it; its shims and their containers live on.
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    /// Starts it again.
    pub fn start_again(&mut self) {
        self.child = spawn(self.dir());
        self.wait_until_listening();
    }

    /// Kills it and starts it again.
    pub fn restart(&mut self) {
        self.kill();
        self.start_again();
    }

    fn wait_until_listening(&self) {
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            let log = || std::fs::read_to_string(self.dir().join("containerd.log")).unwrap_or_default();
            assert!(begun.elapsed() < Duration::from_secs(20), "containerd does not start: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The directory everything of it is in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir().join("containerd.sock")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        clear(self.dir());
    }
}

/// Ends what names a directory in its command line (shims outlive their containerd, and name its socket), and takes away
/// what is mounted below it.
fn clear(dir: &Path) {
    let marker = dir.display().to_string();
    for entry in std::fs::read_dir("/proc").expect("procfs").flatten() {
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(&marker) {
            kill(&entry.file_name().to_string_lossy());
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        if let Some(target) = line.split(' ').nth(1).filter(|target| target.starts_with(&marker)) {
            nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH).ok();
        }
    }
}

fn kill(pid: &str) {
    if let Ok(pid) = pid.parse() {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).ok();
    }
}

/// Takes away what test runs have left that do not run any more. Others may be at the same.
fn sweep() {
    let entries = |directory: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let abandoned = |path: &Path, prefix: &str| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let pid = name.strip_prefix(prefix).map(|rest| rest.split('-').next().unwrap_or(rest));
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
    };
    for dir in entries(&std::env::temp_dir()).into_iter().filter(|path| abandoned(path, DIRECTORIES)) {
        clear(&dir);
        std::fs::remove_dir_all(&dir).ok();
    }
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = entries(root).into_iter().chain([root.to_owned()]);
    let left = hierarchies.flat_map(|hierarchy| entries(&hierarchy)).filter(|path| path.is_dir());
    for cgroup in left.filter(|path| CGROUPS.iter().any(|prefix| abandoned(path, prefix))) {
        remove_cgroup(&cgroup);
    }
}

/// Removes a cgroup with those below it; what runs there is killed.
fn remove_cgroup(cgroup: &Path) {
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    let begun = Instant::now();
    while std::fs::remove_dir(cgroup).is_err() && cgroup.exists() && begun.elapsed() < Duration::from_secs(5)
    {
        let processes = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        processes.lines().for_each(kill);
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn spawn(dir: &Path) -> Child {
    let log =
        std::fs::OpenOptions::new().create(true).append(true).open(dir.join("containerd.log")).expect("log");
    Command::new("containerd")
        .arg("--config")
        .arg(dir.join("config.toml"))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("containerd is installed")
}

//! A containerd in a temporary directory, ended with everything it started when dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running containerd.
pub struct Containerd {
    child: Child,
    dir: tempfile::TempDir,
}

impl Containerd {
    /// Starts one and waits until its socket accepts.
    pub fn start() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        let dir = tempfile::Builder::new().prefix("keelson-cri-test-").tempdir().expect("temp dir");
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
        // Shims outlive their containerd; ours name the socket below our directory.
        let marker = self.dir().display().to_string();
        for entry in std::fs::read_dir("/proc").expect("procfs").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&command).contains(&marker) {
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
                    .ok();
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for line in mounts.lines().rev() {
            if let Some(target) = line.split(' ').nth(1).filter(|target| target.starts_with(&marker)) {
                nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH).ok();
            }
        }
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

//! `--peer-kubelet PATH`: a node with a stock kubelet beside ours, joined to the same control plane, for as long as a bench
//! runs.
//!
//! ```text
//! host namespace: control plane, our node, images ── 10.251.0.1 ── kl-bpeer0 ── eth0 (10.251.0.2) of bench-peer:
//!                                            containerd with its CRI plugin, Debian's CNI plugins, PATH --config …
//! ```
//! The node has network, mount and PID namespaces of its own. Its first process dies with the bench, however that ends, and
//! the kernel ends everything else with it: processes, mounts, links. What is left then, [`Place::clean`] removes: cgroups,
//! files, the node's objects, the machine's settings that a kubelet changes.

mod config;
mod init;
mod place;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use self::init::Pids;
use self::place::Place;
use super::interrupt;
use crate::cmd::{Cmd, step, which};
use crate::images::{Store, idle};
use crate::paths::Layout;
use crate::process::{ProcessId, Record};
use crate::status::kubectl;
use crate::{preflight, registry, up};

pub(super) use self::config::TAINT;
pub(super) use self::init::run as run_first_process;

/// Name of the peer's node.
pub(super) const NODE: &str = "bench-peer";
/// From its start until the node is Ready.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// Lines of a log that an error tells.
const TOLD: usize = 20;

/// Whom to measure beside our node.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Arguments {
    /// A stock kubelet, which is measured beside our node, interleaved: on a node of its own, with containerd's CRI plugin.
    #[arg(long, value_name = "PATH")]
    peer_kubelet: Option<PathBuf>,
    /// The containerd of that node, where it is not the one on PATH.
    #[arg(long, value_name = "PATH", requires = "peer_kubelet")]
    peer_containerd: Option<PathBuf>,
}

impl Arguments {
    /// Starts the node, where one is asked for.
    pub(super) fn start(&self, layout: &Layout) -> Result<Option<Peer>> {
        let Some(kubelet) = &self.peer_kubelet else {
            println!("peer: absent (--peer-kubelet PATH measures a stock kubelet beside ours)\n");
            return Ok(None);
        };
        let kubelet = program("--peer-kubelet", kubelet)?;
        let containerd = match &self.peer_containerd {
            Some(path) => program("--peer-containerd", path)?,
            None => which("containerd").context("the peer needs a containerd, and none is on PATH")?,
        };
        step("starting the peer's node", || Peer::start(layout, &kubelet, &containerd)).map(Some)
    }
}

/// A path that can be started, or what is wrong with it.
fn program(option: &str, path: &Path) -> Result<PathBuf> {
    let found = fs::canonicalize(path).with_context(|| format!("{option} {}", path.display()))?;
    let metadata = fs::metadata(&found).with_context(|| format!("{option} {}", path.display()))?;
    ensure!(metadata.is_file(), "{option} {}: it is no file", path.display());
    ensure!(
        metadata.permissions().mode() & 0o111 != 0,
        "{option} {}: it is not executable (chmod +x)",
        path.display()
    );
    Ok(found)
}

/// What a peer is, for reports.
#[derive(Debug, Clone, Serialize)]
pub(super) struct About {
    kubelet: PathBuf,
    kubelet_version: String,
    containerd_version: String,
}

/// The peer's node; it goes when this is dropped.
pub(super) struct Peer {
    cluster: Layout,
    place: Place,
    about: About,
    /// `unshare`, which holds the namespaces' first process.
    holder: Option<Child>,
    first: Option<ProcessId>,
}

impl Peer {
    fn start(layout: &Layout, kubelet: &Path, containerd: &Path) -> Result<Self> {
        preflight::require_root()?;
        ensure!(
            up::running(layout).is_some(),
            "the peer joins the cluster that is up: start it with `cargo xtask up --detach`"
        );
        let place = Place::of(&layout.repo);
        let about = About {
            kubelet: kubelet.to_owned(),
            kubelet_version: version(kubelet)?,
            containerd_version: version(containerd)?,
        };
        println!("    {}; {}", about.kubelet_version, about.containerd_version);
        place.claim(layout)?;
        // From here on whatever fails is tidied up by the drop.
        let mut peer = Self { cluster: layout.clone(), place, about, holder: None, first: None };
        peer.bring_up(kubelet, containerd)?;
        Ok(peer)
    }

    fn bring_up(&mut self, kubelet: &Path, containerd: &Path) -> Result<()> {
        let kubelet = self.visible(kubelet, "kubelet")?;
        let containerd = self.visible(containerd, "containerd")?;
        config::write(&self.cluster, &self.place, &kubelet, &containerd, self.most_pods()?)?;
        for name in ["kubelet", "containerd"] {
            fs::remove_file(self.place.log(name)).ok();
        }
        let holder = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net", "--mount", "--propagation", "private"])
            .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(std::env::current_exe()?)
            .args(["bench", "peer-node"])
            .current_dir(&self.cluster.repo)
            .stdin(Stdio::null())
            // A Ctrl-C at the terminal is for the bench, which then ends the node.
            .process_group(0)
            .spawn()
            .context("cannot start setpriv and unshare (util-linux)")?;
        let holder_pid = holder.id().cast_signed();
        self.holder = Some(holder);
        let first = wait_for("the peer's first process", Duration::from_secs(10), || child_of(holder_pid))?;
        self.first = ProcessId::of(first);
        place::connect(first).context("the peer's network")?;
        self.serve_images()?;
        fs::write(self.place.file("connected"), "").context("telling the peer")?;
        self.wait_ready()
    }

    /// A program as it is seen in the node, which has other files in some places.
    fn visible(&self, path: &Path, name: &str) -> Result<PathBuf> {
        let is_hidden = ["/run", "/var/lib", "/var/log"].iter().any(|dir| path.starts_with(dir));
        if !is_hidden {
            return Ok(path.to_owned());
        }
        let copy = self.place.file(name);
        fs::copy(path, &copy).with_context(|| format!("copying {}", path.display()))?;
        Ok(copy)
    }

    /// As many pods as our node takes, so that both are full alike.
    fn most_pods(&self) -> Result<u32> {
        let listed =
            kubectl(&self.cluster, &["get", "nodes", "-o", "jsonpath={.items[0].status.capacity.pods}"])?;
        listed.trim().parse().with_context(|| format!("our node's capacity of pods: {listed:?}"))
    }

    /// The cluster's images and a pause image, at the address of the host that the node reaches.
    fn serve_images(&self) -> Result<()> {
        let pause = idle::pause(&self.cluster.repo, &self.place.file("pause-image"))?;
        let stores = [Store::at(&self.cluster.images()), pause];
        let mut mirrors = String::new();
        for (number, store) in stores.into_iter().enumerate() {
            let certs = self.place.file(&format!("mirror-{number}"));
            let port = certs.join("port");
            let (directory, file) = (certs.clone(), port.clone());
            // Ends with the bench.
            std::thread::Builder::new().name("images".to_owned()).spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let served = runtime.map_err(anyhow::Error::new).and_then(|runtime| {
                    runtime.block_on(registry::serve_at(place::HOST, store, &directory, &file))
                });
                if let Err(error) = served {
                    eprintln!("the peer's images: {error:#}");
                }
            })?;
            wait_for("the peer's images", Duration::from_secs(10), || port.is_file().then_some(()))?;
            let hosts = fs::read_to_string(certs.join("docker.io/hosts.toml"))?;
            // The first line is the server behind all mirrors.
            let (server, mirror) = hosts.split_once('\n').context("hosts.toml")?;
            if mirrors.is_empty() {
                mirrors = format!("{server}\n");
            }
            mirrors += mirror;
        }
        let file = self.place.file("certs.d/docker.io/hosts.toml");
        crate::process::write_atomic(&file, mirrors.as_bytes())
    }

    fn wait_ready(&mut self) -> Result<()> {
        const STATE: &str = "jsonpath={.status.conditions[?(@.type=='Ready')].status} \
                             {.status.conditions[?(@.type=='Ready')].message}";
        let end = Instant::now() + READY_LIMIT;
        let mut last = "it has not registered".to_owned();
        loop {
            interrupt::check()?;
            if let Some(said) = self.has_ended() {
                bail!("{said} before its node was Ready{}", self.logs());
            }
            match kubectl(&self.cluster, &["get", "node", NODE, "-o", STATE]) {
                Ok(state) if state.starts_with("True") => return Ok(()),
                Ok(state) => state.trim().clone_into(&mut last),
                Err(_not_there) => {}
            }
            if Instant::now() > end {
                let limit = READY_LIMIT.as_secs();
                bail!("the peer's node was not Ready after {limit} s, last seen: {last}{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What it is.
    pub(super) fn about(&self) -> &About {
        &self.about
    }

    /// The process that the whole node ends with.
    pub(super) fn first_process(&self) -> Option<ProcessId> {
        self.first
    }

    /// Whether nothing of the node runs any more.
    pub(super) fn is_gone(&self) -> bool {
        self.first.is_none_or(|process| !process.is_alive())
    }

    /// What ended, and how, once the kubelet or its containerd has.
    fn has_ended(&mut self) -> Option<String> {
        let holder = self.holder.as_mut()?;
        let status = holder.try_wait().ok()??;
        let said = fs::read_to_string(self.place.file("ended")).ok();
        Some(said.unwrap_or_else(|| format!("the peer's first process ended ({status})")))
    }

    /// An error of a measurement, with the peer's part in it. The node ends here, so that its pods hold up nobody.
    pub(super) fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let said = self.has_ended().map(|said| format!("{said} during the measurement{}", self.logs()));
        self.end();
        if let Err(error) = place::forget(&self.cluster) {
            eprintln!("removing the peer's node: {error:#}");
        }
        match said {
            Some(said) => error.context(said),
            None => error,
        }
    }

    /// Ends all its processes.
    fn end(&mut self) {
        if let Some(mut holder) = self.holder.take() {
            // Its child is killed with it, and with that everything in the namespaces.
            holder.kill().ok();
            holder.wait().ok();
        }
        if let Some(first) = self.first.take() {
            first.wait_gone(Duration::from_secs(10));
        }
    }

    /// The last lines of both logs.
    fn logs(&self) -> String {
        let tail = |name: &str| {
            let path = self.place.log(name);
            let text = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = lines[lines.len().saturating_sub(TOLD)..].join("\n");
            if last.is_empty() {
                format!("\n--- {}: empty", path.display())
            } else {
                format!("\n--- {} (last lines)\n{last}", path.display())
            }
        };
        tail("containerd") + &tail("kubelet") + "\n---"
    }

    /// Its two daemons, as the host knows them.
    pub(super) fn processes(&self) -> Result<Vec<Record>> {
        let text = fs::read(self.place.file("pids.json")).context("the peer's processes")?;
        let Pids { containerd, kubelet } = serde_json::from_slice(&text)?;
        let first = self.first.context("the peer has no first process")?;
        let namespace = fs::read_link(format!("/proc/{}/ns/pid", first.pid))?;
        [("containerd", containerd), ("kubelet", kubelet)]
            .into_iter()
            .map(|(name, inner)| {
                let pid = outer(&namespace, inner).with_context(|| format!("the peer's {name} has ended"))?;
                let process = ProcessId::of(pid).with_context(|| format!("the peer's {name} has ended"))?;
                Ok(Record { name: name.to_owned(), process, restarts: 0 })
            })
            .collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.end();
        if let Err(error) = self.place.clean(&self.cluster) {
            eprintln!("{error:#}");
        }
    }
}

/// The first line of what a program says of its version; a failure is the program's.
fn version(path: &Path) -> Result<String> {
    let said = Cmd::new(path).args(["--version"]).output()?;
    Ok(said.lines().next().unwrap_or_default().trim().to_owned())
}

/// The process whose parent is this one.
fn child_of(parent: i32) -> Option<i32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
        fields.split_whitespace().nth(1) == Some(parent.to_string().as_str())
    })
}

/// The number, here, of the process that has `inner` in a PID namespace.
fn outer(namespace: &Path, inner: i32) -> Option<i32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        numbers.split_whitespace().last() == Some(inner.to_string().as_str())
            && fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|link| link == namespace)
    })
}

fn wait_for<T>(what: &str, limit: Duration, look: impl Fn() -> Option<T>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(Instant::now() < end, "{what}: not there after {} s", limit.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_cannot_be_started_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let told = |path: &Path| format!("{:#}", program("--peer-kubelet", path).unwrap_err());
        assert!(told(&directory.path().join("none")).contains("No such file"));
        assert!(told(directory.path()).contains("no file"));
        let plain = directory.path().join("plain");
        fs::write(&plain, "").unwrap();
        assert!(told(&plain).contains("chmod +x"));
        fs::set_permissions(&plain, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(program("--peer-kubelet", &plain).is_ok());
    }

    #[test]
    fn processes_are_found_by_their_parent_and_their_namespace() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        let own = fs::read_link("/proc/self/ns/pid").unwrap();
        assert_eq!(outer(&own, pid), Some(pid));
        assert!(child_of(std::process::id().cast_signed()).is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

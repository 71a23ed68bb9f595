//! `--start`: a private containerd, with its own CRI plugin or with keelson-cri on it, in network, mount and PID
//! namespaces of their own, so that nothing of the host is touched and everything ends with the run.
//!
//! Three processes of this program: the outer one makes the namespaces and cleans up cgroups and files; the first one
//! inside reaps orphans as PID 1; its child starts the servers and runs the suite.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cri_shim_api::v1;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use serde_json::json;

use super::Options;
use crate::cmd::{Cmd, step};
use crate::paths::Layout;

/// Tells the inner processes which of them they are.
const STAGE: &str = "KEELSON_CONFORMANCE_STAGE";
/// Tells the inner processes the directory.
const DIR: &str = "KEELSON_CONFORMANCE_DIR";
/// Port of the registry in the private network.
const REGISTRY_PORT: u16 = 5000;

/// Whom to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Target {
    /// keelson-cri on a containerd without its CRI plugin.
    Keelson,
    /// containerd with its CRI plugin, the reference.
    Containerd,
}

/// Starts the target, runs the suite on it and ends everything.
pub(crate) fn run(layout: &Layout, target: Target, options: &Options) -> Result<bool> {
    let dir = std::env::var_os(DIR).map(PathBuf::from);
    match (std::env::var(STAGE).as_deref(), dir) {
        (Ok("init"), Some(_)) => reap(),
        (Ok("inside"), Some(dir)) => inside(layout, target, options, &dir),
        _ => outside(layout, target, options),
    }
}

fn outside(layout: &Layout, target: Target, options: &Options) -> Result<bool> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "--start needs root");
    if !options.no_build {
        let names = ["keelson-cri", "containerd-shim-keelson-v1", "keelson-cni"];
        step("building keelson-cri", || crate::binaries::build_only(&layout.repo, &names))?;
    }
    // The private network does not reach Debian's mirror.
    super::images::fetch(&layout.repo.join("target/conformance"))?;
    let id = std::process::id();
    let dir = PathBuf::from(format!("/tmp/kconf-{id}"));
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    for mountpoint in ["/run/containerd", "/var/lib/cni"] {
        fs::create_dir_all(mountpoint).with_context(|| format!("creating {mountpoint}"))?;
    }
    let status = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "init")
        .env(DIR, &dir)
        .status()
        .context("cannot start unshare (util-linux)")?;
    let logs = layout.repo.join("target/conformance");
    for name in ["containerd.log", "cri.log"] {
        fs::create_dir_all(&logs).ok();
        let of = format!("{target:?}-{}", options.handler).to_lowercase();
        fs::copy(dir.join(name), logs.join(format!("{}-{name}", of.trim_end_matches('-')))).ok();
    }
    remove_cgroups(&cgroup_parent(&dir));
    fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    Ok(status.success())
}

/// PID 1 of the namespace: starts the program again and reaps whatever is orphaned until that ends.
fn reap() -> Result<bool> {
    use nix::sys::wait::{WaitStatus, waitpid};
    let child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "inside")
        .spawn()
        .context("starting the suite")?;
    let wanted = nix::unistd::Pid::from_raw(child.id().cast_signed());
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == wanted => return Ok(code == 0),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == wanted => {
                bail!("the suite was ended by {signal}")
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for the suite"),
        }
    }
}

fn inside(layout: &Layout, target: Target, options: &Options, dir: &Path) -> Result<bool> {
    for mountpoint in ["/run/containerd", "/var/lib/cni"] {
        Cmd::new("mount").args(["-t", "tmpfs", "conformance", mountpoint]).output()?;
    }
    Cmd::new("ip").args(["link", "set", "lo", "up"]).output()?;
    network(dir)?;
    let mut options = options.clone();
    options.registry_port = REGISTRY_PORT;
    options.cgroup_parent = Some(cgroup_parent(dir));
    let list = match target {
        Target::Keelson => "keelson.txt",
        Target::Containerd => "containerd-1.6.txt",
    };
    options.known.get_or_insert_with(|| layout.repo.join("xtask/src/conformance").join(list));
    let runtime = super::runtime()?;
    runtime.block_on(async {
        let work = dir.join("suite");
        let catalog = super::catalog(layout, &options, &work).await?;
        let servers = Servers::start(layout, target, dir)?;
        let endpoint = servers.endpoint.clone();
        wait_until_serving(&endpoint, dir).await?;
        super::check(layout, &options, &endpoint, catalog, &work).await
    })
}

/// The cgroup parent of a run, known from its directory.
fn cgroup_parent(dir: &Path) -> String {
    format!("/{}", dir.file_name().unwrap_or_default().to_string_lossy())
}

/// CNI: Debian's reference plugins for either target.
fn network(dir: &Path) -> Result<()> {
    let list = json!({
        "cniVersion": "1.0.0", "name": "conformance",
        "plugins": [
            {"type": "bridge", "bridge": "conf0", "isGateway": true, "hairpinMode": true, "ipam": {
                "type": "host-local", "ranges": [[{"subnet": "10.77.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
            }},
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        ],
    });
    fs::create_dir_all(dir.join("net.d"))?;
    fs::write(dir.join("net.d/10-conformance.conflist"), list.to_string())
        .context("writing the CNI configuration")
}

struct Servers {
    endpoint: String,
    children: Vec<Child>,
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

impl Servers {
    fn start(layout: &Layout, target: Target, dir: &Path) -> Result<Self> {
        let socket = dir.join("containerd.sock");
        fs::write(dir.join("containerd.toml"), containerd(dir, target == Target::Containerd))?;
        // Shims of ours are found beside the other release binaries.
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}", layout.repo.join("target/release").display());
        let mut containerd = Command::new("containerd");
        containerd.arg("--config").arg(dir.join("containerd.toml")).env("PATH", &path);
        let mut children = vec![spawn(&mut containerd, &dir.join("containerd.log"))?];
        if target == Target::Containerd {
            return Ok(Self { endpoint: format!("unix://{}", socket.display()), children });
        }
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            anyhow::ensure!(
                begun.elapsed() < Duration::from_secs(60),
                "containerd does not start: {}",
                log(dir)
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let text = serde_norway::to_string(&keelson(dir)).context("encoding YAML")?;
        fs::write(dir.join("cri.yaml"), text)?;
        let mut cri = Command::new(layout.binary("keelson-cri"));
        cri.arg("--config").arg(dir.join("cri.yaml")).env("PATH", &path);
        children.push(spawn(&mut cri, &dir.join("cri.log"))?);
        Ok(Self { endpoint: format!("unix://{}", dir.join("cri.sock").display()), children })
    }
}

fn spawn(command: &mut Command, log: &Path) -> Result<Child> {
    let file = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))
}

fn log(dir: &Path) -> String {
    let text: String = ["containerd.log", "cri.log"]
        .iter()
        .map(|name| fs::read_to_string(dir.join(name)).unwrap_or_default())
        .collect();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

async fn wait_until_serving(endpoint: &str, dir: &Path) -> Result<()> {
    let mut client = RuntimeServiceClient::new(super::channel(endpoint)?);
    let begun = Instant::now();
    loop {
        let answer = client.status(v1::StatusRequest { verbose: false }).await;
        let conditions =
            answer.as_ref().map(|answer| answer.get_ref().status.clone().unwrap_or_default().conditions);
        if let Ok(conditions) = &conditions
            && !conditions.is_empty()
            && conditions.iter().all(|condition| condition.status)
        {
            return Ok(());
        }
        if begun.elapsed() > Duration::from_secs(60) {
            bail!("the endpoint does not get ready: {answer:?}\n{}", log(dir));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn containerd(dir: &Path, plugin: bool) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    let disabled = if plugin { "" } else { "\"io.containerd.grpc.v1.cri\", " };
    let base = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [{disabled}\"io.containerd.snapshotter.v1.btrfs\", \
         \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.aufs\", \
         \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.tracing.processor.v1.otlp\"]\n\
         [grpc]\naddress = {:?}\n[ttrpc]\naddress = \"\"\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
        path("containerd-root"),
        path("containerd-state"),
        path("containerd.sock"),
        path("opt"),
    );
    if !plugin {
        return base;
    }
    format!(
        "{base}[plugins.\"io.containerd.grpc.v1.cri\"]\n\
         sandbox_image = \"127.0.0.1:{REGISTRY_PORT}/conformance/pause:latest\"\n\
         stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\nrestrict_oom_score_adj = true\n\
         netns_mounts_under_state_dir = true\nimage_pull_progress_timeout = \"5s\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = {:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.keelson]\n\
         runtime_type = \"io.containerd.keelson.v1\"\n",
        path("net.d"),
    )
}

fn keelson(dir: &Path) -> serde_json::Value {
    json!({
        "listen": dir.join("cri.sock"),
        "containerdSocket": dir.join("containerd.sock"),
        "stateDir": dir.join("cri-state"),
        "rootDir": dir.join("cri-root"),
        "netnsDir": dir.join("netns"),
        "cni": {"confDir": dir.join("net.d"), "binDir": "/usr/lib/cni", "cacheDir": dir.join("cni-cache")},
        "registryConfigDir": dir.join("certs.d"),
        "images": {"progressDeadlineSeconds": 5},
    })
}

/// Removes the cgroups below `parent` in every hierarchy; a process that is just ending keeps one for a moment.
pub(crate) fn remove_cgroups(parent: &str) {
    let end = Instant::now() + Duration::from_secs(5);
    let name = parent.trim_start_matches('/');
    let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
    roots.extend(fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path()));
    let dirs = || roots.iter().map(|root| root.join(name)).filter(|dir| dir.is_dir()).collect::<Vec<_>>();
    while !dirs().is_empty() && Instant::now() < end {
        for dir in dirs() {
            remove_tree(&dir);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn remove_tree(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // Tried again by the caller.
    fs::remove_dir(dir).ok();
}

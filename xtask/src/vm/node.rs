//! A whole node inside the Debian guest: control plane, keelson-cri on Debian's containerd, and the agent, each a unit of
//! systemd's, as on a server.
//!
//! Run by the guest's jobs as `xtask vm-node …`. Input: what the payload disk has (executables in `/keelson/bin`, images in
//! `/keelson/target/images`). Output: a node that is Ready, with swap, huge pages and a kubeconfig ([`kubeconfig`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cmd::Cmd;
use crate::conformance::node::api::Api;
use crate::conformance::node::live::condition;
use crate::images::Store;
use crate::paths::Layout;
use crate::{config, registry};

/// The checkout that the suite takes the payload disk for.
const REPO: &str = "/keelson";
/// The guest has no network: the address of a device that leads nowhere.
const ADDRESS: &str = "172.30.99.1";
/// Name of the node.
const NAME: &str = "keelson-vm";
/// Bytes of swap.
const SWAP: &str = "1G";
/// Huge pages of 2 MiB.
const HUGE_PAGES: &str = "16";
/// Seconds that pods have in a shutdown, and critical ones of them: beyond logind's own limit, so that it must be raised.
const SHUTDOWN: (u32, u32) = (180, 60);
/// From the first unit to Ready, on an emulated processor.
const READY_LIMIT: Duration = Duration::from_secs(400);
/// How often a state is looked at; a look costs an emulated processor much.
const PAUSE: Duration = Duration::from_millis(500);

/// What is done in the guest.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum Act {
    /// Start the node, and wait until it is Ready.
    Start {
        /// Who makes cgroups: systemd or cgroupfs.
        #[arg(long)]
        driver: String,
        /// Without swap.
        #[arg(long)]
        no_swap: bool,
    },
    /// Serve the images.
    Registry,
    /// See logind's shutdown wait for pods; only the guest's end can follow.
    Shutdown,
}

impl Act {
    /// Does it.
    pub(crate) fn run(&self) -> Result<()> {
        match self {
            Self::Start { driver, no_swap } => start(driver, !no_swap),
            Self::Registry => runtime()?.block_on(serve()),
            Self::Shutdown => runtime()?.block_on(super::logind::check()),
        }
    }
}

pub(super) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Where the node's files are: not on the payload disk, which is small.
fn layout() -> Layout {
    Layout {
        repo: REPO.into(),
        instance: "node".to_owned(),
        data: "/var/lib/keelson/node".into(),
        run: "/run/keelson/node".into(),
    }
}

/// The administrator's credentials.
pub(super) fn kubeconfig() -> PathBuf {
    layout().kubeconfig()
}

async fn serve() -> Result<()> {
    let layout = layout();
    let images = Store::at(&layout.images());
    registry::serve(images, &layout.registry_config(), &layout.run.join("registry.port")).await
}

fn start(driver: &str, swap: bool) -> Result<()> {
    prepare_machine(swap)?;
    let layout = layout();
    configure(&layout, driver)?;
    let file = |name: &str| layout.data.join(name).display().to_string();
    unit("registry", &["/keelson/bin/xtask", "vm-node", "registry"])?;
    wait_for_file(&layout.registry_config().join("docker.io/hosts.toml"))?;
    unit("control", &["/keelson/bin/keelson-control", "serve", "--config", &file("control.yaml")])?;
    unit("cri", &["/keelson/bin/keelson-cri", "--config", &file("cri.yaml")])?;
    let identity = layout.data.join("node");
    for path in [identity.join("agent.kubeconfig"), identity.join("kubelet.crt"), layout.cri_socket()] {
        wait_for_file(&path)?;
    }
    unit("agent", &["/keelson/bin/keelson-agent", "--config", &file("agent.yaml")])?;
    let ready = runtime()?.block_on(wait_ready());
    if ready.is_err() {
        tell("agent");
    }
    ready
}

/// A network device, swap and huge pages.
fn prepare_machine(swap: bool) -> Result<()> {
    let address = format!("{ADDRESS}/24");
    let mut steps: Vec<Vec<&str>> = vec![
        vec!["modprobe", "-a", "dummy", "overlay", "br_netfilter", "nf_tables"],
        vec!["ip", "link", "add", "node0", "type", "dummy"],
        vec!["ip", "address", "add", &address, "dev", "node0"],
        vec!["ip", "link", "set", "node0", "up"],
        vec!["ip", "route", "add", "default", "via", "172.30.99.254"],
    ];
    if swap {
        steps.extend([
            vec!["fallocate", "-l", SWAP, "/swap"],
            vec!["chmod", "600", "/swap"],
            vec!["mkswap", "/swap"],
            vec!["swapon", "/swap"],
        ]);
    }
    for step in steps {
        let (program, arguments) = step.split_first().context("an empty command")?;
        Cmd::new(program).args(arguments).output()?;
    }
    fs::write("/proc/sys/vm/nr_hugepages", HUGE_PAGES).context("making huge pages")?;
    fs::write("/etc/resolv.conf", "nameserver 192.0.2.53\n").context("writing /etc/resolv.conf")
}

/// The files of `up`, with what is different here.
fn configure(layout: &Layout, driver: &str) -> Result<()> {
    let node = config::Node {
        name: NAME.to_owned(),
        address: ADDRESS.to_owned(),
        cgroup2: "/sys/fs/cgroup".to_owned(),
        overlay: None,
    };
    fs::create_dir_all(layout.data.join("manifests"))?;
    config::write(layout, ADDRESS, &[(layout.clone(), node)])?;
    edit(&layout.data.join("cri.yaml"), |cri| {
        cri["containerdSocket"] = json!("/run/containerd/containerd.sock");
        cri["containerdNamespace"] = json!("keelson-node");
        cri["cgroupDriver"] = json!(driver);
    })?;
    edit(&layout.data.join("agent.yaml"), |agent| {
        agent["cgroupDriver"] = json!(driver);
        agent["cgroupRoot"] = json!("/");
        agent["memorySwap"] = json!({"swapBehavior": "LimitedSwap"});
        agent["podPidsLimit"] = json!(100);
        agent["shutdownGracePeriod"] = json!(format!("{}s", SHUTDOWN.0));
        agent["shutdownGracePeriodCriticalPods"] = json!(format!("{}s", SHUTDOWN.1));
        // The root disk is small, and nothing on it is kept.
        for (signal, left) in [("nodefs.available", "50Mi"), ("imagefs.available", "50Mi")] {
            agent["evictionHard"][signal] = json!(left);
        }
        if let Some(own) = agent["keelson"].as_object_mut() {
            own.remove("setKernelDefaults");
        }
    })
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let mut value: Value =
        serde_norway::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
    change(&mut value);
    fs::write(path, serde_norway::to_string(&value)?).with_context(|| format!("writing {}", path.display()))
}

/// Starts a service `node-<name>` as a transient unit.
fn unit(name: &str, command: &[&str]) -> Result<()> {
    let unit = format!("--unit=node-{name}");
    Cmd::new("systemd-run")
        .args([unit.as_str(), "--quiet", "-p", "Delegate=yes", "-p", "KillMode=process"])
        .args(["-p", "StandardError=journal+console", "-p", "LimitNOFILE=1048576"])
        .args(["-E", "PATH=/keelson/bin:/usr/sbin:/usr/bin:/sbin:/bin", "-p", "WorkingDirectory=/keelson"])
        .args(command)
        .output()
        .map(drop)
}

fn wait_for_file(path: &Path) -> Result<()> {
    let end = Instant::now() + READY_LIMIT;
    while !path.exists() {
        if Instant::now() > end {
            bail!("{} is not there after {} s", path.display(), READY_LIMIT.as_secs());
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Until the node is Ready and pods may be made.
async fn wait_ready() -> Result<()> {
    let end = Instant::now() + READY_LIMIT;
    loop {
        let state = match readiness().await {
            Ok(None) => return Ok(()),
            Ok(Some(state)) => state,
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() > end {
            bail!("not Ready after {} s: {state}", READY_LIMIT.as_secs());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What is waited for.
async fn readiness() -> Result<Option<String>> {
    let api = Api::open(&kubeconfig(), None).await?;
    let node = api.get(&format!("/api/v1/nodes/{NAME}")).await?;
    let ready = condition(&node, "Ready");
    if ready["status"] != "True" {
        return Ok(Some(format!("the node is not Ready: {}", ready["message"])));
    }
    api.get("/api/v1/namespaces/default/serviceaccounts/default").await.map(|_account| None)
}

/// The end of a unit's journal, for whoever reads the console.
fn tell(name: &str) {
    let unit = format!("node-{name}");
    match Cmd::new("journalctl").args(["--no-pager", "-n", "40", "-u", &unit]).output() {
        Ok(text) => println!("{text}"),
        Err(error) => println!("{error:#}"),
    }
}

/// The node's name.
pub(super) fn name() -> &'static str {
    NAME
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_s_address_is_one() {
        assert!(ADDRESS.parse::<std::net::Ipv4Addr>().is_ok());
    }

    #[test]
    fn files_are_changed_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.yaml");
        fs::write(&file, "a: 1\nb: {c: 2}\n").unwrap();
        edit(&file, |value| value["b"]["c"] = json!("three")).unwrap();
        let read: Value = serde_norway::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        assert_eq!(read, json!({"a": 1, "b": {"c": "three"}}));
    }
}

//! Where everything of the peer is, and how it goes again: found by place and name, never by memory of what was done, so
//! that a run removes what a killed one left.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use base64::Engine as _;

use super::NODE;
use crate::cmd::Cmd;
use crate::host;
use crate::paths::Layout;
use crate::process::{ProcessId, Record, write_atomic};
use crate::status::kubectl;

/// The host's end of the node's link.
const LINK: &str = "kl-bpeer0";
/// The host on that link, and the node; the two addresses of a range that nothing else here uses.
pub(super) const HOST: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 251, 0, 1);
pub(super) const ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 251, 0, 2);
/// Settings of the whole machine that a kubelet changes at its start.
const SETTINGS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// The one place of peers: only one is measured at a time.
#[derive(Debug, Clone)]
pub(super) struct Place {
    layout: Layout,
}

impl Place {
    /// Below `target/bench-peer` and `/run/keelson/bench-peer`.
    pub(super) fn of(repo: &Path) -> Self {
        let instance = "bench-peer".to_owned();
        let data = repo.join("target").join(&instance);
        let run = Path::new("/run/keelson").join(&instance);
        Self { layout: Layout { repo: repo.to_owned(), instance, data, run } }
    }

    /// A file of the node.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.layout.data.join(name)
    }

    /// A log; logs stay after the run.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.layout.repo.join("target/bench").join(format!("peer-{name}.log"))
    }

    /// Below which the node's pods have their cgroups.
    pub(super) fn cgroup(&self) -> String {
        self.layout.cgroup()
    }

    /// Says why the place cannot be had, or makes it anew and keeps what is to be restored.
    pub(super) fn claim(&self, cluster: &Layout) -> Result<()> {
        let runs = Record::load_all(&self.layout.run).into_iter().find(|record| record.process.is_alive());
        if let Some(record) = runs {
            bail!("another bench with --peer-kubelet runs (pid {}); wait for its end", record.process.pid);
        }
        self.clean(cluster).context("removing what an earlier run left")?;
        for dir in ["var-lib", "var-log", "volume-plugins", "net.d"].map(|name| self.file(name)) {
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        restrict(&self.layout.data)?;
        let settings: BTreeMap<&str, String> = SETTINGS
            .into_iter()
            .filter_map(|name| Some((name, fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?)))
            .collect();
        write_atomic(&self.file("settings.json"), &serde_json::to_vec(&settings)?)?;
        Record { name: "bench".to_owned(), process: ProcessId::own(), restarts: 0 }.save(&self.layout.run)?;
        self.make_cgroups()
    }

    /// A kubelet wants the directory that it is told to be there in every hierarchy, and to be of use.
    fn make_cgroups(&self) -> Result<()> {
        let relative = self.cgroup();
        let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
        let roots = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ');
            let dir = fields.nth(1)?;
            fields.next()?.starts_with("cgroup").then(|| PathBuf::from(dir))
        });
        for root in roots {
            let mut dir = root;
            for part in Path::new(relative.trim_start_matches('/')) {
                let parent = dir.clone();
                dir.push(part);
                fs::create_dir_all(&dir).with_context(|| format!("creating cgroup {}", dir.display()))?;
                inherit_cpuset(&parent, &dir)?;
            }
        }
        Ok(())
    }

    /// Removes every trace but the logs, once the node's processes have been ended. All is tried, all failures are told.
    pub(super) fn clean(&self, cluster: &Layout) -> Result<()> {
        let mut failures = Vec::new();
        let mut step = |what: &str, outcome: Result<()>| {
            if let Err(error) = outcome {
                failures.push(format!("{what}: {error:#}"));
            }
        };
        host::kill_all(&host::cgroup_processes(&self.layout));
        if Path::new("/sys/class/net").join(LINK).exists() {
            let deleted = Cmd::new("ip").args(["link", "del", LINK]).output().map(drop);
            // It also goes with the namespace, maybe just now.
            let gone = !Path::new("/sys/class/net").join(LINK).exists();
            step("link", if gone { Ok(()) } else { deleted });
        }
        step("cgroups", host::remove_cgroups(&self.layout));
        step("mounts", host::unmount_below(&self.layout.data));
        step("kernel settings", self.restore());
        if self.layout.data.exists() {
            step("objects of the cluster", forget(cluster));
        }
        for dir in [&self.layout.run, &self.layout.data] {
            step("files", remove_dir(dir));
        }
        if failures.is_empty() {
            return Ok(());
        }
        bail!("not everything of the peer could be removed:\n  - {}", failures.join("\n  - "))
    }

    fn restore(&self) -> Result<()> {
        let Ok(text) = fs::read(self.file("settings.json")) else { return Ok(()) };
        let settings: BTreeMap<String, String> = serde_json::from_slice(&text)?;
        for (name, value) in settings {
            let path = Path::new("/proc/sys").join(name);
            if fs::read_to_string(&path).is_ok_and(|now| now != value) {
                fs::write(&path, value).with_context(|| format!("restoring {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// Joins the host and the namespace of a process by a link.
pub(super) fn connect(process: i32) -> Result<()> {
    let ip = |args: &[&str]| Cmd::new("ip").args(args).output().map(drop);
    let (pid, inside) = (process.to_string(), format!("--net=/proc/{process}/ns/net"));
    ip(&["link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", &pid])?;
    ip(&["address", "add", &format!("{HOST}/30"), "dev", LINK])?;
    ip(&["link", "set", LINK, "up"])?;
    let inside = |args: &[&str]| Cmd::new("nsenter").args([&inside, "ip"]).args(args).output().map(drop);
    inside(&["link", "set", "lo", "up"])?;
    inside(&["address", "add", &format!("{ADDRESS}/30"), "dev", "eth0"])?;
    inside(&["link", "set", "eth0", "up"])?;
    inside(&["route", "add", "default", "via", &HOST.to_string()])
}

/// The first hierarchy's processors and memory nodes are nobody's until they are said.
fn inherit_cpuset(parent: &Path, dir: &Path) -> Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let (file, above) = (dir.join(name), parent.join(name));
        let is_empty = fs::read_to_string(&file).is_ok_and(|text| text.trim().is_empty());
        // On cgroup2 empty means the parent's, and it has no such file at the root.
        if is_empty && dir.join("cgroup.clone_children").is_file() {
            let value = fs::read_to_string(&above).with_context(|| format!("reading {}", above.display()))?;
            fs::write(&file, value).with_context(|| format!("writing {}", file.display()))?;
        }
    }
    Ok(())
}

/// Takes the node and all that is only there because of it out of the cluster; its pods first, whose kubelet is gone.
pub(super) fn forget(cluster: &Layout) -> Result<()> {
    if crate::up::running(cluster).is_none() {
        return Ok(());
    }
    let here = format!("--field-selector=spec.nodeName={NODE}");
    kubectl(cluster, &["delete", "pods", "--all-namespaces", &here, "--force", "--grace-period=0"])?;
    kubectl(cluster, &["delete", "node", NODE, "--ignore-not-found"])?;
    kubectl(cluster, &["delete", "csinode", NODE, "--ignore-not-found"])?;
    kubectl(cluster, &["--namespace=kube-node-lease", "delete", "lease", NODE, "--ignore-not-found"])?;
    for request in requests(cluster)? {
        kubectl(cluster, &["delete", "csr", &request, "--ignore-not-found"])?;
    }
    Ok(())
}

/// Certificate requests of the node. The first one of a node is made with the rights of whoever bootstraps it, here the
/// administrator's, and is removed where it is of no other node's name.
fn requests(cluster: &Layout) -> Result<Vec<String>> {
    let text = kubectl(cluster, &["get", "csr", "--output=json"])?;
    let list: serde_json::Value = serde_json::from_str(&text).context("certificate requests")?;
    let is_ours = |item: &&serde_json::Value| {
        let asker = item["spec"]["username"].as_str().unwrap_or_default();
        asker == format!("system:node:{NODE}")
            || is_for_node(item["spec"]["request"].as_str().unwrap_or_default())
    };
    let items = list["items"].as_array().into_iter().flatten().filter(is_ours);
    Ok(items.filter_map(|item| Some(item["metadata"]["name"].as_str()?.to_owned())).collect())
}

/// Whether a request in base64 (PEM, with DER in base64 once more) is for a certificate of the node: its name is in the DER
/// as it is.
fn is_for_node(request: &str) -> bool {
    let decode = |text: &str| base64::engine::general_purpose::STANDARD.decode(text).ok();
    let der = decode(request).and_then(|pem| {
        let pem = String::from_utf8(pem).ok()?;
        decode(&pem.lines().filter(|line| !line.starts_with("-----")).collect::<String>())
    });
    let name = format!("system:node:{NODE}");
    der.is_some_and(|der| der.windows(name.len()).any(|part| part == name.as_bytes()))
}

fn restrict(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("closing {} to others", dir.display()))
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(anyhow::Error::new(error).context(format!("removing {}", dir.display())))
        }
        _ => Ok(()),
    }
}

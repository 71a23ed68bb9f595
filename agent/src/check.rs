//! `keelson-agent check`: what the machine lacks, and how to mend it, before anything starts.
//!
//! Input: the configuration. Output: one finding per thing looked at. Nothing is changed or started; every question to
//! another process has a deadline.

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::chain::chain;
use crate::config::AgentConfig;
use crate::host::cgroups::controllers;
use crate::host::requirements;
use crate::runtime::cri;
use crate::{network, roles};

/// Deadline of one question.
const DEADLINE: Duration = Duration::from_secs(10);
/// A certificate that ends sooner deserves a word.
const SOON: i64 = 14 * 24 * 3600;
/// Controllers that pods need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Each followed log, watched directory and systemd unit takes one.
const INOTIFY_INSTANCES: u64 = 512;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// As it should be.
    Good,
    /// The agent starts, something will not work.
    Doubtful,
    /// The agent will not start, or no pod will.
    Bad,
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub grade: Grade,
    /// What was looked at.
    pub subject: String,
    /// What was found.
    pub found: String,
    /// How to mend it; empty where nothing is wrong.
    pub mend: String,
}

impl Finding {
    fn good(subject: &str, found: impl Into<String>) -> Self {
        Self { grade: Grade::Good, subject: subject.to_owned(), found: found.into(), mend: String::new() }
    }

    fn of(grade: Grade, subject: &str, found: impl Into<String>, mend: &str) -> Self {
        Self { grade, subject: subject.to_owned(), found: found.into(), mend: mend.to_owned() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.grade {
            Grade::Good => "ok   ",
            Grade::Doubtful => "warn ",
            Grade::Bad => "FAIL ",
        };
        write!(f, "{mark} {}: {}", self.subject, self.found)?;
        if !self.mend.is_empty() {
            write!(f, "\n       → {}", self.mend)?;
        }
        Ok(())
    }
}

/// Looks at everything.
pub async fn run(config: &AgentConfig) -> Vec<Finding> {
    let mut findings = machine();
    findings.extend(demands(config));
    findings.extend(files(config));
    findings.extend(ports(config));
    findings.extend(between_nodes(config).await);
    findings.extend(runtime(config).await);
    let has_credentials = !config.bootstraps() || config.keelson.kubeconfig.exists();
    if !config.is_standalone() && has_credentials {
        findings.push(api_server(config).await);
    }
    findings.extend(config.ignored.iter().map(|ignored| {
        let found = format!("without effect: {}", ignored.reason);
        Finding::of(Grade::Doubtful, &ignored.field, found, "remove it, or live without what it asks for")
    }));
    findings
}

fn machine() -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.push(if nix::unistd::Uid::effective().is_root() {
        Finding::good("user", "root")
    } else {
        Finding::of(Grade::Bad, "user", "not root", "cgroups and mounts need it: run as root, or with sudo")
    });
    findings.push(match controllers() {
        Ok(found) => {
            let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !found.contains(*name)).collect();
            let shown = found.into_iter().collect::<Vec<_>>().join(" ");
            if missing.is_empty() {
                Finding::good("cgroup controllers", shown)
            } else {
                let found = format!("{} missing, there are: {shown}", missing.join(" "));
                let mend =
                    "boot with cgroup_enable=memory swapaccount=1, or enable them in cgroup.subtree_control";
                Finding::of(Grade::Bad, "cgroup controllers", found, mend)
            }
        }
        Err(error) => {
            let mend = "mount -t cgroup2 none /sys/fs/cgroup";
            Finding::of(Grade::Bad, "cgroup controllers", error.to_string(), mend)
        }
    });
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    findings.push(if filesystems.lines().any(|line| line.trim_end().ends_with("\toverlay")) {
        Finding::good("overlayfs", "there")
    } else {
        Finding::of(Grade::Doubtful, "overlayfs", "not in /proc/filesystems", "modprobe overlay")
    });
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    findings.push(match number("/proc/sys/net/ipv4/ip_forward") {
        Some(0) => {
            let mend = "sysctl -w net.ipv4.ip_forward=1";
            Finding::of(
                Grade::Doubtful,
                "net.ipv4.ip_forward",
                "off: pods reach nothing beyond the node",
                mend,
            )
        }
        _ => Finding::good("net.ipv4.ip_forward", "on"),
    });
    let instances = number("/proc/sys/fs/inotify/max_user_instances").unwrap_or(0);
    findings.push(if instances >= INOTIFY_INSTANCES {
        Finding::good("fs.inotify.max_user_instances", instances.to_string())
    } else {
        let mend = format!("sysctl -w fs.inotify.max_user_instances={INOTIFY_INSTANCES}");
        let found = format!("{instances}: many followed logs or pods will run into it");
        Finding::of(Grade::Doubtful, "fs.inotify.max_user_instances", found, &mend)
    });
    findings
}

/// What the configuration demands of the machine.
fn demands(config: &AgentConfig) -> Vec<Finding> {
    let unmet = requirements::unmet(config);
    if unmet.is_empty() {
        return vec![Finding::good("demands of the configuration", "met")];
    }
    unmet.into_iter().map(|unmet| Finding::of(Grade::Bad, unmet.field, unmet.found, unmet.mend)).collect()
}

fn files(config: &AgentConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !config.tls_cert_file.as_os_str().is_empty() {
        findings.push(certificate("tlsCertFile", &config.tls_cert_file));
        findings.push(readable("tlsPrivateKeyFile", &config.tls_private_key_file));
    }
    if config.bootstraps() && !config.keelson.kubeconfig.exists() {
        findings.push(readable("keelson.bootstrapKubeconfig", &config.keelson.bootstrap_kubeconfig));
    } else if !config.is_standalone() {
        findings.push(readable("keelson.kubeconfig", &config.keelson.kubeconfig));
    }
    findings.extend([
        writable("keelson.rootDir", &config.keelson.root_dir),
        writable("podLogsDir", &config.pod_logs_dir),
    ]);
    let client_ca = &config.authentication.x509.client_ca_file;
    findings.push(if client_ca.as_os_str().is_empty() {
        let mend = "set authentication.x509.clientCAFile: without it nobody can read logs or exec";
        Finding::of(Grade::Doubtful, "authentication.x509.clientCAFile", "not set", mend)
    } else {
        certificate("authentication.x509.clientCAFile", client_ca)
    });
    let statics = &config.static_pod_path;
    if !statics.as_os_str().is_empty() {
        findings.push(match std::fs::metadata(statics) {
            Ok(_) => Finding::good("staticPodPath", statics.display().to_string()),
            Err(error) => {
                let found = format!("{}: {error}", statics.display());
                Finding::of(
                    Grade::Doubtful,
                    "staticPodPath",
                    found,
                    "mkdir -p it; until then there are no static pods",
                )
            }
        });
    }
    findings
}

fn readable(field: &str, path: &Path) -> Finding {
    match std::fs::File::open(path) {
        Ok(_) => Finding::good(field, path.display().to_string()),
        Err(error) => {
            let found = format!("{} cannot be read: {error}", path.display());
            Finding::of(Grade::Bad, field, found, "give the path of a file that root can read")
        }
    }
}

/// The directory, or the nearest one above it that exists, can be written.
fn writable(field: &str, path: &Path) -> Finding {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK) {
        Ok(()) => Finding::good(field, path.display().to_string()),
        Err(error) => {
            let found = format!("{} cannot be written: {}", existing.display(), error.desc());
            Finding::of(
                Grade::Bad,
                field,
                found,
                "choose another directory, or remount the file system read-write",
            )
        }
    }
}

fn certificate(field: &str, path: &Path) -> Finding {
    let now = jiff::Timestamp::now().as_second();
    match not_after(path) {
        Err(problem) => {
            let found = format!("{}: {problem}", path.display());
            Finding::of(Grade::Bad, field, found, "give the path of a PEM certificate")
        }
        Ok(end) => {
            let shown = jiff::Timestamp::from_second(end)
                .map_or_else(|_error| end.to_string(), |end| end.to_string());
            if end <= now {
                Finding::of(Grade::Bad, field, format!("{} expired at {shown}", path.display()), "renew it")
            } else if end - now < SOON {
                let found = format!("{} expires at {shown}", path.display());
                Finding::of(Grade::Doubtful, field, found, "renew it soon")
            } else {
                Finding::good(field, format!("{}, valid until {shown}", path.display()))
            }
        }
    }
}

/// The end of the first certificate in a PEM file, in seconds since 1970.
fn not_after(path: &Path) -> Result<i64, String> {
    let first = CertificateDer::from_pem_file(path).map_err(|error| error.to_string())?;
    let (_, certificate) = X509Certificate::from_der(&first).map_err(|error| error.to_string())?;
    Ok(certificate.validity().not_after.timestamp())
}

fn ports(config: &AgentConfig) -> Vec<Finding> {
    let mut addresses = vec![("port", SocketAddr::new(config.address, config.port))];
    if config.serving.read_only_port != 0 {
        let port = config.serving.read_only_port;
        addresses.push(("readOnlyPort", SocketAddr::new(config.address, port)));
    }
    if config.healthz_port != 0 {
        addresses.push(("healthzPort", SocketAddr::new(config.healthz_bind_address, config.healthz_port)));
    }
    let probe = |(field, address): (&str, SocketAddr)| match TcpListener::bind(address) {
        Ok(_free) => Finding::good(field, format!("{address} is free")),
        Err(error) => {
            let mend =
                "an agent or kubelet that runs already has it (`ss -ltnp`); stop it, or choose another port";
            Finding::of(Grade::Doubtful, field, format!("{address}: {error}"), mend)
        }
    };
    addresses.into_iter().map(probe).collect()
}

async fn between_nodes(config: &AgentConfig) -> Option<Finding> {
    const SUBJECT: &str = "keelson.network";
    let section = config.keelson.network.as_ref().filter(|section| section.enabled)?;
    Some(match network::look(section, config).await {
        Ok(found) => Finding::good(SUBJECT, found),
        Err(error) => Finding::of(
            Grade::Bad,
            SUBJECT,
            format!("{error:#}"),
            "correct what is named; see docs/network.md",
        ),
    })
}

async fn runtime(config: &AgentConfig) -> Vec<Finding> {
    let socket = config.runtime_socket();
    let cri = cri::connect(socket.clone(), config.image_socket(), DEADLINE);
    let (version, status) = tokio::join!(cri.version(), cri.status());
    let mut findings = Vec::new();
    match version {
        Ok(version) => findings.push(Finding::good(
            "container runtime",
            format!("{} {} at {}", version.runtime_name, version.runtime_version, socket.display()),
        )),
        Err(error) => {
            let mend =
                "start the runtime (`systemctl start keelson-cri`), or correct containerRuntimeEndpoint";
            let found = format!("no answer at {}: {error}", socket.display());
            findings.push(Finding::of(Grade::Bad, "container runtime", found, mend));
            return findings;
        }
    }
    let conditions = status.ok().and_then(|status| status.status).unwrap_or_default().conditions;
    for condition in conditions {
        let mend = if condition.r#type == "NetworkReady" {
            "write a CNI configuration, or set keelson.cni so that the agent does"
        } else {
            "see the runtime's log"
        };
        findings.push(if condition.status {
            Finding::good(&condition.r#type, "yes")
        } else {
            let grade = if condition.r#type == "NetworkReady" { Grade::Doubtful } else { Grade::Bad };
            Finding::of(
                grade,
                &condition.r#type,
                format!("{}: {}", condition.reason, condition.message),
                mend,
            )
        });
    }
    findings
}

async fn api_server(config: &AgentConfig) -> Finding {
    const SUBJECT: &str = "API server";
    const MEND: &str =
        "start it, or correct the server and credentials of keelson.kubeconfig; static pods run without it";
    let client = match roles::client(config).await {
        Ok(client) => client,
        Err(error) => return Finding::of(Grade::Bad, SUBJECT, format!("{error:#}"), MEND),
    };
    let nodes: Api<Node> = Api::all(client);
    match tokio::time::timeout(DEADLINE, nodes.get_opt(&config.keelson.node_name)).await {
        Ok(Ok(Some(_))) => {
            Finding::good(SUBJECT, format!("answers, and knows node {}", config.keelson.node_name))
        }
        Ok(Ok(None)) => {
            Finding::good(SUBJECT, format!("answers; node {} is new to it", config.keelson.node_name))
        }
        Ok(Err(error)) => Finding::of(Grade::Doubtful, SUBJECT, chain(&error), MEND),
        Err(_elapsed) => Finding::of(Grade::Doubtful, SUBJECT, "no answer within 10 s", MEND),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_judged_by_their_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.pem");
        let write = |year: i32| {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            let key = rcgen::KeyPair::generate().unwrap();
            std::fs::write(&path, params.self_signed(&key).unwrap().pem()).unwrap();
        };
        assert_eq!(certificate("f", &path).grade, Grade::Bad, "no file");
        std::fs::write(&path, "nonsense").unwrap();
        assert_eq!(certificate("f", &path).grade, Grade::Bad, "no certificate");
        write(2001);
        let old = certificate("f", &path);
        assert!(old.grade == Grade::Bad && old.found.contains("expired at 2001-01-01"), "{old}");
        write(4000);
        assert_eq!(certificate("f", &path).grade, Grade::Good);
    }

    #[tokio::test]
    async fn a_runtime_that_is_not_there_says_how_to_start_it() {
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ntlsCertFile: /c\n\
                    tlsPrivateKeyFile: /k\ncontainerRuntimeEndpoint: unix:///nonexistent/cri.sock\n\
                    keelson: {nodeName: n, nodeIP: 10.0.0.1, kubeconfig: /nonexistent}\n";
        let config = AgentConfig::parse(Path::new("test"), text).unwrap();
        let findings = run(&config).await;
        let of = |subject: &str| findings.iter().find(|finding| finding.subject == subject).expect(subject);
        assert_eq!(of("container runtime").grade, Grade::Bad);
        assert!(of("container runtime").to_string().contains("→ start the runtime"));
        assert_eq!(of("keelson.kubeconfig").grade, Grade::Bad);
        assert!(of("API server").found.contains("/nonexistent"), "{}", of("API server"));
        assert!(findings.iter().all(|finding| finding.subject != "keelson.network"), "there is none");
    }

    #[tokio::test]
    async fn a_network_that_this_machine_cannot_carry_is_told() {
        let found = async |network: &str| {
            let text = format!(
                "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ntlsCertFile: /c\n\
                 tlsPrivateKeyFile: /k\nkeelson:\n  nodeName: n\n  nodeIP: 10.0.0.1\n  kubeconfig: /k\n  \
                 network: {network}\n"
            );
            let config = AgentConfig::parse(Path::new("test"), &text).unwrap();
            between_nodes(&config).await.unwrap()
        };
        let missing = found("{underlay: {interface: nosuch0}}").await;
        assert!(missing.grade == Grade::Bad && missing.found.contains("nosuch0"), "{missing}");
        let alone = found("{presharedKeyFile: /x}").await;
        assert!(
            alone.found.contains("keelson.network.presharedKeyFile: only with mode wireguard"),
            "{alone}"
        );
    }
}

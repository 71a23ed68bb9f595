//! Checks at the start, reported as one readable list instead of one failure after the other.
//!
//! Checks only what can be known before anything runs, and makes the agent's own directories.

use std::path::Path;

use anyhow::bail;

use crate::config::AgentConfig;
use crate::host::requirements;

/// Fails with every problem found.
pub fn check(config: &AgentConfig) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    if !nix::unistd::Uid::effective().is_root() {
        problems.push("not root: cgroups, mounts and the CRI socket need it; start it as root".to_owned());
    }
    let mut readable = |what: &str, path: &Path| {
        if let Err(error) = std::fs::File::open(path) {
            problems.push(format!("{what} {} cannot be read: {error}", path.display()));
        }
    };
    if config.bootstraps() && !config.keelson.kubeconfig.exists() {
        readable("keelson.bootstrapKubeconfig", &config.keelson.bootstrap_kubeconfig);
    } else if !config.is_standalone() {
        readable("keelson.kubeconfig", &config.keelson.kubeconfig);
    }
    if config.keelson.kubelet {
        if !config.tls_cert_file.as_os_str().is_empty() {
            readable("tlsCertFile", &config.tls_cert_file);
            readable("tlsPrivateKeyFile", &config.tls_private_key_file);
        }
        let client_ca = &config.authentication.x509.client_ca_file;
        if !client_ca.as_os_str().is_empty() {
            readable("authentication.x509.clientCAFile", client_ca);
        }
        problems.extend(requirements::unmet(config).iter().map(ToString::to_string));
        own_directories(config, &mut problems);
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("the agent cannot start:\n  - {}", problems.join("\n  - "))
}

fn own_directories(config: &AgentConfig, problems: &mut Vec<String>) {
    let mut directory = |field: &str, path: &Path| {
        if let Err(error) = std::fs::create_dir_all(path) {
            problems.push(format!("{field} {} cannot be made: {error}", path.display()));
        }
    };
    directory("keelson.rootDir", &config.keelson.root_dir.join("pods"));
    directory("podLogsDir", &config.pod_logs_dir);
    if !config.static_pod_path.as_os_str().is_empty() && !config.static_pod_path.is_file() {
        directory("staticPodPath", &config.static_pod_path);
    }
    directory("keelson.containerLogLinksDir", &config.keelson.container_log_links_dir);
}

//! The keys, certificates and kubeconfig files of a cluster, made where they are missing. Blocks; safe to run at every start.

use std::path::Path;

use anyhow::Context as _;
use control_server::{
    Credentials,
    pki::{Authority, Identity, LeafRequest, Usage, render_kubeconfig, write_private},
};

use crate::config::{ControlConfig, NodeConfig};

/// Name of the cluster in kubeconfig files.
const CLUSTER: &str = "keelson";
/// User and group of the administrator.
const ADMIN: (&str, &str) = ("kubernetes-admin", "system:masters");

/// What the process needs of it.
pub(crate) struct Identities {
    /// For the API server.
    pub(crate) server: Credentials,
    /// What certificates of nodes and users are signed with.
    pub(crate) authority: Identity,
    /// A client that may do everything, for the roles of this process. Lives in memory only.
    pub(crate) manager: Identity,
}

/// Load or make everything that the configuration asks for.
pub(crate) fn ensure(config: &ControlConfig, now: jiff::Timestamp) -> anyhow::Result<Identities> {
    let directory = config.data_dir.join("pki");
    let authority = Authority::load_or_create(&directory, now)?;
    let pair = |name: &str, request: &LeafRequest| {
        let (certificate, key) =
            (directory.join(format!("{name}.crt")), directory.join(format!("{name}.key")));
        authority.ensure(&certificate, &key, request, now)
    };
    let serving = pair("apiserver", &serving_request(config)?)?;
    let kubelet_client = pair("apiserver-kubelet-client", &client("kube-apiserver-kubelet-client", ADMIN.1))?;
    let server = Credentials {
        authority_pem: authority.certificate_pem().to_owned(),
        serving,
        kubelet_client,
        service_account_key_pem: service_account_key(&directory)?,
    };
    let endpoint = format!("https://127.0.0.1:{}", config.listen.port());
    if !config.admin_kubeconfig.as_os_str().is_empty() {
        let admin = pair("admin", &client(ADMIN.0, ADMIN.1))?;
        let text = render_kubeconfig(CLUSTER, &endpoint, authority.certificate_pem(), ADMIN.0, &admin);
        write_private(&config.admin_kubeconfig, &text)?;
    }
    for node in &config.nodes {
        issue_node(node, &authority, &directory.join("nodes"), &node_endpoint(config, node), now)
            .with_context(|| format!("issue credentials of node {}", node.name))?;
    }
    let manager = authority.issue(&client("system:kube-controller-manager", ADMIN.1), now)?;
    Ok(Identities { server, authority: authority.identity().clone(), manager })
}

/// Loopback for the node on this machine, which works whatever happens to the network; the advertised address for
/// every other.
fn node_endpoint(config: &ControlConfig, node: &NodeConfig) -> String {
    let address = config.advertise_address;
    let here = node.addresses.is_empty() || node.addresses.contains(&address);
    let host = if here { [127, 0, 0, 1].into() } else { address };
    format!("https://{}", std::net::SocketAddr::new(host, config.listen.port()))
}

fn client(user: &str, group: &str) -> LeafRequest {
    LeafRequest {
        common_name: user.to_owned(),
        organization: Some(group.to_owned()),
        usage: Usage::Client,
        names: Vec::new(),
    }
}

fn serving_request(config: &ControlConfig) -> anyhow::Result<LeafRequest> {
    let mut names: Vec<String> = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "127.0.0.1",
        "::1",
    ]
    .map(str::to_owned)
    .to_vec();
    let more = [config.service_range()?.nth(1).to_string(), config.advertise_address.to_string()];
    for name in more.into_iter().chain(config.server_names.iter().cloned()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(LeafRequest {
        common_name: "kube-apiserver".to_owned(),
        organization: None,
        usage: Usage::Server,
        names,
    })
}

fn issue_node(
    node: &NodeConfig,
    authority: &Authority,
    directory: &Path,
    endpoint: &str,
    now: jiff::Timestamp,
) -> anyhow::Result<()> {
    let user = format!("system:node:{}", node.name);
    let group = "system:nodes";
    let (certificate, key) =
        (directory.join(format!("{}.crt", node.name)), directory.join(format!("{}.key", node.name)));
    let identity = authority.ensure(&certificate, &key, &client(&user, group), now)?;
    let text = render_kubeconfig(CLUSTER, endpoint, authority.certificate_pem(), &user, &identity);
    write_private(&node.kubeconfig, &text)?;
    let mut names = vec![node.name.clone()];
    names.extend(node.addresses.iter().map(ToString::to_string));
    let serving =
        LeafRequest { common_name: user, organization: Some(group.to_owned()), usage: Usage::Server, names };
    authority.ensure(&node.serving_cert, &node.serving_key, &serving, now)?;
    write_private(&node.client_ca, authority.certificate_pem())?;
    Ok(())
}

/// The key that signs service account tokens; tokens die with it, so it is never replaced.
fn service_account_key(directory: &Path) -> anyhow::Result<String> {
    let path = directory.join("sa.key");
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text =
                rcgen::KeyPair::generate().context("generate the service account key")?.serialize_pem();
            write_private(&path, &text)?;
            Ok(text)
        }
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_made_once_and_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let file = |name: &str| root.join(name).display().to_string();
        let text = format!(
            "dataDir: {}\nadvertiseAddress: 10.0.0.1\nadminKubeconfig: {}\nnodes: [{{name: a, addresses: [10.0.0.1], \
             kubeconfig: {}, servingCert: {}, servingKey: {}, clientCA: {}}}]",
            file("data"),
            file("admin"),
            file("node/kubeconfig"),
            file("node/crt"),
            file("node/key"),
            file("node/ca")
        );
        std::fs::write(root.join("control.yaml"), text).unwrap();
        let config = ControlConfig::load(&root.join("control.yaml")).unwrap();
        let now = jiff::Timestamp::now();
        ensure(&config, now).unwrap();
        let names = [
            "data/pki/ca.key",
            "data/pki/sa.key",
            "admin",
            "node/kubeconfig",
            "node/crt",
            "node/key",
            "node/ca",
        ];
        let read = || names.map(|name| std::fs::read_to_string(root.join(name)).unwrap());
        let first = read();
        for name in names {
            assert_eq!(
                std::fs::metadata(root.join(name)).unwrap().permissions().mode() & 0o777,
                0o600,
                "{name}"
            );
        }
        ensure(&config, now).unwrap();
        assert_eq!(read(), first, "a second start changes nothing");
    }
}

//! What a volume on a server asks for: from the pod itself or from a PersistentVolume. Pure.
//!
//! Kept in the pod's directory with its claim, so that a pod goes on without the API server. Of secrets only names are kept.

use k8s_openapi::api::core::v1::{
    ISCSIPersistentVolumeSource, ISCSIVolumeSource, NFSVolumeSource, PersistentVolume, Volume,
};
use serde::{Deserialize, Serialize};

use super::iscsi::{Chap, Target};

/// One volume on a server, as a pod uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct NetworkVolume {
    /// Name of the PersistentVolume, or of the pod's volume; its directory is called so.
    pub(in super::super) spec_name: String,
    /// The pod may not write.
    pub(in super::super) read_only: bool,
    /// `mountOptions` of the PersistentVolume.
    pub(super) mount_options: Vec<String>,
    pub(super) source: Source,
}

/// Where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Source {
    /// A directory of an NFS server.
    Nfs { server: String, path: String },
    /// A disk of an iSCSI target.
    Iscsi(Target),
}

impl NetworkVolume {
    /// Of a volume in a pod of this namespace; `None` where it is of another kind.
    pub(in super::super) fn inline(volume: &Volume, namespace: &str) -> Option<Self> {
        let (source, read_only) = if let Some(nfs) = &volume.nfs {
            (of_nfs(nfs), nfs.read_only)
        } else {
            let iscsi = volume.iscsi.as_ref()?;
            (Source::Iscsi(of_inline(iscsi, &volume.name, namespace)), iscsi.read_only)
        };
        Some(Self {
            spec_name: volume.name.clone(),
            read_only: read_only.unwrap_or(false),
            mount_options: Vec::new(),
            source,
        })
    }

    /// Of a PersistentVolume; `read_only` is the pod's wish, which the volume's own adds to.
    pub(in super::super) fn of_persistent(volume: &PersistentVolume, read_only: bool) -> Option<Self> {
        let (name, spec) = (volume.metadata.name.clone().unwrap_or_default(), volume.spec.as_ref()?);
        let (source, own) = if let Some(nfs) = &spec.nfs {
            (of_nfs(nfs), nfs.read_only)
        } else {
            let iscsi = spec.iscsi.as_ref()?;
            (Source::Iscsi(of_persistent(iscsi, &name)), iscsi.read_only)
        };
        Some(Self {
            spec_name: name,
            read_only: read_only || own.unwrap_or(false),
            mount_options: spec.mount_options.clone().unwrap_or_default(),
            source,
        })
    }

    /// The plugin's part of the directory's name.
    pub(in super::super) fn plugin(&self) -> &'static str {
        match self.source {
            Source::Nfs { .. } => "nfs",
            Source::Iscsi(_) => "iscsi",
        }
    }
}

fn of_nfs(source: &NFSVolumeSource) -> Source {
    Source::Nfs { server: source.server.clone(), path: source.path.clone() }
}

fn of_inline(source: &ISCSIVolumeSource, name: &str, namespace: &str) -> Target {
    let secret = source.secret_ref.as_ref();
    Target {
        volume: name.to_owned(),
        portals: portals(&source.target_portal, source.portals.as_deref()),
        iqn: source.iqn.clone(),
        lun: source.lun,
        interface: interface(source.iscsi_interface.as_deref()),
        initiator: source.initiator_name.clone().unwrap_or_default(),
        fs_type: source.fs_type.clone().unwrap_or_default(),
        chap: Chap {
            discovery: source.chap_auth_discovery.unwrap_or(false),
            session: source.chap_auth_session.unwrap_or(false),
            secret: secret.map(|secret| (namespace.to_owned(), secret.name.clone())),
        },
    }
}

fn of_persistent(source: &ISCSIPersistentVolumeSource, name: &str) -> Target {
    let secret = source.secret_ref.as_ref();
    Target {
        volume: name.to_owned(),
        portals: portals(&source.target_portal, source.portals.as_deref()),
        iqn: source.iqn.clone(),
        lun: source.lun,
        interface: interface(source.iscsi_interface.as_deref()),
        initiator: source.initiator_name.clone().unwrap_or_default(),
        fs_type: source.fs_type.clone().unwrap_or_default(),
        chap: Chap {
            discovery: source.chap_auth_discovery.unwrap_or(false),
            session: source.chap_auth_session.unwrap_or(false),
            secret: secret.map(|secret| {
                (secret.namespace.clone().unwrap_or_default(), secret.name.clone().unwrap_or_default())
            }),
        },
    }
}

fn interface(named: Option<&str>) -> String {
    named.filter(|name| !name.is_empty()).unwrap_or("default").to_owned()
}

/// The first portal and the others, each with its port and once.
fn portals(first: &str, others: Option<&[String]>) -> Vec<String> {
    let mut portals = Vec::new();
    for portal in std::iter::once(first).chain(others.unwrap_or_default().iter().map(String::as_str)) {
        let portal = with_port(portal);
        if !portals.contains(&portal) {
            portals.push(portal);
        }
    }
    portals
}

/// iSCSI's port is meant where none is named.
fn with_port(portal: &str) -> String {
    let has_port = match portal.strip_prefix('[') {
        Some(rest) => rest.contains("]:"),
        None => portal.contains(':'),
    };
    if has_port { portal.to_owned() } else { format!("{portal}:3260") }
}

/// What `mount` is told to mount. An IPv6 address needs brackets, else its colons end it.
pub(super) fn nfs_source(server: &str, path: &str) -> String {
    let is_bare_v6 = server.parse::<std::net::Ipv6Addr>().is_ok();
    if is_bare_v6 { format!("[{server}]:{path}") } else { format!("{server}:{path}") }
}

/// Options of both lists, each once, in upstream's order.
pub(super) fn join_options(options: &[String], more: &[&str]) -> String {
    let all = options.iter().map(String::as_str).chain(more.iter().copied());
    let all: std::collections::BTreeSet<&str> = all.filter(|option| !option.is_empty()).collect();
    all.into_iter().collect::<Vec<_>>().join(",")
}

/// Arguments of `mount`.
pub(super) fn mount_arguments(kind: Option<&str>, options: &str, source: &str, target: &str) -> Vec<String> {
    let mut arguments = Vec::new();
    for (flag, value) in [("-t", kind.unwrap_or_default()), ("-o", options)] {
        if !value.is_empty() {
            arguments.extend([flag.to_owned(), value.to_owned()]);
        }
    }
    // What follows is no option, whatever somebody has called a server.
    arguments.extend(["--".to_owned(), source.to_owned(), target.to_owned()]);
    arguments
}

/// Why this can be no server's name; a pod's author has chosen it.
pub(super) fn check_server(server: &str) -> Result<(), String> {
    let is_strange = |letter: char| letter == '/' || letter.is_whitespace() || letter.is_control();
    if server.is_empty() || server.starts_with('-') || server.contains(is_strange) {
        return Err(format!("nfs.server {server:?} is neither a host name nor an address"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn inline(source: &Value) -> NetworkVolume {
        let mut volume = json!({"name": "v"});
        for (key, value) in source.as_object().unwrap() {
            volume[key] = value.clone();
        }
        NetworkVolume::inline(&serde_json::from_value(volume).unwrap(), "ns").unwrap()
    }

    #[test]
    fn a_server_is_no_option_and_no_path() {
        for right in ["nfs.example", "10.0.0.1", "fd00::1", "fe80::1%eth0"] {
            check_server(right).unwrap();
        }
        for wrong in ["", "-T/var/lib/fstab", "a b", "/etc/fstab", "s\n"] {
            assert!(check_server(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn mount_is_told_what_upstream_tells_it() {
        assert_eq!(nfs_source("fd00::1", "/d"), "[fd00::1]:/d");
        assert_eq!(nfs_source("nfs.example", "/d"), "nfs.example:/d");
        let options = ["vers=4.1".to_owned(), "hard".to_owned(), "vers=4.1".to_owned()];
        assert_eq!(join_options(&options, &["ro"]), "hard,ro,vers=4.1");
        assert_eq!(
            mount_arguments(Some("nfs"), "hard,ro", "s:/d", "/t"),
            ["-t", "nfs", "-o", "hard,ro", "--", "s:/d", "/t"]
        );
        assert_eq!(mount_arguments(Some("nfs"), "", "s:/d", "/t"), ["-t", "nfs", "--", "s:/d", "/t"]);
    }

    #[test]
    fn a_persistent_volume_is_read_only_by_either_wish() {
        let volume = |read_only: bool| -> PersistentVolume {
            serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": {
                "mountOptions": ["hard"], "nfs": {"server": "s", "path": "/d", "readOnly": read_only}}}))
            .unwrap()
        };
        for (own, wished, both) in [(false, false, false), (true, false, true), (false, true, true)] {
            let found = NetworkVolume::of_persistent(&volume(own), wished).unwrap();
            assert_eq!((found.read_only, found.spec_name.as_str(), found.plugin()), (both, "pv", "nfs"));
        }
        let other: PersistentVolume =
            serde_json::from_value(json!({"spec": {"hostPath": {"path": "/d"}}})).unwrap();
        assert_eq!(NetworkVolume::of_persistent(&other, false), None);
    }

    #[test]
    fn portals_have_ports_and_secrets_a_namespace() {
        let volume = inline(&json!({"iscsi": {"targetPortal": "10.0.0.1", "iqn": "iqn.a", "lun": 3,
            "portals": ["10.0.0.2:3333", "10.0.0.1:3260", "[fd00::1]"], "chapAuthSession": true,
            "secretRef": {"name": "chap"}}}));
        let Source::Iscsi(target) = &volume.source else { panic!("{volume:?}") };
        assert_eq!(target.portals, ["10.0.0.1:3260", "10.0.0.2:3333", "[fd00::1]:3260"]);
        assert_eq!((target.interface.as_str(), target.lun), ("default", 3));
        assert_eq!(target.chap.secret, Some(("ns".to_owned(), "chap".to_owned())));
        let text = serde_json::to_string(&volume).unwrap();
        assert_eq!(serde_json::from_str::<NetworkVolume>(&text).unwrap(), volume);
    }
}

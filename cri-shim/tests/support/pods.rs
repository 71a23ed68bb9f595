//! What tests ask of containers: pods for every handler, security contexts, mounts, an image with volumes.

use cri_shim_api::v1;
use cri_shim_api::v1::security_profile::ProfileType;

use super::cri::{Cri, busybox_layers, shell};

/// A pod with a sandbox for each handler; `change` sees the pod's configuration first.
pub async fn sandboxes(
    cri: &Cri,
    name: &str,
    change: impl Fn(&mut v1::PodSandboxConfig),
) -> Vec<(v1::PodSandboxConfig, String)> {
    let mut all = Vec::new();
    for handler in cri.handlers().await {
        let mut pod = cri.pod(&format!("{name}-{}", handler.name));
        change(&mut pod);
        let sandbox = cri.run_with(&pod, &handler.name).await.expect("runs");
        all.push((pod, sandbox));
    }
    assert!(!all.is_empty(), "a handler is offered");
    all
}

/// Removes them; nothing may be left.
pub async fn end(cri: &Cri, all: Vec<(v1::PodSandboxConfig, String)>) {
    for (_, sandbox) in all {
        cri.remove(&sandbox).await;
    }
    cri.assert_nothing_left().await;
}

/// A shell container whose security context is changed.
pub fn secured(
    name: &str,
    script: &str,
    change: impl FnOnce(&mut v1::LinuxContainerSecurityContext),
) -> v1::ContainerConfig {
    let mut config = shell(name, script);
    change(config.linux.get_or_insert_default().security_context.get_or_insert_default());
    config
}

/// A shell container with mounts.
pub fn mounted(name: &str, script: &str, mounts: Vec<v1::Mount>) -> v1::ContainerConfig {
    v1::ContainerConfig { mounts, ..shell(name, script) }
}

/// A directory of the node at a place of the container.
pub fn mount(host: &std::path::Path, own: &str) -> v1::Mount {
    v1::Mount {
        host_path: host.display().to_string(),
        container_path: own.to_owned(),
        ..v1::Mount::default()
    }
}

/// An image, or a part of it, at a place of the container.
pub fn image_mount(image: &str, own: &str, sub_path: &str) -> v1::Mount {
    v1::Mount {
        container_path: own.to_owned(),
        image: Some(v1::ImageSpec { image: image.to_owned(), ..v1::ImageSpec::default() }),
        image_sub_path: sub_path.to_owned(),
        readonly: true,
        ..v1::Mount::default()
    }
}

/// A layer with directories, owners, a link and an extended attribute below `data`.
pub fn data_layer() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, owner: u64, content: &[u8], link: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(0);
        if link.is_empty() {
            archive.append_data(&mut header, path, content).expect("appended");
        } else {
            archive.append_link(&mut header, path, link).expect("appended");
        }
    };
    add("data/", tar::EntryType::Directory, 0o1775, 33, b"", "");
    add("data/file", tar::EntryType::Regular, 0o640, 33, b"from the image", "");
    add("data/sub/", tar::EntryType::Directory, 0o750, 33, b"", "");
    add("data/sub/deep", tar::EntryType::Regular, 0o600, 34, b"deep", "");
    add("data/link", tar::EntryType::Symlink, 0o777, 33, b"", "/etc/shadow");
    add("escape", tar::EntryType::Symlink, 0o777, 0, b"", "/../../../../../../..");
    archive.into_inner().expect("finished")
}

/// Pulls an image called `data`: busybox and [`data_layer`], which declares volumes.
pub async fn push_data(cri: &Cri) {
    let busybox = busybox_layers();
    let layers: Vec<Vec<u8>> = busybox.into_iter().chain([data_layer()]).collect();
    let config = serde_json::json!({
        "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "WorkingDir": "/made/by/runtime",
        "Volumes": { "/data": {}, "/fresh/volume": {} },
    });
    cri.push("data", &layers, config).await;
}

/// A number as the CRI has it.
pub fn number(value: i64) -> v1::Int64Value {
    v1::Int64Value { value }
}

/// A seccomp or AppArmor profile.
pub fn profile(kind: ProfileType, reference: &str) -> v1::SecurityProfile {
    v1::SecurityProfile { profile_type: kind.into(), localhost_ref: reference.to_owned() }
}

/// The namespaces of a pod with users of its own.
pub fn own_users() -> v1::NamespaceOption {
    let map = vec![v1::IdMapping { host_id: FIRST, container_id: 0, length: 65_536 }];
    let user = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: map.clone(), gids: map };
    v1::NamespaceOption {
        pid: v1::NamespaceMode::Container.into(),
        userns_options: Some(user),
        ..v1::NamespaceOption::default()
    }
}

/// Root of such a pod on the node.
pub const FIRST: u32 = 200_000;

//! Pods with users of their own. Needs root.

mod support;

use std::os::unix::fs::MetadataExt;

use cri_shim_api::v1;
use support::cri::{Cri, PATIENCE, shell};
use support::pods::{FIRST, mount, own_users, push_data, secured};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_own_users_are_root_inside_and_nobody_outside() {
    let mut cri = Cri::start().await;
    push_data(&cri).await;
    for handler in cri.handlers().await {
        if !handler.features.as_ref().is_some_and(|features| features.user_namespaces) {
            continue;
        }
        let mut pod = cri.pod(&format!("userns-{}", handler.name));
        let linux = pod.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().namespace_options = Some(own_users());
        let sandbox = cri.run_with(&pod, &handler.name).await.expect("a sandbox with its own users");
        let volume = cri.dir().join(format!("volume-{}", handler.name));
        std::fs::create_dir_all(&volume).unwrap();
        std::os::unix::fs::chown(&volume, Some(0), Some(0)).unwrap();
        let map = own_users().userns_options.unwrap();
        let shifted =
            v1::Mount { uid_mappings: map.uids, gid_mappings: map.gids, ..mount(&volume, "/volume") };
        let script = "id -u; busybox stat -c %u /bin/busybox /data /data/file /etc/hosts /volume; \
                      echo x > /written; echo x > /data/new; echo x > /volume/file; busybox stat -c %u /written; \
                      cat /proc/self/uid_map | tr -s ' '; hostname; echo ready; exec sleep 3600";
        let mut config = secured("main", script, |security| security.namespace_options = Some(own_users()));
        config.image = Some(v1::ImageSpec { image: "data".into(), ..v1::ImageSpec::default() });
        config.mounts = vec![shifted];
        let id = cri.create(&sandbox, &pod, config.clone()).await.expect("created");
        cri.restart().await;
        cri.launch(&id).await.expect("started");
        let name = &pod.metadata.as_ref().unwrap().name;
        let log = cri.log_has(name, "main", "ready").await;
        let seen: Vec<&str> = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
        assert_eq!(seen[..7], ["0", "0", "33", "33", "0", "0", "0"], "{log}");
        assert_eq!(seen[7].trim(), format!("0 {FIRST} 65536"));

        let request = v1::ContainerStatusRequest { container_id: id.clone(), verbose: true };
        let info = cri.runtime().container_status(request).await.unwrap().into_inner().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        let process = std::path::PathBuf::from(format!("/proc/{}", info["pid"]));
        assert_eq!(
            std::fs::metadata(&process).unwrap().uid(),
            FIRST,
            "root of the pod is nobody on the node"
        );
        assert_eq!(
            std::fs::metadata(volume.join("file")).unwrap().uid(),
            0,
            "the volume keeps the pod's numbers"
        );
        let outside = cri.exec(&id, &["sh", "-c", "id -u; cat /proc/self/uid_map | tr -s ' '"]).await;
        let outside = String::from_utf8_lossy(&outside.stdout).into_owned();
        assert!(outside.starts_with("0\n") && outside.contains(&FIRST.to_string()), "{outside}");

        let mut plain = shell("plain", "true");
        plain.metadata.as_mut().unwrap().name = "plain".into();
        let refused = cri.create(&sandbox, &pod, plain).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        cri.remove(&sandbox).await;
    }
    cri.assert_nothing_left().await;
}

/// A process in a user namespace whose root is [`FIRST`] on the node; ended when dropped.
struct OtherUsers(std::process::Child);

impl OtherUsers {
    fn start() -> Self {
        let mut command = std::process::Command::new("unshare");
        let child = command.args(["--user", "sleep", "3600"]).spawn().expect("unshare runs");
        let process = std::path::PathBuf::from(format!("/proc/{}", child.id()));
        let own = std::fs::read_link("/proc/self/ns/user").expect("a namespace");
        let begun = std::time::Instant::now();
        while std::fs::read_link(process.join("ns/user")).expect("a namespace") == own {
            assert!(begun.elapsed() < PATIENCE, "it stays in our namespace");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        for file in ["uid_map", "gid_map"] {
            std::fs::write(process.join(file), format!("0 {FIRST} 65536")).expect("mapped");
        }
        Self(child)
    }

    fn namespace(&self) -> std::fs::File {
        std::fs::File::open(format!("/proc/{}/ns/user", self.0.id())).expect("a namespace")
    }
}

impl Drop for OtherUsers {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn layers_and_volumes_show_the_pods_owners_and_keep_their_own() {
    use cri_shim_core::oci::userns::IdMaps;
    use keelson_cri::host::{files, idmap};
    let users = OtherUsers::start();
    let maps = IdMaps::of(Some(&own_users())).unwrap().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for name in ["lower-1", "lower-2", "upper", "work", "state", "volume"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    std::fs::write(at("lower-1/root"), "root's").unwrap();
    std::fs::write(at("lower-2/web"), "web's").unwrap();
    std::os::unix::fs::chown(at("lower-2/web"), Some(33), Some(33)).unwrap();
    let options = ["lowerdir", "upperdir", "workdir"].into_iter().zip(["lower-1", "upper", "work"]);
    let mut options: Vec<String> =
        options.map(|(name, place)| format!("{name}={}", at(place).display())).collect();
    options[0] = format!("{}:{}", options[0], at("lower-2").display());
    let snapshot =
        containerd_client::types::Mount { r#type: "overlay".into(), options, ..Default::default() };
    let root = idmap::root(&[snapshot], &at("state"), &users.namespace(), &maps).unwrap();
    let owner = |path: std::path::PathBuf| {
        let metadata = std::fs::metadata(path).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner(root.clone()), (FIRST, FIRST));
    assert_eq!(owner(root.join("root")), (FIRST, FIRST));
    assert_eq!(owner(root.join("web")), (FIRST + 33, FIRST + 33));
    assert_eq!(owner(at("lower-2/web")), (33, 33), "the layer is as it was");
    assert!(!at("state/layers").exists());

    std::fs::write(at("volume/file"), "x").unwrap();
    std::fs::create_dir(at("state/shown")).unwrap();
    idmap::bind(&at("volume"), &at("state/shown"), &users.namespace()).unwrap();
    assert_eq!(owner(at("state/shown/file")), (FIRST, FIRST));
    assert_eq!(owner(at("volume/file")), (0, 0));
    // procfs has no owners that could be shifted.
    let refused = idmap::bind(std::path::Path::new("/proc"), &at("state/shown"), &users.namespace());
    assert!(refused.unwrap_err().to_string().contains("does not support id-mapped mounts"));
    files::remove_tree(&at("state")).unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&directory.path().display().to_string()), "{mounts}");
}

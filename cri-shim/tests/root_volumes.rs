//! Volumes of images, images as volumes, devices of vendors, with every handler that is offered. Needs root.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use cri_shim_api::v1;
use support::cri::{Cri, PATIENCE, shell};
use support::pods::{end, image_mount, mount, mounted, push_data, sandboxes};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn volumes_of_images_hold_the_images_content() {
    let cri = Cri::start().await;
    push_data(&cri).await;
    let all = sandboxes(&cri, "volumes", |_| ()).await;
    for (pod, sandbox) in &all {
        let from_image = |mut config: v1::ContainerConfig| {
            config.image = Some(v1::ImageSpec { image: "data".into(), ..v1::ImageSpec::default() });
            config
        };
        let script = "busybox stat -c '%a %u:%g' /data /data/file /data/sub /data/sub/deep; cat /data/file; echo; \
                      busybox readlink /data/link; pwd; grep -c ' /data ' /proc/mounts; \
                      echo mine > /data/file; echo new > /fresh/volume/x; cat /data/file; ls /fresh/volume";
        let script = script.replace("grep", "busybox grep");
        let (seen, status) = cri.output(sandbox, pod, from_image(shell("one", &script))).await;
        let expected = "1775 33:33\n640 33:33\n750 33:33\n600 34:34\nfrom the image\n/etc/shadow\n/made/by/runtime\n1\nmine\nx";
        assert_eq!(seen, expected);
        assert_eq!(status.exit_code, 0);
        let volumes = cri.dir().join("cri/root/containers").join(&status.id).join("volumes");
        assert_eq!(std::fs::read_to_string(volumes.join("0/file")).unwrap(), "mine\n");

        let (seen, _) =
            cri.output(sandbox, pod, from_image(shell("two", "cat /data/file; ls /fresh/volume"))).await;
        assert_eq!(seen, "from the image", "each container has volumes of its own");

        let host = cri.dir().join("shown-instead");
        let over = mounted("three", "ls -a /data", vec![mount(&host, "/data/")]);
        let (seen, _) = cri.output(sandbox, pod, from_image(over)).await;
        assert_eq!(seen, ".\n..", "a mount of the pod replaces the volume");

        let remove = v1::RemoveContainerRequest { container_id: status.id.clone() };
        cri.runtime().remove_container(remove).await.unwrap();
        let gone = async {
            while volumes.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.expect("a volume goes with its container");
    }
    end(&cri, all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_as_volumes_are_readonly_and_stay_in_the_image() {
    let mut cri = Cri::start().await;
    push_data(&cri).await;
    let all = sandboxes(&cri, "image-volumes", |_| ()).await;
    for (pod, sandbox) in &all {
        let mounts = vec![image_mount("data", "/all", ""), image_mount("data", "/part", "data/sub")];
        let script = "cat /all/data/file; echo; cat /part/deep; echo; echo x > /all/new; echo x > /part/new; \
                      echo x > /all/data/file; true";
        let (seen, _) = cri.output(sandbox, pod, mounted("reader", script, mounts.clone())).await;
        assert!(seen.starts_with("from the image\ndeep\n"), "{seen}");
        assert_eq!(seen.matches("Read-only file system").count(), 3, "{seen}");
        let file = vec![image_mount("data", "/one", "data/file")];
        let (seen, _) = cri.output(sandbox, pod, mounted("file", "cat /one", file)).await;
        assert_eq!(seen, "from the image");

        let before = mount_count(&cri);
        for (index, (mount, field)) in [
            (
                image_mount("data", "/x", "no/such/path"),
                "mounts.image_sub_path: \"no/such/path\" does not exist",
            ),
            (image_mount("data", "/x", "/etc"), "mounts.image_sub_path"),
            (image_mount("data", "/x", "../etc"), "mounts.image_sub_path"),
            (v1::Mount { readonly: false, ..image_mount("data", "/x", "") }, "mounts.readonly"),
        ]
        .into_iter()
        .enumerate()
        {
            let config = mounted(&format!("refused-{index}"), "true", vec![mount]);
            let refused = cri.create(sandbox, pod, config).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
            assert!(refused.message().contains(field), "{refused}");
        }
        let missing = mounted("missing", "true", vec![image_mount("nowhere", "/x", "")]);
        assert_eq!(cri.create(sandbox, pod, missing).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(mount_count(&cri), before, "a refused container leaves no mount");
        // The link leads to the root of the image, not of the node.
        let inside = mounted("escape", "ls /x", vec![image_mount("data", "/x", "escape")]);
        let (seen, _) = cri.output(sandbox, pod, inside).await;
        assert!(seen.contains("data\n") && !seen.contains("proc"), "{seen}");

        let config = mounted("restarted", "cat /all/data/file; echo; exec sleep 3600", mounts);
        let id = cri.create(sandbox, pod, config).await.unwrap();
        cri.restart().await;
        cri.launch(&id).await.unwrap();
        cri.log_has(&pod.metadata.as_ref().unwrap().name, "restarted", "from the image").await;
    }
    end(&cri, all).await;
}

fn mount_count(cri: &Cri) -> usize {
    let marker = cri.dir().join("cri").display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    mounts.lines().filter(|line| line.contains(&marker)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_vendors_come_by_name() {
    let cri = Cri::start().await;
    let cdi = cri.dir().join("cdi");
    std::fs::create_dir_all(&cdi).unwrap();
    let library = cri.dir().join("library");
    std::fs::create_dir_all(&library).unwrap();
    std::fs::write(library.join("lib.so"), "vendor").unwrap();
    let text = format!(
        "cdiVersion: 0.7.0\nkind: vendor.com/net\ncontainerEdits:\n  env: [VENDOR=yes]\ndevices:\n- name: a\n  \
         containerEdits:\n    env: [DEVICE=a]\n    additionalGids: [4242]\n    deviceNodes:\n    \
         - {{path: /dev/mine, hostPath: /dev/null, permissions: rw}}\n    mounts:\n    \
         - {{hostPath: {}, containerPath: /opt/lib, options: [ro, nosuid]}}\n- name: b\n  containerEdits:\n    env: [OTHER=b]\n",
        library.display()
    );
    std::fs::write(cdi.join("vendor.yaml"), text).unwrap();
    let all = sandboxes(&cri, "cdi", |_| ()).await;
    for (pod, sandbox) in &all {
        let script = "echo $VENDOR $DEVICE $OTHER; echo x > /dev/mine && echo written; cat /opt/lib/lib.so; echo; \
                      busybox touch /opt/lib/x || echo refused; id -G; ls -l /dev/mine | busybox cut -c1-10";
        let mut config = shell("user", script);
        config.cdi_devices = vec![v1::CdiDevice { name: "vendor.com/net=a".into() }];
        config.annotations.insert("cdi.k8s.io/more".into(), "vendor.com/net=b".into());
        let (seen, _) = cri.output(sandbox, pod, config).await;
        let lines: Vec<&str> = seen.lines().collect();
        assert_eq!(lines[..3], ["yes a b", "written", "vendor"], "{seen}");
        assert!(seen.contains("refused") && seen.contains("4242") && seen.contains("crw"), "{seen}");

        let mut unknown = shell("unknown", "true");
        unknown.cdi_devices = vec![v1::CdiDevice { name: "vendor.com/net=z".into() }];
        let refused = cri.create(sandbox, pod, unknown).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("no file describes device \"vendor.com/net=z\""), "{refused}");
    }
    end(&cri, all).await;
}

/// What a hook of a vendor is told: it writes down its name and the container's state.
const HOOK: &str = r#"#!/bin/sh
{ echo "$1"; cat; echo; } >> "$OUT"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn hooks_of_vendors_run_in_their_order_or_are_refused_by_name() {
    let cri = Cri::start().await;
    let (cdi, hook) = (cri.dir().join("cdi"), cri.dir().join("hook"));
    std::fs::create_dir_all(&cdi).unwrap();
    std::fs::write(&hook, HOOK).unwrap();
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    let out = cri.dir().join("hooks.out");
    let hooks: Vec<_> = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]
        .map(|name| {
            serde_json::json!({
                "hookName": name, "path": hook, "args": [hook, name],
                "env": [format!("OUT={}", out.display()), "PATH=/bin:/usr/bin"],
            })
        })
        .into();
    let device = serde_json::json!({
        "cdiVersion": "0.7.0", "kind": "vendor.com/hooked",
        "devices": [{ "name": "a", "containerEdits": { "hooks": hooks } }],
    });
    std::fs::write(cdi.join("hooked.json"), device.to_string()).unwrap();
    let all = sandboxes(&cri, "hooks", |_| ()).await;
    let mut ran = Vec::new();
    for (pod, sandbox) in &all {
        std::fs::write(&out, "").unwrap();
        let mut config = shell("main", "exec sleep 3600");
        config.cdi_devices = vec![v1::CdiDevice { name: "vendor.com/hooked=a".into() }];
        let made = match cri.create(sandbox, pod, config).await {
            Ok(id) => cri.launch(&id).await.map(|()| id),
            Err(status) => Err(status),
        };
        let name = &pod.metadata.as_ref().unwrap().name;
        let id = match made {
            Ok(id) => id,
            Err(refused) => {
                assert!(refused.message().contains("hook"), "{name}: {refused}");
                assert_eq!(
                    std::fs::read_to_string(&out).unwrap(),
                    "",
                    "{name}: refused, and run all the same"
                );
                continue;
            }
        };
        ran.push(name.clone());
        let stop = v1::StopContainerRequest { container_id: id.clone(), timeout: 0 };
        cri.runtime().stop_container(stop).await.unwrap();
        let remove = v1::RemoveContainerRequest { container_id: id.clone() };
        cri.runtime().remove_container(remove).await.unwrap();
        // The last one runs when the container is deleted, which may be behind the answer.
        let last = async {
            while !std::fs::read_to_string(&out).unwrap().contains("poststop") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, last).await.expect("the last hook runs");
        let text = std::fs::read_to_string(&out).unwrap();
        let names: Vec<&str> = text.lines().filter(|line| line.chars().all(char::is_alphabetic)).collect();
        let names: Vec<&str> = names.into_iter().filter(|line| !line.is_empty()).collect();
        assert_eq!(
            names,
            ["prestart", "createRuntime", "createContainer", "poststart", "poststop"],
            "{name}: {text}"
        );
        assert!(text.contains(&id), "{name}: the state names the container: {text}");
    }
    assert!(ran.iter().any(|name| name.ends_with("runc")), "runc runs hooks: {ran:?}");
    end(&cri, all).await;
}

//! What containers get of what CRI asks, as only the kernel can prove it, with every handler that is offered. Needs root.

mod support;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use cri_shim_api::v1;
use cri_shim_api::v1::security_profile::ProfileType;
use support::cri::{Cri, PATIENCE, busybox_layers, shell};
use tonic::Code;

/// A pod with a sandbox for each handler; `change` sees the pod's configuration first.
async fn sandboxes(
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

async fn end(cri: &Cri, all: Vec<(v1::PodSandboxConfig, String)>) {
    for (_, sandbox) in all {
        cri.remove(&sandbox).await;
    }
    cri.assert_nothing_left().await;
}

/// A shell container whose security context is changed.
fn secured(
    name: &str,
    script: &str,
    change: impl FnOnce(&mut v1::LinuxContainerSecurityContext),
) -> v1::ContainerConfig {
    let mut config = shell(name, script);
    change(config.linux.get_or_insert_default().security_context.get_or_insert_default());
    config
}

fn mounted(name: &str, script: &str, mounts: Vec<v1::Mount>) -> v1::ContainerConfig {
    v1::ContainerConfig { mounts, ..shell(name, script) }
}

fn mount(host: &std::path::Path, own: &str) -> v1::Mount {
    v1::Mount {
        host_path: host.display().to_string(),
        container_path: own.to_owned(),
        ..v1::Mount::default()
    }
}

fn image_mount(image: &str, own: &str, sub_path: &str) -> v1::Mount {
    v1::Mount {
        container_path: own.to_owned(),
        image: Some(v1::ImageSpec { image: image.to_owned(), ..v1::ImageSpec::default() }),
        image_sub_path: sub_path.to_owned(),
        readonly: true,
        ..v1::Mount::default()
    }
}

/// A layer with directories, owners, a link and an extended attribute below `data`.
fn data_layer() -> Vec<u8> {
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

async fn push_data(cri: &Cri) {
    let busybox = busybox_layers();
    let layers: Vec<Vec<u8>> = busybox.into_iter().chain([data_layer()]).collect();
    let config = serde_json::json!({
        "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "WorkingDir": "/made/by/runtime",
        "Volumes": { "/data": {}, "/fresh/volume": {} },
    });
    cri.push("data", &layers, config).await;
}

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

fn number(value: i64) -> v1::Int64Value {
    v1::Int64Value { value }
}

type Change = Box<dyn Fn(&mut v1::LinuxContainerSecurityContext)>;

#[tokio::test(flavor = "multi_thread")]
async fn users_and_groups_are_the_ones_told() {
    let cri = Cri::start().await;
    let all = sandboxes(&cri, "users", |_| ()).await;
    for (pod, sandbox) in &all {
        let who = "id -u; id -g; id -G";
        let cases: [(&str, Change, &str); 6] = [
            ("plain", Box::new(|_| ()), "0\n0\n0"),
            ("named", Box::new(|security| security.run_as_username = "web".into()), "33\n33\n33 77"),
            (
                "merge",
                Box::new(|security| {
                    security.run_as_user = Some(number(33));
                    security.run_as_group = Some(number(50));
                    security.supplemental_groups = vec![60, 50];
                }),
                "33\n50\n50 60 77",
            ),
            (
                "strict",
                Box::new(|security| {
                    security.run_as_user = Some(number(33));
                    security.supplemental_groups = vec![60];
                    security.set_supplemental_groups_policy(v1::SupplementalGroupsPolicy::Strict);
                }),
                "33\n33\n33 60",
            ),
            ("unknown", Box::new(|security| security.run_as_user = Some(number(4711))), "4711\n0\n0"),
            ("number", Box::new(|security| security.run_as_username = "33".into()), "33\n33\n33 77"),
        ];
        for (name, change, expected) in cases {
            let (seen, status) = cri.output(sandbox, pod, secured(name, who, change)).await;
            assert_eq!(seen, expected, "{name}");
            let user = status.user.unwrap().linux.unwrap();
            let groups: Vec<String> = user.supplemental_groups.iter().map(ToString::to_string).collect();
            assert_eq!(
                format!("{}\n{}\n{}", user.uid, user.gid, groups.join(" ")),
                expected,
                "status of {name}"
            );
        }
    }
    end(&cri, all).await;
}

fn profile(kind: ProfileType, reference: &str) -> v1::SecurityProfile {
    v1::SecurityProfile { profile_type: kind.into(), localhost_ref: reference.to_owned() }
}

/// The sets of capabilities as the kernel shows them, by name.
fn capabilities(status: &str, set: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(set)).expect("a set");
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn confinement_is_what_the_security_context_says() {
    const CHOWN: u64 = 1;
    const NET_ADMIN: u64 = 1 << 12;
    const DEFAULT: u64 = 0xa804_25fb;
    let cri = Cri::start().await;
    let filter = cri.dir().join("no-mkdir.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#;
    std::fs::write(&filter, text).unwrap();
    let all = sandboxes(&cri, "confined", |pod| {
        let linux = pod.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
    })
    .await;
    for (pod, sandbox) in &all {
        let show = "cat /proc/self/status";
        let run = |config| async { cri.output(sandbox, pod, config).await.0 };
        let seen = run(shell("default", show)).await;
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(capabilities(&seen, set), DEFAULT, "{set}");
        }
        assert_eq!(capabilities(&seen, "CapAmb"), 0);
        assert!(seen.contains("NoNewPrivs:\t0") && seen.contains("Seccomp:\t2"), "{seen}");

        let config = secured("tight", show, |security| {
            security.no_new_privs = true;
            security.seccomp = Some(profile(ProfileType::Unconfined, ""));
            security.capabilities = Some(v1::Capability {
                drop_capabilities: vec!["ALL".into()],
                add_capabilities: vec!["CAP_CHOWN".into(), "net_admin".into()],
                ..v1::Capability::default()
            });
        });
        let seen = run(config).await;
        assert_eq!(capabilities(&seen, "CapEff"), CHOWN | NET_ADMIN);
        assert_eq!(capabilities(&seen, "CapBnd"), CHOWN | NET_ADMIN);
        assert!(seen.contains("NoNewPrivs:\t1") && seen.contains("Seccomp:\t0"), "{seen}");

        let config = secured("ambient", show, |security| {
            security.run_as_user = Some(v1::Int64Value { value: 1000 });
            security.capabilities = Some(v1::Capability {
                add_ambient_capabilities: vec!["CHOWN".into()],
                ..v1::Capability::default()
            });
        });
        let seen = run(config).await;
        assert_eq!(capabilities(&seen, "CapAmb"), CHOWN);
        assert_eq!(capabilities(&seen, "CapEff"), CHOWN, "what survives the change of user");

        let config = secured("filtered", "mkdir /tmp-x || echo refused", |security| {
            security.seccomp = Some(profile(ProfileType::Localhost, &filter.display().to_string()));
        });
        assert!(run(config).await.contains("refused"));
        let config = secured("old-name", "busybox grep Seccomp: /proc/self/status", |security| {
            security.seccomp = None;
            security.seccomp_profile_path = "runtime/default".into();
        });
        assert_eq!(run(config).await, "Seccomp:\t2");

        let config = secured(
            "paths",
            "cat /proc/stat | busybox wc -c; echo 1 > /proc/sys/vm/swappiness; cat /proc/uptime | busybox wc -c",
            |security| {
                security.masked_paths = vec!["/proc/stat".into(), "/proc/uptime".into(), "/no/such".into()];
            },
        );
        let seen = run(config).await;
        assert!(seen.starts_with("0\n") && seen.ends_with("\n0") && seen.contains("Read-only"), "{seen}");
        let config = secured("frozen", "echo x > /file; echo x > /dev/shm/file && echo memory", |security| {
            security.readonly_rootfs = true;
        });
        let seen = run(config).await;
        assert!(seen.contains("Read-only file system") && seen.contains("memory"), "{seen}");

        let config = secured(
            "privileged",
            "cat /proc/self/status; ls /dev | busybox wc -l; mkdir -p /m && mount -t tmpfs x /m && echo mounted",
            |security| {
                security.privileged = true;
            },
        );
        let seen = run(config).await;
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert_eq!(capabilities(&seen, "CapEff"), capabilities(&own, "CapBnd"));
        assert!(seen.contains("Seccomp:\t0") && seen.contains("mounted"), "{seen}");
    }
    end(&cri, all).await;
}

/// Mounts a fresh file system.
fn tmpfs(at: &std::path::Path, flags: nix::mount::MsFlags) {
    std::fs::create_dir_all(at).expect("made");
    nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), flags, None::<&str>).expect("mounted");
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_are_where_and_what_they_should_be() {
    let cri = Cri::start().await;
    let all = sandboxes(&cri, "mounts", |_| ()).await;
    let plain = nix::mount::MsFlags::empty();
    let features = cri.handlers().await;
    for (index, (pod, sandbox)) in all.iter().enumerate() {
        let name = &pod.metadata.as_ref().unwrap().name;
        let base = cri.dir().join(name);
        let shared = base.join("shared");
        tmpfs(&shared, plain);
        let make_shared = nix::mount::MsFlags::MS_SHARED | nix::mount::MsFlags::MS_REC;
        nix::mount::mount(None::<&str>, &shared, None::<&str>, make_shared, None::<&str>).unwrap();
        let mut follows = mount(&shared, "/follows");
        follows.set_propagation(v1::MountPropagation::PropagationHostToContainer);
        let script = "echo ready; while [ ! -e /follows/late/file ]; do sleep 0.05; done; echo arrived; exec sleep 3600";
        let private = mount(&shared, "/private");
        let id = cri.create(sandbox, pod, mounted("follower", script, vec![follows, private])).await.unwrap();
        cri.launch(&id).await.unwrap();
        cri.log_has(name, "follower", "ready").await;
        tmpfs(&shared.join("late"), plain);
        std::fs::write(shared.join("late/file"), "x").unwrap();
        cri.log_has(name, "follower", "arrived").await;
        assert_eq!(
            cri.exec(&id, &["ls", "/private/late"]).await.stdout,
            b"",
            "a private mount does not follow"
        );

        let mut both = mount(&shared, "/both");
        both.set_propagation(v1::MountPropagation::PropagationBidirectional);
        let mut config = mounted(
            "giver",
            "mkdir /both/given; mount -t tmpfs x /both/given && echo x > /both/given/file",
            vec![both],
        );
        let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        security.seccomp = Some(profile(ProfileType::Unconfined, ""));
        security.capabilities =
            Some(v1::Capability { add_capabilities: vec!["SYS_ADMIN".into()], ..v1::Capability::default() });
        cri.output(sandbox, pod, config).await;
        assert!(shared.join("given/file").exists(), "what is mounted inside is seen outside");

        let mut lonely = mount(std::path::Path::new("/usr"), "/m");
        lonely.set_propagation(v1::MountPropagation::PropagationBidirectional);
        let refused = cri.create(sandbox, pod, mounted("lonely", "true", vec![lonely])).await.unwrap_err();
        assert!(refused.message().contains("needs the host mount to be shared"), "{refused}");

        let tree = base.join("tree");
        tmpfs(&tree, plain);
        tmpfs(&tree.join("below"), plain);
        let script = "echo x > /ro/file; echo x > /ro/below/file; ls /ro/below";
        let readonly = v1::Mount { readonly: true, ..mount(&tree, "/ro") };
        let (seen, _) = cri.output(sandbox, pod, mounted("ro", script, vec![readonly.clone()])).await;
        assert_eq!(seen.matches("Read-only").count(), 1, "only the mount itself: {seen}");
        if features[index].features.as_ref().is_some_and(|features| features.recursive_read_only_mounts) {
            std::fs::remove_file(tree.join("below/file")).unwrap();
            let all = v1::Mount { recursive_read_only: true, ..readonly };
            let (seen, _) = cri.output(sandbox, pod, mounted("rro", script, vec![all])).await;
            assert_eq!(seen.matches("Read-only").count(), 2, "everything below, too: {seen}");
        }

        let absent = base.join("made/by/the/runtime");
        let links = vec![mount(&absent, "/new/place"), mount(&absent, "/bin/../later/x")];
        let (seen, _) =
            cri.output(sandbox, pod, mounted("absent", "echo x > /new/place/file; ls /later/x", links)).await;
        assert_eq!(seen, "file");
        assert!(absent.join("file").exists());
    }
    end(&cri, all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn links_of_an_image_lead_mounts_nowhere_else() {
    let cri = Cri::start().await;
    push_data(&cri).await;
    let all = sandboxes(&cri, "links", |_| ()).await;
    for (pod, sandbox) in &all {
        let host = cri.dir().join("linked");
        let mut config =
            mounted("main", "ls /keelson-escape-test", vec![mount(&host, "/escape/keelson-escape-test")]);
        config.image = Some(v1::ImageSpec { image: "data".into(), ..v1::ImageSpec::default() });
        std::fs::create_dir_all(&host).unwrap();
        std::fs::write(host.join("inside"), "x").unwrap();
        let (seen, _) = cri.output(sandbox, pod, config).await;
        assert_eq!(seen, "inside", "the link leads to the container's own root");
        assert!(!std::path::Path::new("/keelson-escape-test").exists());
    }
    end(&cri, all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_wishes_are_told_by_field_and_leave_nothing() {
    let cri = Cri::start().await;
    let pod = cri.pod("refusals");
    let sandbox = cri.run(&pod).await.unwrap();
    let bad = |change: fn(&mut v1::LinuxContainerSecurityContext)| secured("bad", "true", change);
    let device = |host: &str, permissions: &str| {
        let mut config = shell("bad", "true");
        config.devices = vec![v1::Device {
            host_path: host.into(),
            container_path: "/dev/x".into(),
            permissions: permissions.into(),
        }];
        config
    };
    let limits = |change: fn(&mut v1::LinuxContainerResources)| {
        let mut config = shell("bad", "true");
        change(config.linux.get_or_insert_default().resources.get_or_insert_default());
        config
    };
    let at = |own: &str| mounted("bad", "true", vec![mount(std::path::Path::new("/usr"), own)]);
    let below_a_file = cri.dir().join("cri.yaml/x");
    let cases = vec![
        (
            bad(|security| {
                security.capabilities =
                    Some(v1::Capability { add_capabilities: vec!["FLY".into()], ..Default::default() });
            }),
            "unknown capability \"FLY\"",
        ),
        (
            bad(|security| security.seccomp = Some(profile(ProfileType::Localhost, "/no/such.json"))),
            "seccomp.localhost_ref",
        ),
        (
            bad(|security| security.seccomp = Some(profile(ProfileType::Localhost, "relative.json"))),
            "seccomp.localhost_ref",
        ),
        (
            bad(|security| security.seccomp = Some(profile(ProfileType::Localhost, "/etc/passwd"))),
            "seccomp profile",
        ),
        (bad(|security| security.privileged = true), "privileged"),
        (bad(|security| security.run_as_group = Some(v1::Int64Value { value: 5 })), "run_as_group"),
        (bad(|security| security.run_as_user = Some(v1::Int64Value { value: -1 })), "-1"),
        (bad(|security| security.supplemental_groups = vec![i64::MAX]), "not a valid user or group id"),
        (
            bad(|security| {
                security.namespace_options.get_or_insert_default().userns_options =
                    Some(v1::UserNamespace::default());
            }),
            "userns_options",
        ),
        (device("/no/such/device", "rw"), "devices.host_path"),
        (device("/etc/passwd", "rw"), "devices.host_path"),
        (device("/dev/null", "xyz"), "devices.permissions"),
        (limits(|limits| limits.cpuset_cpus = "a-b".into()), "resources.cpuset_cpus"),
        (limits(|limits| limits.cpu_period = -5), "resources.cpu_period"),
        (limits(|limits| limits.unified = [("a/b".to_owned(), String::new())].into()), "resources.unified"),
        (at(""), "mounts.container_path"),
        (at("/"), "mounts.container_path"),
        (at("/proc/sys"), "mounts.container_path"),
        (at("/x/../proc/1"), "mounts.container_path"),
        (mounted("bad", "true", vec![mount(&below_a_file, "/x")]), "mounts.host_path"),
        (v1::ContainerConfig { working_dir: "relative".into(), ..shell("bad", "true") }, "working_dir"),
        (v1::ContainerConfig { envs: vec![v1::KeyValue::default()], ..shell("bad", "true") }, "envs"),
    ];
    for (config, words) in cases {
        let refused = cri.create(&sandbox, &pod, config).await.expect_err(words);
        assert_eq!(refused.code(), Code::InvalidArgument, "{words}: {refused}");
        assert!(refused.message().contains(words), "{words:?} is not in {refused}");
    }
    let listed = cri.runtime().list_containers(v1::ListContainersRequest::default()).await.unwrap();
    assert!(listed.into_inner().containers.is_empty());
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

/// A limit as the kernel has it, on any version of cgroups.
fn limit(cgroup: &str, v1_file: &str, v2_file: &str) -> String {
    let below = cgroup.trim_start_matches('/');
    let controller = v1_file.split('.').next().expect("a controller");
    let candidates = [
        format!("/sys/fs/cgroup/{controller}/{below}/{v1_file}"),
        format!("/sys/fs/cgroup/{controller},cpuacct/{below}/{v1_file}"),
        format!("/sys/fs/cgroup/{below}/{v2_file}"),
    ];
    let found = candidates.iter().find_map(|path| std::fs::read_to_string(path).ok());
    found.unwrap_or_else(|| panic!("none of {candidates:?}")).trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn resources_can_be_changed_before_and_while_it_runs() {
    let cri = Cri::start().await;
    let all = sandboxes(&cri, "resources", |_| ()).await;
    for (pod, sandbox) in &all {
        let mut config = shell("main", "exec sleep 3600");
        config.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
            cpu_quota: 50_000,
            cpu_period: 100_000,
            cpu_shares: 256,
            memory_limit_in_bytes: 64 << 20,
            cpuset_cpus: "0".into(),
            oom_score_adj: 500,
            ..v1::LinuxContainerResources::default()
        });
        let id = cri.create(sandbox, pod, config).await.unwrap();
        let update = async |linux: v1::LinuxContainerResources| {
            let request = v1::UpdateContainerResourcesRequest {
                container_id: id.clone(),
                linux: Some(linux),
                ..v1::UpdateContainerResourcesRequest::default()
            };
            cri.runtime().update_container_resources(request).await
        };
        update(v1::LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() })
            .await
            .unwrap();
        cri.launch(&id).await.unwrap();
        let parent = &pod.linux.as_ref().unwrap().cgroup_parent;
        let cgroup = format!("{parent}/{id}");
        let memory = || limit(&cgroup, "memory.limit_in_bytes", "memory.max");
        let quota = || limit(&cgroup, "cpu.cfs_quota_us", "cpu.max");
        assert_eq!(memory(), (96 << 20).to_string(), "changed before it ran");
        assert!(quota().starts_with("50000"), "{}", quota());
        assert_eq!(limit(&cgroup, "cpuset.cpus", "cpuset.cpus"), "0");
        let score = cri.exec(&id, &["cat", "/proc/1/oom_score_adj"]).await.stdout;
        assert_eq!(score, b"500\n");

        update(v1::LinuxContainerResources {
            oom_score_adj: 700,
            memory_limit_in_bytes: 128 << 20,
            cpu_quota: 70_000,
            ..Default::default()
        })
        .await
        .unwrap();
        assert_eq!(memory(), (128 << 20).to_string());
        assert_eq!(cri.exec(&id, &["cat", "/proc/1/oom_score_adj"]).await.stdout, b"700\n");
        assert!(quota().starts_with("70000"), "{}", quota());
        let shown = cri.status(&id).await.resources.unwrap().linux.unwrap();
        assert_eq!(
            (shown.memory_limit_in_bytes, shown.cpu_quota, shown.cpu_shares),
            (128 << 20, 70_000, 256)
        );
        let refused = update(v1::LinuxContainerResources { cpuset_cpus: "x".into(), ..Default::default() })
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains("resources.cpuset_cpus"), "{refused}");
        assert_eq!(
            cri.status(&id).await.resources.unwrap().linux.unwrap(),
            shown,
            "a refused change changes nothing"
        );
    }
    end(&cri, all).await;
}

const FIRST: u32 = 200_000;

fn own_users() -> v1::NamespaceOption {
    let map = vec![v1::IdMapping { host_id: FIRST, container_id: 0, length: 65_536 }];
    let user = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: map.clone(), gids: map };
    v1::NamespaceOption {
        pid: v1::NamespaceMode::Container.into(),
        userns_options: Some(user),
        ..v1::NamespaceOption::default()
    }
}

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

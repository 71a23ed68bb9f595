//! Mounts and limits of containers, and wishes that cannot be met, with every handler that is offered. Needs root.

mod support;

use cri_shim_api::v1;
use cri_shim_api::v1::security_profile::ProfileType;
use support::cri::{Cri, shell};
use support::pods::{end, mount, mounted, profile, push_data, sandboxes, secured};
use tonic::Code;

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
        // Where there is AppArmor, its default profile forbids mounts.
        security.apparmor = Some(profile(ProfileType::Unconfined, ""));
        security.capabilities =
            Some(v1::Capability { add_capabilities: vec!["SYS_ADMIN".into()], ..v1::Capability::default() });
        cri.output(sandbox, pod, config).await;
        assert!(shared.join("given/file").exists(), "what is mounted inside is seen outside");

        // Under systemd the root, and what is mounted in it, is shared.
        let alone = base.join("alone");
        tmpfs(&alone, plain);
        let make_private = nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, &alone, None::<&str>, make_private, None::<&str>).unwrap();
        let mut lonely = mount(&alone, "/m");
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
        // No machine has it.
        let impossible =
            update(v1::LinuxContainerResources { cpuset_cpus: "4000".into(), ..Default::default() })
                .await
                .unwrap_err();
        assert_eq!(impossible.code(), Code::InvalidArgument, "{impossible}");
        assert!(impossible.message().starts_with("linux: the kernel refuses"), "{impossible}");
        assert_eq!(
            cri.status(&id).await.resources.unwrap().linux.unwrap(),
            shown,
            "a refused change changes nothing"
        );
    }
    end(&cri, all).await;
}

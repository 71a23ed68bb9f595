//! What the specification of a container says, and that no wish gives more than it asked for.

use std::sync::LazyLock;

use super::*;
use cri_shim_api::v1;
use cri_shim_api::v1::{LinuxContainerConfig, LinuxContainerResources, LinuxSandboxSecurityContext};
use proptest::prelude::*;

fn node() -> NodeFacts {
    NodeFacts {
        seccomp: true,
        capabilities: vec!["SYS_ADMIN".into(), "CHOWN".into()],
        ..NodeFacts::default()
    }
}

/// What a plain container is made from.
fn wanted<'a>(
    config: &'a ContainerConfig,
    sandbox: &'a PodSandboxConfig,
    node: &'a NodeFacts,
    edits: &'a cdi::Edits,
) -> ContainerSpec<'a> {
    static IMAGE: LazyLock<ImageDefaults> =
        LazyLock::new(|| ImageDefaults { cmd: vec!["sh".into()], ..ImageDefaults::default() });
    static IDENTITY: LazyLock<Identity> = LazyLock::new(|| Identity { uid: 5, gid: 6, groups: vec![6, 7] });
    static FILES: LazyLock<SandboxFiles> = LazyLock::new(SandboxFiles::default);
    ContainerSpec {
        sandbox_id: "s1",
        sandbox,
        config,
        image: &IMAGE,
        identity: &IDENTITY,
        namespaces: SandboxNamespaces::default(),
        mounts: &[],
        files: &FILES,
        devices: &[],
        cdi: edits,
        seccomp: Profile::RuntimeDefault,
        hostname: "web-0",
        cgroup: "/kubepods/c1",
        node,
    }
}

fn build(
    config: &ContainerConfig,
    sandbox: &PodSandboxConfig,
    node: &NodeFacts,
) -> Result<serde_json::Value, SpecError> {
    Ok(serde_json::to_value(spec(&wanted(config, sandbox, node, &cdi::Edits::default()))?).unwrap())
}

fn privileged() -> ContainerConfig {
    let security =
        LinuxContainerSecurityContext { privileged: true, ..LinuxContainerSecurityContext::default() };
    let linux = LinuxContainerConfig { security_context: Some(security), ..LinuxContainerConfig::default() };
    ContainerConfig { linux: Some(linux), ..ContainerConfig::default() }
}

#[test]
fn a_plain_container_is_confined() {
    let resources = LinuxContainerResources { memory_limit_in_bytes: 1 << 20, ..Default::default() };
    let linux = LinuxContainerConfig { resources: Some(resources), ..LinuxContainerConfig::default() };
    let config = ContainerConfig { linux: Some(linux), ..ContainerConfig::default() };
    let spec = build(&config, &PodSandboxConfig::default(), &node()).unwrap();
    assert_eq!(spec["process"]["user"]["additionalGids"], serde_json::json!([6, 7]));
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 1 << 20);
    assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], false);
    assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/c1");
    assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
}

#[test]
fn a_privileged_container_needs_a_privileged_sandbox() {
    let refused = build(&privileged(), &PodSandboxConfig::default(), &node()).unwrap_err();
    assert!(matches!(refused, SpecError::PrivilegedInPlainSandbox));
    let mut sandbox = PodSandboxConfig::default();
    sandbox.linux.get_or_insert_default().security_context =
        Some(LinuxSandboxSecurityContext { privileged: true, ..LinuxSandboxSecurityContext::default() });
    let spec = build(&privileged(), &sandbox, &node()).unwrap();
    assert!(spec["linux"].get("seccomp").is_none());
    assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], true);
    let sysfs = spec["mounts"].as_array().unwrap().iter().find(|mount| mount["destination"] == "/sys");
    assert!(sysfs.unwrap()["options"].as_array().unwrap().contains(&"rw".into()));
}

fn with_security(change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> ContainerConfig {
    let mut security = LinuxContainerSecurityContext::default();
    change(&mut security);
    let linux = LinuxContainerConfig { security_context: Some(security), ..LinuxContainerConfig::default() };
    ContainerConfig { linux: Some(linux), ..ContainerConfig::default() }
}

#[test]
fn what_the_security_context_says_arrives() {
    let config = with_security(|security| {
        security.no_new_privs = true;
        security.readonly_rootfs = true;
        security.masked_paths = vec!["/proc/kcore".into()];
        security.readonly_paths = vec!["/proc/sys".into()];
        security.selinux_options =
            Some(v1::SeLinuxOption { level: "s0:c1".into(), ..v1::SeLinuxOption::default() });
        security.capabilities = Some(v1::Capability {
            drop_capabilities: vec!["ALL".into()],
            add_ambient_capabilities: vec!["CHOWN".into()],
            ..v1::Capability::default()
        });
    });
    let node = NodeFacts { selinux: true, apparmor: true, apparmor_default: true, ..node() };
    let spec = build(&config, &PodSandboxConfig::default(), &node).unwrap();
    assert_eq!(spec["process"]["noNewPrivileges"], true);
    assert_eq!(spec["root"]["readonly"], true);
    assert_eq!(spec["linux"]["maskedPaths"], serde_json::json!(["/proc/kcore"]));
    assert_eq!(spec["linux"]["readonlyPaths"], serde_json::json!(["/proc/sys"]));
    assert_eq!(spec["process"]["selinuxLabel"], "system_u:system_r:container_t:s0:c1");
    assert_eq!(spec["linux"]["mountLabel"], "system_u:object_r:container_file_t:s0:c1");
    assert_eq!(spec["process"]["apparmorProfile"], labels::DEFAULT_PROFILE_NAME);
    for set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
        assert_eq!(spec["process"]["capabilities"][set], serde_json::json!(["CAP_CHOWN"]), "{set}");
    }
}

#[test]
fn devices_of_vendors_change_what_their_files_say() {
    let edits = cdi::Edits {
        env: vec!["GPU=0".into(), "PATH=/gpu".into()],
        mounts: vec![cdi::file::Mount {
            host_path: "/opt/gpu".into(),
            container_path: "/opt/gpu/../lib".into(),
            kind: String::new(),
            options: vec!["ro".into()],
        }],
        hooks: vec![cdi::file::Hook {
            hook_name: "createContainer".into(),
            path: "/bin/hook".into(),
            args: vec!["hook".into(), "x".into()],
            env: Vec::new(),
            timeout: Some(5),
        }],
        additional_gids: vec![44, 7],
        ..cdi::Edits::default()
    };
    let (config, sandbox, node) = (ContainerConfig::default(), PodSandboxConfig::default(), node());
    let spec = serde_json::to_value(spec(&wanted(&config, &sandbox, &node, &edits)).unwrap()).unwrap();
    let env = spec["process"]["env"].as_array().unwrap();
    assert!(env.contains(&"GPU=0".into()) && env.contains(&"PATH=/gpu".into()));
    assert_eq!(env.iter().filter(|pair| pair.as_str().unwrap().starts_with("PATH=")).count(), 1);
    assert_eq!(spec["process"]["user"]["additionalGids"], serde_json::json!([6, 7, 44]));
    let mount = spec["mounts"].as_array().unwrap().iter().find(|mount| mount["destination"] == "/opt/lib");
    assert_eq!(mount.unwrap()["options"], serde_json::json!(["ro", "rbind"]));
    assert_eq!(spec["hooks"]["createContainer"][0]["args"], serde_json::json!(["hook", "x"]));
}

#[test]
fn a_pods_own_users_are_in_the_specification() {
    let map = vec![v1::IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
    let user = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: map.clone(), gids: map };
    let options = v1::NamespaceOption { userns_options: Some(user), ..v1::NamespaceOption::default() };
    let config = with_security(|security| security.namespace_options = Some(options.clone()));
    let refused = build(&config, &PodSandboxConfig::default(), &node()).unwrap_err().to_string();
    assert!(refused.starts_with("namespace_options.userns_options"), "{refused}");
    let mut sandbox = PodSandboxConfig::default();
    sandbox.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(options),
        ..LinuxSandboxSecurityContext::default()
    });
    let spec = build(&config, &sandbox, &node()).unwrap();
    let mapping = serde_json::json!([{ "hostID": 100_000, "containerID": 0, "size": 65_536 }]);
    assert_eq!(spec["linux"]["uidMappings"], mapping);
    assert_eq!(spec["linux"]["gidMappings"], mapping);
}

#[test]
fn impossible_wishes_are_refused_by_name() {
    let mount = |mount: v1::Mount| ContainerConfig { mounts: vec![mount], ..ContainerConfig::default() };
    let image = Some(v1::ImageSpec { image: "data".into(), ..v1::ImageSpec::default() });
    let cases = [
        (mount(v1::Mount { host_path: "x".into(), ..v1::Mount::default() }), "mounts.host_path"),
        (mount(v1::Mount { image_sub_path: "x".into(), ..v1::Mount::default() }), "mounts.image_sub_path"),
        (mount(v1::Mount { image: image.clone(), ..v1::Mount::default() }), "mounts.readonly"),
        (
            mount(v1::Mount { image, readonly: true, host_path: "/x".into(), ..v1::Mount::default() }),
            "mounts.host_path",
        ),
        (ContainerConfig { working_dir: "x".into(), ..ContainerConfig::default() }, "working_dir"),
        (ContainerConfig { command: vec!["a\0".into()], ..ContainerConfig::default() }, "command"),
        (with_security(|security| security.apparmor_profile = "what".into()), "apparmor_profile"),
    ];
    for (config, field) in cases {
        let error = build(&config, &PodSandboxConfig::default(), &node()).unwrap_err().to_string();
        assert!(error.starts_with(field), "{field}: {error}");
    }
}

fn words() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z/.]{0,12}",
        ".{0,6}",
        Just("ALL".to_owned()),
        Just("CAP_SYS_ADMIN".to_owned()),
        Just("NET_RAW".to_owned()),
        Just("/proc/self/fd".to_owned()),
        Just("/a/../proc/1".to_owned()),
    ]
}

fn lists() -> impl Strategy<Value = Vec<String>> {
    proptest::collection::vec(words(), 0..3)
}

prop_compose! {
    fn configs()(
        (command, args, dir, paths) in (lists(), lists(), words(), lists()),
        (add, drop_, ambient) in (lists(), lists(), lists()),
        (tty, readonly, rro, nnp) in any::<(bool, bool, bool, bool)>(),
        propagation in 0..4_i32,
        numbers in any::<(i64, i64, i64, i64)>(),
    ) -> ContainerConfig {
        let mounts = paths.into_iter().map(|path| v1::Mount {
            container_path: path.clone(),
            host_path: "/data".into(),
            readonly,
            recursive_read_only: rro,
            propagation,
            ..v1::Mount::default()
        }).collect();
        let mut config = with_security(|security| {
            security.no_new_privs = nnp;
            security.capabilities = Some(v1::Capability {
                add_capabilities: add,
                drop_capabilities: drop_,
                add_ambient_capabilities: ambient,
            });
        });
        config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
            cpu_shares: numbers.0,
            cpu_quota: numbers.1,
            memory_limit_in_bytes: numbers.2,
            oom_score_adj: numbers.3,
            ..LinuxContainerResources::default()
        });
        ContainerConfig { command, args, working_dir: dir, mounts, tty, ..config }
    }
}

proptest! {
    #[test]
    fn whatever_is_asked_nothing_more_is_given(config in configs()) {
        let (sandbox, node, edits) = (PodSandboxConfig::default(), node(), cdi::Edits::default());
        let host = super::super::mounts::HostPropagation { shared: true, slave: true };
        let found: Vec<HostMount> = config
            .mounts
            .iter()
            .map(|mount| HostMount { source: "/data".into(), wanted: mount.into(), host })
            .collect();
        let wanted = ContainerSpec { mounts: &found, ..wanted(&config, &sandbox, &node, &edits) };
        let Ok(spec) = spec(&wanted) else { return Ok(()) };
        let spec = serde_json::to_value(&spec).unwrap();
        let security = config.linux.as_ref().unwrap().security_context.clone().unwrap();
        let asked = security.capabilities.unwrap();
        let names = |list: &[String]| -> Vec<String> {
            list.iter().map(|name| name.to_ascii_uppercase().trim_start_matches("CAP_").to_owned()).collect()
        };
        let mut most: Vec<String> = caps::DEFAULT.iter().map(|name| (*name).to_owned()).collect();
        most.extend(names(&asked.add_capabilities));
        most.extend(names(&asked.add_ambient_capabilities));
        if most.contains(&"ALL".to_owned()) {
            most.extend(node.capabilities.clone());
        }
        let dropped = names(&asked.drop_capabilities);
        for set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
            for name in spec["process"]["capabilities"][set].as_array().unwrap() {
                let name = name.as_str().unwrap().trim_start_matches("CAP_").to_owned();
                prop_assert!(most.contains(&name), "{set} has {name} unasked");
                prop_assert!(!dropped.contains(&name), "{set} has {name}, which was dropped");
            }
        }
        prop_assert_eq!(spec["process"]["noNewPrivileges"].as_bool(), Some(security.no_new_privs));
        for mount in spec["mounts"].as_array().unwrap() {
            let path = mount["destination"].as_str().unwrap();
            let plain = path.len() > 1
                && path.starts_with('/')
                && path.split('/').skip(1).all(|part| !["", ".", ".."].contains(&part));
            prop_assert!(plain, "{path}");
            prop_assert!(!path.starts_with("/proc/"), "{path}");
        }
        let score = spec["process"]["oomScoreAdj"].as_i64().unwrap();
        prop_assert!((-1000..=1000).contains(&score));
    }
}

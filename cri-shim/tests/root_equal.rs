//! Commands find themselves confined alike whether our own shim or runc runs the pod, and run by ExecSync.
//! Needs root.

mod support;

use std::collections::BTreeMap;

use cri_shim_api::v1;
use support::cri::{Cri, shell};

/// What a process sees of its confinement, by file. It uses nothing but the shell, cat, ls and id.
const LOOK: &str = "for f in status limits cgroup mountinfo uid_map gid_map attr/current oom_score_adj; do \
    echo \"=== $f\"; cat /proc/self/$f 2>/dev/null; done; echo === id; id; echo === env; env; echo === cwd; pwd; umask; \
    echo === fds; ls /proc/self/fd; echo === ns; for n in /proc/self/ns/*; do \
    a=$(ls -l $n); b=$(ls -l /proc/1/ns/${n##*/}); \
    [ \"${a##* -> }\" = \"${b##* -> }\" ] && echo \"$n as the first process\" || echo \"$n other\"; done";

/// Lines of `status` that every process has for itself.
const OWN: &[&str] = &[
    "Name:",
    "Pid:",
    "Tgid:",
    "PPid:",
    "Ngid:",
    "Vm",
    "Rss",
    "voluntary_ctxt",
    "nonvoluntary_ctxt",
    "NSpid:",
    "NSpgid:",
    "NSsid:",
    "NStgid:",
    "HugetlbPages:",
    "Threads:",
    "State:",
    "SigQ:",
    "TracerPid:",
    "FDSize:",
];

/// The parts that must be equal, without what names the container.
fn confinement(text: &str, ids: &[&str]) -> BTreeMap<String, Vec<String>> {
    let mut parts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut part = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("=== ") {
            name.clone_into(&mut part);
            continue;
        }
        if part == "status" && OWN.iter().any(|own| line.starts_with(own)) {
            continue;
        }
        let mut line = if part == "mountinfo" { mount(line) } else { line.to_owned() };
        for id in ids {
            line = line.replace(id, "ID");
        }
        parts.entry(part.clone()).or_default().push(line);
    }
    if let Some(mounts) = parts.get_mut("mountinfo") {
        mounts.sort();
    }
    parts
}

/// Root, place and options of a mount, then its type, source and options; numbers and layers differ.
fn mount(line: &str) -> String {
    let fields: Vec<&str> = line.split(' ').collect();
    let dash = fields.iter().position(|field| *field == "-").expect("a separator");
    let (own, shared) = (&fields[3..6], &fields[dash + 1..]);
    // A masked file is a null device: the container's own with runc, the node's with us.
    if own[0] == "/null" {
        return format!("null at {}", own[1]);
    }
    let options = if shared[0] == "overlay" { "layers" } else { shared[2] };
    format!("{} - {} {options}", own.join(" "), shared[0])
}

/// A way to change a container's configuration.
type Change = fn(&mut v1::ContainerConfig);

fn context(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

fn default_profile() -> v1::SecurityProfile {
    v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::RuntimeDefault.into(),
        ..v1::SecurityProfile::default()
    }
}

/// Containers as pods ask for them.
const CONTAINERS: [(&str, Change); 5] = [
    ("plain", |_| {}),
    ("restricted", |config| {
        "/tmp".clone_into(&mut config.working_dir);
        let security = context(config);
        security.run_as_user = Some(v1::Int64Value { value: 33 });
        security.run_as_group = Some(v1::Int64Value { value: 44 });
        security.supplemental_groups = vec![55, 66];
        security.no_new_privs = true;
        security.seccomp = Some(default_profile());
        security.readonly_rootfs = true;
        security.capabilities =
            Some(v1::Capability { drop_capabilities: vec!["ALL".to_owned()], ..v1::Capability::default() });
    }),
    ("capable", |config| {
        let security = context(config);
        security.seccomp = Some(default_profile());
        security.run_as_user = Some(v1::Int64Value { value: 33 });
        security.capabilities = Some(v1::Capability {
            add_capabilities: vec!["NET_ADMIN".to_owned()],
            drop_capabilities: vec!["CHOWN".to_owned()],
            add_ambient_capabilities: vec!["NET_BIND_SERVICE".to_owned()],
        });
    }),
    ("privileged", |config| {
        let security = context(config);
        security.privileged = true;
        security.masked_paths.clear();
        security.readonly_paths.clear();
    }),
    ("limited", |config| {
        config.envs = vec![v1::KeyValue { key: "OWN".to_owned(), value: "value".to_owned() }];
        config.linux.get_or_insert_default().resources = Some(v1::LinuxContainerResources {
            cpu_shares: 256,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: 900,
            ..v1::LinuxContainerResources::default()
        });
    }),
];

#[tokio::test(flavor = "multi_thread")]
async fn execs_are_confined_alike_by_every_handler() {
    let cri = Cri::start().await;
    for (name, change) in CONTAINERS {
        let mut seen = Vec::new();
        for handler in ["keelson", "runc"] {
            let mut pod = cri.pod(&format!("{name}-{handler}"));
            pod.hostname = "same".to_owned();
            let mut config = shell("main", "exec sleep 3600");
            change(&mut config);
            let linux = pod.linux.get_or_insert_default();
            linux.security_context.get_or_insert_default().privileged = context(&mut config).privileged;
            let sandbox = cri.run_with(&pod, handler).await.expect("running");
            let id =
                cri.create(&sandbox, &pod, config).await.unwrap_or_else(|status| panic!("{name}: {status}"));
            cri.launch(&id).await.unwrap_or_else(|status| panic!("{name}: {status}"));
            let answer = cri.exec(&id, &["/bin/sh", "-c", LOOK]).await;
            let text = String::from_utf8_lossy(&answer.stdout).into_owned();
            let pod_name = format!("{name}-{handler}");
            let parts = confinement(&text, &[&id, &sandbox, &pod_name]);
            assert!(parts.len() >= 11, "{name}, {handler}: {text}");
            seen.push(parts);
            cri.remove(&sandbox).await;
        }
        for (part, own) in &seen[0] {
            assert_eq!(Some(own), seen[1].get(part), "{name}, {part}: ours, then runc's");
        }
    }
    cri.assert_nothing_left().await;
}

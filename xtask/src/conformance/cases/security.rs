//! Security context: namespaces, users and groups, capabilities, read-only roots, privileged, masked paths,
//! no_new_privs.

use anyhow::{Context, Result};
use cri_shim_api::v1::{self, NamespaceMode};

use super::super::case::{Case, case, holds, refused, same};
use super::super::context::{IDLE, T, image_spec, pod_security, security, strings};

pub(crate) fn cases() -> Vec<Case> {
    [namespaces(), users(), capabilities(), roots()].into_iter().flatten().collect()
}

fn namespaces() -> Vec<Case> {
    let group = "security: namespaces";
    vec![
        case(group, "pid CONTAINER: a container sees only its own processes", pid_container),
        case(group, "pid POD: containers see each other, PID 1 is the pod's", pid_pod),
        case(group, "pid NODE: a container sees the host's processes", pid_node),
        case(group, "pid TARGET: a container sees those of the named container", pid_target),
        case(group, "pid TARGET of an unknown container is refused", pid_target_unknown),
        case(group, "ipc POD: its own, ipc NODE: the host's", ipc),
        case(group, "network POD: its own, network NODE: the host's", network),
        case(group, "the mount and cgroup namespaces are never the host's", mount_namespace),
    ]
}

fn users() -> Vec<Case> {
    let group = "security: users";
    vec![
        case(group, "root by default", user_default),
        case(group, "run_as_user by number", user_number),
        case(group, "run_as_user and run_as_group", user_and_group),
        case(group, "run_as_username is looked up in the image", user_name),
        case(group, "run_as_username that the image does not know is refused", user_unknown),
        case(group, "run_as_group without a user is refused", group_alone),
        case(group, "the image's user: number, name, and user with group", user_of_image),
        case(group, "supplemental groups are added", groups),
        case(group, "groups that the image gives the user are added (Merge)", groups_merge),
        case(group, "groups that the image gives the user are left out (Strict)", groups_strict),
        case(group, "the status tells uid, gid and groups", user_in_status),
    ]
}

fn capabilities() -> Vec<Case> {
    let group = "security: capabilities";
    vec![
        case(group, "the default set is the usual fourteen", caps_default),
        case(group, "one is added", caps_add),
        case(group, "one is dropped", caps_drop),
        case(group, "drop ALL leaves none, and one can be added to it", caps_drop_all),
        case(group, "add ALL gives all that the host has", caps_add_all),
        case(group, "names work with and without CAP_, in any case", caps_names),
        case(group, "one that does not exist is refused and named", caps_unknown),
        case(group, "a user other than root has none in effect", caps_user),
        case(group, "ambient capabilities reach a user other than root", caps_ambient),
    ]
}

fn roots() -> Vec<Case> {
    let group = "security: files and privilege";
    vec![
        case(group, "the root can be written by default", root_rw),
        case(group, "readonly_rootfs: it cannot", root_ro),
        case(group, "masked paths are empty", masked),
        case(group, "read-only paths cannot be written", readonly_paths),
        case(group, "no masked and read-only paths: nothing is hidden", unmasked),
        case(group, "/sys and the cgroups are read-only", sys_ro),
        case(group, "the devices of every container are there and no others", devices_default),
        case(group, "privileged: all capabilities, devices, a writable /sys, no seccomp", privileged),
        case(group, "privileged in a pod that is not is refused", privileged_refused),
        case(group, "no_new_privs is set when asked for", no_new_privs),
        case(group, "no_new_privs is not set otherwise", new_privs),
    ]
}

async fn with_pid(t: &T, mode: NamespaceMode) -> Result<(super::super::context::Pod, String)> {
    let mut config = t.pod();
    pod_security(&mut config).namespace_options.get_or_insert_default().pid = mode.into();
    let pod = t.run(&config).await?;
    let mut config = t.shell(IDLE);
    security(&mut config).namespace_options.get_or_insert_default().pid = mode.into();
    let id = t.launch(&pod, &config).await?;
    Ok((pod, id))
}

async fn pid_container(t: T) -> Result<()> {
    let (pod, first) = with_pid(&t, NamespaceMode::Container).await?;
    let text = t.output_in(&pod, "ps -o pid,args", |_| ()).await?;
    anyhow::ensure!(!text.contains("sleep 3600"), "the other container's processes: {text}");
    holds("PID 1", &t.sh(&first, "tr '\\000' ' ' </proc/1/cmdline").await?, "/bin/sh -c trap")
}

async fn pid_pod(t: T) -> Result<()> {
    let (pod, first) = with_pid(&t, NamespaceMode::Pod).await?;
    let text = t
        .output_in(&pod, "ps -o pid,args; readlink /proc/self/ns/pid", |config| {
            security(config).namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
        })
        .await?;
    holds("ps", &text, "sleep 3600")?;
    holds("the namespace", &text, &t.sh(&first, "readlink /proc/self/ns/pid").await?)?;
    let one = t.sh(&first, "tr '\\000' ' ' </proc/1/cmdline").await?;
    anyhow::ensure!(!one.contains("trap"), "PID 1 is the container's command: {one}");
    Ok(())
}

async fn pid_node(t: T) -> Result<()> {
    let (_, id) = with_pid(&t, NamespaceMode::Node).await?;
    same("the namespace", t.sh(&id, "readlink /proc/self/ns/pid").await?, own("pid")?)
}

/// A namespace of this process, which is the host's.
fn own(kind: &str) -> Result<String> {
    Ok(std::fs::read_link(format!("/proc/self/ns/{kind}"))?.display().to_string())
}

async fn pid_target(t: T) -> Result<()> {
    let (pod, first) = with_pid(&t, NamespaceMode::Container).await?;
    let text = t
        .output_in(&pod, "ps -o args; readlink /proc/self/ns/pid", |config| {
            let options = security(config).namespace_options.get_or_insert_default();
            (options.pid, options.target_id) = (NamespaceMode::Target.into(), first.clone());
        })
        .await?;
    holds("ps", &text, "sleep 3600")?;
    holds("the namespace", &text, &t.sh(&first, "readlink /proc/self/ns/pid").await?)
}

async fn pid_target_unknown(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("true");
    let options = security(&mut config).namespace_options.get_or_insert_default();
    (options.pid, options.target_id) = (NamespaceMode::Target.into(), "nothing".to_owned());
    refused("a target that does not exist", t.try_create(&pod, &config).await).map(drop)
}

async fn ipc(t: T) -> Result<()> {
    let script = "readlink /proc/self/ns/ipc";
    anyhow::ensure!(t.output(script, |_| ()).await?.trim() != own("ipc")?, "POD is the host's");
    let mut config = t.pod();
    pod_security(&mut config).namespace_options.get_or_insert_default().ipc = NamespaceMode::Node.into();
    let pod = t.run(&config).await?;
    let text = t
        .output_in(&pod, script, |config| {
            security(config).namespace_options.get_or_insert_default().ipc = NamespaceMode::Node.into();
        })
        .await?;
    same("NODE", text.trim(), own("ipc")?)
}

async fn network(t: T) -> Result<()> {
    let text = t.output("readlink /proc/self/ns/net", |_| ()).await?;
    anyhow::ensure!(text.trim() != own("net")?, "POD is the host's");
    let mut config = t.pod();
    super::network::host_network(&mut config);
    let pod = t.run(&config).await?;
    let text = t
        .output_in(&pod, "readlink /proc/self/ns/net", |config| {
            security(config).namespace_options.get_or_insert_default().network = NamespaceMode::Node.into();
        })
        .await?;
    same("NODE", text.trim(), own("net")?)
}

async fn mount_namespace(t: T) -> Result<()> {
    let text = t.output("readlink /proc/self/ns/mnt; readlink /proc/self/ns/uts", |_| ()).await?;
    for kind in ["mnt", "uts"] {
        anyhow::ensure!(!text.contains(&own(kind)?), "{kind} is the host's: {text}");
    }
    Ok(())
}

const ID: &str = "echo $(id -u):$(id -g):$(id -G)";

async fn identity(t: &T, change: impl FnOnce(&mut v1::ContainerConfig)) -> Result<String> {
    Ok(t.output(ID, change).await?.trim().to_owned())
}

#[allow(clippy::unnecessary_wraps, reason = "the fields it is for are optional")]
fn number(value: i64) -> Option<v1::Int64Value> {
    Some(v1::Int64Value { value })
}

async fn user_default(t: T) -> Result<()> {
    let found = identity(&t, |_| ()).await?;
    anyhow::ensure!(found.starts_with("0:0:0"), "{found}");
    Ok(())
}

async fn user_number(t: T) -> Result<()> {
    same("1002", identity(&t, |c| security(c).run_as_user = number(1002)).await?.as_str(), "1002:1002:1002")?;
    same(
        "unknown to the image",
        identity(&t, |c| security(c).run_as_user = number(7777)).await?.as_str(),
        "7777:0:0",
    )
}

async fn user_and_group(t: T) -> Result<()> {
    let found = identity(&t, |config| {
        security(config).run_as_user = number(1002);
        security(config).run_as_group = number(4444);
    });
    same("the identity", found.await?.as_str(), "1002:4444:4444")
}

async fn user_name(t: T) -> Result<()> {
    let found = identity(&t, |config| security(config).run_as_username = "plain".to_owned()).await?;
    same("the identity", found.as_str(), "1002:1002:1002")
}

async fn user_unknown(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell(ID);
    security(&mut config).run_as_username = "nobody-has-this".to_owned();
    let result = match t.try_create(&pod, &config).await {
        Ok(id) => t.try_start(&id).await,
        Err(status) => Err(status),
    };
    refused("an unknown user", result).map(drop)
}

async fn group_alone(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell(ID);
    security(&mut config).run_as_group = number(4444);
    refused("a group without a user", t.try_create(&pod, &config).await).map(drop)
}

async fn user_of_image(t: T) -> Result<()> {
    for (name, wanted) in [
        ("user-uid", "1002:1002:1002"),
        ("user-name", "1000:1000:1000 50000"),
        ("user-pair", "1000:1002:1002 50000"),
    ] {
        let image = t.pull(&t.suite.catalog.reference(&format!("conformance/{name}:latest"))?).await?;
        let found = identity(&t, |config| config.image = Some(image_spec(&image))).await?;
        let short = wanted.strip_suffix(" 50000").filter(|_| name == "user-pair");
        anyhow::ensure!(
            found == wanted || Some(found.as_str()) == short,
            "{name}: {found}, expected {wanted}"
        );
    }
    Ok(())
}

async fn groups(t: T) -> Result<()> {
    let found = identity(&t, |config| {
        security(config).run_as_user = number(1002);
        security(config).supplemental_groups = vec![1234, 5678];
    });
    same("the identity", found.await?.as_str(), "1002:1002:1002 1234 5678")
}

async fn groups_merge(t: T) -> Result<()> {
    let found = identity(&t, |config| {
        security(config).run_as_user = number(1000);
        security(config).supplemental_groups = vec![1234];
    })
    .await?;
    let mut groups: Vec<&str> = found.rsplit(':').next().unwrap_or_default().split(' ').collect();
    groups.sort_unstable();
    same("the groups", groups, vec!["1000", "1234", "50000"])
}

async fn groups_strict(t: T) -> Result<()> {
    t.suite.facts.need_groups_policy()?;
    let found = identity(&t, |config| {
        let context = security(config);
        context.run_as_user = number(1000);
        context.supplemental_groups = vec![1234];
        context.supplemental_groups_policy = v1::SupplementalGroupsPolicy::Strict.into();
    })
    .await?;
    same("the identity", found.as_str(), "1000:1000:1000 1234")
}

async fn user_in_status(t: T) -> Result<()> {
    t.suite.facts.need_groups_policy()?;
    let (_, id) = t
        .idle_with(|config| {
            security(config).run_as_user = number(1000);
            security(config).supplemental_groups = vec![1234];
        })
        .await?;
    let user = t.status(&id).await?.user.and_then(|user| user.linux).context("no user in the status")?;
    same("uid and gid", (user.uid, user.gid), (1000, 1000))?;
    let mut groups = user.supplemental_groups;
    groups.retain(|group| *group != 1000);
    groups.sort_unstable();
    same("groups", groups, vec![1234, 50000])
}

/// One line of `/proc/self/status` as a number.
async fn mask(t: &T, field: &str, change: impl FnOnce(&mut v1::ContainerConfig)) -> Result<u64> {
    let text = t.output(&format!("grep {field}: /proc/self/status"), change).await?;
    let hex = text.split_whitespace().last().context("no value")?;
    u64::from_str_radix(hex, 16).with_context(|| format!("{field} is {hex:?}"))
}

/// chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, mknod,
/// audit_write, setfcap.
const DEFAULT: u64 = 0xa804_25fb;
const NET_ADMIN: u64 = 1 << 12;
const CHOWN: u64 = 1;

pub(super) fn capability(config: &mut v1::ContainerConfig, add: &[&str], drop: &[&str]) {
    security(config).capabilities = Some(v1::Capability {
        add_capabilities: strings(add),
        drop_capabilities: strings(drop),
        add_ambient_capabilities: Vec::new(),
    });
}

async fn caps_default(t: T) -> Result<()> {
    for field in ["CapEff", "CapPrm", "CapBnd"] {
        let found = mask(&t, field, |_| ()).await?;
        anyhow::ensure!(found == DEFAULT, "{field} is {found:x}, expected {DEFAULT:x}");
    }
    same("CapAmb", mask(&t, "CapAmb", |_| ()).await?, 0)
}

async fn caps_add(t: T) -> Result<()> {
    let found = mask(&t, "CapEff", |config| capability(config, &["NET_ADMIN"], &[])).await?;
    same("CapEff", found, DEFAULT | NET_ADMIN)
}

async fn caps_drop(t: T) -> Result<()> {
    let found = mask(&t, "CapEff", |config| capability(config, &[], &["CHOWN"])).await?;
    same("CapEff", found, DEFAULT & !CHOWN)
}

async fn caps_drop_all(t: T) -> Result<()> {
    same("CapEff", mask(&t, "CapEff", |config| capability(config, &[], &["ALL"])).await?, 0)?;
    same("CapBnd", mask(&t, "CapBnd", |config| capability(config, &["CHOWN"], &["ALL"])).await?, CHOWN)
}

async fn caps_add_all(t: T) -> Result<()> {
    let own = std::fs::read_to_string("/proc/self/status")?;
    let own = own.lines().find(|line| line.starts_with("CapBnd:")).context("CapBnd")?;
    let own = u64::from_str_radix(own.split_whitespace().last().context("a value")?, 16)?;
    let found = mask(&t, "CapEff", |config| capability(config, &["ALL"], &[])).await?;
    anyhow::ensure!(found & own == own || found == own, "{found:x}, the host has {own:x}");
    Ok(())
}

async fn caps_names(t: T) -> Result<()> {
    for name in ["NET_ADMIN", "net_admin", "CAP_NET_ADMIN"] {
        let found = mask(&t, "CapEff", |config| capability(config, &[name], &["ALL"])).await?;
        anyhow::ensure!(found == NET_ADMIN, "{name}: {found:x}");
    }
    Ok(())
}

async fn caps_unknown(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("true");
    capability(&mut config, &["NOBODY_HAS_THIS"], &[]);
    let result = match t.try_create(&pod, &config).await {
        Ok(id) => t.try_start(&id).await,
        Err(status) => Err(status),
    };
    holds("the error", refused("an unknown capability", result)?.message(), "NOBODY_HAS_THIS")
}

async fn caps_user(t: T) -> Result<()> {
    same("CapEff", mask(&t, "CapEff", |config| security(config).run_as_user = number(1000)).await?, 0)
}

async fn caps_ambient(t: T) -> Result<()> {
    let found = mask(&t, "CapEff", |config| {
        security(config).run_as_user = number(1000);
        security(config).capabilities = Some(v1::Capability {
            add_capabilities: strings(&["NET_ADMIN"]),
            add_ambient_capabilities: strings(&["NET_ADMIN"]),
            ..v1::Capability::default()
        });
    })
    .await?;
    same("CapEff", found, NET_ADMIN)
}

async fn root_rw(t: T) -> Result<()> {
    same("the file", t.output("echo x >/file && cat /file", |_| ()).await?.trim(), "x")
}

async fn root_ro(t: T) -> Result<()> {
    let script = "echo x 2>/dev/null >/file && echo written; echo x >/dev/shm/file && echo shm";
    let text = t.output(script, |config| security(config).readonly_rootfs = true).await?;
    same("what could be written", text.as_str(), "shm\n")
}

async fn masked(t: T) -> Result<()> {
    let script = "cat /proc/kcore 2>/dev/null | head -c 10 | wc -c; ls /sys/firmware | wc -l";
    same("bytes and files", t.output(script, |_| ()).await?.as_str(), "0\n0\n")
}

async fn readonly_paths(t: T) -> Result<()> {
    let script = "echo 0 2>/dev/null >/proc/sys/kernel/shm_rmid_forced && echo written; true";
    same("what could be written", t.output(script, |_| ()).await?.as_str(), "")
}

async fn unmasked(t: T) -> Result<()> {
    let script = "grep -c -E ' /proc/(kcore|sys|bus) ' /proc/self/mountinfo; true";
    let text = t
        .output(script, |config| {
            security(config).masked_paths.clear();
            security(config).readonly_paths.clear();
        })
        .await?;
    same("mounts over /proc", text.trim(), "0")
}

async fn sys_ro(t: T) -> Result<()> {
    // In version 1 the directory of the hierarchies is a tmpfs that nobody reads.
    let cgroup = if t.suite.facts.cgroup2 { "" } else { "memory/" };
    let script = format!(
        "mkdir /sys/fs/cgroup/{cgroup}x 2>/dev/null && echo made; grep -c ' /sys ro,' /proc/self/mountinfo"
    );
    same("/sys", t.output(&script, |_| ()).await?.trim(), "1")
}

async fn devices_default(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let found = t.sh(&id, "ls /dev").await?;
    let mut names: Vec<&str> = found.lines().collect();
    names.sort_unstable();
    let usual = [
        "core",
        "fd",
        "full",
        "mqueue",
        "null",
        "ptmx",
        "pts",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "termination-log",
        "tty",
        "urandom",
        "zero",
        "console",
    ];
    for name in &names {
        anyhow::ensure!(usual.contains(name), "/dev/{name} is in every container: {names:?}");
    }
    for name in ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "fd", "stdin"] {
        anyhow::ensure!(names.contains(&name), "/dev/{name} is missing: {names:?}");
    }
    // And no other can be made and used.
    let made = t.sh(
        &id,
        "mknod /kmsg c 1 11 && head -c 0 /kmsg 2>&1; head -c 1 /kmsg >/dev/null 2>&1 && echo used; true",
    );
    anyhow::ensure!(!made.await?.contains("used"), "a device of the host can be used");
    Ok(())
}

pub(super) async fn privileged_pod(t: &T) -> Result<super::super::context::Pod> {
    let mut config = t.pod();
    pod_security(&mut config).privileged = true;
    t.run(&config).await
}

pub(super) fn make_privileged(config: &mut v1::ContainerConfig) {
    let context = security(config);
    context.privileged = true;
    context.masked_paths.clear();
    context.readonly_paths.clear();
}

async fn privileged(t: T) -> Result<()> {
    let pod = privileged_pod(&t).await?;
    let script = "grep -E '^(CapEff|Seccomp):' /proc/self/status; grep -c ' /sys ro,' /proc/self/mountinfo; ls /dev/kmsg";
    let text = t.output_in(&pod, &format!("{script}; true"), make_privileged).await?;
    let own = std::fs::read_to_string("/proc/self/status")?;
    let bounding = own.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).context("CapBnd")?;
    for wanted in [format!("CapEff:\t{bounding}"), "Seccomp:\t0".to_owned(), "\n0\n".to_owned()] {
        holds("the process", &text, &wanted)?;
    }
    if std::path::Path::new("/dev/kmsg").exists() {
        holds("the devices", &text, "/dev/kmsg\n")?;
    }
    Ok(())
}

async fn privileged_refused(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("true");
    make_privileged(&mut config);
    refused("a privileged container in another pod", t.try_create(&pod, &config).await).map(drop)
}

async fn privileges_flag(t: &T, no_new_privs: bool) -> Result<String> {
    let script = "grep NoNewPrivs /proc/self/status";
    Ok(t.output(script, |config| security(config).no_new_privs = no_new_privs).await?.trim().to_owned())
}

async fn no_new_privs(t: T) -> Result<()> {
    same("the flag", privileges_flag(&t, true).await?.as_str(), "NoNewPrivs:\t1")
}

async fn new_privs(t: T) -> Result<()> {
    same("the flag", privileges_flag(&t, false).await?.as_str(), "NoNewPrivs:\t0")
}

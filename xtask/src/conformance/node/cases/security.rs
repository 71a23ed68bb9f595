//! Security contexts.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same, skip};
use super::super::context::T;
use super::super::live::container;
use super::super::pod::Pod;
use super::prints;

const GROUP: &str = "Security Context";

/// The effective capabilities as a number in hexadecimal.
const CAPABILITIES: &str = "awk '/^CapEff/ {print $2}' /proc/self/status";

fn pod_with(pod: Pod, context: Value) -> Pod {
    pod.spec(json!({"securityContext": context}))
}

fn main_with(pod: Pod, context: Value) -> Pod {
    pod.main(json!({"securityContext": context}))
}

pub(super) fn cases() -> Vec<Case<T>> {
    vec![
        prints(
            GROUP,
            "runAsUser and runAsGroup of the pod count",
            "id -u; id -g",
            |pod| pod_with(pod, json!({"runAsUser": 1001, "runAsGroup": 2002})),
            "1001\n2002",
        ),
        prints(
            GROUP,
            "runAsUser of the container goes before the pod's",
            "id -u; id -g",
            |pod| {
                main_with(
                    pod_with(pod, json!({"runAsUser": 1001, "runAsGroup": 2002})),
                    json!({"runAsUser": 1003}),
                )
            },
            "1003\n2002",
        ),
        prints(
            GROUP,
            "supplementalGroups and fsGroup are groups of every container",
            "id -G | tr ' ' '\\n' | sort -n | tr '\\n' ' '",
            |pod| {
                pod_with(
                    pod,
                    json!({"runAsUser": 1001, "runAsGroup": 2000, "supplementalGroups": [3003, 3004], "fsGroup": 4000}),
                )
            },
            "2000 3003 3004 4000",
        ),
        case(GROUP, "runAsNonRoot refuses an image that runs as root", non_root_image),
        case(GROUP, "runAsNonRoot refuses runAsUser 0", non_root_user),
        prints(
            GROUP,
            "runAsNonRoot lets another user run",
            "id -u",
            |pod| pod_with(pod, json!({"runAsNonRoot": true, "runAsUser": 1001})),
            "1001",
        ),
        case(GROUP, "the user of a container is told in its status", user_told),
        case(GROUP, "a container has the runtime's default capabilities", default_capabilities),
        prints(
            GROUP,
            "all capabilities can be dropped",
            CAPABILITIES,
            |pod| main_with(pod, json!({"capabilities": {"drop": ["ALL"]}})),
            "0000000000000000",
        ),
        prints(
            GROUP,
            "a capability can be added to none",
            CAPABILITIES,
            |pod| main_with(pod, json!({"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}})),
            "0000000000001000",
        ),
        prints(
            GROUP,
            "a capability that was dropped is missed",
            "chown 1 /tmp 2>/dev/null || echo refused",
            |pod| main_with(pod, json!({"capabilities": {"drop": ["CHOWN"]}})),
            "refused",
        ),
        case(GROUP, "a privileged container has all capabilities and the node's devices", privileged),
        prints(
            GROUP,
            "a container that is not privileged cannot mount",
            "mount -t tmpfs x /mnt 2>/dev/null || mount -t tmpfs x /tmp 2>/dev/null || echo refused",
            |pod| pod,
            "refused",
        ),
        prints(
            GROUP,
            "readOnlyRootFilesystem keeps the root, not the volumes",
            "touch /file 2>/dev/null || echo refused; touch /v/dir/file && echo written",
            |pod| {
                main_with(pod, json!({"readOnlyRootFilesystem": true})).volume("dir", json!({"emptyDir": {}}))
            },
            "refused\nwritten",
        ),
        prints(
            GROUP,
            "without it the root can be written",
            "touch /file && echo written",
            |pod| pod,
            "written",
        ),
        prints(
            GROUP,
            "allowPrivilegeEscalation false sets no_new_privs",
            "awk '/^NoNewPrivs/ {print $2}' /proc/self/status",
            |pod| main_with(pod, json!({"allowPrivilegeEscalation": false})),
            "1",
        ),
        prints(
            GROUP,
            "without it no_new_privs is not set",
            "awk '/^NoNewPrivs/ {print $2}' /proc/self/status",
            |pod| pod,
            "0",
        ),
        case(GROUP, "allowPrivilegeEscalation false of a privileged container is refused", escalation),
        prints(
            GROUP,
            "seccomp RuntimeDefault filters calls",
            "awk '/^Seccomp:/ {print $2}' /proc/self/status; unshare -U true 2>/dev/null || echo refused",
            |pod| pod_with(pod, json!({"seccompProfile": {"type": "RuntimeDefault"}})),
            "2\nrefused",
        ),
        prints(
            GROUP,
            "seccomp Unconfined filters nothing",
            "awk '/^Seccomp:/ {print $2}' /proc/self/status",
            |pod| pod_with(pod, json!({"seccompProfile": {"type": "Unconfined"}})),
            "0",
        ),
        prints(
            GROUP,
            "seccomp of the container goes before the pod's",
            "awk '/^Seccomp:/ {print $2}' /proc/self/status",
            |pod| {
                main_with(
                    pod_with(pod, json!({"seccompProfile": {"type": "Unconfined"}})),
                    json!({"seccompProfile": {"type": "RuntimeDefault"}}),
                )
            },
            "2",
        ),
        case(GROUP, "a seccomp profile that the node lacks is told", no_profile),
        prints(
            GROUP,
            "parts of /proc are masked",
            "test -s /proc/kcore && echo seen; dd if=/proc/kcore of=/dev/null bs=1 count=1 2>/dev/null | wc -c; touch /proc/sys/kernel/hostname 2>/dev/null || echo kept",
            |pod| pod,
            "0\nkept",
        ),
        case(GROUP, "procMount Unmasked shows all of /proc to a pod with users of its own", unmasked),
        case(GROUP, "procMount Unmasked needs users of its own", unmasked_refused),
        case(GROUP, "hostUsers false gives the pod users of its own", own_users),
        case(GROUP, "two pods with users of their own have different ones", users_differ),
        case(GROUP, "the policy Strict keeps groups of the image away", strict_groups),
        prints(
            GROUP,
            "processes of other containers are not seen",
            "ps -o args | grep -c '[s]leep 3601'; true",
            |pod| pod.beside("other", "timeout 5 sleep 3601; true", json!({})),
            "0",
        ),
        case(
            GROUP,
            "shareProcessNamespace shows the pod's processes to all its containers",
            shared_processes,
        ),
        case(GROUP, "hostPID shows the node's processes", host_pid),
        case(GROUP, "without hostPID a container's first process is its own", own_pid),
        case(GROUP, "hostIPC shares the node's namespace, which a pod has for itself otherwise", host_ipc),
        case(GROUP, "containers of a pod share its IPC namespace", shared_ipc),
        prints(
            GROUP,
            "/dev has the usual devices",
            "cd /dev; for f in null zero full random urandom tty; do test -c $f || echo no $f; done; test -d shm && df -k /dev/shm | awk 'END {print $(NF-4)}'",
            |pod| pod,
            "65536",
        ),
    ]
}

async fn non_root_image(t: T) -> Result<()> {
    let live = t.run(pod_with(t.idle(), json!({"runAsNonRoot": true}))).await?;
    let message = live.waiting("main", "CreateContainerConfigError").await?;
    holds("the message", &message, "container has runAsNonRoot and image will run as root (pod: ")?;
    live.event("Failed", "Error: container has runAsNonRoot and image will run as root").await.map(drop)
}

async fn non_root_user(t: T) -> Result<()> {
    let live = t.run(pod_with(t.idle(), json!({"runAsNonRoot": true, "runAsUser": 0}))).await?;
    let message = live.waiting("main", "CreateContainerConfigError").await?;
    holds("the message", &message, "container's runAsUser breaks non-root policy (pod: ")
}

async fn user_told(t: T) -> Result<()> {
    let pod =
        pod_with(t.idle(), json!({"runAsUser": 1001, "runAsGroup": 2002, "supplementalGroups": [3003]}));
    let live = t.ready(pod).await?;
    let pod = live.ready().await?;
    let user = &container(&pod, "main")["user"]["linux"];
    if user.is_null() && t.suite().node_object["status"]["features"]["supplementalGroupsPolicy"] != true {
        return skip("the node's runtime does not tell users");
    }
    same("uid", &user["uid"], 1001)?;
    same("gid", &user["gid"], 2002)?;
    ensure!(user["supplementalGroups"].as_array().is_some_and(|all| all.contains(&json!(3003))), "{user}");
    Ok(())
}

async fn default_capabilities(t: T) -> Result<()> {
    let output = t.output(t.pod(CAPABILITIES)).await?;
    let set = u64::from_str_radix(output.trim(), 16)?;
    // CHOWN, KILL and NET_BIND_SERVICE yes; NET_ADMIN, SYS_ADMIN and SYS_PTRACE no.
    ensure!([0, 5, 10].iter().all(|bit| set >> bit & 1 == 1), "too few: {output}");
    ensure!([12, 21, 19].iter().all(|bit| set >> bit & 1 == 0), "too many: {output}");
    Ok(())
}

async fn privileged(t: T) -> Result<()> {
    let script = "awk '/^CapEff|^CapBnd/ {print $2}' /proc/self/status; ls /dev | wc -l; mount -t tmpfs x /tmp && echo mounted";
    let plain: u32 = t.output(t.pod("ls /dev | wc -l")).await?.trim().parse()?;
    let output = t.output(main_with(t.pod(script), json!({"privileged": true}))).await?;
    let lines: Vec<&str> = output.lines().collect();
    let [effective, bounding, devices, "mounted"] = lines.as_slice() else { anyhow::bail!("{output:?}") };
    same("the effective capabilities", effective, bounding)?;
    ensure!(devices.parse::<u32>()? > plain, "{devices} devices, {plain} in an everyday container");
    ensure!(u64::from_str_radix(effective, 16)? >> 21 & 1 == 1, "no SYS_ADMIN: {effective}");
    Ok(())
}

async fn escalation(t: T) -> Result<()> {
    let refused = t
        .refused(main_with(t.idle(), json!({"privileged": true, "allowPrivilegeEscalation": false})))
        .await?;
    same("the code", refused.code, 422)?;
    holds(
        "the message",
        &refused.message,
        "cannot set `allowPrivilegeEscalation` to false and `privileged` to true",
    )
}

async fn no_profile(t: T) -> Result<()> {
    let profile =
        json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "no/such/profile.json"}});
    let live = t.run(pod_with(t.idle(), profile)).await?;
    live.event("Failed", "no/such/profile.json").await?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

/// Skips unless the node's runtime has user namespaces.
fn need_users(t: &T) -> Result<()> {
    let handlers = t.suite().node_object["status"]["runtimeHandlers"].as_array();
    let mut all = handlers.into_iter().flatten();
    let default = |handler: &Value| handler["name"].as_str().unwrap_or_default().is_empty();
    if all.any(|handler| default(handler) && handler["features"]["userNamespaces"] == true) {
        return Ok(());
    }
    skip("the node's status says no to user namespaces of the default runtime handler")
}

async fn unmasked(t: T) -> Result<()> {
    need_users(&t)?;
    let pod = t.pod("grep -c ' /proc/kcore ' /proc/mounts; true").spec(json!({"hostUsers": false}));
    let output = t.output(main_with(pod, json!({"procMount": "Unmasked"}))).await?;
    same("masks", output.trim(), "0")
}

async fn unmasked_refused(t: T) -> Result<()> {
    let refused = t.refused(main_with(t.idle(), json!({"procMount": "Unmasked"}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "procMount")
}

async fn own_users(t: T) -> Result<()> {
    need_users(&t)?;
    let pod = t.pod("id -u; cat /proc/self/uid_map; touch /v/dir/file && stat -c %u /v/dir/file");
    let output =
        t.output(pod.spec(json!({"hostUsers": false})).volume("dir", json!({"emptyDir": {}}))).await?;
    let words: Vec<&str> = output.split_whitespace().collect();
    let ["0", "0", first, "65536", "0"] = words.as_slice() else { anyhow::bail!("{output:?}") };
    ensure!(first.parse::<u32>()? >= 65536, "the pod's root is the node's {first}");
    Ok(())
}

async fn users_differ(t: T) -> Result<()> {
    need_users(&t)?;
    let pod = || t.idle().spec(json!({"hostUsers": false}));
    let (one, two) = (t.ready(pod()).await?, t.ready(pod()).await?);
    let (one, two) = (one.exec("cat /proc/self/uid_map").await?, two.exec("cat /proc/self/uid_map").await?);
    ensure!(one != two, "both have {one:?}");
    Ok(())
}

async fn strict_groups(t: T) -> Result<()> {
    if t.suite().node_object["status"]["features"]["supplementalGroupsPolicy"] != true {
        return skip("the node's status says no to supplementalGroupsPolicy");
    }
    let context = json!({"runAsUser": 0, "supplementalGroups": [3003], "supplementalGroupsPolicy": "Strict"});
    let output = t.output(pod_with(t.pod("id -G"), context)).await?;
    same("the groups", output.trim(), "0 3003")
}

async fn shared_processes(t: T) -> Result<()> {
    let pod =
        t.idle().spec(json!({"shareProcessNamespace": true})).beside("other", "exec sleep 3602", json!({}));
    let live = t.ready(pod).await?;
    live.exec_until("ps -o args | grep -q '[s]leep 3602'").await?;
    // The first process is nobody's of the containers.
    let first = live.exec("cat /proc/1/cmdline | tr '\\0' ' '").await?;
    ensure!(!first.contains("sleep") && !first.contains("sh -c"), "the first process is {first:?}");
    Ok(())
}

async fn host_pid(t: T) -> Result<()> {
    let spec = json!({"hostPID": true});
    let (one, two) = (t.ready(t.idle().spec(spec.clone())).await?, t.ready(t.idle().spec(spec)).await?);
    let namespace = "readlink /proc/self/ns/pid";
    same("the namespace", one.exec(namespace).await?, two.exec(namespace).await?)?;
    one.exec("test $$ -gt 1 && ps -o args | grep -q '[s]leep 3600'").await.map(drop)
}

async fn own_pid(t: T) -> Result<()> {
    same("the process id", t.output(t.pod("echo $$$$")).await?.trim(), "1")
}

async fn host_ipc(t: T) -> Result<()> {
    let namespace = "readlink /proc/self/ns/ipc";
    let shared = || t.pod(namespace).spec(json!({"hostIPC": true}));
    let (one, two) = (t.output(shared()).await?, t.output(shared()).await?);
    let own = t.output(t.pod(namespace)).await?;
    same("the namespace", &one, &two)?;
    ensure!(own != one, "an everyday pod has the node's");
    Ok(())
}

async fn shared_ipc(t: T) -> Result<()> {
    let live = t.ready(t.idle().beside("other", "exec sleep 3603", json!({}))).await?;
    let other = live.exec_in("other", "readlink /proc/self/ns/ipc").await?.text();
    same("the namespace", live.exec("readlink /proc/self/ns/ipc").await?.as_str(), other.trim())?;
    live.exec("echo said > /dev/shm/file").await?;
    same("the shared memory", live.exec_in("other", "cat /dev/shm/file").await?.text().as_str(), "said\n")
}

//! emptyDir volumes.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same};
use super::super::context::{IDLE, T};
use super::super::live::container;
use super::super::pod::Pod;
use super::prints;

const GROUP: &str = "EmptyDir volumes";

/// Writes as whoever it is, and tells mode, owner and what it wrote.
const WRITES: &str = "cd /v/dir; stat -c %a .; echo mine > file; cat file; stat -c '%a %u %g' file";

fn disk(pod: Pod) -> Pod {
    pod.volume("dir", json!({"emptyDir": {}}))
}

fn memory(pod: Pod) -> Pod {
    pod.volume("dir", json!({"emptyDir": {"medium": "Memory"}}))
}

fn as_user(pod: Pod) -> Pod {
    pod.spec(json!({"securityContext": {"runAsUser": 1001}}))
}

pub(super) fn cases() -> Vec<Case<T>> {
    vec![
        prints(
            GROUP,
            "a directory on disk is there for all, with mode 0777",
            WRITES,
            disk,
            "777\nmine\n644 0 0",
        ),
        prints(
            GROUP,
            "a directory on disk can be written by a user who is not root",
            WRITES,
            |pod| disk(as_user(pod)),
            "777\nmine\n644 1001 0",
        ),
        prints(
            GROUP,
            "a directory in memory is there for all, with mode 0777",
            WRITES,
            memory,
            "777\nmine\n644 0 0",
        ),
        prints(
            GROUP,
            "a directory in memory can be written by a user who is not root",
            WRITES,
            |pod| memory(as_user(pod)),
            "777\nmine\n644 1001 0",
        ),
        prints(
            GROUP,
            "medium Memory is a tmpfs",
            "awk '$2 == \"/v/dir\" {print $3}' /proc/mounts",
            memory,
            "tmpfs",
        ),
        prints(
            GROUP,
            "the default medium is none",
            "awk '$2 == \"/v/dir\" && $3 == \"tmpfs\"' /proc/mounts; echo",
            disk,
            "",
        ),
        prints(
            GROUP,
            "a size limit is the size of what is in memory",
            "df -k /v/dir | awk 'END {print $(NF-4)}'; head -c 3000000 /dev/zero > /v/dir/file 2>/dev/null || echo full",
            |pod| pod.volume("dir", json!({"emptyDir": {"medium": "Memory", "sizeLimit": "2Mi"}})),
            "2048\nfull",
        ),
        prints(
            GROUP,
            "fsGroup owns the directory, and new files in it",
            "cd /v/dir; touch file; stat -c %g . file; test -g . && echo setgid; id -G",
            |pod| {
                disk(pod).spec(
                    json!({"securityContext": {"runAsUser": 1001, "runAsGroup": 1002, "fsGroup": 1003}}),
                )
            },
            "1003\n1003\nsetgid\n1002 1003",
        ),
        case(GROUP, "containers of a pod share it", shared),
        case(GROUP, "it survives a restart of the container", survives),
        case(GROUP, "it is empty at first, also under a name that was used before", fresh),
        case(GROUP, "a pod that writes more than the size limit is evicted", over_limit),
        prints(
            GROUP,
            "a mount can be read-only",
            "touch /v/dir/file 2>/dev/null || echo refused",
            |pod| {
                pod.volume_at(
                    "dir",
                    json!({"emptyDir": {}}),
                    json!({"mountPath": "/v/dir", "readOnly": true}),
                )
            },
            "refused",
        ),
        case(GROUP, "a mount of a volume that the pod does not have is refused", no_volume),
    ]
}

fn mount() -> Value {
    json!({"volumeMounts": [{"name": "dir", "mountPath": "/other"}]})
}

async fn shared(t: T) -> Result<()> {
    let script = "until test -s /v/dir/file; do sleep 0.1; done; cat /v/dir/file";
    let pod = disk(t.pod(script)).beside(
        "writer",
        "echo from beside > /other/new; mv /other/new /other/file",
        mount(),
    );
    same("the output", t.output(pod).await?.as_str(), "from beside\n")
}

async fn survives(t: T) -> Result<()> {
    let script = format!("echo run >> /v/dir/runs; test $(wc -l < /v/dir/runs) -ge 2 || exit 1; {IDLE}");
    let live = t.run(disk(t.pod(&script)).always()).await?;
    live.restarted("main", 1).await?;
    live.ready().await?;
    same("the runs", live.exec("wc -l < /v/dir/runs").await?.as_str(), "2")
}

async fn fresh(t: T) -> Result<()> {
    let first = t.ready(disk(t.idle()).named("same")).await?;
    first.exec("echo x > /v/dir/file").await?;
    first.delete(1).await?;
    first.gone().await?;
    let second = t.ready(disk(t.idle()).named("same")).await?;
    same("the files", second.exec("ls -A /v/dir").await?.as_str(), "")
}

async fn over_limit(t: T) -> Result<()> {
    let script = format!("head -c 4000000 /dev/zero > /v/dir/file; {IDLE}");
    let pod = t.pod(&script).volume("dir", json!({"emptyDir": {"sizeLimit": "1Mi"}}));
    let live = t.run(pod).await?;
    let pod = live.failed("Evicted").await?;
    let message = "Usage of EmptyDir volume \"dir\" exceeds the limit \"1Mi\". ";
    same("the message", &pod["status"]["message"], message)?;
    let target = super::super::live::condition(&pod, "DisruptionTarget");
    same("DisruptionTarget", &target["status"], "True")?;
    same("its reason", &target["reason"], "TerminationByKubelet")?;
    live.event("Evicted", message).await?;
    let pod = live
        .until("its container ended", |pod| container(pod, "main")["state"]["terminated"].is_object())
        .await?;
    ensure!(pod["status"]["phase"] == "Failed", "the phase was taken back");
    Ok(())
}

async fn no_volume(t: T) -> Result<()> {
    let refused =
        t.refused(t.idle().main(json!({"volumeMounts": [{"name": "none", "mountPath": "/x"}]}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "spec.containers[0].volumeMounts[0].name: Not found: \"none\"")
}

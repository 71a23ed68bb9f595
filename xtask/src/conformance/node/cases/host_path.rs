//! hostPath volumes, with each type's check.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, same};
use super::super::context::T;
use super::super::live::container;

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "HostPath";
    vec![
        case(group, "without a type the path is mounted as it is", plain),
        case(group, "DirectoryOrCreate makes a directory of mode 0755", directory_or_create),
        case(group, "FileOrCreate makes a file of mode 0644", file_or_create),
        case(group, "Directory takes a directory", |t| takes(t, "/tmp", "Directory", "test -d /v/host")),
        case(group, "File takes a file", |t| takes(t, "/etc/passwd", "File", "grep -q root /v/host")),
        case(group, "CharDevice takes a character device", |t| {
            takes(t, "/dev/null", "CharDevice", "test -c /v/host")
        }),
        case(group, "Socket takes a socket", socket),
        case(group, "Directory refuses a path that is missing", |t| {
            refuses(t, "/tmp/no-such-path", "Directory", "is not a directory")
        }),
        case(group, "Directory refuses a file", |t| {
            refuses(t, "/etc/passwd", "Directory", "is not a directory")
        }),
        case(group, "File refuses a directory", |t| refuses(t, "/tmp", "File", "is not a file")),
        case(group, "Socket refuses a file", |t| refuses(t, "/etc/passwd", "Socket", "is not a socket file")),
        case(group, "CharDevice refuses a directory", |t| {
            refuses(t, "/tmp", "CharDevice", "is not a character device")
        }),
        case(group, "BlockDevice refuses a character device", |t| {
            refuses(t, "/dev/null", "BlockDevice", "is not a block device")
        }),
        case(group, "a path with .. is refused", dots),
        case(group, "a read-only mount cannot be written", read_only),
        case(group, "two pods see each other's files", between_pods),
    ]
}

fn volume(path: &str, kind: &str) -> Value {
    json!({"hostPath": {"path": path, "type": kind}})
}

async fn plain(t: T) -> Result<()> {
    let output = t.output(t.pod("grep -c ^root: /v/host/passwd").volume("host", volume("/etc", ""))).await?;
    same("the output", output.trim(), "1")
}

async fn takes(t: T, path: &str, kind: &str, script: &str) -> Result<()> {
    t.output(t.pod(script).volume("host", volume(path, kind))).await.map(drop)
}

async fn refuses(t: T, path: &str, kind: &str, why: &str) -> Result<()> {
    let live = t.run(t.idle().volume("host", volume(path, kind))).await?;
    live.event("FailedMount", &format!("hostPath type check failed: {path} {why}")).await?;
    live.waiting("main", "ContainerCreating").await?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

/// Removes what a case left in the node's /tmp.
async fn sweep(t: &T, name: &str) -> Result<()> {
    t.output(t.pod(&format!("rm -r /v/tmp/{name}")).volume("tmp", volume("/tmp", "Directory")))
        .await
        .map(drop)
}

async fn directory_or_create(t: T) -> Result<()> {
    let name = t.unique("made");
    let path = format!("/tmp/{name}/deep");
    let pod = t.pod("stat -c '%F %a %u' /v/host").volume("host", volume(&path, "DirectoryOrCreate"));
    let output = t.output(pod).await;
    sweep(&t, &name).await?;
    same("the output", output?.trim(), "directory 755 0")
}

async fn file_or_create(t: T) -> Result<()> {
    let name = t.unique("made-file");
    let path = format!("/tmp/{name}");
    let pod = t.pod("stat -c '%F %a %u' /v/host").volume("host", volume(&path, "FileOrCreate"));
    let output = t.output(pod).await;
    sweep(&t, &name).await?;
    same("the output", output?.trim(), "regular empty file 644 0")
}

async fn socket(t: T) -> Result<()> {
    let name = t.unique("socket");
    let path = format!("/tmp/{name}");
    // syslogd's socket; the pod's /dev is a directory of the node for it.
    let pod =
        t.idle().volume_at("dir", volume(&path, "DirectoryOrCreate"), json!({"mountPath": "/dev/shared"}));
    let maker = t.ready(pod).await?;
    maker.exec("ln -sf /dev/shared/log /dev/log; syslogd -O /dev/null").await?;
    maker.exec_until("test -S /dev/shared/log").await?;
    let result = takes(t.clone(), &format!("{path}/log"), "Socket", "test -S /v/host").await;
    sweep(&t, &name).await?;
    result
}

async fn dots(t: T) -> Result<()> {
    let refused = t.refused(t.idle().volume("host", volume("/tmp/../etc", ""))).await?;
    same("the code", refused.code, 422)?;
    super::super::super::case::holds("the message", &refused.message, "must not contain '..'")
}

async fn read_only(t: T) -> Result<()> {
    let pod = t.pod("touch /v/host/file 2>/dev/null || echo refused");
    let mount = json!({"mountPath": "/v/host", "readOnly": true});
    let output = t.output(pod.volume_at("host", volume("/tmp", "Directory"), mount)).await?;
    same("the output", output.trim(), "refused")
}

async fn between_pods(t: T) -> Result<()> {
    let name = t.unique("shared");
    let path = format!("/tmp/{name}");
    let of = |script: &str| t.pod(script).volume("host", volume(&path, "DirectoryOrCreate"));
    let (writes, reads) = (of("echo said > /v/host/file"), of("cat /v/host/file"));
    t.output(writes).await?;
    let output = t.output(reads).await;
    sweep(&t, &name).await?;
    let output = output?;
    ensure!(output == "said\n", "the other pod reads {output:?}");
    Ok(())
}

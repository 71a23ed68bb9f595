//! Mounts of a part of a volume.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same};
use super::super::context::{IDLE, T};
use super::super::live::container;
use super::super::pod::Pod;

pub(super) fn cases() -> Vec<Case<T>> {
    let (group, expansion) = ("Subpath", "Variable Expansion");
    vec![
        case(group, "a file of a ConfigMap is mounted alone", config_map_file),
        case(group, "a file of a Secret is mounted alone", secret_file),
        case(group, "a directory that is missing is made", made),
        case(group, "containers see only their own part", parts),
        case(group, "it is the same directory after a restart of the container", restart),
        case(group, "a read-only part cannot be written", read_only),
        case(group, "a mounted file does not follow changes of its ConfigMap", no_updates),
        case(group, "a link inside of the volume is followed", link_inside),
        case(group, "a link out of the volume is refused", |t| link_out(t, "ln -s /etc /v/dir/escape")),
        case(group, "a link out of the volume by .. is refused", |t| {
            link_out(t, "ln -s ../../../../../../../../etc /v/dir/escape")
        }),
        case(group, "a link on the way out of the volume is refused", |t| {
            link_out(t, "ln -s / /v/dir/away; ln -s away/etc /v/dir/escape")
        }),
        case(group, "an absolute path is refused", absolute),
        case(group, "a path with .. is refused", dots),
        case(expansion, "subPathExpr takes variables of the container", expression),
        case(expansion, "subPathExpr takes variables that other variables make", expression_nested),
        case(expansion, "subPathExpr with backticks is no command", expression_backticks),
        case(expansion, "subPathExpr that becomes an absolute path is refused", expression_absolute),
        case(expansion, "subPathExpr that becomes a path with .. is refused", expression_dots),
        case(expansion, "subPath and subPathExpr together are refused", both),
    ]
}

fn part(pod: Pod, mount: Value) -> Pod {
    let mut mount = mount;
    mount["mountPath"] = "/v/part".into();
    pod.volume_at("dir", json!({"emptyDir": {}}), mount)
}

fn whole() -> Value {
    json!({"volumeMounts": [{"name": "dir", "mountPath": "/v/dir"}]})
}

async fn config_map_file(t: T) -> Result<()> {
    t.config_map("map", json!({"a": "1", "b": "2"})).await?;
    let mount = json!({"mountPath": "/etc/a.conf", "subPath": "a"});
    let pod = t.pod("cat /etc/a.conf; test -f /etc/passwd && echo , kept").volume_at(
        "map",
        json!({"configMap": {"name": "map"}}),
        mount,
    );
    same("the output", t.output(pod).await?.as_str(), "1, kept\n")
}

async fn secret_file(t: T) -> Result<()> {
    t.secret("secret", json!({"a": "1"})).await?;
    let mount = json!({"mountPath": "/etc/a.key", "subPath": "a", "readOnly": true});
    let pod = t.pod("cat /etc/a.key").volume_at("s", json!({"secret": {"secretName": "secret"}}), mount);
    same("the output", t.output(pod).await?.as_str(), "1")
}

async fn made(t: T) -> Result<()> {
    let pod =
        part(t.pod("test -d /v/part && touch /v/part/file && echo there"), json!({"subPath": "deep/er"}));
    same("the output", t.output(pod).await?.trim(), "there")
}

async fn parts(t: T) -> Result<()> {
    let pod = part(t.pod("cat /v/part/*"), json!({"subPath": "mine"})).init(
        "writer",
        "mkdir /v/dir/mine /v/dir/yours; echo mine > /v/dir/mine/a; echo yours > /v/dir/yours/b",
        whole(),
    );
    same("the output", t.output(pod).await?.as_str(), "mine\n")
}

async fn restart(t: T) -> Result<()> {
    let script = format!("echo run >> /v/part/runs; test $(wc -l < /v/part/runs) -ge 2 || exit 1; {IDLE}");
    let live = t.run(part(t.pod(&script), json!({"subPath": "kept"})).always()).await?;
    live.restarted("main", 1).await?;
    live.ready().await?;
    same("the runs", live.exec("wc -l < /v/part/runs").await?.as_str(), "2")
}

async fn read_only(t: T) -> Result<()> {
    let pod = part(
        t.pod("touch /v/part/file 2>/dev/null || echo refused"),
        json!({"subPath": "mine", "readOnly": true}),
    );
    same("the output", t.output(pod).await?.trim(), "refused")
}

async fn no_updates(t: T) -> Result<()> {
    t.config_map("map", json!({"a": "old"})).await?;
    let source = json!({"configMap": {"name": "map"}});
    let pod = t.idle().volume_at("map", source.clone(), json!({"mountPath": "/etc/a.conf", "subPath": "a"}));
    let live = t.ready(pod.volume("all", source)).await?;
    t.api().merge(&t.path("configmaps/map").await?, &json!({"data": {"a": "new"}})).await?;
    live.exec_until("grep -q new /v/all/a").await?;
    same("the mounted file", live.exec("cat /etc/a.conf").await?.as_str(), "old")
}

async fn link_inside(t: T) -> Result<()> {
    let pod = part(t.pod("cat /v/part/file"), json!({"subPath": "link"})).init(
        "writer",
        "mkdir /v/dir/real; echo inside > /v/dir/real/file; ln -s real /v/dir/link",
        whole(),
    );
    same("the output", t.output(pod).await?.as_str(), "inside\n")
}

async fn link_out(t: T, script: &'static str) -> Result<()> {
    let pod = part(t.pod("cat /v/part/passwd"), json!({"subPath": "escape"})).init("writer", script, whole());
    let live = t.run(pod).await?;
    let message = live.waiting("main", "CreateContainerConfigError").await?;
    holds(
        "the message",
        &message,
        "failed to prepare subPath for volumeMount \"dir\" of container \"main\"",
    )?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn absolute(t: T) -> Result<()> {
    let refused = t.refused(part(t.idle(), json!({"subPath": "/etc"}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "must be a relative path")
}

async fn dots(t: T) -> Result<()> {
    let refused = t.refused(part(t.idle(), json!({"subPath": "a/../../etc"}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "must not contain '..'")
}

async fn expression(t: T) -> Result<()> {
    let env = json!([{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]);
    let pod = t.pod("ls /v/dir").env(env).volume("dir", json!({"emptyDir": {}}));
    let mounts = json!([{"name": "dir", "mountPath": "/v/dir"},
        {"name": "dir", "mountPath": "/v/part", "subPathExpr": "of-$(POD)"}]);
    let pod = pod.main(json!({"volumeMounts": mounts}));
    let name = pod.name();
    same("the directories", t.output(pod).await?, format!("of-{name}\n"))
}

async fn expression_nested(t: T) -> Result<()> {
    let env = json!([{"name": "A", "value": "a"}, {"name": "B", "value": "$(A)b"}]);
    let mounts = json!([{"name": "dir", "mountPath": "/v/dir"},
        {"name": "dir", "mountPath": "/v/part", "subPathExpr": "$(B)/$(A)"}]);
    let pod = t
        .pod("find /v/dir -type d")
        .env(env)
        .volume("dir", json!({"emptyDir": {}}))
        .main(json!({"volumeMounts": mounts}));
    same("the directories", t.output(pod).await?.as_str(), "/v/dir\n/v/dir/ab\n/v/dir/ab/a\n")
}

/// A pod whose subPathExpr is the value of a variable; it must not start.
async fn bad_expression(t: &T, value: &str) -> Result<()> {
    let pod = part(t.idle().env(json!([{"name": "P", "value": value}])), json!({"subPathExpr": "$(P)"}));
    let live = t.run(pod).await?;
    live.waiting("main", "CreateContainerConfigError").await?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn expression_backticks(t: T) -> Result<()> {
    let env = json!([{"name": "P", "value": "`hostname`"}]);
    let mounts = json!([{"name": "dir", "mountPath": "/v/dir"}, {"name": "dir", "mountPath": "/v/part", "subPathExpr": "$(P)"}]);
    let pod = t
        .pod("ls /v/dir")
        .env(env)
        .volume("dir", json!({"emptyDir": {}}))
        .main(json!({"volumeMounts": mounts}));
    same("the directories", t.output(pod).await?.as_str(), "`hostname`\n")
}

async fn expression_absolute(t: T) -> Result<()> {
    bad_expression(&t, "/tmp").await
}

async fn expression_dots(t: T) -> Result<()> {
    bad_expression(&t, "../../tmp").await
}

async fn both(t: T) -> Result<()> {
    let refused = t.refused(part(t.idle(), json!({"subPath": "a", "subPathExpr": "b"}))).await?;
    same("the code", refused.code, 422)?;
    ensure!(refused.message.contains("subPathExpr"), "the message is {:?}", refused.message);
    Ok(())
}

//! The downward API as a volume.

use anyhow::Result;
use serde_json::{Value, json};

use super::super::super::case::{Case, case, same};
use super::super::context::T;
use super::super::pod::Pod;

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Downward API volume";
    vec![
        case(group, "name, namespace and uid of the pod are files", names),
        case(group, "labels and annotations are files, sorted and quoted", maps),
        case(group, "one label or annotation can be a file", one_label),
        case(group, "a changed label reaches its file", label_changes),
        case(group, "a changed annotation reaches its file", annotation_changes),
        case(group, "limits and requests of a container are files, in units of the divisor", resources),
        case(group, "without a limit the node's allocatable is told", allocatable),
        case(group, "defaultMode and modes of items are kept", modes),
        case(group, "fsGroup owns the files", fs_group),
        case(group, "a container that the pod does not have is refused", no_container),
    ]
}

fn fields(list: &[(&str, &str)]) -> Value {
    let items: Vec<Value> =
        list.iter().map(|(path, field)| json!({"path": path, "fieldRef": {"fieldPath": field}})).collect();
    json!({"downwardAPI": {"items": items}})
}

async fn names(t: T) -> Result<()> {
    let volume = fields(&[("name", "metadata.name"), ("ns", "metadata.namespace"), ("uid", "metadata.uid")]);
    let live = t
        .run(t.pod("cd /v/info; for f in name ns uid; do cat $f; echo; done").volume("info", volume))
        .await?;
    live.phase("Succeeded").await?;
    let expected = format!("{}\n{}\n{}\n", live.name, live.namespace, live.uid);
    same("the files", live.log("").await?, expected)
}

fn described(t: &T) -> Pod {
    t.idle()
        .metadata(json!({"labels": {"b": "two", "a": "one"}, "annotations": {"note": "line 1\nline \"2\""}}))
}

async fn maps(t: T) -> Result<()> {
    let volume = fields(&[("labels", "metadata.labels"), ("notes", "metadata.annotations")]);
    let live = t.ready(described(&t).volume("info", volume)).await?;
    let labels = live.exec("grep -v conformance /v/info/labels").await?;
    same("labels", labels.as_str(), "a=\"one\"\nb=\"two\"")?;
    let note = live.exec("grep ^note= /v/info/notes").await?;
    same("annotations", note.as_str(), "note=\"line 1\\nline \\\"2\\\"\"")
}

async fn one_label(t: T) -> Result<()> {
    let volume = fields(&[("a", "metadata.labels['a']"), ("note", "metadata.annotations['note']")]);
    let live = t.ready(described(&t).volume("info", volume)).await?;
    same("the label", live.exec("cat /v/info/a").await?.as_str(), "one")?;
    same("the annotation", live.exec("cat /v/info/note").await?.as_str(), "line 1\nline \"2\"")
}

async fn label_changes(t: T) -> Result<()> {
    let live = t.ready(described(&t).volume("info", fields(&[("labels", "metadata.labels")]))).await?;
    live.patch(json!({"metadata": {"labels": {"a": "changed"}}})).await?;
    live.exec_until("grep -q 'a=\"changed\"' /v/info/labels").await
}

async fn annotation_changes(t: T) -> Result<()> {
    let live = t.ready(described(&t).volume("info", fields(&[("notes", "metadata.annotations")]))).await?;
    live.patch(json!({"metadata": {"annotations": {"note": "changed"}}})).await?;
    live.exec_until("grep -q 'note=\"changed\"' /v/info/notes").await
}

fn resource(path: &str, name: &str, divisor: &str) -> Value {
    json!({"path": path, "resourceFieldRef": {"containerName": "main", "resource": name, "divisor": divisor}})
}

async fn resources(t: T) -> Result<()> {
    let items = [
        resource("cpu", "limits.cpu", "1m"),
        resource("cpus", "limits.cpu", "0"),
        resource("memory", "limits.memory", "1Mi"),
        resource("requested", "requests.cpu", "1m"),
        resource("bytes", "requests.memory", "0"),
    ];
    let amounts =
        json!({"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "250m", "memory": "64Mi"}});
    let script = "cd /v/info; for f in cpu cpus memory requested bytes; do cat $f; echo; done";
    let pod = t
        .pod(script)
        .main(json!({"resources": amounts}))
        .volume("info", json!({"downwardAPI": {"items": items}}));
    // Without a divisor a CPU is told whole, rounded up.
    same("the files", t.output(pod).await?.as_str(), "250\n1\n64\n10\n16777216\n")
}

async fn allocatable(t: T) -> Result<()> {
    let items = [resource("cpu", "limits.cpu", "1m"), resource("memory", "limits.memory", "0")];
    let pod = t
        .pod("cat /v/info/cpu; echo; cat /v/info/memory")
        .volume("info", json!({"downwardAPI": {"items": items}}));
    let output = t.output(pod).await?;
    let allocatable = &t.suite().node_object["status"]["allocatable"];
    let text = |name: &str| allocatable[name].as_str().unwrap_or_default();
    let cpu = super::resources::milli(text("cpu"));
    let memory = super::resources::bytes(text("memory"));
    same("the files", output, format!("{cpu}\n{memory}"))
}

async fn modes(t: T) -> Result<()> {
    let items = json!([{"path": "a", "fieldRef": {"fieldPath": "metadata.name"}},
        {"path": "b", "mode": 0o440, "fieldRef": {"fieldPath": "metadata.name"}}]);
    let volume = json!({"downwardAPI": {"defaultMode": 0o400, "items": items}});
    let output = t.output(t.pod("cd /v/info; stat -L -c %a a b").volume("info", volume)).await?;
    same("the modes", output.as_str(), "400\n440\n")
}

async fn fs_group(t: T) -> Result<()> {
    let pod = t
        .pod("stat -L -c %g /v/info/name; cat /v/info/name")
        .volume("info", fields(&[("name", "metadata.name")]));
    let pod = pod.spec(json!({"securityContext": {"runAsUser": 1000, "fsGroup": 2000}}));
    let name = pod.name();
    same("the output", t.output(pod).await?, format!("2000\n{name}"))
}

async fn no_container(t: T) -> Result<()> {
    let item = json!({"path": "cpu", "resourceFieldRef": {"resource": "limits.cpu"}});
    let refused = t.refused(t.idle().volume("info", json!({"downwardAPI": {"items": [item]}}))).await?;
    same("the code", refused.code, 422)?;
    super::super::super::case::holds("the message", &refused.message, "containerName")
}

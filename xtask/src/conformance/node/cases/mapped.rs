//! ConfigMap and Secret volumes: names, modes, owners, changes.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same};
use super::super::context::{IDLE, T};
use super::super::live::container;

/// What both kinds of volume promise, for one of them.
#[derive(Clone, Copy)]
enum Source {
    ConfigMap,
    Secret,
}

impl Source {
    fn volume(self, more: Value) -> Value {
        let (field, key) = match self {
            Self::ConfigMap => ("configMap", "name"),
            Self::Secret => ("secret", "secretName"),
        };
        let mut volume = json!({field: {key: "data"}});
        if let (Some(target), Value::Object(more)) = (volume[field].as_object_mut(), more) {
            target.extend(more);
        }
        volume
    }

    async fn make(self, t: &T, data: Value) -> Result<()> {
        match self {
            Self::ConfigMap => t.config_map("data", data).await,
            Self::Secret => t.secret("data", data).await,
        }
    }

    fn field(self) -> &'static str {
        match self {
            Self::ConfigMap => "data",
            Self::Secret => "stringData",
        }
    }

    async fn path(self, t: &T) -> Result<String> {
        let plural = match self {
            Self::ConfigMap => "configmaps/data",
            Self::Secret => "secrets/data",
        };
        t.path(plural).await
    }

    fn word(self) -> &'static str {
        match self {
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
        }
    }
}

pub(super) fn cases() -> Vec<Case<T>> {
    let mut all = Vec::new();
    for (group, source) in [("ConfigMap", Source::ConfigMap), ("Secrets", Source::Secret)] {
        all.extend([
            case(group, "every key is a file with its value, of mode 0644", move |t| files(t, source)),
            case(group, "defaultMode is every file's mode", move |t| default_mode(t, source)),
            case(group, "items choose keys, paths and modes", move |t| items(t, source)),
            case(group, "fsGroup owns the files, and a user who is not root reads them", move |t| {
                fs_group(t, source)
            }),
            case(group, "the files cannot be written", move |t| read_only(t, source)),
            case(group, "one can be mounted by several volumes of a pod", move |t| twice(t, source)),
            case(group, "one that is missing holds the pod back until it comes", move |t| missing(t, source)),
            case(group, "an optional one may be missing, and its files come later", move |t| {
                optional(t, source)
            }),
            case(group, "a key that is missing holds the pod back", move |t| missing_key(t, source)),
            case(group, "an optional key may be missing", move |t| optional_key(t, source)),
            case(group, "changes reach the files: new, changed and removed keys", move |t| {
                updates(t, source)
            }),
            case(group, "a change is seen whole: files are replaced by one link", move |t| whole(t, source)),
            case(group, "a pod starts with an immutable one, which cannot be changed", move |t| {
                immutable(t, source)
            }),
        ]);
    }
    all.extend([
        case("ConfigMap", "binary data are files of these bytes", binary),
        case("Secrets", "the files are in memory", in_memory),
        case("Secrets", "a secret of another namespace is not seen", other_namespace),
    ]);
    all
}

async fn files(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1", "two.txt": "zwei\n"})).await?;
    let script = "cd /v/data; cat one two.txt; stat -L -c '%a' one two.txt; ls";
    let output = t.output(t.pod(script).volume("data", source.volume(json!({})))).await?;
    same("the output", output.as_str(), "1zwei\n644\n644\none\ntwo.txt\n")
}

async fn default_mode(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1"})).await?;
    let volume = source.volume(json!({"defaultMode": 0o400}));
    let output = t.output(t.pod("stat -L -c %a /v/data/one").volume("data", volume)).await?;
    same("the mode", output.trim(), "400")
}

async fn items(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1", "two": "2", "three": "3"})).await?;
    let items = json!([{"key": "one", "path": "deep/er/uno"}, {"key": "two", "path": "dos", "mode": 0o440}]);
    let script = "cd /v/data; ls; cat deep/er/uno dos; stat -L -c %a deep/er/uno dos";
    let output = t.output(t.pod(script).volume("data", source.volume(json!({"items": items})))).await?;
    same("the output", output.as_str(), "deep\ndos\n12644\n440\n")
}

async fn fs_group(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1"})).await?;
    let pod = t.pod("cat /v/data/one; echo; stat -L -c '%g %a' /v/data/one; id -u");
    let pod = pod.volume("data", source.volume(json!({"defaultMode": 0o440})));
    let output = t.output(pod.spec(json!({"securityContext": {"runAsUser": 1000, "fsGroup": 1001}}))).await?;
    same("the output", output.as_str(), "1\n1001 440\n1000\n")
}

async fn read_only(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1"})).await?;
    let script = "(echo x > /v/data/one) 2>/dev/null && echo written; (echo x > /v/data/new) 2>/dev/null && echo made; cat /v/data/one";
    let output = t.output(t.pod(script).volume("data", source.volume(json!({})))).await?;
    ensure!(
        output.trim_end().ends_with('1') && !output.contains("written") && !output.contains("made"),
        "{output:?}"
    );
    Ok(())
}

async fn twice(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1"})).await?;
    let pod = t.pod("cat /v/data/one /v/again/one");
    let pod = pod.volume("data", source.volume(json!({}))).volume("again", source.volume(json!({})));
    same("the output", t.output(pod).await?.as_str(), "11")
}

async fn missing(t: T, source: Source) -> Result<()> {
    let live = t.run(t.pod("cat /v/data/one").volume("data", source.volume(json!({})))).await?;
    live.event("FailedMount", &format!("{} \"data\" not found", source.word())).await?;
    live.waiting("main", "ContainerCreating").await?;
    source.make(&t, json!({"one": "1"})).await?;
    live.phase("Succeeded").await?;
    same("the log", live.log("").await?.as_str(), "1")
}

async fn optional(t: T, source: Source) -> Result<()> {
    let live = t.ready(t.idle().volume("data", source.volume(json!({"optional": true})))).await?;
    same("the files", live.exec("ls /v/data").await?.as_str(), "")?;
    source.make(&t, json!({"one": "1"})).await?;
    live.exec_until("grep -q 1 /v/data/one").await
}

async fn missing_key(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1"})).await?;
    let volume = source.volume(json!({"items": [{"key": "none", "path": "p"}]}));
    let live = t.run(t.idle().volume("data", volume)).await?;
    live.event("FailedMount", "references non-existent").await?;
    live.waiting("main", "ContainerCreating").await?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn optional_key(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1"})).await?;
    let items = json!([{"key": "none", "path": "p"}, {"key": "one", "path": "q"}]);
    let volume = source.volume(json!({"items": items, "optional": true}));
    same("the files", t.output(t.pod("ls /v/data").volume("data", volume)).await?.as_str(), "q\n")
}

async fn updates(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"kept": "old", "goes": "x"})).await?;
    let live = t.ready(t.idle().volume("data", source.volume(json!({})))).await?;
    let path = source.path(&t).await?;
    // A secret's texts cannot take a key away; its data can.
    let change = match source {
        Source::ConfigMap => json!({"data": {"goes": null, "kept": "new", "comes": "y"}}),
        Source::Secret => json!({"data": {"goes": null}, "stringData": {"kept": "new", "comes": "y"}}),
    };
    t.api().merge(&path, &change).await?;
    live.exec_until("[ \"$(cat /v/data/kept /v/data/comes 2>/dev/null)\" = newy ] && [ ! -e /v/data/goes ]")
        .await?;
    let pod = live.ready().await?;
    same("restarts", &container(&pod, "main")["restartCount"], 0)
}

async fn whole(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"a": "1", "b": "1"})).await?;
    // Reads both through one directory, again and again: they are never of two generations.
    let script = format!(
        "while test ! -e /tmp/stop; do cd /v/data/..data 2>/dev/null || continue; a=$(cat a) b=$(cat b 2>/dev/null) || continue; \
         [ \"$a\" = \"$b\" ] || touch /tmp/torn; touch /tmp/seen-$a; done & {IDLE}"
    );
    let live = t.ready(t.pod(&script).volume("data", source.volume(json!({})))).await?;
    live.exec_until("test -e /tmp/seen-1").await?;
    t.api().merge(&source.path(&t).await?, &json!({source.field(): {"a": "2", "b": "2"}})).await?;
    live.exec_until("test -e /tmp/seen-2").await?;
    live.exec("touch /tmp/stop; test ! -e /tmp/torn").await?;
    same("the link", live.exec("readlink /v/data/a").await?.as_str(), "..data/a")
}

async fn immutable(t: T, source: Source) -> Result<()> {
    source.make(&t, json!({"one": "1"})).await?;
    let path = source.path(&t).await?;
    t.api().merge(&path, &json!({"immutable": true})).await?;
    let output = t.output(t.pod("cat /v/data/one").volume("data", source.volume(json!({})))).await?;
    same("the output", output.as_str(), "1")?;
    let changed = t.api().merge(&path, &json!({source.field(): {"one": "2"}})).await;
    let refused = super::super::api::refusal("the change", changed)?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "field is immutable when `immutable` is set")
}

async fn binary(t: T) -> Result<()> {
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "data"},
        "data": {"text": "t"}, "binaryData": {"bytes": "AP/+"}});
    t.api().post(&t.path("configmaps").await?, &object).await?;
    let pod = t.pod("hexdump -e '1/1 \"%02x\"' /v/data/bytes; cat /v/data/text");
    let output = t.output(pod.volume("data", json!({"configMap": {"name": "data"}}))).await?;
    same("the output", output.as_str(), "00fffet")
}

async fn in_memory(t: T) -> Result<()> {
    t.secret("data", json!({"one": "1"})).await?;
    let pod = t
        .pod("awk '$2 == \"/v/data\" {print $3}' /proc/mounts")
        .volume("data", json!({"secret": {"secretName": "data"}}));
    same("the file system", t.output(pod).await?.trim(), "tmpfs")
}

async fn other_namespace(t: T) -> Result<()> {
    // There is one of this name, elsewhere.
    let elsewhere = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": t.unique("elsewhere")}, "stringData": {"one": "1"}});
    t.make("/api/v1/namespaces/default/secrets", &elsewhere).await?;
    let volume = json!({"secret": {"secretName": t.unique("elsewhere")}});
    let live = t.run(t.idle().volume("data", volume)).await?;
    live.event("FailedMount", "not found").await?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

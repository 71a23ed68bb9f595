//! Static pods and their mirrors, where this machine is the node.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, same, skip};
use super::super::LABEL;
use super::super::api::Refused;
use super::super::context::{IDLE, T};
use super::super::live::{Live, container};

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "MirrorPod";
    vec![
        case(
            group,
            "a manifest in the directory becomes a pod with the node's name, which the API shows",
            shown,
        ),
        case(group, "deleting the mirror leaves the container, and it is shown again", deleted),
        case(group, "a changed manifest replaces the pod", changed),
        case(group, "a removed manifest ends the pod", removed),
        case(group, "a broken manifest beside it disturbs no other", broken),
        case(group, "a container of it is started again", restarts),
    ]
}

/// A manifest that goes with the case.
struct Manifest {
    file: PathBuf,
    name: String,
}

impl Drop for Manifest {
    fn drop(&mut self) {
        // One that the case has removed is gone already.
        std::fs::remove_file(&self.file).ok();
    }
}

impl Manifest {
    async fn new(t: &T, script: &str) -> Result<Self> {
        let Some(directory) = &t.suite().manifests else {
            return skip("the node's directory of static pods is not known here (--static-pods DIR)");
        };
        let name = t.unique("static");
        let manifest = Self { file: directory.join(format!("{name}.json")), name };
        // The namespace must be there for the mirror.
        t.namespace().await?;
        manifest.write(t, script).await?;
        Ok(manifest)
    }

    async fn write(&self, t: &T, script: &str) -> Result<()> {
        let pod =
            t.pod(script).spec(json!({"nodeName": null, "tolerations": null, "restartPolicy": "Always"}));
        let labels = json!({LABEL: t.suite().run});
        let pod =
            pod.metadata(json!({"name": self.name, "namespace": t.namespace().await?, "labels": labels}));
        let text = serde_json::to_vec(&pod.object)?;
        crate::process::write_atomic(&self.file, &text).context("writing the manifest")
    }

    /// The mirror, once it is ready and is not the one with the uid `old`.
    async fn mirror(&self, t: &T, old: &str) -> Result<Live> {
        let namespace = t.namespace().await?;
        let name = format!("{}-{}", self.name, t.node());
        let suite = t.suite();
        let found = suite.board.wait("the mirror", suite.limit, |seen| {
            let life = seen.life(super::super::board::Kind::Pod, namespace, &name).ok_or("no mirror")?;
            let last = life.last().ok_or("no mirror")?;
            let ready = super::super::live::condition(last, "Ready")["status"] == "True";
            if !life.gone && ready && last["metadata"]["uid"] != old {
                Ok(last.clone())
            } else {
                Err(super::super::live::summary(last))
            }
        });
        Ok(Live::new(t, found.await?))
    }
}

async fn shown(t: T) -> Result<()> {
    let manifest = Manifest::new(&t, &format!("echo first; {IDLE}")).await?;
    let live = manifest.mirror(&t, "").await?;
    let pod = live.ready().await?;
    let annotations = &pod["metadata"]["annotations"];
    for name in ["hash", "mirror", "source", "seen"] {
        let key = format!("kubernetes.io/config.{name}");
        ensure!(annotations[&key].is_string(), "no annotation {key}: {annotations}");
    }
    same("the source", &annotations["kubernetes.io/config.source"], "file")?;
    same("the owner", &pod["metadata"]["ownerReferences"][0]["kind"], "Node")?;
    same("the node", &pod["spec"]["nodeName"], t.node())?;
    same("the log", live.log("").await?.as_str(), "first\n")
}

fn id(pod: &Value) -> Value {
    container(pod, "main")["containerID"].clone()
}

async fn deleted(t: T) -> Result<()> {
    let manifest = Manifest::new(&t, IDLE).await?;
    let live = manifest.mirror(&t, "").await?;
    let before = id(&live.ready().await?);
    live.delete(1).await?;
    let again = manifest.mirror(&t, &live.uid).await?;
    same("the container", id(&again.ready().await?), before)
}

async fn changed(t: T) -> Result<()> {
    let manifest = Manifest::new(&t, &format!("echo first; {IDLE}")).await?;
    let live = manifest.mirror(&t, "").await?;
    manifest.write(&t, &format!("echo second; {IDLE}")).await?;
    let again = manifest.mirror(&t, &live.uid).await?;
    same("the log", again.says("second\n").await?.as_str(), "second\n")
}

async fn removed(t: T) -> Result<()> {
    let manifest = Manifest::new(&t, IDLE).await?;
    let live = manifest.mirror(&t, "").await?;
    std::fs::remove_file(&manifest.file)?;
    live.gone().await?;
    let found = t.api().get(&live.path()).await;
    let refused = found.err().and_then(|error| error.downcast::<Refused>().ok());
    same("the code", refused.map(|refused| refused.code), Some(404))
}

async fn broken(t: T) -> Result<()> {
    let manifest = Manifest::new(&t, IDLE).await?;
    let live = manifest.mirror(&t, "").await?;
    let before = id(&live.ready().await?);
    let beside = Manifest { file: manifest.file.with_extension("broken.yaml"), name: String::new() };
    std::fs::write(&beside.file, "kind: [Pod")?;
    // Another manifest that comes later is seen: so the broken one was looked at.
    let second =
        Manifest { file: manifest.file.with_extension("z.json"), name: format!("{}-z", manifest.name) };
    second.write(&t, IDLE).await?;
    second.mirror(&t, "").await?;
    same("the container", id(&live.ready().await?), before)
}

async fn restarts(t: T) -> Result<()> {
    let manifest = Manifest::new(&t, IDLE).await?;
    let live = manifest.mirror(&t, "").await?;
    live.end_main().await?;
    live.restarted("main", 1).await?;
    live.ready().await.map(drop)
}

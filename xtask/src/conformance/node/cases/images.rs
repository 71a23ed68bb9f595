//! Images: pull policies, and what is told when an image does not come.

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::super::case::{Case, case, holds, same};
use super::super::context::T;
use super::super::live::container;

/// Nobody listens there.
const NOWHERE: &str = "127.0.0.1:1/none/none:v1";

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Container Runtime images";
    vec![
        case(group, "policy Never runs an image that is there", never_there),
        case(group, "policy Never does not pull", never),
        case(group, "policy IfNotPresent tells that the image is there", if_not_present),
        case(group, "the policy is Always for the tag latest, and IfNotPresent for others", defaults),
        case(group, "an image that cannot be pulled is told, and tried again later", cannot_pull),
        case(group, "a name that is none is told", invalid_name),
        case(group, "a pull secret that is missing is told", missing_secret),
        case(group, "a container gets another image in place of one that cannot be pulled", mended),
        case(group, "an init container's image that is missing holds the pod back", init_image),
        case(group, "the image's name and digest are told", told),
        case(group, "an image volume that cannot be pulled is told", image_volume),
    ]
}

async fn never_there(t: T) -> Result<()> {
    // With the first pod it is there, whatever was before.
    t.output(t.pod("true")).await?;
    t.output(t.pod("true").main(json!({"imagePullPolicy": "Never"}))).await.map(drop)
}

async fn never(t: T) -> Result<()> {
    let live = t.run(t.idle().main(json!({"image": NOWHERE, "imagePullPolicy": "Never"}))).await?;
    let message = live.waiting("main", "ErrImageNeverPull").await?;
    same(
        "the message",
        message,
        format!("Container image \"{NOWHERE}\" is not present with pull policy of Never"),
    )?;
    live.event(
        "ErrImageNeverPull",
        &format!("Container image \"{NOWHERE}\" is not present with pull policy of Never"),
    )
    .await?;
    live.event("Failed", "Error: ErrImageNeverPull").await.map(drop)
}

async fn if_not_present(t: T) -> Result<()> {
    t.output(t.pod("true")).await?;
    let live = t.run(t.pod("true")).await?;
    live.event("Pulled", &format!("Container image \"{}\" already present on machine", t.suite().image))
        .await
        .map(drop)
}

async fn defaults(t: T) -> Result<()> {
    let policy = |image: &str| t.idle().main(json!({"image": image, "imagePullPolicy": null}));
    for (image, wanted) in [
        ("127.0.0.1:1/none/none", "Always"),
        ("127.0.0.1:1/none/none:latest", "Always"),
        (NOWHERE, "IfNotPresent"),
    ] {
        let live = t.run(policy(image)).await?;
        let pod = live.until("it is there", serde_json::Value::is_object).await?;
        same(image, &pod["spec"]["containers"][0]["imagePullPolicy"], wanted)?;
    }
    Ok(())
}

async fn cannot_pull(t: T) -> Result<()> {
    let live = t.run(t.idle().main(json!({"image": NOWHERE}))).await?;
    live.until("ErrImagePull", |pod| {
        matches!(
            container(pod, "main")["state"]["waiting"]["reason"].as_str(),
            Some("ErrImagePull" | "ImagePullBackOff")
        )
    })
    .await?;
    live.event("Pulling", &format!("Pulling image \"{NOWHERE}\"")).await?;
    live.event("Failed", &format!("Failed to pull image \"{NOWHERE}\": ")).await?;
    live.event("Failed", "Error: ErrImagePull").await?;
    let message = live.waiting("main", "ImagePullBackOff").await?;
    holds("the message", &message, &format!("Back-off pulling image \"{NOWHERE}\""))?;
    live.event("BackOff", &format!("Back-off pulling image \"{NOWHERE}\"")).await?;
    live.never("another phase", |pod| pod["status"]["phase"] != "Pending")
}

async fn invalid_name(t: T) -> Result<()> {
    let live = t.run(t.idle().main(json!({"image": "Upper/CASE:v1"}))).await?;
    let message = live.waiting("main", "InvalidImageName").await?;
    holds("the message", &message, "Failed to apply default image tag \"Upper/CASE:v1\"")?;
    live.event("InspectFailed", "Failed to apply default image tag \"Upper/CASE:v1\"").await?;
    live.event("Failed", "Error: InvalidImageName").await.map(drop)
}

async fn missing_secret(t: T) -> Result<()> {
    let live = t.run(t.idle().spec(json!({"imagePullSecrets": [{"name": "none"}]}))).await?;
    live.event(
        "FailedToRetrieveImagePullSecret",
        "Unable to retrieve some image pull secrets (none); attempting to pull the image may not succeed.",
    )
    .await?;
    live.ready().await.map(drop)
}

async fn mended(t: T) -> Result<()> {
    let live = t.run(t.idle().always().main(json!({"image": NOWHERE}))).await?;
    live.until("waiting", |pod| container(pod, "main")["state"]["waiting"]["reason"] != "ContainerCreating")
        .await?;
    live.patch(json!({"spec": {"containers": [{"name": "main", "image": t.suite().image}]}})).await?;
    let pod = live.ready().await?;
    same("restarts", &container(&pod, "main")["restartCount"], 0)
}

async fn init_image(t: T) -> Result<()> {
    let live =
        t.run(t.idle().init("first", "true", json!({"image": NOWHERE, "imagePullPolicy": "Never"}))).await?;
    live.waiting("first", "ErrImageNeverPull").await?;
    live.waiting("main", "PodInitializing").await?;
    live.never("main ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn told(t: T) -> Result<()> {
    let pod = t.ready(t.idle()).await?.ready().await?;
    let main = container(&pod, "main");
    let last = t.suite().image.rsplit('/').next().unwrap_or_default().to_owned();
    let name = last.split(['@', ':']).next().unwrap_or_default();
    holds("image", main["image"].as_str().unwrap_or_default(), name)?;
    ensure!(
        main["imageID"].as_str().is_some_and(|id| id.contains("sha256:")),
        "imageID is {}",
        main["imageID"]
    );
    Ok(())
}

async fn image_volume(t: T) -> Result<()> {
    let volume = json!({"image": {"reference": NOWHERE, "pullPolicy": "Never"}});
    let live = t.run(t.idle().volume("image", volume)).await?;
    live.waiting("main", "ErrImageNeverPull").await?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

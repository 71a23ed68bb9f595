//! Idempotence: what may be asked again, and about things that are gone.

use anyhow::{Context, Result};
use cri_shim_api::v1;

use super::super::case::{Case, case, same};
use super::super::context::T;

pub(crate) fn cases() -> Vec<Case> {
    let group = "idempotence";
    vec![
        case(group, "Stop of a stopped sandbox", stop_pod_twice),
        case(group, "Remove of a removed sandbox", remove_pod_twice),
        case(group, "Stop and Remove of an unknown sandbox", unknown_pod),
        case(group, "Stop of an ended container", stop_twice),
        case(group, "Stop of a created container", stop_created),
        case(group, "Remove of a removed container, three times", remove_twice),
        case(group, "Stop and Remove of an unknown container", unknown_container),
        case(group, "Remove of an unknown image", unknown_image),
        case(group, "ten thousand unknown ids leave nothing behind", ten_thousand),
    ]
}

async fn stop_pod_twice(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    for _ in 0..3 {
        t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    }
    Ok(())
}

async fn remove_pod_twice(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    for _ in 0..3 {
        t.try_remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    }
    Ok(())
}

async fn unknown_pod(t: T) -> Result<()> {
    t.try_stop_pod(&"e".repeat(64)).await.context("StopPodSandbox")?;
    t.try_remove_pod(&"e".repeat(64)).await.context("RemovePodSandbox")
}

async fn stop_twice(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    t.stop(&id, 0).await?;
    let first = t.status(&id).await?;
    t.stop(&id, 0).await?;
    same("the status", t.status(&id).await?, first)
}

async fn stop_created(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.create(&pod, &t.shell("true")).await?;
    t.stop(&id, 1).await
}

async fn remove_twice(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    t.stop(&id, 0).await?;
    for _ in 0..3 {
        t.try_remove(&id).await.context("RemoveContainer")?;
    }
    Ok(())
}

async fn unknown_container(t: T) -> Result<()> {
    t.try_stop(&"e".repeat(64), 1).await.context("StopContainer")?;
    t.try_remove(&"e".repeat(64)).await.context("RemoveContainer")
}

async fn unknown_image(t: T) -> Result<()> {
    t.remove_image("127.0.0.1:1/nobody/has-this:latest").await?;
    t.remove_image(&format!("sha256:{}", "e".repeat(64))).await
}

async fn ten_thousand(t: T) -> Result<()> {
    let ids: Vec<String> = (0..2000_u32).map(|number| format!("{number:064x}")).collect();
    for chunk in ids.chunks(50) {
        let calls = chunk.iter().map(|id| async {
            let status = t.try_status(id).await.err().map(|status| status.code());
            let pod = t.try_pod_status(id).await.err().map(|status| status.code());
            let exec = t.try_exec(id, &["true"], 1).await.err().map(|status| status.code());
            // Whether these are errors is told by cases of their own.
            t.try_stop(id, 0).await.ok();
            t.try_remove(id).await.ok();
            (status, pod, exec)
        });
        for answers in futures::future::join_all(calls).await {
            let wanted = Some(tonic::Code::NotFound);
            same("the codes", answers, (wanted, wanted, wanted))?;
        }
    }
    let answer =
        t.rt().list_containers(v1::ListContainersRequest::default()).await.context("ListContainers")?;
    anyhow::ensure!(
        answer.into_inner().containers.iter().all(|item| !ids.contains(&item.id)),
        "one is listed"
    );
    Ok(())
}

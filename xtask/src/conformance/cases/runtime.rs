//! Runtime info: Version, Status, RuntimeConfig, UpdateRuntimeConfig.

use anyhow::{Context, Result};
use cri_shim_api::v1;

use super::super::case::{Case, case, same};
use super::super::context::T;

pub(crate) fn cases() -> Vec<Case> {
    let group = "runtime info";
    vec![
        case(group, "Version names the runtime, its version and the API v1", version),
        case(group, "Status says RuntimeReady and NetworkReady", status),
        case(group, "Status with verbose gives the runtime's configuration", verbose_status),
        case(group, "Status lists the default handler and the one under test with their features", handlers),
        case(group, "RuntimeConfig tells the cgroup driver", runtime_config),
        case(group, "UpdateRuntimeConfig accepts a pod CIDR", update_runtime_config),
    ]
}

async fn version(t: T) -> Result<()> {
    for asked in ["v1", "", "0.1.0"] {
        let request = v1::VersionRequest { version: asked.to_owned() };
        let answer = t.rt().version(request).await.context("Version")?.into_inner();
        anyhow::ensure!(!answer.runtime_name.is_empty(), "no runtime name: {answer:?}");
        anyhow::ensure!(!answer.runtime_version.is_empty(), "no runtime version: {answer:?}");
        same("runtime_api_version", answer.runtime_api_version.as_str(), "v1")?;
        same("version of the kubelet API", answer.version.as_str(), "0.1.0")?;
    }
    Ok(())
}

async fn status(t: T) -> Result<()> {
    let answer = t.rt().status(v1::StatusRequest { verbose: false }).await.context("Status")?.into_inner();
    let conditions = answer.status.context("a status")?.conditions;
    for wanted in ["RuntimeReady", "NetworkReady"] {
        let found = conditions.iter().find(|condition| condition.r#type == wanted);
        anyhow::ensure!(
            found.is_some_and(|condition| condition.status),
            "{wanted} is not true: {conditions:?}"
        );
    }
    anyhow::ensure!(answer.info.is_empty(), "info without verbose: {:?}", answer.info.keys());
    Ok(())
}

async fn verbose_status(t: T) -> Result<()> {
    let answer = t.rt().status(v1::StatusRequest { verbose: true }).await.context("Status")?.into_inner();
    let config = answer.info.get("config").context("info has no `config`")?;
    serde_json::from_str::<serde_json::Value>(config).context("`config` is not JSON")?;
    Ok(())
}

async fn handlers(t: T) -> Result<()> {
    let answer = t.rt().status(v1::StatusRequest { verbose: false }).await.context("Status")?.into_inner();
    for wanted in ["", t.suite.handler.as_str()] {
        let found = answer.runtime_handlers.iter().find(|handler| handler.name == wanted);
        let found =
            found.with_context(|| format!("no handler {wanted:?} in {:?}", answer.runtime_handlers))?;
        anyhow::ensure!(found.features.is_some(), "the handler {wanted:?} tells no features");
    }
    anyhow::ensure!(answer.features.is_some(), "the runtime tells no features");
    Ok(())
}

async fn runtime_config(t: T) -> Result<()> {
    let answer = t.rt().runtime_config(v1::RuntimeConfigRequest {}).await.context("RuntimeConfig")?;
    let linux = answer.into_inner().linux.context("no Linux part")?;
    v1::CgroupDriver::try_from(linux.cgroup_driver).context("an unknown cgroup driver")?;
    Ok(())
}

async fn update_runtime_config(t: T) -> Result<()> {
    let network = v1::NetworkConfig { pod_cidr: "10.77.0.0/16".to_owned() };
    let runtime_config = Some(v1::RuntimeConfig { network_config: Some(network) });
    t.rt()
        .update_runtime_config(v1::UpdateRuntimeConfigRequest { runtime_config })
        .await
        .context("UpdateRuntimeConfig")?;
    Ok(())
}

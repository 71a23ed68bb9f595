//! What the runtime tells about itself: version, conditions, configuration.

use std::collections::BTreeMap;

use cri_shim_api::v1::{
    CgroupDriver, LinuxRuntimeConfiguration, RuntimeCondition, RuntimeConfigResponse, RuntimeFeatures,
    RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus, StatusResponse, VersionResponse,
};
use cri_shim_core::cgroup::Driver;

use crate::handlers::{Handler, Handlers};
use crate::runtime::{Readiness, Runtime};

/// The name CRI clients show.
const NAME: &str = "keelson-cri";

/// Name and versions.
pub fn version() -> VersionResponse {
    VersionResponse {
        // The kubelet's own API version, fixed for as long as there is only one.
        version: "0.1.0".to_owned(),
        runtime_name: NAME.to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}

/// Whether containers can be run, and whether pods get a network.
pub fn status(runtime: &Runtime, verbose: bool) -> StatusResponse {
    let readiness = runtime.readiness.borrow().clone();
    let mut info = BTreeMap::new();
    let ready = match readiness {
        Readiness::Ready { containerd } => {
            if verbose {
                info.insert(
                    "containerd".to_owned(),
                    serde_json::json!({ "version": containerd }).to_string(),
                );
            }
            // Only what the node itself lacks: a handler that is merely not installed is told in the information.
            let problem = runtime.handlers.default_problem();
            condition("RuntimeReady", problem.map(|words| ("RuntimeHandlerMissing", words)))
        }
        Readiness::NotReady { reason, .. } => {
            condition("RuntimeReady", Some(("ContainerdNotReachable", reason)))
        }
    };
    if verbose {
        info.insert("config".to_owned(), runtime.collector.config().to_string());
        info.insert(
            "version".to_owned(),
            serde_json::json!({
                "keelson-cri": env!("CARGO_PKG_VERSION"), "criAPI": "v1 (1.36)",
            })
            .to_string(),
        );
    }
    let network = match runtime.network.current() {
        Ok(list) => {
            if verbose {
                info.insert("cniconfig".to_owned(), list.source.clone());
            }
            condition("NetworkReady", None)
        }
        Err(reason) => condition("NetworkReady", Some(("NetworkPluginNotReady", reason))),
    };
    if verbose {
        info.insert("handlers".to_owned(), runtime.handlers.info().to_string());
        info.insert("pulls".to_owned(), runtime.images.pulls().list().to_string());
    }
    StatusResponse {
        status: Some(RuntimeStatus { conditions: vec![ready, network] }),
        info,
        runtime_handlers: handlers(&runtime.handlers),
        features: Some(RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: false,
        }),
    }
}

/// What the kubelet must do the same way.
pub fn runtime_config(runtime: &Runtime) -> RuntimeConfigResponse {
    let driver = match runtime.cgroup_driver {
        Driver::Cgroupfs => CgroupDriver::Cgroupfs,
        Driver::Systemd => CgroupDriver::Systemd,
    };
    let linux = LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
    RuntimeConfigResponse { linux: Some(linux) }
}

/// The default handler under the empty name, then every handler under its own.
fn handlers(all: &Handlers) -> Vec<RuntimeHandler> {
    let shown = |name: &str, handler: &Handler| {
        let features = RuntimeHandlerFeatures {
            recursive_read_only_mounts: handler.features.recursive_readonly,
            user_namespaces: handler.features.user_namespaces,
        };
        RuntimeHandler { name: name.to_owned(), features: Some(features) }
    };
    let default = all.get("").ok().map(|handler| shown("", &handler));
    default.into_iter().chain(all.offered().iter().map(|handler| shown(&handler.name, handler))).collect()
}

fn condition(kind: &str, problem: Option<(&str, String)>) -> RuntimeCondition {
    let status = problem.is_none();
    let (reason, message) = problem.unwrap_or_default();
    RuntimeCondition { r#type: kind.to_owned(), status, reason: reason.to_owned(), message }
}

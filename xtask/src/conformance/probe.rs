//! What the endpoint and the host below it can do, found by asking and looking, so that a case which cannot run here
//! says why.

use std::path::Path;

use anyhow::{Context, Result};
use cri_shim_api::v1;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use tonic::transport::Channel;

use super::case::skip;

/// Findings of one endpoint.
#[derive(Debug, Default, Clone)]
#[allow(clippy::struct_excessive_bools, reason = "independent findings")]
pub(crate) struct Facts {
    /// Name and version as the runtime tells them.
    pub(crate) runtime: String,
    /// The handler's features.
    pub(crate) rro: bool,
    /// The handler's features.
    pub(crate) userns: bool,
    /// SupplementalGroupsPolicy is understood.
    pub(crate) groups_policy: bool,
    /// Whether cgroups are of version 2.
    pub(crate) cgroup2: bool,
    /// Cgroup paths are slices of systemd.
    pub(crate) systemd: bool,
    /// AppArmor is enabled in the kernel.
    pub(crate) apparmor: bool,
    /// SELinux is enabled in the kernel.
    pub(crate) selinux: bool,
}

impl Facts {
    /// Asks and looks.
    pub(crate) async fn find(client: &RuntimeServiceClient<Channel>, handler: &str) -> Result<Self> {
        let mut client = client.clone();
        let version = client
            .version(v1::VersionRequest { version: "v1".to_owned() })
            .await
            .context("the endpoint does not answer Version")?
            .into_inner();
        let status =
            client.status(v1::StatusRequest { verbose: false }).await.context("Status")?.into_inner();
        let features = status
            .runtime_handlers
            .iter()
            .find(|known| known.name == handler)
            .and_then(|known| known.features)
            .unwrap_or_default();
        let driver = client.runtime_config(v1::RuntimeConfigRequest {}).await.ok();
        let driver = driver.and_then(|answer| answer.into_inner().linux).map(|linux| linux.cgroup_driver());
        Ok(Self {
            runtime: format!("{} {}", version.runtime_name, version.runtime_version),
            rro: features.recursive_read_only_mounts,
            userns: features.user_namespaces,
            groups_policy: status.features.unwrap_or_default().supplemental_groups_policy,
            cgroup2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            systemd: driver == Some(v1::CgroupDriver::Systemd),
            apparmor: std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
                .is_ok_and(|text| text.trim() == "Y"),
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        })
    }

    /// The cgroup parent of one pod in the endpoint's notation.
    pub(crate) fn pod_cgroup(&self, parent: &str, uid: &str) -> String {
        if self.systemd {
            let base = parent.trim_matches('/').replace(['-', '/'], "_");
            return format!("/{base}.slice/{base}-{}.slice", uid.replace('-', "_"));
        }
        format!("{parent}/{uid}")
    }

    /// Skips unless the handler offers user namespaces.
    pub(crate) fn need_userns(&self) -> Result<()> {
        if self.userns { Ok(()) } else { skip("the handler's features say no to user namespaces") }
    }

    /// Skips unless the handler offers recursive read-only mounts.
    pub(crate) fn need_rro(&self) -> Result<()> {
        if self.rro { Ok(()) } else { skip("the handler's features say no to recursive read-only mounts") }
    }

    /// Skips unless the runtime knows the policy of supplemental groups.
    pub(crate) fn need_groups_policy(&self) -> Result<()> {
        if self.groups_policy {
            Ok(())
        } else {
            skip("the runtime's features say no to SupplementalGroupsPolicy")
        }
    }

    /// Skips unless the kernel has AppArmor.
    pub(crate) fn need_apparmor(&self) -> Result<()> {
        if self.apparmor { Ok(()) } else { skip("/sys/module/apparmor/parameters/enabled does not say Y") }
    }

    /// Skips unless the kernel has SELinux.
    pub(crate) fn need_selinux(&self) -> Result<()> {
        if self.selinux {
            Ok(())
        } else {
            skip("the kernel has no SELinux: /sys/fs/selinux/enforce is missing")
        }
    }
}

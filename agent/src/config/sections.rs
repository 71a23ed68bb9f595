//! Sections of the configuration with a field or two.

use serde::{Deserialize, Serialize};

use super::GoDuration;

/// `userNamespaces`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct UserNamespaces {
    /// Ids of one pod, a multiple of 65536.
    pub ids_per_pod: u32,
}

impl UserNamespaces {
    pub(super) fn problem(&self) -> Option<String> {
        let ids = self.ids_per_pod;
        let wrong = ids == 0 || !ids.is_multiple_of(65536);
        wrong.then(|| format!("userNamespaces.idsPerPod {ids}: expected a multiple of 65536"))
    }
}

impl Default for UserNamespaces {
    fn default() -> Self {
        Self { ids_per_pod: 65536 }
    }
}

/// `crashLoopBackOff`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CrashLoopBackOff {
    /// 1 s to 300 s.
    pub max_container_restart_period: Option<GoDuration>,
}

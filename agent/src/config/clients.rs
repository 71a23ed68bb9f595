//! Settings of requests that the agent makes: how many, how often. Pure.

use agent_core::pace::Rate;
use agent_core::pulls::{Allowlist, Policy};
use serde::{Deserialize, Serialize};

use super::{AgentConfig, GoDuration};

/// The usual `imagePullCredentialsVerificationPolicy`.
const PRELOADED: &str = "NeverVerifyPreloadedImages";
/// The gate of that field.
const ENSURE_PULLED: &str = "KubeletEnsureSecretPulledImages";

/// Fields of `KubeletConfiguration`. Rates are limits only where one of the pair is given: upstream's defaults would hold up
/// a node whose pods all start at once.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientSettings {
    /// Requests to the API server per second.
    #[serde(rename = "kubeAPIQPS")]
    pub kube_api_qps: Option<i64>,
    /// … at once.
    #[serde(rename = "kubeAPIBurst")]
    pub kube_api_burst: Option<i64>,
    /// Events written per second; 0: no limit.
    #[serde(rename = "eventRecordQPS")]
    pub event_record_qps: Option<i64>,
    /// … at once.
    pub event_burst: Option<i64>,
    /// Images pulled per second; 0: no limit.
    #[serde(rename = "registryPullQPS")]
    pub registry_pull_qps: Option<i64>,
    /// … at once.
    pub registry_burst: Option<i64>,
    /// Without effect.
    pub content_type: String,
    /// Pods are looked at again at least this often.
    pub sync_frequency: GoDuration,
    /// Sizes of volumes are this old at most.
    pub volume_stats_agg_period: GoDuration,
    /// `Watch`; the others have no effect.
    pub config_map_and_secret_change_detection_strategy: String,
    /// Who may use images that are on the node already.
    pub image_pull_credentials_verification_policy: String,
    /// Images of the policy `NeverVerifyAllowlistedImages`.
    pub preloaded_images_verification_allowlist: Vec<String>,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            kube_api_qps: None,
            kube_api_burst: None,
            event_record_qps: None,
            event_burst: None,
            registry_pull_qps: None,
            registry_burst: None,
            content_type: "application/vnd.kubernetes.protobuf".to_owned(),
            // Upstream's is a minute.
            sync_frequency: GoDuration::from_millis(30_000),
            volume_stats_agg_period: GoDuration::from_millis(60_000),
            config_map_and_secret_change_detection_strategy: "Watch".to_owned(),
            image_pull_credentials_verification_policy: PRELOADED.to_owned(),
            preloaded_images_verification_allowlist: Vec::new(),
        }
    }
}

impl AgentConfig {
    /// Requests to the API server, heartbeats and events aside.
    pub fn api_rate(&self) -> Option<Rate> {
        let clients = &self.clients;
        // Of the client library upstream: 0 stands for its own default.
        let per_second = clients.kube_api_qps.map(|given| if given == 0 { 5 } else { given });
        rate(per_second, clients.kube_api_burst, 50, 100)
    }

    /// Events.
    pub fn event_rate(&self) -> Option<Rate> {
        rate(self.clients.event_record_qps, self.clients.event_burst, 50, 100)
    }

    /// Pulls.
    pub fn pull_rate(&self) -> Option<Rate> {
        rate(self.clients.registry_pull_qps, self.clients.registry_burst, 5, 10)
    }

    /// Who may use images that are on the node already; `None`: whoever names them.
    pub fn pull_policy(&self) -> Option<Policy> {
        let clients = &self.clients;
        self.is_enabled(ENSURE_PULLED).then(|| {
            match clients.image_pull_credentials_verification_policy.as_str() {
                "NeverVerify" => Policy::NeverVerify,
                "NeverVerifyAllowlistedImages" => {
                    let list = Allowlist::parse(&clients.preloaded_images_verification_allowlist);
                    Policy::NeverVerifyAllowlistedImages(list.unwrap_or_default())
                }
                "AlwaysVerify" => Policy::AlwaysVerify,
                _ => Policy::NeverVerifyPreloadedImages,
            }
        })
    }

    pub(super) fn client_problems(&self) -> Vec<String> {
        let clients = &self.clients;
        let mut problems = Vec::new();
        for (field, value) in [
            ("kubeAPIQPS", clients.kube_api_qps),
            ("kubeAPIBurst", clients.kube_api_burst),
            ("eventRecordQPS", clients.event_record_qps),
            ("eventBurst", clients.event_burst),
            ("registryPullQPS", clients.registry_pull_qps),
            ("registryBurst", clients.registry_burst),
        ] {
            if let Some(value) = value.filter(|value| *value < 0) {
                problems.push(format!("{field} {value} must not be a negative number"));
            }
        }
        if !matches!(
            clients.content_type.as_str(),
            "application/json" | "application/vnd.kubernetes.protobuf"
        ) {
            let given = &clients.content_type;
            problems.push(format!(
                "contentType {given:?}: expected application/json or application/vnd.kubernetes.protobuf"
            ));
        }
        let strategy = &clients.config_map_and_secret_change_detection_strategy;
        if !matches!(strategy.as_str(), "Watch" | "Cache" | "Get") {
            problems.push(format!(
                "configMapAndSecretChangeDetectionStrategy: unknown configmap and secret manager mode: {strategy:?}, \
                 expected Watch, Cache or Get"
            ));
        }
        problems.extend(self.verification_problems());
        problems
    }

    fn verification_problems(&self) -> Vec<String> {
        const POLICY: &str = "imagePullCredentialsVerificationPolicy";
        const LIST: &str = "preloadedImagesVerificationAllowlist";
        let clients = &self.clients;
        let policy = clients.image_pull_credentials_verification_policy.as_str();
        let list = &clients.preloaded_images_verification_allowlist;
        let mut problems = Vec::new();
        if !self.is_enabled(ENSURE_PULLED) {
            for (field, is_set) in [(POLICY, policy != PRELOADED), (LIST, !list.is_empty())] {
                if is_set {
                    problems.push(format!(
                        "`{field}` must not be set if KubeletEnsureSecretPulledImages feature gate is not enabled"
                    ));
                }
            }
            return problems;
        }
        if !matches!(
            policy,
            "NeverVerify" | "NeverVerifyPreloadedImages" | "NeverVerifyAllowlistedImages" | "AlwaysVerify"
        ) {
            problems.push(format!(
                "option {policy:?} specified for {POLICY}. Valid options are \"NeverVerify\", \
                 \"NeverVerifyPreloadedImages\", \"NeverVerifyAllowlistedImages\" or \"AlwaysVerify\""
            ));
        }
        if !list.is_empty() && policy != "NeverVerifyAllowlistedImages" {
            problems
                .push(format!("can't set `{LIST}` if `{POLICY}` is not \"NeverVerifyAllowlistedImages\""));
        }
        let wrong = Allowlist::parse(list).err();
        problems.extend(wrong.map(|problem| format!("invalid image pattern in `{LIST}`: {problem}")));
        problems
    }
}

/// A limit, where one of the two is given; the other is upstream's default. A burst of 0 stands for it as well.
fn rate(per_second: Option<i64>, burst: Option<i64>, usual: u32, usual_burst: u32) -> Option<Rate> {
    if per_second.is_none() && burst.is_none_or(|burst| burst == 0) {
        return None;
    }
    let number = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
    let burst = burst.filter(|burst| *burst > 0).map_or(usual_burst, number);
    Rate::of(per_second.map_or(usual, number), burst)
}

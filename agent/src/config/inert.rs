//! Fields that are checked and have no effect here: what they are about does not exist, or is somebody else's. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::AgentConfig;

/// Fields of `KubeletConfiguration`; the reasons are in [`super::known`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "the switches are KubeletConfiguration's")]
#[serde(rename_all = "camelCase", default)]
pub struct InertSettings {
    /// `promiscuous-bridge`, `hairpin-veth` or `none`.
    pub hairpin_mode: String,
    /// 0 to 31.
    #[serde(rename = "iptablesMasqueradeBit")]
    pub iptables_masquerade_bit: i64,
    /// 0 to 31.
    #[serde(rename = "iptablesDropBit")]
    pub iptables_drop_bit: i64,
    /// Any.
    #[serde(rename = "makeIPTablesUtilChains")]
    pub make_iptables_util_chains: bool,
    /// `false`: the mode is gone.
    pub run_once: bool,
    /// `1.35` or nothing.
    pub show_hidden_metrics_for_version: String,
    /// Any absolute path.
    pub volume_plugin_dir: String,
    /// `true`: the node attaches nothing by itself.
    pub enable_controller_attach_detach: bool,
    /// Any.
    pub kernel_memcg_notification: bool,
    /// Spans to an OpenTelemetry collector.
    pub tracing: Option<TracingSettings>,
    /// Percentages of the class Guaranteed.
    pub qos_reserved: BTreeMap<String, String>,
}

/// `tracing`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TracingSettings {
    /// Address of the collector.
    pub endpoint: Option<String>,
    /// Of a million spans, how many.
    pub sampling_rate_per_million: Option<i64>,
}

impl Default for InertSettings {
    fn default() -> Self {
        Self {
            hairpin_mode: "promiscuous-bridge".to_owned(),
            iptables_masquerade_bit: 14,
            iptables_drop_bit: 15,
            make_iptables_util_chains: true,
            run_once: false,
            show_hidden_metrics_for_version: String::new(),
            volume_plugin_dir: "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/".to_owned(),
            enable_controller_attach_detach: true,
            kernel_memcg_notification: false,
            tracing: None,
            qos_reserved: BTreeMap::new(),
        }
    }
}

impl InertSettings {
    pub(super) fn problems(&self, config: &AgentConfig) -> Vec<String> {
        let mut problems = Vec::new();
        if !matches!(self.hairpin_mode.as_str(), "promiscuous-bridge" | "hairpin-veth" | "none") {
            let given = &self.hairpin_mode;
            problems.push(format!(
                "option {given:?} specified for hairpinMode. Valid options are \"none\", \"hairpin-veth\" or \
                 \"promiscuous-bridge\""
            ));
        }
        for (field, bit) in [
            ("iptablesMasqueradeBit", self.iptables_masquerade_bit),
            ("iptablesDropBit", self.iptables_drop_bit),
        ] {
            if !(0..=31).contains(&bit) {
                problems.push(format!("{field} {bit} must be between 0 and 31, inclusive"));
            }
        }
        if self.run_once {
            problems.push("runOnce true, Runonce mode has been deprecated and should not be set".to_owned());
        }
        if !matches!(self.show_hidden_metrics_for_version.as_str(), "" | "1.35") {
            let given = &self.show_hidden_metrics_for_version;
            problems.push(format!(
                "showHiddenMetricsForVersion must be omitted or have the value '1.35'. Only the previous minor version is \
                 allowed, not {given:?}"
            ));
        }
        if !self.volume_plugin_dir.starts_with('/') {
            problems.push(format!("volumePluginDir {:?} is not absolute", self.volume_plugin_dir));
        }
        if !self.enable_controller_attach_detach {
            problems.push(
                "enableControllerAttachDetach false is not supported: the attach-detach controller attaches volumes"
                    .to_owned(),
            );
        }
        if !self.qos_reserved.is_empty() {
            let why = if config.is_enabled("QOSReserved") {
                "is not supported"
            } else {
                "requires feature gate QOSReserved"
            };
            problems.push(format!("qosReserved {why}"));
        }
        problems.extend(self.tracing.iter().flat_map(TracingSettings::problems));
        problems
    }
}

impl TracingSettings {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(rate) = self.sampling_rate_per_million.filter(|rate| !(0..=1_000_000).contains(rate)) {
            let bound = if rate < 0 {
                "sampling rate must be positive"
            } else {
                "sampling rate per million must be less than or equal to one million"
            };
            problems.push(format!("tracing.samplingRatePerMillion: Invalid value: {rate}: {bound}"));
        }
        if let Some(endpoint) = &self.endpoint
            && endpoint.contains("://")
            && !["dns://", "unix://", "http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme))
        {
            problems.push(format!("tracing.endpoint: Invalid value: {endpoint:?}: unsupported scheme"));
        }
        problems
    }
}

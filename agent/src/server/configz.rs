//! `/configz`: every setting in effect, whether the file says it or not.

use serde_json::{Value, json};

use crate::config::AgentConfig;

/// The document. The `keelson:` section is not a kubelet's and stays out.
pub(super) fn configz(config: &AgentConfig) -> Value {
    let mut settings = match serde_json::to_value(config) {
        Ok(settings) => settings,
        // A path that is not UTF-8.
        Err(error) => json!({"error": error.to_string()}),
    };
    if let Some(fields) = settings.as_object_mut() {
        fields.retain(|name, value| !value.is_null() && !matches!(name.as_str(), "apiVersion" | "kind"));
    }
    json!({"kubeletconfig": settings})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_settings_are_shown_as_the_file_writes_them() {
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nmaxPods: 7\n\
                    memorySwap: {swapBehavior: LimitedSwap}\nfeatureGates: {MemoryQoS: true}\nsyncFrequency: 90s\n\
                    keelson: {nodeName: n, nodeIP: 10.0.0.1, kubeconfig: /secret}\n";
        let config = AgentConfig::parse(std::path::Path::new("test"), text).unwrap();
        let shown = configz(&config);
        let field = |name: &str| shown["kubeletconfig"][name].clone();
        assert_eq!(field("maxPods"), 7);
        assert_eq!(field("memorySwap")["swapBehavior"], "LimitedSwap");
        assert_eq!(field("featureGates")["MemoryQoS"], true);
        assert_eq!(field("syncFrequency"), "1m30s");
        assert_eq!(field("cpuCFSQuotaPeriod"), "100ms");
        for (name, default) in [
            ("failSwapOn", json!(true)),
            ("enableServer", json!(true)),
            ("readOnlyPort", json!(0)),
            ("oomScoreAdj", json!(-999)),
            ("maxOpenFiles", json!(1_000_000)),
            ("memoryThrottlingFactor", json!(0.9)),
            ("hairpinMode", json!("promiscuous-bridge")),
            ("containerLogMaxSize", json!("10Mi")),
            ("localStorageCapacityIsolation", json!(true)),
        ] {
            assert_eq!(field(name), default, "{name}");
        }
        assert!(field("keelson").is_null() && field("kubeAPIQPS").is_null(), "{shown}");
    }
}

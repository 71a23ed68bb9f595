//! Fields of KubeletConfiguration v1beta1 (Kubernetes 1.36) that are accepted and change nothing, each with its reason.

/// Top-level fields whose values are checked, and why they change nothing.
pub(super) const INERT: &[(&str, &str)] = &[
    ("contentType", "requests and answers are JSON whatever it says"),
    ("enableContentionProfiling", "there is nothing of Go to profile"),
    ("enableControllerAttachDetach", "the attach-detach controller always attaches volumes"),
    ("hairpinMode", "the CNI plugin decides it for each interface"),
    ("iptablesDropBit", "no rules of iptables are made; upstream's has no effect either"),
    ("iptablesMasqueradeBit", "no rules of iptables are made; upstream's has no effect either"),
    ("kernelMemcgNotification", "memory stalls (PSI) are always followed, which say the same sooner"),
    ("makeIPTablesUtilChains", "no rules of iptables are made"),
    ("showHiddenMetricsForVersion", "no metric is hidden"),
    ("streamingConnectionIdleTimeout", "streams are the runtime's, as upstream"),
    ("tracing", "no spans are sent"),
    ("volumePluginDir", "FlexVolume drivers are not run; CSI drivers are"),
];

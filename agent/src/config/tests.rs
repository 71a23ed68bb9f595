//! Configuration files that users write, right and wrong.

use std::path::Path;

use super::*;

const MINIMAL: &str = "
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
tlsCertFile: /d/kubelet.crt
tlsPrivateKeyFile: /d/kubelet.key
keelson:
  nodeName: n1
  nodeIP: 10.0.0.1
  kubeconfig: /d/agent.kubeconfig
";

fn parse(extra: &str) -> Result<AgentConfig, String> {
    AgentConfig::parse(Path::new("agent.yaml"), &format!("{MINIMAL}{extra}")).map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {source}")
    })
}

#[test]
fn defaults_are_upstreams() {
    let config = parse("").expect("valid");
    assert_eq!((config.port, config.healthz_port, config.max_pods), (10250, 10248, 110));
    assert_eq!(config.runtime_socket(), PathBuf::from("/run/keelson/cri.sock"));
    assert_eq!(config.cpu_cfs_quota_period, GoDuration::from_millis(100));
}

#[test]
fn an_unknown_field_is_named() {
    let error = parse("maxPodss: 3\n").expect_err("unknown field");
    assert!(error.contains("maxPodss"), "{error}");
    let error = parse("  nodeNam: x\n").expect_err("unknown field in the section");
    assert!(error.contains("nodeNam"), "{error}");
}

#[test]
fn a_stock_field_without_effect_is_accepted_and_listed() {
    let config = parse("volumePluginDir: /x\nclusterDNS: [10.96.0.10]\nfeatureGates: {EventedPLEG: true}\n");
    let config = config.expect("valid");
    let fields: Vec<&str> = config.ignored.iter().map(|ignored| ignored.field.as_str()).collect();
    assert_eq!(fields, ["volumePluginDir", "featureGates"]);
    assert!(config.ignored[1].reason.contains("EventedPLEG=true"), "{:?}", config.ignored);
    assert_eq!(config.cluster_dns, [IpAddr::from([10, 96, 0, 10])]);
}

#[test]
fn impossible_values_are_all_reported_at_once() {
    let error = parse("cgroupDriver: openrc\ncgroupRoot: x\n").expect_err("two problems");
    assert!(
        error.contains("\"openrc\": expected cgroupfs or systemd") && error.contains("cgroupRoot"),
        "{error}"
    );
}

#[test]
fn shutdown_periods_become_groups_or_are_refused() {
    let groups = |text: &str| -> Vec<(i32, i64)> {
        let groups = parse(text).expect("valid").shutdown_groups();
        groups.into_iter().map(|group| (group.priority, group.seconds)).collect()
    };
    assert_eq!(groups(""), []);
    let two = "shutdownGracePeriod: 30s\nshutdownGracePeriodCriticalPods: 10s\n";
    assert_eq!(groups(two), [(0, 20), (2_000_000_000, 10)]);
    let list = "shutdownGracePeriodByPodPriority: [{priority: 5, shutdownGracePeriodSeconds: 7}]\n";
    assert_eq!(groups(list), [(5, 7)]);
    for (text, why) in [
        ("shutdownGracePeriod: 5s\nshutdownGracePeriodCriticalPods: 6s\n", "must not be longer"),
        ("shutdownGracePeriod: 10ms\n", "at least 1s"),
        (format!("{list}shutdownGracePeriod: 5s\n").as_str(), "exclude each other"),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_node_without_an_api_server_needs_no_kubeconfig() {
    let minimal = MINIMAL.replace("  kubeconfig: /d/agent.kubeconfig\n", "");
    let parse = |extra: &str| AgentConfig::parse(Path::new("agent.yaml"), &format!("{extra}{minimal}"));
    let config = parse("podCIDR: 10.88.0.0/24\nstaticPodURL: http://h/pods\n").expect("valid");
    assert!(config.is_standalone());
    assert_eq!(config.static_sources().len(), 1);
    let error = parse("podCIDR: nonsense\n").expect_err("no range").to_string();
    assert!(error.contains("podCIDR"), "{error}");
    let with_proxy = format!("{minimal}  proxy: {{cgroupRoot: /c, pinDir: /p, serviceCIDR: 10.96.0.0/16}}\n");
    let error =
        AgentConfig::parse(Path::new("agent.yaml"), &with_proxy).expect_err("nobody tells").to_string();
    assert!(error.contains("keelson.proxy"), "{error}");
}

#[test]
fn settings_of_numa_nodes_are_checked() {
    let error = parse(
        "topologyManagerPolicy: nearest\ntopologyManagerScope: node\n\
         topologyManagerPolicyOptions: {max-allowable-numa-nodes: \"99\", other: \"true\"}\n\
         memoryManagerPolicy: Static\n",
    )
    .expect_err("impossible");
    for part in [
        "topologyManagerPolicy \"nearest\": expected none, best-effort, restricted or single-numa-node",
        "topologyManagerScope \"node\": expected container or pod",
        "topologyManagerPolicyOptions \"max-allowable-numa-nodes\": expected 8 to 16",
        "topologyManagerPolicyOptions \"other\"",
        "memoryManagerPolicy Static needs reservedMemory",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let error = parse(
        "memoryManagerPolicy: Static\nreservedMemory: [{numaNode: 0, limits: {memory: 1Gi, cpu: 1}}, \
         {numaNode: 0, limits: {memory: none}}]\n",
    )
    .expect_err("impossible");
    assert!(
        error.contains("numaNode 0: \"cpu\"") && error.contains("memory \"none\" is not an amount"),
        "{error}"
    );
    let config = parse(
        "topologyManagerPolicy: restricted\nmemoryManagerPolicy: Static\n\
         reservedMemory: [{numaNode: 1, limits: {memory: 1Gi}}]\n",
    )
    .expect("valid");
    assert_eq!(config.memory_reserved().collect::<Vec<_>>(), [(1, "memory".to_owned(), 1 << 30)]);
}

/// What kubeadm 1.36 writes, but for the cgroup driver.
const KUBEADM: &str = r#"
apiVersion: kubelet.config.k8s.io/v1beta1
authentication:
  anonymous: {enabled: false}
  webhook: {cacheTTL: 0s, enabled: true}
  x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}
authorization:
  mode: Webhook
  webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}
cgroupDriver: cgroupfs
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: ""
cpuManagerReconcilePeriod: 0s
crashLoopBackOff: {}
evictionPressureTransitionPeriod: 0s
fileCheckFrequency: 0s
healthzBindAddress: 127.0.0.1
healthzPort: 10248
httpCheckFrequency: 0s
imageMaximumGCAge: 0s
imageMinimumGCAge: 0s
kind: KubeletConfiguration
logging:
  flushFrequency: 0
  options:
    json: {infoBufferSize: "0"}
    text: {infoBufferSize: "0"}
  verbosity: 0
memorySwap: {}
nodeStatusReportFrequency: 0s
nodeStatusUpdateFrequency: 0s
rotateCertificates: true
runtimeRequestTimeout: 0s
shutdownGracePeriod: 0s
shutdownGracePeriodCriticalPods: 0s
staticPodPath: /etc/kubernetes/manifests
streamingConnectionIdleTimeout: 0s
syncFrequency: 0s
volumeStatsAggPeriod: 0s
"#;

fn written(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
    std::fs::write(&path, text).expect("a file");
    path
}

#[test]
fn a_file_of_kubeadm_works_with_the_flags_that_belong_to_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = written(dir.path(), "config.yaml", KUBEADM);
    let mut keelson = serde_norway::Mapping::new();
    keelson.insert("kubeconfig".into(), "/etc/kubernetes/kubelet.conf".into());
    keelson.insert("nodeIP".into(), "10.0.0.9".into());
    let overrides = [("keelson".into(), keelson.into()), ("maxPods".into(), 30.into())].into_iter().collect();
    let config =
        AgentConfig::load_from(&Source { file, drop_ins: None, overrides }).expect("a configuration");
    assert_eq!((config.max_pods, config.keelson.node_ip), (30, IpAddr::from([10, 0, 0, 9])));
    assert!(!config.keelson.node_name.is_empty(), "the machine's name");
    assert_eq!(config.runtime_socket(), PathBuf::from("/run/keelson/cri.sock"));
    assert_eq!(config.runtime_request_timeout, GoDuration::from_millis(120_000), "0s is the default");
    let listed: Vec<&str> = config.ignored.iter().map(|ignored| ignored.field.as_str()).collect();
    assert_eq!(listed, ["streamingConnectionIdleTimeout"]);
}

#[test]
fn drop_ins_are_merged_by_name_and_flags_count_more() {
    const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";
    let dir = tempfile::tempdir().expect("a directory");
    let at = dir.path();
    let file = written(
        at,
        "agent.yaml",
        &format!(
            "{MINIMAL}maxPods: 1\nevictionHard: {{memory.available: 1Mi}}\nsystemReserved: {{cpu: 1, memory: 1Gi}}\n"
        ),
    );
    written(
        at,
        "d/20-more.conf",
        &format!("{HEAD}maxPods: 20\nclusterDNS: [10.96.0.10]\nsystemReserved: {{cpu: null}}\n"),
    );
    written(
        at,
        "d/10-first.conf",
        &format!("{HEAD}maxPods: 10\nevictionHard: {{nodefs.available: 5%}}\npodsPerCore: 3\n"),
    );
    written(at, "d/15/deep.conf", &format!("{HEAD}clusterDNS: [10.96.0.1, 10.96.0.2]\n"));
    written(at, "d/99-no.yaml", "nonsense: 1\n");
    let load = |overrides: serde_norway::Mapping| {
        AgentConfig::load_from(&Source { file: file.clone(), drop_ins: Some(at.join("d")), overrides })
    };
    let config = load(serde_norway::Mapping::new()).expect("merged");
    assert_eq!((config.max_pods, config.machine.pods_per_core), (20, 3));
    assert_eq!(config.cluster_dns, [IpAddr::from([10, 96, 0, 10])], "a list takes the place of another");
    assert_eq!(config.eviction_hard.as_ref().map(BTreeMap::len), Some(2), "sections are merged");
    assert_eq!(config.system_reserved, [("memory".to_owned(), "1Gi".to_owned())].into(), "null removes");
    let hard: serde_norway::Value = serde_norway::from_str("{memory.available: 9Mi}").expect("a mapping");
    let config = load([("evictionHard".into(), hard)].into_iter().collect()).expect("merged");
    assert_eq!(config.eviction_hard.as_ref().map(BTreeMap::len), Some(1), "a flag says all of a field");
    written(at, "d/30-bad.conf", &format!("{HEAD}maxPods: many\n"));
    let error = load(serde_norway::Mapping::new()).expect_err("no number").to_string();
    assert!(error.contains("field maxPods"), "{error}");
    written(at, "d/30-bad.conf", "maxPods: 3\n");
    let error = load(serde_norway::Mapping::new()).expect_err("what is it?").to_string();
    assert!(error.contains("30-bad.conf") && error.contains("KubeletConfiguration"), "{error}");
}

#[test]
fn a_wrong_value_is_told_with_its_field() {
    for (text, part) in [
        (
            "memorySwap: {swapBehavior: UnlimitedSwap}\n",
            "memorySwap.swapBehavior \"UnlimitedSwap\" must be one of",
        ),
        ("memorySwap: {behavior: NoSwap}\n", "field memorySwap"),
        ("failSwapOn: perhaps\n", "field failSwapOn"),
        ("readOnlyPort: 70000\n", "field readOnlyPort"),
        ("readOnlyPort: 10250\n", "readOnlyPort 10250 is the port"),
        ("podsPerCore: -1\n", "podsPerCore -1 must not be a negative number"),
        ("oomScoreAdj: -1001\n", "oomScoreAdj -1001 must be between -1000 and 1000"),
        ("memoryThrottlingFactor: 1.5\n", "memoryThrottlingFactor 1.5"),
        ("memoryReservationPolicy: TieredReservation\n", "memoryReservationPolicy"),
        ("enforceNodeAllocatable: [pods, kube-reserved]\n", "kubeReservedCgroup must be specified"),
        ("enforceNodeAllocatable: [pods, pods]\n", "duplicated enforcements \"pods\""),
        ("enforceNodeAllocatable: [none, pods]\n", "may not contain additional enforcements"),
        ("enforceNodeAllocatable: [all]\n", "option \"all\" specified for enforceNodeAllocatable"),
        ("kubeletCgroups: kubelet.slice\n", "kubeletCgroups \"kubelet.slice\""),
        ("systemCgroups: /\n", "systemCgroups cannot be root"),
        ("tlsCipherSuites: [TLS_NONE]\n", "tlsCipherSuites: cipher suite TLS_NONE"),
        ("tlsMinVersion: TLS13\n", "tlsMinVersion: unknown tls version"),
        ("tlsCurvePreferences: [1]\n", "tlsCurvePreferences: 1"),
        ("enableSystemLogQuery: true\nenableSystemLogHandler: false\n", "enableSystemLogHandler is required"),
        ("enableSystemLogQuery: true\nfeatureGates: {NodeLogQuery: false}\n", "NodeLogQuery feature gate"),
        ("kubeAPIQPS: -1\n", "kubeAPIQPS -1 must not be a negative number"),
        ("registryBurst: -1\n", "registryBurst -1 must not be a negative number"),
        ("contentType: text/plain\n", "contentType \"text/plain\""),
        ("configMapAndSecretChangeDetectionStrategy: Poll\n", "unknown configmap and secret manager mode"),
        ("imagePullCredentialsVerificationPolicy: Sometimes\n", "imagePullCredentialsVerificationPolicy"),
        ("preloadedImagesVerificationAllowlist: [a/b]\n", "preloadedImagesVerificationAllowlist"),
        ("logging: {format: xml}\n", "logging.format: Invalid value: \"xml\": Unsupported log format"),
        (
            "logging: {format: json, vmodule: [{filePattern: pods, verbosity: 4}]}\n",
            "logging.vmodule: Forbidden",
        ),
        ("logging: {options: {text: {splitStream: true}}}\n", "Feature LoggingAlphaOptions is disabled"),
        ("featureGates: {NoSuchGate: true}\n", "unrecognized feature gate: NoSuchGate"),
        (
            "featureGates: {NodeSwap: false}\n",
            "cannot set feature gate NodeSwap to false, feature is locked to true",
        ),
        (
            "serverTLSBootstrap: true\nfeatureGates: {RotateKubeletServerCertificate: false}\n",
            "requires feature gate",
        ),
        ("runOnce: true\n", "runOnce true, Runonce mode has been deprecated"),
        ("hairpinMode: sometimes\n", "option \"sometimes\" specified for hairpinMode"),
        ("iptablesDropBit: 32\n", "iptablesDropBit 32 must be between 0 and 31"),
        ("showHiddenMetricsForVersion: \"1.30\"\n", "showHiddenMetricsForVersion"),
        ("volumePluginDir: here\n", "volumePluginDir \"here\" is not absolute"),
        ("tracing: {samplingRatePerMillion: 1000001}\n", "tracing.samplingRatePerMillion"),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn gates_are_on_as_upstream_unless_they_are_set() {
    let is_on = |text: &str, gate: &str| parse(text).expect(text).is_enabled(gate);
    assert!(!is_on("", "MemoryQoS") && is_on("", "GracefulNodeShutdown") && is_on("", "NodeSwap"));
    assert!(is_on("featureGates: {MemoryQoS: true}\n", "MemoryQoS"));
    assert!(is_on("featureGates: {AllAlpha: true}\n", "MemoryQoS"));
    assert!(!is_on("featureGates: {AllAlpha: true, MemoryQoS: false}\n", "MemoryQoS"));
    assert!(!is_on("featureGates: {AllBeta: false}\n", "GracefulNodeShutdown"));
    let throttling = |text: &str| parse(text).expect(text).memory_throttling();
    assert_eq!(throttling("memoryThrottlingFactor: 0.5\n"), None);
    assert_eq!(throttling("featureGates: {MemoryQoS: true}\nmemoryThrottlingFactor: 0.5\n"), Some(500_000));
}

#[test]
fn rates_limit_where_they_are_asked_for() {
    use agent_core::pace::Rate;
    let config = parse("").expect("valid");
    assert_eq!((config.api_rate(), config.event_rate(), config.pull_rate()), (None, None, None));
    let config =
        parse("kubeAPIBurst: 7\neventRecordQPS: 0\nregistryPullQPS: 2\nregistryBurst: 0\n").expect("valid");
    assert_eq!(config.api_rate(), Some(Rate { per_second: 50, burst: 7 }));
    assert_eq!(config.event_rate(), None, "0 is no limit");
    assert_eq!(config.pull_rate(), Some(Rate { per_second: 2, burst: 10 }));
}

#[test]
fn reserved_cgroups_have_what_is_reserved() {
    let text = "enforceNodeAllocatable: [pods, system-reserved, kube-reserved-compressible]\n\
                systemReserved: {cpu: 500m, memory: 1Gi, pid: \"1000\"}\nkubeReserved: {cpu: \"1\", memory: 2Gi}\n\
                systemReservedCgroup: /system.slice\nkubeReservedCgroup: /kube.slice\n";
    let config = parse(text).expect("valid");
    let whole = ReservedCgroup {
        whose: Reserved::System,
        path: "/system.slice".to_owned(),
        milli_cpu: Some(500),
        memory: Some(1 << 30),
        pids: Some(1000),
    };
    let part = ReservedCgroup {
        whose: Reserved::Kube,
        path: "/kube.slice".to_owned(),
        milli_cpu: Some(1000),
        memory: None,
        pids: None,
    };
    assert_eq!(config.reserved_cgroups(), [whole, part]);
    assert!(config.enforces_pods());
    assert_eq!(parse("podsPerCore: 5\n").expect("valid").pods_at_most(4), 20);
    assert_eq!(parse("podsPerCore: 50\n").expect("valid").pods_at_most(4), 110);
}

#[test]
fn tls_rules_are_read_by_their_go_names() {
    let config = parse(
        "tlsMinVersion: VersionTLS13\ntlsCurvePreferences: [29, 4588]\ntlsCipherSuites: \
         [TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305, TLS_AES_128_GCM_SHA256, TLS_RSA_WITH_AES_128_CBC_SHA]\n",
    )
    .expect("valid");
    let suites = vec!["TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256".to_owned()];
    assert_eq!(
        config.serving.tls(),
        TlsRules { suites: Some(suites), only_13: true, curves: vec![29, 4588] }
    );
    assert!(config.ignored[0].reason.contains("TLS_RSA_WITH_AES_128_CBC_SHA"), "{:?}", config.ignored);
    assert_eq!(parse("").expect("valid").serving.tls(), TlsRules::default());
}

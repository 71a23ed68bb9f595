//! Configuration files that users write, right and wrong.

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
    let config = parse("memoryManagerPolicy: Static\nclusterDNS: [10.96.0.10]\n").expect("valid");
    assert_eq!(config.ignored, ["memoryManagerPolicy"]);
    assert_eq!(config.cluster_dns, [IpAddr::from([10, 96, 0, 10])]);
}

#[test]
fn impossible_values_are_all_reported_at_once() {
    let error = parse("cgroupDriver: systemd\ncgroupRoot: x\n").expect_err("two problems");
    assert!(error.contains("systemd") && error.contains("cgroupRoot"), "{error}");
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

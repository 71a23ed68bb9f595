//! The command line: the configuration, what a stock kubelet's flags say over it, and chores beside running the agent.
//!
//! Input: arguments. Output: [`Arguments`], and by [`Arguments::source`] where the configuration comes from. A flag of a
//! kubelet stands for a field of the configuration file, and counts more than the file, as upstream.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, Parser, Subcommand};
use serde_norway::{Mapping, Value};

use keelson_agent::config::{Source, gates};
use keelson_agent::proxy::show;

/// Kubernetes node agent.
#[derive(Debug, Parser)]
#[command(name = "keelson-agent", version)]
pub(crate) struct Arguments {
    /// Configuration file: KubeletConfiguration v1beta1, with a `keelson:` section where it needs one.
    #[arg(long, global = true, default_value = "/etc/keelson/agent.yaml")]
    config: PathBuf,
    /// Directory of drop-ins: its `*.conf` files are merged over the configuration file, in the order of their names.
    #[arg(long, global = true)]
    config_dir: Option<PathBuf>,
    #[command(flatten)]
    kubelet: KubeletFlags,
    #[command(subcommand)]
    pub(crate) command: Option<Chore>,
}

impl Arguments {
    /// Where the configuration comes from.
    pub(crate) fn source(&self) -> Source {
        Source {
            file: self.config.clone(),
            drop_ins: self.config_dir.clone(),
            overrides: self.kubelet.overrides.clone(),
        }
    }

    /// Flags that were given and change nothing.
    pub(crate) fn idle(&self) -> &[&'static str] {
        &self.kubelet.idle
    }
}

/// What the program does instead of running the agent.
#[derive(Debug, Subcommand)]
pub(crate) enum Chore {
    /// Tell what this machine lacks, and how to mend it; starts nothing.
    Check,
    /// The service data plane, which outlives the agent.
    #[command(subcommand)]
    Proxy(ProxyChore),
    /// The network between nodes, which outlives the agent.
    #[command(subcommand)]
    Network(NetworkChore),
    /// What the service data plane of this node does.
    Service {
        /// Where it is pinned; the configuration file tells by default.
        #[arg(long, global = true)]
        pin_dir: Option<PathBuf>,
        /// How the answer looks.
        #[arg(long, short, global = true, value_enum, default_value_t)]
        output: show::Output,
        #[command(subcommand)]
        question: ServiceQuestion,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkChore {
    /// Remove the tunnel device and the routes to other nodes' pods.
    Cleanup {
        /// The tunnel device.
        #[arg(long, default_value = "kl-vxlan")]
        device: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceQuestion {
    #[command(flatten)]
    Maps(show::Question),
    /// Compare the maps with the API server; fails where they differ.
    Verify,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ProxyChore {
    /// Detach and unpin the data plane, and remove its routes.
    Cleanup {
        /// Where it is pinned.
        #[arg(long)]
        pin_dir: PathBuf,
        /// Service range whose route is removed.
        #[arg(long = "service-cidr", default_value = "")]
        service_cidr: String,
    },
}

/// How a flag's value reads.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// As it is.
    Text,
    /// A whole number.
    Number,
    /// `true` where nothing follows.
    Switch,
    /// Parts with commas between.
    List,
    /// `a=1,b=2`.
    Pairs,
    /// `memory.available<100Mi`, with commas between.
    Thresholds,
    /// `A=true,B=false`.
    Gates,
    /// `key=value:effect`, with commas between.
    Taints,
    /// The first of one or two addresses; an unspecified one leaves the choice to the agent.
    Address,
}

/// A stock kubelet's flags, and the fields that they stand for.
const FLAGS: &[(Form, &[(&str, &str)])] = &[
    (
        Form::Text,
        &[
            ("address", "address"),
            ("authorization-mode", "authorization.mode"),
            ("bootstrap-kubeconfig", "keelson.bootstrapKubeconfig"),
            ("cert-dir", "keelson.certDir"),
            ("cgroup-driver", "cgroupDriver"),
            ("cgroup-root", "cgroupRoot"),
            ("client-ca-file", "authentication.x509.clientCAFile"),
            ("cloud-provider", "keelson.cloudProvider"),
            ("cluster-domain", "clusterDomain"),
            ("container-log-max-size", "containerLogMaxSize"),
            ("container-runtime-endpoint", "containerRuntimeEndpoint"),
            ("cpu-cfs-quota-period", "cpuCFSQuotaPeriod"),
            ("cpu-manager-policy", "cpuManagerPolicy"),
            ("cpu-manager-reconcile-period", "cpuManagerReconcilePeriod"),
            ("eviction-pressure-transition-period", "evictionPressureTransitionPeriod"),
            ("file-check-frequency", "fileCheckFrequency"),
            ("hairpin-mode", "hairpinMode"),
            ("healthz-bind-address", "healthzBindAddress"),
            ("hostname-override", "keelson.nodeName"),
            ("http-check-frequency", "httpCheckFrequency"),
            ("image-service-endpoint", "imageServiceEndpoint"),
            ("kube-api-content-type", "contentType"),
            ("kube-reserved-cgroup", "kubeReservedCgroup"),
            ("kubeconfig", "keelson.kubeconfig"),
            ("kubelet-cgroups", "kubeletCgroups"),
            ("logging-format", "logging.format"),
            ("manifest-url", "staticPodURL"),
            ("memory-manager-policy", "memoryManagerPolicy"),
            ("minimum-image-ttl-duration", "imageMinimumGCAge"),
            ("node-status-update-frequency", "nodeStatusUpdateFrequency"),
            ("pod-cidr", "podCIDR"),
            ("pod-manifest-path", "staticPodPath"),
            ("provider-id", "providerID"),
            ("reserved-cpus", "reservedSystemCPUs"),
            ("resolv-conf", "resolvConf"),
            ("root-dir", "keelson.rootDir"),
            ("runtime-request-timeout", "runtimeRequestTimeout"),
            ("show-hidden-metrics-for-version", "showHiddenMetricsForVersion"),
            ("streaming-connection-idle-timeout", "streamingConnectionIdleTimeout"),
            ("sync-frequency", "syncFrequency"),
            ("system-cgroups", "systemCgroups"),
            ("system-reserved-cgroup", "systemReservedCgroup"),
            ("tls-cert-file", "tlsCertFile"),
            ("tls-min-version", "tlsMinVersion"),
            ("tls-private-key-file", "tlsPrivateKeyFile"),
            ("topology-manager-policy", "topologyManagerPolicy"),
            ("topology-manager-scope", "topologyManagerScope"),
            ("volume-plugin-dir", "volumePluginDir"),
            ("volume-stats-agg-period", "volumeStatsAggPeriod"),
        ],
    ),
    (
        Form::Number,
        &[
            ("container-log-max-files", "containerLogMaxFiles"),
            ("event-burst", "eventBurst"),
            ("event-qps", "eventRecordQPS"),
            ("eviction-max-pod-grace-period", "evictionMaxPodGracePeriod"),
            ("healthz-port", "healthzPort"),
            ("image-gc-high-threshold", "imageGCHighThresholdPercent"),
            ("image-gc-low-threshold", "imageGCLowThresholdPercent"),
            ("kube-api-burst", "kubeAPIBurst"),
            ("kube-api-qps", "kubeAPIQPS"),
            ("max-open-files", "maxOpenFiles"),
            ("max-pods", "maxPods"),
            ("node-status-max-images", "nodeStatusMaxImages"),
            ("oom-score-adj", "oomScoreAdj"),
            ("pod-max-pids", "podPidsLimit"),
            ("pods-per-core", "podsPerCore"),
            ("port", "port"),
            ("read-only-port", "readOnlyPort"),
            ("registry-burst", "registryBurst"),
            ("registry-qps", "registryPullQPS"),
            ("v", "logging.verbosity"),
        ],
    ),
    (
        Form::Switch,
        &[
            ("anonymous-auth", "authentication.anonymous.enabled"),
            ("authentication-token-webhook", "authentication.webhook.enabled"),
            ("cgroups-per-qos", "cgroupsPerQOS"),
            ("cpu-cfs-quota", "cpuCFSQuota"),
            ("enable-controller-attach-detach", "enableControllerAttachDetach"),
            ("enable-debugging-handlers", "enableDebuggingHandlers"),
            ("enable-server", "enableServer"),
            ("fail-cgroupv1", "failCgroupV1"),
            ("fail-swap-on", "failSwapOn"),
            ("kernel-memcg-notification", "kernelMemcgNotification"),
            ("local-storage-capacity-isolation", "localStorageCapacityIsolation"),
            ("make-iptables-util-chains", "makeIPTablesUtilChains"),
            ("protect-kernel-defaults", "protectKernelDefaults"),
            ("register-node", "registerNode"),
            ("rotate-certificates", "rotateCertificates"),
            ("rotate-server-certificates", "serverTLSBootstrap"),
            ("runonce", "runOnce"),
            ("seccomp-default", "seccompDefault"),
            ("serialize-image-pulls", "serializeImagePulls"),
        ],
    ),
    (
        Form::List,
        &[
            ("allowed-unsafe-sysctls", "allowedUnsafeSysctls"),
            ("cluster-dns", "clusterDNS"),
            ("enforce-node-allocatable", "enforceNodeAllocatable"),
            ("tls-cipher-suites", "tlsCipherSuites"),
        ],
    ),
    (
        Form::Pairs,
        &[
            ("cpu-manager-policy-options", "cpuManagerPolicyOptions"),
            ("eviction-minimum-reclaim", "evictionMinimumReclaim"),
            ("eviction-soft-grace-period", "evictionSoftGracePeriod"),
            ("kube-reserved", "kubeReserved"),
            ("node-labels", "keelson.nodeLabels"),
            ("system-reserved", "systemReserved"),
            ("topology-manager-policy-options", "topologyManagerPolicyOptions"),
        ],
    ),
    (Form::Thresholds, &[("eviction-hard", "evictionHard"), ("eviction-soft", "evictionSoft")]),
    (Form::Gates, &[("feature-gates", "featureGates")]),
    (Form::Taints, &[("register-with-taints", "registerWithTaints")]),
    (Form::Address, &[("node-ip", "keelson.nodeIP")]),
];

/// Flags that unit files of kubelets carry, and that change nothing.
const IDLE: &[&str] = &[
    "container-runtime",
    "log-flush-frequency",
    "maximum-dead-containers",
    "maximum-dead-containers-per-container",
    "minimum-container-ttl-duration",
    "pod-infra-container-image",
    "runtime-cgroups",
];

/// What a stock kubelet's flags say.
#[derive(Debug, Clone, Default)]
struct KubeletFlags {
    /// In the form of the configuration file.
    overrides: Mapping,
    /// Flags that change nothing.
    idle: Vec<&'static str>,
}

impl Args for KubeletFlags {
    fn augment_args(command: Command) -> Command {
        const HEADING: &str = "Flags of a kubelet";
        let acting =
            FLAGS.iter().flat_map(|(form, flags)| flags.iter().map(move |(flag, field)| (form, flag, field)));
        let command = acting.fold(command, |command, (form, flag, field)| {
            let mut arg = Arg::new(*flag)
                .long(*flag)
                .action(ArgAction::Append)
                .allow_hyphen_values(true)
                .help_heading(HEADING)
                .help(format!("Overrides {field}"));
            if matches!(form, Form::Switch) {
                arg = arg.num_args(0..=1).require_equals(true).default_missing_value("true");
            }
            command.arg(if *flag == "v" { arg.short('v') } else { arg })
        });
        IDLE.iter().fold(command, |command, flag| {
            command.arg(
                Arg::new(*flag).long(*flag).action(ArgAction::Append).hide(true).allow_hyphen_values(true),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for KubeletFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut read = Self::default();
        read.update_from_arg_matches(matches)?;
        Ok(read)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for (form, flags) in FLAGS {
            for (flag, field) in *flags {
                let Some(values) = matches.get_many::<String>(flag) else { continue };
                let given: Vec<&str> = values.map(String::as_str).collect();
                let value = form.read(&given).map_err(|problem| {
                    clap::Error::raw(
                        clap::error::ErrorKind::ValueValidation,
                        format!("--{flag}: {problem}\n"),
                    )
                })?;
                if let Some(value) = value {
                    put(&mut self.overrides, field, value);
                }
            }
        }
        self.idle = IDLE.iter().copied().filter(|flag| matches.contains_id(flag)).collect();
        Ok(())
    }
}

impl Form {
    /// All values of a flag that was given once or more; of most forms the last counts. `None`: it says nothing.
    fn read(self, given: &[&str]) -> Result<Option<Value>, String> {
        let last = given.last().copied().unwrap_or_default();
        let parts =
            || given.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|part| !part.is_empty());
        let pairs = |separator: char, what: &str| -> Result<Mapping, String> {
            let pair = |part: &str| {
                let (key, value) = part.split_once(separator).ok_or(format!("{part:?} is not {what}"))?;
                Ok((Value::from(key.trim()), Value::from(value.trim())))
            };
            parts().map(pair).collect()
        };
        Ok(Some(match self {
            Self::Text => last.into(),
            Self::Number => {
                last.parse::<i64>().map_err(|_error| format!("{last:?} is not a whole number"))?.into()
            }
            Self::Switch => {
                last.parse::<bool>().map_err(|_error| format!("{last:?} is not true or false"))?.into()
            }
            Self::List => Value::Sequence(parts().map(Value::from).collect()),
            Self::Pairs => Value::Mapping(pairs('=', "name=value")?),
            Self::Thresholds => Value::Mapping(pairs('<', "signal<amount")?),
            Self::Gates => {
                let gates = gates::parse(&given.join(","))?;
                Value::Mapping(gates.into_iter().map(|(name, is_on)| (name.into(), is_on.into())).collect())
            }
            Self::Taints => Value::Sequence(parts().map(taint).collect::<Result<_, _>>()?),
            Self::Address => {
                let first = last.split(',').next().unwrap_or_default().trim();
                let address: std::net::IpAddr =
                    first.parse().map_err(|_error| format!("{first:?} is not an address"))?;
                if address.is_unspecified() {
                    return Ok(None);
                }
                address.to_string().into()
            }
        }))
    }
}

/// `key=value:effect` or `key:effect`.
fn taint(text: &str) -> Result<Value, String> {
    let wrong = || format!("{text:?} is not a taint, as key=value:NoSchedule");
    let (name, effect) = text.rsplit_once(':').ok_or_else(wrong)?;
    if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
        return Err(wrong());
    }
    let (key, value) = name.split_once('=').unwrap_or((name, ""));
    let mut taint = Mapping::new();
    taint.insert("key".into(), key.into());
    if !value.is_empty() {
        taint.insert("value".into(), value.into());
    }
    taint.insert("effect".into(), effect.into());
    Ok(Value::Mapping(taint))
}

/// Puts a value at a path with dots.
fn put(document: &mut Mapping, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            document.insert(path.into(), value);
        }
        Some((section, rest)) => {
            let inner = document.entry(section.into()).or_insert_with(|| Value::Mapping(Mapping::new()));
            if let Value::Mapping(inner) = inner {
                put(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overrides(arguments: &[&str]) -> Result<serde_json::Value, String> {
        let all = std::iter::once("keelson-agent").chain(arguments.iter().copied());
        let parsed = Arguments::try_parse_from(all).map_err(|error| error.to_string())?;
        serde_json::to_value(parsed.source().overrides).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_stand_for_fields() {
        let given = overrides(&[
            "--config=/etc/k.yaml",
            "--node-ip=10.0.0.7,fd00::7",
            "--hostname-override",
            "worker",
            "--node-labels=a=b,c/d=e",
            "--node-labels=f=",
            "--register-with-taints=k=v:NoSchedule,only:NoExecute",
            "--fail-swap-on=false",
            "--rotate-certificates",
            "--oom-score-adj",
            "-500",
            "--eviction-hard=memory.available<100Mi,nodefs.available<10%",
            "--feature-gates=MemoryQoS=true",
            "--client-ca-file=/ca",
            "--pod-infra-container-image=registry.k8s.io/pause:3.10",
            "-v=5",
            "check",
        ])
        .expect("flags of a kubelet");
        assert_eq!(
            given,
            serde_json::json!({
                "authentication": {"x509": {"clientCAFile": "/ca"}},
                "evictionHard": {"memory.available": "100Mi", "nodefs.available": "10%"},
                "failSwapOn": false,
                "featureGates": {"MemoryQoS": true},
                "keelson": {"nodeName": "worker", "nodeIP": "10.0.0.7", "nodeLabels": {"a": "b", "c/d": "e", "f": ""}},
                "logging": {"verbosity": 5},
                "oomScoreAdj": -500,
                "registerWithTaints": [
                    {"key": "k", "value": "v", "effect": "NoSchedule"}, {"key": "only", "effect": "NoExecute"}],
                "rotateCertificates": true,
            })
        );
        assert_eq!(overrides(&["--node-ip=0.0.0.0"]).expect("any address"), serde_json::json!({}));
    }

    #[test]
    fn a_wrong_value_is_told_with_its_flag() {
        for (flag, why) in [
            ("--max-pods=many", "--max-pods: \"many\" is not a whole number"),
            ("--fail-swap-on=perhaps", "--fail-swap-on"),
            ("--register-with-taints=a=b", "is not a taint"),
            ("--node-ip=here", "--node-ip: \"here\" is not an address"),
            ("--node-labels=x", "--node-labels: \"x\" is not name=value"),
            ("--feature-gates=A=maybe", "--feature-gates: invalid value of A=maybe"),
            ("--no-such-flag", "--no-such-flag"),
        ] {
            let problem = overrides(&[flag]).expect_err(flag);
            assert!(problem.contains(why), "{problem}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }
}

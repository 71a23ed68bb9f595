//! Settings of the kubelet API's server. Pure.

use serde::{Deserialize, Serialize};

use super::{AgentConfig, GoDuration};

/// TLS 1.2 suites by Go's names that this server has; those of 1.3 are always on, as upstream.
const SUITES: &[&str] = &[
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
];
/// Names that Go knows too: older suites, which this server does not have, and those of TLS 1.3.
const OTHER_SUITES: &[&str] = &[
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_RC4_128_SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_RSA_WITH_RC4_128_SHA",
];
/// Key exchanges by number (RFC 8446 and its registry): P-256, P-384, P-521, X25519, X25519MLKEM768.
const CURVES: &[u16] = &[23, 24, 25, 29, 4588];

/// Fields of `KubeletConfiguration`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "the switches are KubeletConfiguration's")]
#[serde(rename_all = "camelCase", default)]
pub struct ServingSettings {
    /// The kubelet API is served.
    pub enable_server: bool,
    /// Port without TLS and without questions; 0: there is none.
    pub read_only_port: u16,
    /// `/logs/` shows the node's `/var/log`.
    pub enable_system_log_handler: bool,
    /// `/logs/?query=` asks the node's services.
    pub enable_system_log_query: bool,
    /// `/debug/pprof/`, which is not there.
    pub enable_profiling_handler: bool,
    /// `/debug/flags/v` changes the log's verbosity.
    pub enable_debug_flags_handler: bool,
    /// Without effect.
    pub enable_contention_profiling: bool,
    /// Without effect: streams are the runtime's.
    pub streaming_connection_idle_timeout: GoDuration,
    /// Suites of TLS 1.2, by Go's names; empty: all there are.
    pub tls_cipher_suites: Vec<String>,
    /// `VersionTLS12` or `VersionTLS13`.
    pub tls_min_version: String,
    /// Key exchanges, by number; empty: all there are.
    pub tls_curve_preferences: Vec<u16>,
}

impl Default for ServingSettings {
    fn default() -> Self {
        Self {
            enable_server: true,
            read_only_port: 0,
            enable_system_log_handler: true,
            enable_system_log_query: false,
            enable_profiling_handler: true,
            enable_debug_flags_handler: true,
            enable_contention_profiling: false,
            streaming_connection_idle_timeout: GoDuration::from_millis(4 * 3_600_000),
            tls_cipher_suites: Vec::new(),
            tls_min_version: String::new(),
            tls_curve_preferences: Vec::new(),
        }
    }
}

/// How connections to the kubelet API are protected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsRules {
    /// Suites of TLS 1.2, by their names; `None`: all there are.
    pub suites: Option<Vec<String>>,
    /// TLS 1.2 is refused.
    pub only_13: bool,
    /// Key exchanges, by number; empty: all there are.
    pub curves: Vec<u16>,
}

impl ServingSettings {
    /// What the TLS fields ask for.
    pub fn tls(&self) -> TlsRules {
        let wanted = self
            .tls_cipher_suites
            .iter()
            .map(|name| full_name(name))
            .filter(|name| SUITES.contains(&name.as_str()));
        TlsRules {
            suites: (!self.tls_cipher_suites.is_empty()).then(|| wanted.collect()),
            only_13: self.tls_min_version == "VersionTLS13",
            curves: self.tls_curve_preferences.clone(),
        }
    }

    /// Suites that were asked for and are not there.
    pub fn missing_suites(&self) -> Vec<&str> {
        let is_missing = |name: &&str| OTHER_SUITES.contains(name) && name.contains("_WITH_");
        self.tls_cipher_suites.iter().map(String::as_str).filter(is_missing).collect()
    }

    pub(super) fn problems(&self, config: &AgentConfig) -> Vec<String> {
        let mut problems = Vec::new();
        for name in &self.tls_cipher_suites {
            let full = full_name(name);
            if !SUITES.contains(&full.as_str()) && !OTHER_SUITES.contains(&full.as_str()) {
                problems.push(format!("tlsCipherSuites: cipher suite {name} not supported or doesn't exist"));
            }
        }
        // There is nothing below 1.2 here: who allows more gets that.
        if !matches!(
            self.tls_min_version.as_str(),
            "" | "VersionTLS10" | "VersionTLS11" | "VersionTLS12" | "VersionTLS13"
        ) {
            let given = &self.tls_min_version;
            problems.push(format!(
                "tlsMinVersion: unknown tls version {given:?}, expected VersionTLS12 or VersionTLS13"
            ));
        }
        for curve in &self.tls_curve_preferences {
            if !CURVES.contains(curve) {
                problems.push(format!("tlsCurvePreferences: {curve} is not one of {CURVES:?}"));
            }
        }
        if self.enable_system_log_query && !config.is_enabled("NodeLogQuery") {
            problems.push("NodeLogQuery feature gate is required for enableSystemLogQuery".to_owned());
        }
        if self.enable_system_log_query && !self.enable_system_log_handler {
            problems.push("enableSystemLogHandler is required for enableSystemLogQuery".to_owned());
        }
        if self.read_only_port != 0 && self.read_only_port == config.port {
            problems.push(format!("readOnlyPort {} is the port of the kubelet API", self.read_only_port));
        }
        problems
    }
}

/// Go has short names for two suites.
fn full_name(name: &str) -> String {
    if name.ends_with("_WITH_CHACHA20_POLY1305") { format!("{name}_SHA256") } else { name.to_owned() }
}

//! The configuration of `keelson-bandwidth`; the keys are those of the reference plugin bandwidth.

use cni_plugins_host::netlink::TokenBucket;
use serde::Deserialize;
use serde_json::Value;

use crate::{call::Call, failure::Failure};

/// How long a full queue takes to empty.
const LATENCY_MS: u64 = 25;
/// Least burst in bytes: one packet as the kernel hands it to a veth (64 KiB of TCP) passes whole.
const MIN_BURST: u32 = 64 << 10;

/// The object on standard input.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BandwidthConfig {
    #[serde(flatten)]
    own: Rates,
    #[serde(default)]
    runtime_config: RuntimeConfig,
}

/// Bits per second, and bits that may pass at once.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rates {
    #[serde(default)]
    ingress_rate: u64,
    #[serde(default)]
    ingress_burst: u64,
    #[serde(default)]
    egress_rate: u64,
    #[serde(default)]
    egress_burst: u64,
    /// Keys of the reference plugin: who is limited, and who is not.
    #[serde(default)]
    shaped_subnets: Vec<Value>,
    #[serde(default)]
    unshaped_subnets: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    bandwidth: Option<Rates>,
}

/// What is to be limited.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// What the pod receives.
    pub(super) ingress: Option<TokenBucket>,
    /// What it sends.
    pub(super) egress: Option<TokenBucket>,
}

impl BandwidthConfig {
    /// Reads a call's object.
    pub(super) fn of(call: &Call) -> Result<Self, Failure> {
        call.parse()
    }

    /// The limits; the runtime's take the place of the list's.
    pub(super) fn limits(&self) -> Result<Limits, Failure> {
        let rates = self.runtime_config.bandwidth.as_ref().unwrap_or(&self.own);
        for (key, subnets) in
            [("shapedSubnets", &rates.shaped_subnets), ("unshapedSubnets", &rates.unshaped_subnets)]
        {
            if !subnets.is_empty() {
                let value = Value::from(subnets.as_slice());
                return Err(Failure::unsupported(key, &value, "a limit is for all of a pod's traffic"));
            }
        }
        Ok(Limits {
            ingress: bucket("ingress", rates.ingress_rate, rates.ingress_burst)?,
            egress: bucket("egress", rates.egress_rate, rates.egress_burst)?,
        })
    }
}

/// A bucket of `rate` bits per second. Rate and burst go together, as the reference has it: a burst that
/// nobody thought about is a limit that nobody expects.
fn bucket(field: &str, rate: u64, burst: u64) -> Result<Option<TokenBucket>, Failure> {
    match (rate, burst) {
        (0, 0) => return Ok(None),
        (0, _) => return Err(Failure::config(format!("{field}Burst: {burst} without {field}Rate"))),
        (_, 0) => return Err(Failure::config(format!("{field}Rate: {rate} without {field}Burst"))),
        _ => {}
    }
    let bytes = rate / 8;
    if bytes == 0 {
        return Err(Failure::config(format!("{field}Rate: {rate} bits/s is less than a byte")));
    }
    let Ok(wanted) = u32::try_from(burst / 8) else {
        return Err(Failure::config(format!("{field}Burst: {burst} bits is more than 4 GiB")));
    };
    // A bucket smaller than a packet would stop that packet for ever.
    let burst = wanted.max(MIN_BURST);
    let queue = (bytes / 1000).saturating_mul(LATENCY_MS).saturating_add(burst.into());
    let limit = u32::try_from(queue).unwrap_or(u32::MAX);
    Ok(Some(TokenBucket { rate: bytes, burst, limit }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_become_bytes_and_bursts_fit_a_packet() {
        let made = bucket("ingress", 8_000_000, 1_000_000).unwrap().unwrap();
        assert_eq!((made.rate, made.burst, made.limit), (1_000_000, 125_000, 150_000));
        let small = bucket("ingress", 800_000, 8).unwrap().unwrap();
        assert_eq!(small.burst, 65_536);
        // The kubelet's burst.
        let huge = bucket("egress", 80_000_000_000, u64::from(u32::MAX)).unwrap().unwrap();
        assert_eq!((huge.rate, huge.burst), (10_000_000_000, u32::MAX / 8));
        assert!(bucket("ingress", 0, 0).unwrap().is_none());
    }

    #[test]
    fn limits_for_some_peers_only_are_refused() {
        let config = r#"{"ingressRate":8000,"ingressBurst":8000,"unshapedSubnets":["10.0.0.0/8"]}"#;
        let config: BandwidthConfig = serde_json::from_str(config).unwrap();
        let failure = config.limits().unwrap_err().to_string();
        assert!(failure.starts_with(r#"unshapedSubnets: ["10.0.0.0/8"] is not supported"#), "{failure}");
    }

    #[test]
    fn halves_are_refused_by_name() {
        let failure = bucket("egress", 0, 9).unwrap_err().to_string();
        assert!(failure.starts_with("egressBurst: 9 without egressRate"), "{failure}");
        let failure = bucket("egress", 9_000, 0).unwrap_err().to_string();
        assert!(failure.starts_with("egressRate: 9000 without egressBurst"), "{failure}");
        let failure = bucket("egress", 9_000, 1 << 40).unwrap_err().to_string();
        assert!(failure.starts_with("egressBurst: 1099511627776 bits is more than 4 GiB"), "{failure}");
        let failure = bucket("ingress", 7, 8).unwrap_err().to_string();
        assert!(failure.starts_with("ingressRate: 7 bits/s"), "{failure}");
    }
}

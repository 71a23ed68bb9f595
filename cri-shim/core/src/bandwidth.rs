//! The pod's bandwidth limits, from the annotations that Kubernetes defines for them.

use std::collections::BTreeMap;

/// Annotation with the limit of what the pod receives.
pub const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// Annotation with the limit of what the pod sends.
pub const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// The smallest and largest limits that Kubernetes accepts, in bits per second.
const RANGE: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// Limits in bits per second; nothing where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// What the pod receives.
    pub ingress: Option<u64>,
    /// What it sends.
    pub egress: Option<u64>,
}

/// An annotation that is no limit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{annotation}: {value:?} is no bandwidth between 1k and 1P")]
pub struct BandwidthError {
    /// The annotation.
    pub annotation: &'static str,
    /// What it holds.
    pub value: String,
}

impl Bandwidth {
    /// Reads both annotations.
    pub fn of(annotations: &BTreeMap<String, String>) -> Result<Self, BandwidthError> {
        let read = |annotation: &'static str| {
            let Some(value) = annotations.get(annotation) else { return Ok(None) };
            let wrong = || BandwidthError { annotation, value: value.clone() };
            quantity(value).filter(|limit| RANGE.contains(limit)).map(Some).ok_or_else(wrong)
        };
        Ok(Self { ingress: read(INGRESS)?, egress: read(EGRESS)? })
    }
}

/// A quantity as Kubernetes writes them (`10M`, `1.5Gi`, `2e6`), rounded up.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|byte: char| !byte.is_ascii_digit() && byte != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.len() > 18 || fraction.contains('.') {
        return None;
    }
    let scale: u128 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        exponent => {
            let power: u32 = exponent.strip_prefix(['e', 'E'])?.trim_start_matches('+').parse().ok()?;
            10_u128.checked_pow(power).filter(|_| power <= 18)?
        }
    };
    let places = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let mantissa: u128 = format!("{whole}{fraction}").parse().ok()?;
    u64::try_from(mantissa.checked_mul(scale)?.div_ceil(places)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_kubernetes_writes_them() {
        let cases = [
            ("10M", Some(10_000_000)),
            ("1.5Gi", Some(1_610_612_736)),
            ("2e6", Some(2_000_000)),
            ("1000", Some(1_000)),
            ("0.0015M", Some(1_500)),
            (".5M", Some(500_000)),
            ("1P", Some(1_000_000_000_000_000)),
            ("999", None),
            ("2P", None),
            ("1m", None),
            ("", None),
            (".", None),
            ("1..2M", None),
            ("-1M", None),
            ("1e99", None),
            ("M", None),
            ("99999999999999999999999999999999999999999", None),
        ];
        for (text, wanted) in cases {
            let annotations = BTreeMap::from([(INGRESS.to_owned(), text.to_owned())]);
            match Bandwidth::of(&annotations) {
                Ok(found) => assert_eq!(found.ingress, wanted, "{text}"),
                Err(error) => {
                    assert!(wanted.is_none() && error.to_string().contains(text), "{text}: {error}");
                }
            }
        }
        assert_eq!(Bandwidth::of(&BTreeMap::new()).unwrap(), Bandwidth::default());
    }
}

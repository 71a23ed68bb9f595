//! Resource quantities as numbers (`500m`, `1Gi`, `2e3`), rounded up as Kubernetes does.
//!
//! Input: the text of a `resource.Quantity`. Output: whole units or thousandths as `i64`, saturating.
//! Never fails loudly: the API server has validated quantities; what cannot be read counts as zero.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Whole units, rounded up: bytes for memory, pieces for extended resources.
pub fn value(quantity: &Quantity) -> i64 {
    scaled(&quantity.0, 0).unwrap_or(0)
}

/// Thousandths, rounded up: the unit of CPU arithmetic.
pub fn milli_value(quantity: &Quantity) -> i64 {
    scaled(&quantity.0, 3).unwrap_or(0)
}

/// The quantity times 10^`scale`, rounded away from zero; `None` when it is not a quantity.
fn scaled(text: &str, scale: i32) -> Option<i64> {
    let text = text.trim();
    let split = text
        .char_indices()
        .find(|(_, character)| !matches!(character, '0'..='9' | '.' | '+' | '-'))
        .map_or(text.len(), |(index, _)| index);
    let (number, suffix) = text.split_at(split);
    let (digits, decimals) = decimal(number)?;
    let (multiplier, exponent) = suffix_factor(suffix)?;
    let product = digits.checked_mul(multiplier)?;
    Some(shift(product, exponent + scale - decimals))
}

/// `12.50` as (1250, 2): digits without the point, and how many stood behind it.
fn decimal(number: &str) -> Option<(i128, i32)> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // More than nine decimals are below the finest unit Kubernetes knows; keeping twelve is plenty.
    let fraction = fraction.get(..12).unwrap_or(fraction);
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    Some((digits, i32::try_from(fraction.len()).ok()?))
}

/// The factor of a suffix as (multiplier, power of ten).
fn suffix_factor(suffix: &str) -> Option<(i128, i32)> {
    let binary = |power: u32| Some((1_i128 << (10 * power), 0));
    match suffix {
        "" => Some((1, 0)),
        "n" => Some((1, -9)),
        "u" => Some((1, -6)),
        "m" => Some((1, -3)),
        "k" => Some((1, 3)),
        "M" => Some((1, 6)),
        "G" => Some((1, 9)),
        "T" => Some((1, 12)),
        "P" => Some((1, 15)),
        "E" => Some((1, 18)),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            Some((1, exponent.parse().ok().filter(|power: &i32| power.abs() <= 27)?))
        }
    }
}

/// `value` × 10^`power`, rounded away from zero, saturating at the ends of `i64`.
fn shift(value: i128, power: i32) -> i64 {
    let factor = 10_i128.pow(power.unsigned_abs().min(30));
    let shifted = if power >= 0 {
        value.saturating_mul(factor)
    } else {
        let quotient = value / factor;
        if value % factor == 0 { quotient } else { quotient + value.signum() }
    };
    i64::try_from(shifted).unwrap_or(if shifted < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_round_up_to_their_unit() {
        for (text, units, thousandths) in [
            ("1", 1, 1000),
            ("100m", 1, 100),
            ("0.5", 1, 500),
            ("1.5Gi", 1_610_612_736, 1_610_612_736_000),
            ("128Mi", 134_217_728, 134_217_728_000),
            ("2e3", 2000, 2_000_000),
            ("1k", 1000, 1_000_000),
            ("100n", 1, 1),
            ("0", 0, 0),
            ("9E", 9_000_000_000_000_000_000, i64::MAX),
            ("nonsense", 0, 0),
        ] {
            let quantity = Quantity(text.into());
            assert_eq!((value(&quantity), milli_value(&quantity)), (units, thousandths), "{text}");
        }
    }
}

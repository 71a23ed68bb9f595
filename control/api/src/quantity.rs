//! `resource.Quantity`: exact decimal amounts with suffixes.
//!
//! Input: text such as `100m`, `1.5Gi`, `2e3`. Output: a value in thousand-millionths (nano) that compares, adds, and
//! rounds as upstream does (up, for [`Quantity::value`] and [`Quantity::millis`]). Never uses floats.

use std::fmt;

/// An amount, in units of 10⁻⁹; smaller parts are rounded up, as upstream does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity {
    nanos: i128,
}

/// The text is not a quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseQuantityError {
    /// Wrong syntax.
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]+)?$'")]
    Format,
    /// Unknown suffix.
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

const NANO: i128 = 1_000_000_000;

/// Upstream caps quantities at 2⁶³-1; ours are too, so that sums of many never overflow.
const CAP: i128 = i64::MAX as i128 * NANO;

impl Quantity {
    /// Nothing.
    pub const ZERO: Self = Self { nanos: 0 };

    /// Parses the text form.
    pub fn parse(text: &str) -> Result<Self, ParseQuantityError> {
        let (negative, unsigned) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let digits = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(digits);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(ParseQuantityError::Format);
        }
        let (multiplier, exponent) = scale_of(suffix)?;
        let magnitude = scaled(whole, fraction, multiplier, exponent);
        Ok(Self { nanos: if negative { -magnitude } else { magnitude } })
    }

    /// The canonical text of a quantity, in the family of its suffix: `1024Mi` is `1Gi`, `0.5` is `500m`.
    pub fn canonical(text: &str) -> Result<String, ParseQuantityError> {
        let quantity = Self::parse(text)?;
        let suffix = text.trim_start_matches(|c: char| c.is_ascii_digit() || matches!(c, '.' | '+' | '-'));
        if suffix.ends_with('i') && quantity.is_integer() && quantity.nanos.abs() >= 1024 * NANO {
            return Ok(binary(quantity.nanos / NANO));
        }
        let is_exponent = suffix.len() > 1 && suffix.starts_with(['e', 'E']);
        Ok(if is_exponent { exponent(quantity.nanos) } else { quantity.to_string() })
    }

    /// Whole units.
    pub fn from_units(units: i64) -> Self {
        Self { nanos: i128::from(units) * NANO }
    }

    /// Thousandths.
    pub fn from_millis(millis: i64) -> Self {
        Self { nanos: i128::from(millis) * (NANO / 1000) }
    }

    /// Whole units, rounded up (away from zero).
    pub fn value(self) -> i64 {
        self.rounded(NANO)
    }

    /// Thousandths, rounded up (away from zero).
    pub fn millis(self) -> i64 {
        self.rounded(NANO / 1000)
    }

    fn rounded(self, unit: i128) -> i64 {
        let away = if self.nanos < 0 { -(unit - 1) } else { unit - 1 };
        let rounded = (self.nanos + away) / unit;
        i64::try_from(rounded).unwrap_or(if rounded < 0 { i64::MIN } else { i64::MAX })
    }

    /// Sum, capped.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self { nanos: (self.nanos + other.nanos).clamp(-CAP, CAP) }
    }

    /// Difference, capped.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self { nanos: (self.nanos - other.nanos).clamp(-CAP, CAP) }
    }

    /// Less than nothing.
    pub fn is_negative(self) -> bool {
        self.nanos < 0
    }

    /// Nothing.
    pub fn is_zero(self) -> bool {
        self.nanos == 0
    }

    /// Whether it is a whole number.
    pub fn is_integer(self) -> bool {
        self.nanos % NANO == 0
    }
}

impl fmt::Display for Quantity {
    /// The canonical decimal form (`1500m`, `2k`); binary suffixes are not restored.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return write!(f, "0");
        }
        let suffixes = [("E", 18_u32), ("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3), ("", 0)];
        for (suffix, power) in suffixes {
            let unit = NANO * 10_i128.pow(power);
            if self.nanos % unit == 0 {
                return write!(f, "{}{suffix}", self.nanos / unit);
            }
        }
        for (suffix, unit) in [("m", NANO / 1000), ("u", 1000), ("n", 1)] {
            if self.nanos % unit == 0 {
                return write!(f, "{}{suffix}", self.nanos / unit);
            }
        }
        Ok(())
    }
}

/// Whole units with the largest binary suffix that divides them.
fn binary(units: i128) -> String {
    let suffixes = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let (mut rest, mut power) = (units, 0);
    while rest % 1024 == 0 && power + 1 < suffixes.len() {
        rest /= 1024;
        power += 1;
    }
    format!("{rest}{}", suffixes[power])
}

/// With an exponent that is a multiple of three.
fn exponent(nanos: i128) -> String {
    let (mut rest, mut power) = (nanos, -9);
    while rest != 0 && rest % 1000 == 0 {
        rest /= 1000;
        power += 3;
    }
    if rest == 0 || power == 0 { rest.to_string() } else { format!("{rest}e{power}") }
}

/// `(binary multiplier, decimal exponent)` of a suffix.
fn scale_of(suffix: &str) -> Result<(i128, i32), ParseQuantityError> {
    let scale = match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or(ParseQuantityError::Suffix)?;
            (1, exponent.parse::<i32>().map_err(|_not_a_number| ParseQuantityError::Suffix)?)
        }
    };
    Ok(scale)
}

/// `whole.fraction × multiplier × 10^exponent` in nanos, rounded up, capped.
fn scaled(whole: &str, fraction: &str, multiplier: i128, exponent: i32) -> i128 {
    let digits = whole.len() + fraction.len();
    // Digits that lie beyond the cap or far below a nano cannot change the result but by rounding.
    let mut mantissa: i128 = 0;
    let mut dropped = 0_i32;
    let mut inexact = false;
    for digit in whole.bytes().chain(fraction.bytes()) {
        if mantissa > 10_i128.pow(18) {
            dropped = dropped.saturating_add(1);
            inexact |= digit != b'0';
        } else {
            mantissa = mantissa * 10 + i128::from(digit - b'0');
        }
    }
    debug_assert!(digits > 0, "checked by the caller");
    if mantissa == 0 {
        return 0;
    }
    let fraction_len = i32::try_from(fraction.len()).unwrap_or(i32::MAX);
    let power = exponent.saturating_add(9).saturating_add(dropped).saturating_sub(fraction_len);
    let Some(mut nanos) = mantissa.checked_mul(multiplier) else { return CAP };
    if power >= 0 {
        let factor = u32::try_from(power).ok().and_then(|p| 10_i128.checked_pow(p));
        nanos = factor.and_then(|f| nanos.checked_mul(f)).unwrap_or(CAP);
    } else {
        let divisor = 10_i128.checked_pow(power.unsigned_abs());
        let (quotient, rest) = divisor.map_or((0, 1), |d| (nanos / d, nanos % d));
        nanos = quotient + i128::from(rest != 0 || inexact);
    }
    nanos.min(CAP)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn millis(text: &str) -> i64 {
        Quantity::parse(text).unwrap().millis()
    }

    #[test]
    fn suffixes_mean_what_upstream_means() {
        assert_eq!(millis("100m"), 100);
        assert_eq!(millis("1.5"), 1500);
        assert_eq!(millis(".5"), 500);
        assert_eq!(millis("2."), 2000);
        assert_eq!(millis("1e3"), 1_000_000);
        assert_eq!(millis("0.0001"), 1);
        assert_eq!(millis("-1500u"), -2);
        assert_eq!(Quantity::parse("1.5Gi").unwrap().value(), 1_610_612_736);
        assert_eq!(Quantity::parse("12E").unwrap().value(), i64::MAX);
        assert_eq!(Quantity::parse("128974848").unwrap(), Quantity::parse("128974848000m").unwrap());
        assert!(Quantity::parse("200m").unwrap() > Quantity::parse("0.1").unwrap());
    }

    #[test]
    fn canonical_forms_are_upstreams() {
        let cases = [
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("0.5Ki", "512"),
            ("64Mi", "64Mi"),
            ("2000", "2k"),
            ("1e3", "1e3"),
            ("110", "110"),
            ("0", "0"),
            ("16374464Ki", "16374464Ki"),
        ];
        for (text, expected) in cases {
            assert_eq!(Quantity::canonical(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "abc", "1 Gi", "1gi", "..", "1.2.3", "m", "1ee3", "+", "1Kib"] {
            assert!(Quantity::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "[+-]?[0-9.]{0,40}[eEinumkKMGTP]{0,3}[-+]?[0-9]{0,12}") {
            let _ignored = Quantity::parse(&text);
        }

        #[test]
        fn canonical_form_reads_back(nanos in -1_000_000_000_000_000_000_i64..1_000_000_000_000_000_000) {
            let quantity = Quantity { nanos: i128::from(nanos) };
            prop_assert_eq!(Quantity::parse(&quantity.to_string()).unwrap(), quantity);
        }

        #[test]
        fn canonical_text_is_stable(text in "[0-9]{1,6}(\\.[0-9]{1,3})?(|m|k|M|Ki|Mi|Gi|e2|e3)") {
            let once = Quantity::canonical(&text).unwrap();
            prop_assert_eq!(Quantity::parse(&once).unwrap(), Quantity::parse(&text).unwrap());
            prop_assert_eq!(Quantity::canonical(&once).unwrap(), once);
        }

        #[test]
        fn order_is_numeric(a in 0_i64..1_000_000, b in 0_i64..1_000_000) {
            let left = Quantity::parse(&format!("{a}m")).unwrap();
            let right = Quantity::parse(&format!("{b}000u")).unwrap();
            prop_assert_eq!(left.cmp(&right), a.cmp(&b));
        }
    }
}

//! Pressure stall information (PSI): how long tasks waited for a resource.

use super::number;

/// The stalls of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    /// Nanoseconds since the cgroup was made.
    pub total_nanoseconds: u64,
    /// Per cent of the last 10 seconds.
    pub avg10: f64,
    /// Per cent of the last minute.
    pub avg60: f64,
    /// Per cent of the last 5 minutes.
    pub avg300: f64,
}

/// The pressure on one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Some task waited.
    pub some: Stall,
    /// Every task waited.
    pub full: Stall,
}

/// The content of a `*.pressure` file; nothing where the kernel does not count.
pub fn pressure(text: &str) -> Option<Pressure> {
    let line = |kind: &str| {
        text.lines().find_map(|line| line.strip_prefix(kind).and_then(|rest| rest.strip_prefix(' ')))
    };
    let some = stall(line("some")?);
    // Older kernels have no full line for the CPU.
    Some(Pressure { some, full: line("full").map(stall).unwrap_or_default() })
}

fn stall(line: &str) -> Stall {
    let mut found = Stall::default();
    for (key, value) in line.split_ascii_whitespace().filter_map(|word| word.split_once('=')) {
        let per_cent = || value.parse::<f64>().ok().filter(|number| number.is_finite()).unwrap_or_default();
        match key {
            "avg10" => found.avg10 = per_cent(),
            "avg60" => found.avg60 = per_cent(),
            "avg300" => found.avg300 = per_cent(),
            // The kernel counts microseconds.
            "total" => found.total_nanoseconds = number(value).saturating_mul(1000),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_are_read_and_an_absent_file_is_no_pressure() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=42\nfull avg10=0.10 avg60=0.00 avg300=0.00 total=7\n";
        let found = pressure(text).unwrap();
        assert!((found.some.avg10 - 1.5).abs() < 1e-9);
        assert_eq!((found.some.total_nanoseconds, found.full.total_nanoseconds), (42_000, 7_000));
        assert_eq!(pressure(""), None);
    }
}

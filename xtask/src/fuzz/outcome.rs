//! What a run of libFuzzer did, read from what it printed.

use std::fmt;

/// The sum of one target's run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Inputs that were tried.
    pub(super) inputs: u64,
    /// Places in the code that they reached: with the corpus as it was, and in the end.
    pub(super) coverage: (u64, u64),
    /// Inputs in the corpus in the end.
    pub(super) corpus: u64,
    /// What was found.
    pub(super) finding: Option<Finding>,
}

/// An input that broke something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    /// What was said about it.
    pub(super) words: String,
    /// The file with the input, where libFuzzer wrote one.
    pub(super) input: Option<String>,
}

impl Outcome {
    /// Reads what was printed: lines of progress (`#16384 pulse cov: 321 ft: 900 corp: 88/2313b …`), the last figures
    /// (`stat::number_of_executed_units: 4711`), and the words of a crash.
    pub(super) fn read(printed: &str) -> Self {
        let mut outcome = Self::default();
        let mut finding = None;
        for (index, line) in printed.lines().enumerate() {
            if let Some(progress) = line.strip_prefix('#') {
                outcome.progress(progress);
            } else if let Some(units) = line.strip_prefix("stat::number_of_executed_units:") {
                outcome.inputs = units.trim().parse().unwrap_or(outcome.inputs);
            } else if let Some(words) = broken(line) {
                // The first words are the cause; the next line has what a panic says.
                finding.get_or_insert_with(|| match printed.lines().nth(index + 1) {
                    Some(next) if line.ends_with(':') => format!("{words} {}", next.trim()),
                    _ => words.to_owned(),
                });
            }
        }
        outcome.finding = finding.map(|words| Finding {
            words,
            input: printed
                .lines()
                .find_map(|line| Some(line.split_once("Test unit written to ")?.1.trim().to_owned())),
        });
        outcome
    }

    fn progress(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let count = words.next().and_then(|count| count.parse().ok());
        let first = words.next() == Some("INITED");
        let after = |name: &str| {
            let mut words = line.split_whitespace().skip_while(|word| *word != name);
            words.nth(1)?.split('/').next()?.parse::<u64>().ok()
        };
        self.inputs = count.unwrap_or(self.inputs);
        if let Some(coverage) = after("cov:") {
            self.coverage.1 = coverage;
            if first {
                self.coverage.0 = coverage;
            }
        }
        self.corpus = after("corp:").unwrap_or(self.corpus);
    }
}

/// The words of a line that tells of something broken.
fn broken(line: &str) -> Option<&str> {
    if line.starts_with("thread '") && line.contains("panicked at ") {
        return line.split_once("panicked at ").map(|(_, rest)| rest);
    }
    let (_, rest) =
        line.strip_prefix("==")?.split_once("== ERROR: ").or_else(|| line.split_once("==ERROR: "))?;
    Some(rest)
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, now) = self.coverage;
        write!(f, "{:>9} inputs, coverage {now} (+{})", self.inputs, now.saturating_sub(before))?;
        write!(f, ", corpus {}", self.corpus)?;
        let Some(finding) = &self.finding else { return Ok(()) };
        write!(f, ": FOUND {}", finding.words)?;
        match &finding.input {
            Some(input) => write!(f, " ({input})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: &str = "INFO: Seed: 1\n#2\tINITED cov: 100 ft: 101 corp: 1/1b exec/s: 0 rss: 40Mb\n\
        #4096\tpulse  cov: 180 ft: 300 corp: 20/90b lim: 43 exec/s: 2048 rss: 41Mb\n\
        #9000\tDONE   cov: 212 ft: 400 corp: 31/2313b lim: 80 exec/s: 900 rss: 42Mb\nDone 9000 runs in 10 second(s)\n\
        stat::number_of_executed_units: 9001\nstat::peak_rss_mb: 42\n";

    #[test]
    fn a_run_without_findings() {
        let outcome = Outcome::read(QUIET);
        let expected = Outcome { inputs: 9001, coverage: (100, 212), corpus: 31, finding: None };
        assert_eq!(outcome, expected);
        assert_eq!(outcome.to_string(), "     9001 inputs, coverage 212 (+112), corpus 31");
    }

    #[test]
    fn a_panic_is_told_with_its_place_and_words() {
        let printed = "#2\tINITED cov: 3 corp: 1/1b\n\nthread '<unnamed>' (7) panicked at fuzz_targets/record.rs:13:9:\n\
            assertion failed: a == b\nnote: run with `RUST_BACKTRACE=1`\n==7== ERROR: libFuzzer: deadly signal\n\
            artifact_prefix='/f/'; Test unit written to /f/crash-12\n";
        let finding = Outcome::read(printed).finding.expect("a finding");
        assert_eq!(finding.words, "fuzz_targets/record.rs:13:9: assertion failed: a == b");
        assert_eq!(finding.input.as_deref(), Some("/f/crash-12"));
    }

    #[test]
    fn slowness_hunger_and_the_sanitizer_are_findings() {
        for (line, words) in [
            ("==9== ERROR: libFuzzer: timeout after 21 seconds", "libFuzzer: timeout after 21 seconds"),
            (
                "==9== ERROR: libFuzzer: out-of-memory (used: 2050Mb; limit: 2048Mb)",
                "libFuzzer: out-of-memory (used: 2050Mb; limit: 2048Mb)",
            ),
            (
                "==9==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x1",
                "AddressSanitizer: heap-buffer-overflow on address 0x1",
            ),
        ] {
            let finding = Outcome::read(&format!("{line}\nmore\n")).finding.expect(line);
            assert_eq!((finding.words.as_str(), finding.input), (words, None));
        }
    }
}

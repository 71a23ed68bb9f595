//! What is told while cases run: a line for each, or, on a terminal that is to have it, a bar with what did not pass above it.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::report::{self, Done, Outcome};

/// Characters of the bar.
const WIDTH: usize = 32;

/// How far a run is.
pub(super) struct Progress {
    total: usize,
    begun: Instant,
    /// Finished, failed.
    counts: Mutex<(usize, usize)>,
    bar: bool,
}

impl Progress {
    /// Of a run of `total` cases; `bar` asks for one where there is a terminal.
    pub(super) fn new(total: usize, bar: bool) -> Self {
        let bar = bar && std::io::stdout().is_terminal();
        Self { total, begun: Instant::now(), counts: Mutex::default(), bar }
    }

    /// Tells that a case ended.
    pub(super) fn done(&self, done: &Done) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.0 += 1;
        counts.1 += usize::from(matches!(done.outcome, Outcome::Failed(_)));
        if !self.bar {
            report::line(done);
            return;
        }
        print!("\r\x1b[K");
        if done.outcome != Outcome::Passed {
            report::line(done);
        }
        print!("{}", bar(*counts, self.total, self.begun.elapsed()));
        // A terminal that is gone has no reader.
        std::io::stdout().flush().ok();
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        if self.bar {
            print!("\r\x1b[K");
        }
    }
}

fn bar((finished, failed): (usize, usize), total: usize, took: Duration) -> String {
    let filled = (WIDTH * finished).checked_div(total).unwrap_or(WIDTH);
    let failed = if failed == 0 { String::new() } else { format!(", {failed} failed") };
    format!(
        "[{}{}] {finished} of {total}{failed}, {} s",
        "#".repeat(filled),
        "-".repeat(WIDTH.saturating_sub(filled)),
        took.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_as_long_as_what_is_done() {
        let text = bar((8, 1), 16, Duration::from_secs(3));
        assert_eq!(text, format!("[{}{}] 8 of 16, 1 failed, 3 s", "#".repeat(16), "-".repeat(16)));
        assert!(bar((0, 0), 0, Duration::ZERO).starts_with("[####"), "nothing to do is done");
    }
}

//! Questions about paths whose file system may never answer: that of a server that is gone, or of a FUSE program that hangs.
//!
//! Input: paths, and what is asked about each. Output: the answers, or after a while which path gives none. Whoever waits in the
//! kernel cannot be called back; so a path that has kept somebody waiting is not asked again before it has answered, and the
//! threads that wait are bounded for each path and in all.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::blocking;
use crate::error::RuntimeError;

/// How long answers are waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// A path that has kept somebody waiting for longer is not asked again meanwhile.
const SLOW: Duration = Duration::from_secs(3);
/// Most questions to one file system that it has kept waiting for so long.
const MOST: usize = 8;
/// Most questions about one path at the same time, before anybody has waited for long.
const MOST_AT_ONCE: usize = 32;
/// Most questions in all, so that others find a thread.
pub const MOST_IN_ALL: usize = 64;

/// The questions that are being asked. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Asked(Arc<Mutex<Waiting>>);

/// When those began who ask about a path.
type Waiting = BTreeMap<String, Vec<Instant>>;

/// A question that is being asked: dropped with its answer.
struct Question<'a> {
    asked: &'a Asked,
    path: &'a str,
    since: Instant,
}

impl Asked {
    /// Asks `question` about each of the paths, on a thread that may block.
    pub async fn about<T: Send + 'static>(
        &self,
        paths: Vec<String>,
        question: impl Fn(&str) -> Result<T, RuntimeError> + Send + 'static,
    ) -> Result<Vec<T>, RuntimeError> {
        self.within(PATIENCE, paths, question).await
    }

    async fn within<T: Send + 'static>(
        &self,
        patience: Duration,
        paths: Vec<String>,
        question: impl Fn(&str) -> Result<T, RuntimeError> + Send + 'static,
    ) -> Result<Vec<T>, RuntimeError> {
        let (asked, all) = (self.clone(), paths.clone());
        let asking = blocking(move || {
            let mut answers = Vec::with_capacity(all.len());
            for path in &all {
                let _asking = asked.begin(path, Instant::now())?;
                answers.push(question(path)?);
            }
            Ok(answers)
        });
        if let Ok(answers) = tokio::time::timeout(patience, asking).await {
            return answers;
        }
        let waiting = self.waiting();
        let guilty = paths.iter().find(|path| waiting.contains_key(path.as_str())).or(paths.first());
        Err(silent(guilty.map_or("", String::as_str)))
    }

    fn begin<'a>(&'a self, path: &'a str, now: Instant) -> Result<Question<'a>, RuntimeError> {
        let mut waiting = self.waiting();
        let is_stuck = |since: &&Instant| now.saturating_duration_since(**since) >= SLOW;
        let own = waiting.get(path).map_or(&[][..], Vec::as_slice);
        if own.len() >= MOST_AT_ONCE || own.iter().any(|since| is_stuck(&since)) {
            return Err(silent(path));
        }
        let stuck: Vec<(&String, usize)> = waiting
            .iter()
            .map(|(path, all)| (path, all.iter().filter(is_stuck).count()))
            .filter(|(_, count)| *count > 0)
            .collect();
        if stuck.iter().map(|(_, count)| count).sum::<usize>() >= MOST {
            // Only now, for it takes a while: paths of one dead server have much in common.
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            if let Some(own) = holding(&mounts, path) {
                let beside = stuck.iter().filter(|(other, _)| holding(&mounts, other) == Some(own));
                if beside.map(|(_, count)| count).sum::<usize>() >= MOST {
                    return Err(silent(path));
                }
            }
        }
        if waiting.values().map(Vec::len).sum::<usize>() >= MOST_IN_ALL {
            let full = std::io::Error::other("too many file systems of other paths do not answer");
            return Err(RuntimeError::host("look at", Path::new(path))(full));
        }
        waiting.entry(path.to_owned()).or_default().push(now);
        Ok(Question { asked: self, path, since: now })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        let mut waiting = self.asked.waiting();
        let Some(all) = waiting.get_mut(self.path) else { return };
        if let Some(at) = all.iter().position(|since| *since == self.since) {
            all.swap_remove(at);
        }
        if all.is_empty() {
            waiting.remove(self.path);
        }
    }
}

/// The device of the file system that holds `path` by its name, links not followed; none for what the root file system holds.
fn holding<'a>(mountinfo: &'a str, path: &str) -> Option<&'a str> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let (device, _root, point) = (fields.next()?, fields.next()?, fields.next()?);
        Path::new(path).starts_with(point).then_some((device, point))
    });
    // What was mounted last lies on top.
    let (device, point) = mounts.max_by_key(|(_, point)| point.len())?;
    (point != "/").then_some(device)
}

fn silent(path: &str) -> RuntimeError {
    let what = format!("mounts.host_path {path}: an answer of its file system");
    RuntimeError::Deadline { what, seconds: PATIENCE.as_secs() }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn the_path_that_does_not_answer_is_named_and_left_alone() {
        let asked = Asked::default();
        let (answer, waits) = mpsc::channel::<()>();
        let question = move |path: &str| {
            if path == "/silent" {
                waits.recv().ok();
            }
            Ok(path.len())
        };
        let paths = || vec!["/quick".to_owned(), "/silent".to_owned()];
        let late = asked.within(Duration::from_millis(50), paths(), question).await;
        let problem = late.expect_err("nobody answers").to_string();
        assert_eq!(problem, "mounts.host_path /silent: an answer of its file system took longer than 10 s");
        let later = Instant::now() + SLOW;
        assert!(asked.begin("/silent", later).is_err(), "no second thread waits");
        assert!(asked.begin("/quick", later).is_ok());
        drop(answer);
        let begin = Instant::now();
        while !asked.waiting().is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(20), "it has answered");
            tokio::task::yield_now().await;
        }
        assert_eq!(asked.about(paths(), |path| Ok(path.len())).await.expect("answers"), [6, 7]);
    }

    #[test]
    fn threads_that_wait_are_bounded() {
        let (asked, now) = (Asked::default(), Instant::now());
        let names: Vec<String> = (0..MOST_IN_ALL).map(|number| format!("/{number}")).collect();
        let at_once: Vec<_> = std::iter::from_fn(|| asked.begin("/shared", now).ok()).collect();
        assert_eq!(at_once.len(), MOST_AT_ONCE, "one path is asked by several, for it may be well");
        let others: Vec<_> = names.iter().map_while(|name| asked.begin(name, now).ok()).collect();
        assert_eq!(at_once.len() + others.len(), MOST_IN_ALL);
        drop((at_once, others));
        let of_proc: Vec<String> = (0..=MOST).map(|number| format!("/proc/none/{number}")).collect();
        let (last, stuck) = of_proc.split_last().expect("some");
        let stuck: Vec<_> = stuck.iter().map(|path| asked.begin(path, now)).collect();
        assert!(asked.begin(last, now + SLOW).is_err(), "{} wait for the same file system", stuck.len());
        assert!(asked.begin("/another", now + SLOW).is_ok());
    }
}

//! Questions about paths whose file system may never answer: that of a server that is gone, or of a FUSE program that hangs.
//!
//! Input: a path, and what is asked about it. Output: the answer, or after a while that there is none. Whoever waits in the
//! kernel cannot be called back; so each question has a thread of its own, a path that has kept somebody waiting is not
//! asked again before it has answered, and the threads that wait are bounded for each path and in all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Statx, StatxFlags, statx};

use super::mount_table;

/// How long an answer is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// A path that has kept somebody waiting for longer is not asked again meanwhile.
const SLOW: Duration = Duration::from_secs(3);
/// Most questions to one file system that it has kept waiting for so long.
const MOST: usize = 16;
/// Most questions about one path at the same time, before anybody has waited for long.
const MOST_AT_ONCE: usize = 128;
/// Most questions in all: half of the threads there may be, so that nobody else waits for one.
const MOST_IN_ALL: usize = 256;

/// The questions that are being asked. Clones share them.
#[derive(Clone)]
pub(crate) struct Asked(Arc<Inner>);

struct Inner {
    patience: Duration,
    /// When those began who ask about a path.
    waiting: Mutex<Waiting>,
}

type Waiting = BTreeMap<PathBuf, Vec<Instant>>;

/// A question is not asked.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// The file system has not answered others.
    Silent,
    /// Too many others do not answer.
    Full,
}

/// A question that is being asked: dropped with its answer.
struct Question {
    asked: Asked,
    path: PathBuf,
    since: Instant,
}

impl Asked {
    /// Answers are waited for as long as `patience`.
    pub(crate) fn new(patience: Duration) -> Self {
        Self(Arc::new(Inner { patience, waiting: Mutex::default() }))
    }

    /// Asks `question` about `path` on a thread that may block.
    pub(crate) async fn about<T: Send + 'static>(
        &self,
        path: &Path,
        question: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let silent = || format!("the file system at {} does not answer", path.display());
        let asking = self.begin(path, Instant::now()).map_err(|refusal| match refusal {
            Refusal::Silent => silent(),
            Refusal::Full => {
                format!(
                    "{} is not looked at: too many file systems of other paths do not answer",
                    path.display()
                )
            }
        })?;
        let asked = tokio::task::spawn_blocking(move || {
            let answer = question();
            drop(asking);
            answer
        });
        match tokio::time::timeout(self.0.patience, asked).await {
            Ok(answered) => answered.map_err(|error| error.to_string())?,
            Err(_elapsed) => Err(silent()),
        }
    }

    fn begin(&self, path: &Path, now: Instant) -> Result<Question, Refusal> {
        let mut waiting = self.waiting();
        let slow = SLOW.min(self.0.patience);
        let is_stuck = |since: &&Instant| now.saturating_duration_since(**since) >= slow;
        let own = waiting.get(path).map_or(&[][..], Vec::as_slice);
        if own.len() >= MOST_AT_ONCE || own.iter().any(|since| is_stuck(&since)) {
            return Err(Refusal::Silent);
        }
        let stuck: Vec<(&PathBuf, usize)> = waiting
            .iter()
            .map(|(path, all)| (path, all.iter().filter(is_stuck).count()))
            .filter(|(_, count)| *count > 0)
            .collect();
        if stuck.iter().map(|(_, count)| count).sum::<usize>() >= MOST {
            // Only now, for it takes a while: paths of one dead server have much in common.
            let mounts = mount_table::read().unwrap_or_default();
            if let Some(own) = mount_table::holding(&mounts, path) {
                let beside =
                    stuck.iter().filter(|(other, _)| mount_table::holding(&mounts, other) == Some(own));
                if beside.map(|(_, count)| count).sum::<usize>() >= MOST {
                    return Err(Refusal::Silent);
                }
            }
        }
        if waiting.values().map(Vec::len).sum::<usize>() >= MOST_IN_ALL {
            return Err(Refusal::Full);
        }
        waiting.entry(path.to_owned()).or_default().push(now);
        Ok(Question { asked: self.clone(), path: path.to_owned(), since: now })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Asked {
    fn default() -> Self {
        Self::new(PATIENCE)
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        let mut waiting = self.asked.waiting();
        let Some(all) = waiting.get_mut(&self.path) else { return };
        if let Some(at) = all.iter().position(|since| *since == self.since) {
            all.swap_remove(at);
        }
        if all.is_empty() {
            waiting.remove(&self.path);
        }
    }
}

/// What the kernel knows about `path` by itself: of where a file system is mounted, whoever serves it is asked nothing. `links`
/// says whether a link is followed.
pub(super) fn known(path: &Path, links: AtFlags) -> rustix::io::Result<Statx> {
    let flags = links | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    statx(CWD, path, flags, StatxFlags::BASIC_STATS)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn who_does_not_answer_is_left_alone_until_he_has() {
        let asked = Asked::new(Duration::from_millis(50));
        let (path, other) = (Path::new("/silent"), Path::new("/quick"));
        let (answer, waits) = mpsc::channel::<()>();
        let silent = Err("the file system at /silent does not answer".to_owned());
        let hanging = move || {
            waits.recv().ok();
            Ok(())
        };
        assert_eq!(asked.about(path, hanging).await, silent);
        assert_eq!(asked.about(path, || Ok(())).await, silent, "and no second thread waits");
        assert_eq!(asked.about(other, || Ok(1)).await, Ok(1), "nobody else is held up");
        drop(answer);
        let begin = Instant::now();
        while asked.about(path, || Ok(())).await.is_err() {
            assert!(begin.elapsed() < Duration::from_secs(20), "it has answered");
            tokio::task::yield_now().await;
        }
        assert!(asked.waiting().is_empty(), "nothing is kept");
    }

    #[test]
    fn threads_that_wait_are_bounded() {
        let (asked, now) = (Asked::default(), Instant::now());
        let path = Path::new("/shared");
        let at_once: Vec<_> = std::iter::from_fn(|| asked.begin(path, now).ok()).collect();
        assert_eq!(at_once.len(), MOST_AT_ONCE, "one path is asked by several, for it may be well");
        let begin = |number: usize, now| asked.begin(Path::new(&format!("/{number}")), now);
        let others: Vec<_> = (0..).map_while(|number| begin(number, now).ok()).collect();
        assert_eq!(at_once.len() + others.len(), MOST_IN_ALL);
        assert_eq!(begin(MOST_IN_ALL, now).err(), Some(Refusal::Full));
        drop((at_once, others));
        let first = asked.begin(path, now);
        assert!(first.is_ok() && asked.begin(path, now + SLOW).is_err());
        let second = asked.begin(path, now + SLOW / 2);
        drop(first);
        assert!(asked.begin(path, now + SLOW).is_ok(), "the one that still waits has not waited for long");
        drop(second);
        let of_proc = |number: usize, now| asked.begin(Path::new(&format!("/proc/none/{number}")), now);
        let stuck: Vec<_> = (0..MOST).map(|number| of_proc(number, now)).collect();
        assert_eq!(of_proc(MOST, now + SLOW).err(), Some(Refusal::Silent), "on the same file system");
        assert!(begin(0, now + SLOW).is_ok(), "on another one");
        drop(stuck);
        assert!(asked.waiting().is_empty());
    }
}

//! Keeps the API's pod status equal to ours: at most one write at a time per pod, always the newest, never backwards. Pure:
//! whoever owns it carries the writes out and tells how they ended.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::Value;

use crate::patch::status_patch;

/// Pauses after failed writes.
const FIRST_PAUSE: SignedDuration = SignedDuration::from_millis(200);
const LONGEST_PAUSE: SignedDuration = SignedDuration::from_secs(10);

/// How a write ended.
#[derive(Debug)]
pub enum Written {
    /// The API's object after it.
    Pod(Box<Pod>),
    /// There is no such pod (any more).
    Gone,
    /// Try again later.
    Failed(String),
}

/// The API object that tells a pod's status.
#[derive(Debug, PartialEq, Eq)]
enum ShownBy {
    /// The pod is an object of the API.
    Itself,
    /// A static pod's mirror, by its uid.
    Mirror(String),
    /// A static pod without a mirror yet.
    Nothing,
}

/// What the API says, as far as we know.
#[derive(Debug)]
pub struct StatusSync {
    known: PodStatus,
    version: u64,
    /// What the version was when the write that runs began.
    written_after: u64,
    writing: bool,
    /// The write that runs is to an object that shows the pod no more.
    outdated: bool,
    gone: bool,
    shown_by: ShownBy,
    pause: SignedDuration,
    retry_at: Option<Timestamp>,
}

impl StatusSync {
    /// Starts from what the watch delivered.
    pub fn new(pod: &Pod) -> Self {
        Self {
            known: pod.status.clone().unwrap_or_default(),
            version: version(pod),
            written_after: 0,
            writing: false,
            outdated: false,
            gone: false,
            shown_by: ShownBy::Itself,
            pause: FIRST_PAUSE,
            retry_at: None,
        }
    }

    /// Of a static pod: its status goes to the object that shows it.
    pub fn mirrored(mirror: Option<&Pod>) -> Self {
        let mut sync = Self::new(&Pod::default());
        sync.shown_by = ShownBy::Nothing;
        sync.learn_mirror(mirror);
        sync
    }

    /// Takes the state of a static pod's mirror; another mirror starts over.
    pub fn learn_mirror(&mut self, mirror: Option<&Pod>) {
        let uid = mirror.and_then(|mirror| mirror.metadata.uid.clone());
        let shown_by = uid.map_or(ShownBy::Nothing, ShownBy::Mirror);
        if self.shown_by != shown_by {
            self.outdated = self.writing;
            (self.version, self.gone, self.retry_at) = (0, false, None);
            self.written_after = 0;
            self.known = PodStatus::default();
            self.shown_by = shown_by;
        }
        if let Some(mirror) = mirror {
            self.learn(mirror);
        }
    }

    /// Takes a newer state from the watch or from a write's answer; an older one is ignored.
    pub fn learn(&mut self, pod: &Pod) {
        let version = version(pod);
        if version >= self.version {
            self.version = version;
            self.known = pod.status.clone().unwrap_or_default();
        }
    }

    /// Takes what a list of the API says, whatever was known: versions of a database that was restored are lower, and what was
    /// written since is lost. A list that is older than our last write only costs one more.
    pub fn relearn(&mut self, pod: &Pod) {
        (self.version, self.gone) = (version(pod), false);
        self.known = pod.status.clone().unwrap_or_default();
    }

    /// The patch to write now so that the API says `ours`; marks it as running.
    pub fn next(&mut self, uid: &str, ours: &PodStatus, now: Timestamp) -> Option<Value> {
        if self.writing || self.gone || self.retry_at.is_some_and(|at| at > now) {
            return None;
        }
        let uid = match &self.shown_by {
            ShownBy::Nothing => return None,
            ShownBy::Mirror(mirror) => mirror.as_str(),
            ShownBy::Itself => uid,
        };
        let patch = status_patch(uid, &self.known, ours)?;
        (self.writing, self.written_after) = (true, self.version);
        Some(patch)
    }

    /// Whether the API says `ours`, or can no longer say anything.
    pub fn in_sync(&self, uid: &str, ours: &PodStatus) -> bool {
        self.gone || (!self.writing && status_patch(uid, &self.known, ours).is_none())
    }

    /// Takes the end of a write; the text of a failure, to log.
    pub fn done(&mut self, written: Written, now: Timestamp) -> Option<String> {
        self.writing = false;
        if std::mem::take(&mut self.outdated) {
            // What became of a former mirror says nothing about the one there is now.
            return None;
        }
        match written {
            Written::Pod(pod) => {
                self.pause = FIRST_PAUSE;
                self.retry_at = None;
                if version(&pod) < self.written_after {
                    // An answer that is older than the question: the database was restored.
                    self.relearn(&pod);
                } else {
                    self.learn(&pod);
                }
                None
            }
            Written::Gone => {
                self.gone = true;
                None
            }
            Written::Failed(error) => {
                self.retry_at = Some(now + self.pause);
                self.pause = self.pause.saturating_mul(2).min(LONGEST_PAUSE);
                Some(error)
            }
        }
    }

    /// When a failed write is due again. One that is due has had its turn: where nothing is left to write (the answer was
    /// lost, or the pod is gone) its time stays, and must not wake anybody for ever.
    pub fn retry_at(&self, now: Timestamp) -> Option<Timestamp> {
        self.retry_at.filter(|at| *at > now && !self.writing && !self.gone)
    }

    /// A failed write is due now: the clock that its time was read from has gone back.
    pub fn retry_now(&mut self) {
        self.retry_at = None;
    }
}

/// The object's resource version. They grow, and may be compared (KEP-5504).
pub fn version(pod: &Pod) -> u64 {
    pod.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(version: &str, phase: &str) -> Pod {
        serde_json::from_value(
            json!({"metadata": {"name": "p", "resourceVersion": version}, "status": {"phase": phase}}),
        )
        .expect("a pod")
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1000).expect("in range")
    }

    #[test]
    fn one_write_at_a_time_and_a_late_watch_event_is_ignored() {
        let mut sync = StatusSync::new(&pod("5", "Pending"));
        let running = pod("0", "Running").status.expect("status");
        assert!(sync.next("u", &running, now()).is_some());
        assert!(sync.next("u", &running, now()).is_none(), "one is running");
        assert_eq!(sync.done(Written::Pod(Box::new(pod("7", "Running"))), now()), None);
        sync.learn(&pod("5", "Pending"));
        assert!(sync.in_sync("u", &running));
    }

    #[test]
    fn a_database_that_was_restored_is_told_again() {
        let running = pod("0", "Running").status.expect("status");
        let written = || {
            let mut sync = StatusSync::new(&pod("50", "Pending"));
            assert!(sync.next("u", &running, now()).is_some());
            sync.done(Written::Pod(Box::new(pod("70", "Running"))), now());
            assert!(sync.in_sync("u", &running));
            sync
        };
        // The list says it.
        let mut sync = written();
        sync.relearn(&pod("50", "Pending"));
        assert!(sync.next("u", &running, now()).is_some(), "the status is lost there");
        sync.done(Written::Pod(Box::new(pod("51", "Running"))), now());
        assert!(sync.in_sync("u", &running));
        sync.learn(&pod("52", "Pending"));
        assert!(!sync.in_sync("u", &running), "lower versions count again");
        // The answer to a write says it.
        let mut sync = written();
        let failed = pod("0", "Failed").status.expect("status");
        assert!(sync.next("u", &failed, now()).is_some());
        sync.done(Written::Pod(Box::new(pod("51", "Pending"))), now());
        assert!(sync.next("u", &failed, now()).is_some(), "somebody was faster, after the restore");
        // A change that the watch tells during a write is newer than the write's answer, as ever.
        let mut sync = written();
        assert!(sync.next("u", &failed, now()).is_some());
        sync.learn(&pod("72", "Failed"));
        sync.done(Written::Pod(Box::new(pod("71", "Pending"))), now());
        assert!(sync.in_sync("u", &failed));
    }

    #[test]
    fn a_failed_write_waits_and_then_goes_on() {
        let mut sync = StatusSync::new(&pod("5", "Pending"));
        let running = pod("0", "Running").status.expect("status");
        assert!(sync.next("u", &running, now()).is_some());
        assert!(sync.done(Written::Failed("down".to_owned()), now()).is_some());
        assert!(sync.next("u", &running, now()).is_none());
        let later = sync.retry_at(now()).expect("a time");
        assert!(sync.next("u", &running, later).is_some());
    }

    #[test]
    fn a_write_that_only_lost_its_answer_wakes_nobody_again() {
        let mut sync = StatusSync::new(&pod("5", "Pending"));
        let running = pod("0", "Running").status.expect("status");
        assert!(sync.next("u", &running, now()).is_some());
        sync.done(Written::Failed("no answer".to_owned()), now());
        sync.learn(&pod("6", "Running"));
        let later = sync.retry_at(now()).expect("a time");
        assert!(sync.next("u", &running, later).is_none());
        assert_eq!(sync.retry_at(later), None);
    }
}

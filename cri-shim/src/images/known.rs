//! The last listing of containerd's images, for as long as nothing has changed since.
//!
//! Making a container must not wait for containerd to list all its images again, least of all while it collects garbage.
//! What we change ourselves is told by [`Changes::tell`] at once, what others change by containerd's events; while those are
//! not followed nothing is kept. It asks nobody: who lists hands the listing in.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::store::Image;

/// How often images were changed, and whether all changes are heard of.
#[derive(Debug, Default)]
pub struct Changes {
    count: AtomicU64,
    followed: AtomicBool,
}

impl Changes {
    /// Something was changed, or may have been.
    pub fn tell(&self) {
        self.count.fetch_add(1, Ordering::AcqRel);
    }

    /// From now on changes of others are heard of, or not any more.
    pub fn follow(&self, followed: bool) {
        self.followed.store(followed, Ordering::Release);
        self.tell();
    }

    /// Tells a change when it is dropped: also of a call that was given up half-way.
    pub fn in_the_end(&self) -> Told<'_> {
        Told(self)
    }
}

/// Tells a change when it is dropped.
#[derive(Debug)]
pub struct Told<'a>(&'a Changes);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.tell();
    }
}

/// A listing and the count of changes that it was begun at. One listing at most.
#[derive(Debug, Default)]
pub struct Known {
    listing: Mutex<Option<(u64, Listing)>>,
}

type Listing = Arc<[Arc<Image>]>;

impl Known {
    /// To be called before listing; hand it in with what was listed.
    pub fn begin(changes: &Changes) -> u64 {
        changes.count.load(Ordering::Acquire)
    }

    /// Keeps a listing, unless something was changed since it was begun.
    pub fn put(&self, begun: u64, listing: &[Arc<Image>], changes: &Changes) {
        let mut kept = self.listing.lock().unwrap_or_else(PoisonError::into_inner);
        let holds = changes.followed.load(Ordering::Acquire) && Self::begin(changes) == begun;
        *kept = holds.then(|| (begun, listing.into()));
    }

    /// The listing, when it still holds.
    pub fn get(&self, changes: &Changes) -> Option<Arc<[Arc<Image>]>> {
        let kept = self.listing.lock().unwrap_or_else(PoisonError::into_inner);
        let (begun, listing) = kept.as_ref()?;
        let holds = changes.followed.load(Ordering::Acquire) && Self::begin(changes) == *begun;
        holds.then(|| Arc::clone(listing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_holds_until_something_changes_and_only_while_that_is_heard() {
        let (changes, known) = (Changes::default(), Known::default());
        let list = || known.put(Known::begin(&changes), &[], &changes);
        list();
        assert!(known.get(&changes).is_none(), "nobody would tell of a change");
        changes.follow(true);
        assert!(known.get(&changes).is_none());
        list();
        assert!(known.get(&changes).is_some() && known.get(&changes).is_some());
        changes.tell();
        assert!(known.get(&changes).is_none());

        let begun = Known::begin(&changes);
        changes.tell();
        known.put(begun, &[], &changes);
        assert!(known.get(&changes).is_none(), "it may have been listed before the change");

        list();
        let change = changes.in_the_end();
        assert!(known.get(&changes).is_some(), "not yet");
        drop(change);
        assert!(known.get(&changes).is_none());

        list();
        changes.follow(false);
        assert!(known.get(&changes).is_none());
    }
}

//! Which images are removed, and when. Pure.
//!
//! Input: the images there are, which of them containers use, how full their file system is, and what was seen before.
//! Output: ids to remove, oldest use first. Upstream's rules: nothing in use, pinned or younger than the minimum age.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;

/// When images are removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImagePolicy {
    /// Per cent of the file system in use from which on images are removed.
    pub high: u64,
    /// … down to this.
    pub low: u64,
    /// Younger images stay.
    pub min_age: Duration,
    /// Images unused for longer go in any case.
    pub max_age: Option<Duration>,
}

/// An image that the runtime has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundImage {
    /// Its id.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// The runtime says it must stay.
    pub pinned: bool,
}

/// What is remembered of images between looks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageMemory {
    records: BTreeMap<String, Record>,
    first_look: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    size: u64,
    pinned: bool,
    in_use: bool,
    first_seen: Timestamp,
    last_used: Option<Timestamp>,
}

/// How much there is to remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Per cent in use.
    pub usage: u64,
    /// Bytes to free.
    pub bytes: u64,
}

impl ImageMemory {
    /// Takes in what there is now. `in_use` are ids of images that any container was made from, running or not.
    pub fn observe(&mut self, images: &[FoundImage], in_use: &BTreeSet<String>, now: Timestamp) {
        let first = self.first_look.is_none();
        self.first_look.get_or_insert(now);
        self.records.retain(|id, _| images.iter().any(|image| image.id == *id));
        for image in images {
            // What was there before the agent is old.
            let seen = if first { Timestamp::UNIX_EPOCH } else { now };
            let fresh = Record { size: 0, pinned: false, in_use: false, first_seen: seen, last_used: None };
            let record = self.records.entry(image.id.clone()).or_insert(fresh);
            (record.size, record.pinned) = (image.size, image.pinned);
            record.in_use = in_use.contains(&image.id);
            if record.in_use {
                record.last_used = Some(now);
            }
        }
    }

    /// Unused images to remove until `bytes` are free, with their sizes: least recently used first.
    pub fn to_free(&self, bytes: u64, min_age: Duration, now: Timestamp) -> Vec<(String, u64)> {
        let mut freed = 0_u64;
        let mut chosen = Vec::new();
        for (id, record) in self.candidates(now) {
            if freed >= bytes {
                break;
            }
            if is_older(record.first_seen, min_age, now) {
                freed = freed.saturating_add(record.size);
                chosen.push((id.clone(), record.size));
            }
        }
        chosen
    }

    /// Images unused for longer than `max_age`; none before the agent itself has watched for so long.
    pub fn outdated(&self, max_age: Duration, now: Timestamp) -> Vec<(String, u64)> {
        if self.first_look.is_none_or(|since| !is_older(since, max_age, now)) {
            return Vec::new();
        }
        self.candidates(now)
            .into_iter()
            .filter(|(_, record)| is_older(record.last_used.unwrap_or(record.first_seen), max_age, now))
            .map(|(id, record)| (id.clone(), record.size))
            .collect()
    }

    fn candidates(&self, now: Timestamp) -> Vec<(&String, &Record)> {
        let mut unused: Vec<(&String, &Record)> = self
            .records
            .iter()
            .filter(|(_, record)| !record.in_use && !record.pinned && record.last_used != Some(now))
            .collect();
        unused.sort_by_key(|(id, record)| (record.last_used, record.first_seen, (*id).clone()));
        unused
    }
}

/// What is to be freed on a file system of `capacity` with `available` bytes left; `None`: nothing yet.
pub fn shortage(policy: ImagePolicy, capacity: u64, available: u64) -> Option<Shortage> {
    if capacity == 0 {
        return None;
    }
    let share = |part: u64, per: u128| u64::try_from(u128::from(part) * per / 100).unwrap_or(u64::MAX);
    let free = u64::try_from(u128::from(available) * 100 / u128::from(capacity)).unwrap_or(100);
    let usage = 100_u64.saturating_sub(free);
    let wanted = share(capacity, u128::from(100 - policy.low.min(100)));
    (usage >= policy.high).then(|| Shortage { usage, bytes: wanted.saturating_sub(available) })
}

fn is_older(since: Timestamp, age: Duration, now: Timestamp) -> bool {
    Duration::try_from(now.duration_since(since)).is_ok_and(|passed| passed >= age)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).expect("in range")
    }

    fn images(names: &str) -> Vec<FoundImage> {
        let image =
            |name: &str| FoundImage { id: name.to_owned(), size: 10, pinned: name.starts_with("pin") };
        names.split_whitespace().map(image).collect()
    }

    fn used(names: &str) -> BTreeSet<String> {
        names.split_whitespace().map(str::to_owned).collect()
    }

    fn names(chosen: Vec<(String, u64)>) -> String {
        chosen.into_iter().map(|(id, _)| id).collect::<Vec<_>>().join(" ")
    }

    const AGE: Duration = Duration::from_secs(120);

    #[test]
    fn the_least_recently_used_go_first_and_only_as_many_as_needed() {
        let mut memory = ImageMemory::default();
        memory.observe(&images("a b c pinned d"), &used("a"), at(0));
        memory.observe(&images("a b c pinned d"), &used("b c"), at(10));
        memory.observe(&images("a b c pinned d"), &used("c"), at(20));
        assert_eq!(names(memory.to_free(1, AGE, at(30))), "d");
        assert_eq!(names(memory.to_free(30, AGE, at(30))), "d a b");
        assert_eq!(names(memory.to_free(1000, AGE, at(30))), "d a b", "neither used nor pinned ones");
    }

    #[test]
    fn young_images_stay() {
        let mut memory = ImageMemory::default();
        memory.observe(&images("old"), &used(""), at(0));
        memory.observe(&images("old new"), &used(""), at(10));
        assert_eq!(names(memory.to_free(1000, AGE, at(100))), "old");
        assert_eq!(names(memory.to_free(1000, AGE, at(130))), "old new");
    }

    #[test]
    fn outdated_images_go_once_the_agent_has_watched_long_enough() {
        let mut memory = ImageMemory::default();
        memory.observe(&images("a b"), &used("a"), at(0));
        assert_eq!(names(memory.outdated(AGE, at(119))), "");
        memory.observe(&images("a b"), &used("a"), at(120));
        assert_eq!(names(memory.outdated(AGE, at(120))), "b");
    }

    #[test]
    fn a_full_disk_is_emptied_to_the_lower_mark() {
        let policy = ImagePolicy { high: 85, low: 80, min_age: AGE, max_age: None };
        assert_eq!(shortage(policy, 1000, 160), None);
        assert_eq!(shortage(policy, 1000, 150), Some(Shortage { usage: 85, bytes: 50 }));
        assert_eq!(shortage(policy, 0, 0), None);
        let off = ImagePolicy { high: 100, low: 80, ..policy };
        assert_eq!(shortage(off, 1000, 10), None);
    }
}

//! Which facts become a new event, which count an old one up, and which are too many. Pure but for its own table.

use std::collections::{HashMap, VecDeque};

use jiff::{SignedDuration, Timestamp};

use super::Fact;

/// Series remembered; the oldest is forgotten first and would start again with count 1.
const SERIES: usize = 1024;
/// Events that one object may have at once, and how often it gains another, as upstream's spam filter.
const BURST: u32 = 25;
const REFILL: SignedDuration = SignedDuration::from_secs(300);

/// What to do with a fact.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Create an event of this name.
    Create {
        /// `<object>.<hex time>`.
        name: String,
    },
    /// Set the count of the event that exists.
    Count {
        /// Its name.
        name: String,
        /// New count.
        count: i32,
    },
    /// The object has had too many.
    Drop,
}

/// The memory behind the decisions.
#[derive(Debug, Default)]
pub(super) struct SeriesTable {
    series: HashMap<Key, Series>,
    order: VecDeque<Key>,
    budgets: HashMap<String, Budget>,
}

type Key = (String, String, String, String);

#[derive(Debug)]
struct Series {
    name: String,
    count: i32,
}

#[derive(Debug, Clone, Copy)]
struct Budget {
    tokens: u32,
    refilled: Timestamp,
}

impl SeriesTable {
    /// Decides and remembers.
    pub(super) fn decide(&mut self, fact: &Fact) -> Decision {
        if !self.take_token(fact) {
            return Decision::Drop;
        }
        let key = key(fact);
        if let Some(series) = self.series.get_mut(&key) {
            series.count = series.count.saturating_add(1);
            return Decision::Count { name: series.name.clone(), count: series.count };
        }
        let object = fact.object.name.as_deref().unwrap_or("unknown");
        let name = format!("{object}.{:x}", fact.at.as_nanosecond());
        self.series.insert(key.clone(), Series { name: name.clone(), count: 1 });
        self.order.push_back(key);
        if self.order.len() > SERIES
            && let Some(oldest) = self.order.pop_front()
        {
            self.series.remove(&oldest);
        }
        Decision::Create { name }
    }

    /// A write failed (the event may have expired): start the series anew next time.
    pub(super) fn forget(&mut self, fact: &Fact) {
        let key = key(fact);
        self.series.remove(&key);
        self.order.retain(|known| *known != key);
    }

    fn take_token(&mut self, fact: &Fact) -> bool {
        if self.budgets.len() > SERIES {
            self.budgets.retain(|_, budget| fact.at.duration_since(budget.refilled) < REFILL);
        }
        let object = fact.object.uid.clone().unwrap_or_default();
        let budget = self.budgets.entry(object).or_insert(Budget { tokens: BURST, refilled: fact.at });
        while budget.tokens < BURST && fact.at.duration_since(budget.refilled) >= REFILL {
            budget.tokens += 1;
            budget.refilled += REFILL;
        }
        if budget.tokens == BURST {
            budget.refilled = fact.at;
        }
        let allowed = budget.tokens > 0;
        budget.tokens = budget.tokens.saturating_sub(1);
        allowed
    }
}

fn key(fact: &Fact) -> Key {
    (
        fact.object.uid.clone().unwrap_or_default(),
        fact.object.field_path.clone().unwrap_or_default(),
        fact.reason.clone(),
        fact.message.clone(),
    )
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ObjectReference;

    use super::super::EventType;
    use super::*;

    fn fact(second: i64, message: &str) -> Fact {
        Fact {
            object: ObjectReference {
                name: Some("web".to_owned()),
                uid: Some("u".to_owned()),
                ..ObjectReference::default()
            },
            kind: EventType::Warning,
            reason: "BackOff".to_owned(),
            message: message.to_owned(),
            at: Timestamp::from_second(1000 + second).expect("in range"),
        }
    }

    #[test]
    fn a_repeated_fact_counts_up_and_a_different_one_does_not() {
        let mut table = SeriesTable::default();
        let Decision::Create { name } = table.decide(&fact(0, "a")) else { panic!("first is created") };
        assert_eq!(table.decide(&fact(1, "a")), Decision::Count { name, count: 2 });
        assert!(matches!(table.decide(&fact(2, "b")), Decision::Create { .. }));
    }

    #[test]
    fn a_storm_is_cut_and_recovers() {
        let mut table = SeriesTable::default();
        let kept = (0..100).filter(|_| table.decide(&fact(0, "a")) != Decision::Drop).count();
        assert_eq!(kept, 25);
        assert_ne!(table.decide(&fact(301, "a")), Decision::Drop);
        assert_eq!(table.decide(&fact(302, "a")), Decision::Drop);
    }
}

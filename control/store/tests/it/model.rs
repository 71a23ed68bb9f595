//! Random transactions against a model that keeps every version of everything.

use std::collections::BTreeMap;

use bytes::Bytes;
use control_store::{
    Event, EventKind, KeyValue, Range, RedbOptions, RedbStore, Revision, Store, StoreError, Txn,
};
use proptest::prelude::*;

/// One random step.
#[derive(Clone, Debug)]
enum Step {
    Create(u8, u8),
    Update { key: u8, value: u8, stale: bool },
    Delete { key: u8, stale: bool },
    Compact(u8),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..8_u8, any::<u8>()).prop_map(|(key, value)| Step::Create(key, value)),
        5 => (0..8_u8, any::<u8>(), prop::bool::weighted(0.2))
            .prop_map(|(key, value, stale)| Step::Update { key, value, stale }),
        3 => (0..8_u8, prop::bool::weighted(0.2)).prop_map(|(key, stale)| Step::Delete { key, stale }),
        1 => (0..6_u8).prop_map(Step::Compact),
        1 => Just(Step::Reopen),
    ]
}

fn name(key: u8) -> Bytes {
    Bytes::from(format!("/{}/{key}", if key.is_multiple_of(2) { "even" } else { "odd" }))
}

/// Every state the store has had, by revision, and all events.
struct Model {
    states: BTreeMap<u64, BTreeMap<Bytes, KeyValue>>,
    events: Vec<Event>,
    compacted: u64,
}

impl Model {
    fn newest(&self) -> (u64, &BTreeMap<Bytes, KeyValue>) {
        let (revision, state) = self.states.last_key_value().unwrap();
        (*revision, state)
    }

    /// What a correct store answers to a write of `key` that expects `expected` (`None`: absent).
    fn write(&mut self, key: &Bytes, expected: Option<Revision>, value: Option<Bytes>) -> Option<Revision> {
        let (newest, state) = self.newest();
        let before = state.get(key).cloned();
        if before.as_ref().map(|pair| pair.modified) != expected {
            return None;
        }
        let revision = Revision(newest + 1);
        let created = before.as_ref().map_or(revision, |pair| pair.created);
        let mut state = state.clone();
        let kind = match (&value, &before) {
            (Some(_), None) => EventKind::Created,
            (Some(_), Some(_)) => EventKind::Updated,
            (None, _) => EventKind::Deleted,
        };
        if let Some(value) = &value {
            let pair = KeyValue { key: key.clone(), value: value.clone(), created, modified: revision };
            state.insert(key.clone(), pair);
        } else {
            state.remove(key);
        }
        let last = value.or_else(|| before.as_ref().map(|pair| pair.value.clone())).unwrap();
        self.events.push(Event {
            kind,
            key: key.clone(),
            value: last,
            previous: before.map(|pair| (pair.value, pair.modified)),
            created,
            revision,
        });
        self.states.insert(revision.0, state);
        Some(revision)
    }
}

async fn check_ranges(store: &RedbStore, model: &Model) {
    for prefix in ["/even/", "/odd/", "/"] {
        for (revision, state) in &model.states {
            let range =
                Range { prefix: Bytes::from(prefix), at: Some(Revision(*revision)), ..Range::default() };
            let answer = store.range(range.clone()).await;
            if *revision < model.compacted {
                assert!(matches!(answer, Err(StoreError::Compacted { .. })));
                continue;
            }
            let want: Vec<_> =
                state.values().filter(|pair| pair.key.starts_with(prefix.as_bytes())).cloned().collect();
            assert_eq!(answer.unwrap().items, want, "{prefix} at {revision}");
            let mut paged = Vec::new();
            let mut after = None;
            loop {
                let page = store.range(Range { limit: 2, after, ..range.clone() }).await.unwrap();
                paged.extend(page.items);
                assert_eq!(page.remaining, want.len() - paged.len());
                if page.remaining == 0 {
                    break;
                }
                after = paged.last().map(|pair: &KeyValue| pair.key.clone());
            }
            assert_eq!(paged, want);
        }
    }
}

async fn check_watch(store: &RedbStore, model: &Model, after: u64) {
    let want: Vec<_> = model.events.iter().filter(|event| event.revision.0 > after).cloned().collect();
    if after < model.compacted {
        assert!(matches!(
            store.watch(Bytes::new(), Revision(after)).await.err(),
            Some(StoreError::Compacted { .. })
        ));
        return;
    }
    let mut watch = store.watch(Bytes::from_static(b"/"), Revision(after)).await.unwrap();
    let mut got = Vec::new();
    while got.len() < want.len() {
        got.extend(watch.next().await.unwrap().0);
    }
    assert_eq!(got, want);
}

async fn run(steps: Vec<Step>) {
    let directory = tempfile::tempdir().unwrap();
    let options = RedbOptions::new(directory.path().join("store.redb"));
    let mut store = RedbStore::open(&options).unwrap();
    let mut model =
        Model { states: BTreeMap::from([(1, BTreeMap::new())]), events: Vec::new(), compacted: 1 };
    for step in steps {
        let current = |model: &Model, key: &Bytes, stale: bool| {
            let modified = model.newest().1.get(key).map_or(Revision(9999), |pair| pair.modified);
            if stale { Revision(modified.0 + 1) } else { modified }
        };
        let (key, expected, value) = match step {
            Step::Create(key, value) => (name(key), None, Some(Bytes::from(vec![value]))),
            Step::Update { key, value, stale } => {
                (name(key), Some(current(&model, &name(key), stale)), Some(Bytes::from(vec![value])))
            }
            Step::Delete { key, stale } => (name(key), Some(current(&model, &name(key), stale)), None),
            Step::Compact(back) => {
                let upto = model.newest().0.saturating_sub(u64::from(back));
                store.compact(Revision(upto)).await.unwrap();
                model.compacted = model.compacted.max(upto);
                continue;
            }
            Step::Reopen => {
                store.close().await;
                drop(store);
                store = RedbStore::open(&options).unwrap();
                continue;
            }
        };
        let txn = match (expected, value.clone()) {
            (None, value) => Txn::create(key.clone(), value.unwrap()),
            (Some(expected), Some(value)) => Txn::update(key.clone(), expected, value),
            (Some(expected), None) => Txn::delete(key.clone(), expected),
        };
        match (store.txn(txn).await, model.write(&key, expected, value)) {
            (Ok(got), Some(want)) => assert_eq!(got, want),
            (Err(StoreError::Conflict { current, .. }), None) => {
                assert_eq!(current.as_deref(), model.newest().1.get(&key));
            }
            (got, want) => panic!("store {got:?}, model {want:?}"),
        }
        assert_eq!(store.get(key.clone()).await.unwrap().as_ref(), model.newest().1.get(&key));
    }
    check_ranges(&store, &model).await;
    for after in [1, model.compacted, model.newest().0] {
        check_watch(&store, &model, after).await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_store_behaves_like_the_model(steps in prop::collection::vec(step(), 1..60)) {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(run(steps));
    }
}

#[tokio::test]
async fn concurrent_writers_share_commits_and_watchers_see_one_order() {
    let directory = tempfile::tempdir().unwrap();
    let store = std::sync::Arc::new(RedbStore::open(&RedbOptions::new(directory.path().join("s"))).unwrap());
    let mut watch = store.watch(Bytes::from_static(b"/"), Revision(1)).await.unwrap();
    let writers = (0..200).map(|number| {
        let store = std::sync::Arc::clone(&store);
        tokio::spawn(async move {
            store.txn(Txn::create(Bytes::from(format!("/{number}")), Bytes::new())).await.unwrap()
        })
    });
    let mut revisions = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        revisions.push(writer.await.unwrap());
    }
    revisions.sort();
    assert_eq!(revisions, (2..202).map(Revision).collect::<Vec<_>>());
    let mut seen = Vec::new();
    while seen.len() < 200 {
        seen.extend(watch.next().await.unwrap().0.into_iter().map(|event| event.revision));
    }
    assert_eq!(seen, revisions);
}

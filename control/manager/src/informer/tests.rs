//! An informer against a scripted source: lists, watches, breaks and expiry.

use std::{collections::VecDeque, sync::Mutex};

use futures::stream;

use super::*;

/// What the source does, step by step; when the script ends, it hangs.
enum Step {
    List(Vec<(&'static str, u64)>, u64),
    Watch { from: u64, events: Vec<Event> },
    Refuse,
}

enum Event {
    Set(&'static str, u64),
    Gone(&'static str, u64),
    Expire,
}

struct Script(Mutex<VecDeque<Step>>);

fn object(name: &str, version: u64) -> MetadataOnly {
    MetadataOnly(ObjectMeta {
        name: Some(name.into()),
        uid: Some(name.into()),
        resource_version: Some(version.to_string()),
        ..ObjectMeta::default()
    })
}

impl Script {
    async fn next(&self) -> Step {
        let step = self.0.lock().expect("not poisoned").pop_front();
        match step {
            Some(step) => step,
            None => std::future::pending().await,
        }
    }
}

impl Source<MetadataOnly> for Script {
    async fn list(&self, _: Option<String>) -> Result<Page<MetadataOnly>, SourceError> {
        match self.next().await {
            Step::List(objects, version) => Ok(Page {
                items: objects.into_iter().map(|(name, version)| object(name, version)).collect(),
                version: version.to_string(),
                continue_token: None,
            }),
            Step::Refuse => Err(SourceError::Ended("refused".into())),
            Step::Watch { .. } => panic!("listed where a watch was expected"),
        }
    }

    async fn watch(
        &self,
        at: &str,
    ) -> Result<BoxStream<'static, Result<Incoming<MetadataOnly>, SourceError>>, SourceError> {
        match self.next().await {
            Step::Watch { from, events } => {
                assert_eq!(at, from.to_string(), "resumes where it stopped");
                let events = events.into_iter().map(|event| {
                    Ok(match event {
                        Event::Set(name, version) => Incoming::Applied(object(name, version)),
                        Event::Gone(name, version) => Incoming::Deleted(object(name, version)),
                        Event::Expire => Incoming::Expired,
                    })
                });
                Ok(stream::iter(events).boxed())
            }
            Step::Refuse => Err(SourceError::Ended("refused".into())),
            Step::List(..) => panic!("watched where a list was expected"),
        }
    }
}

fn describe(change: &Change<MetadataOnly>) -> String {
    let version = |object: &Arc<MetadataOnly>| version_of(object.meta()).to_owned();
    let old = change.old.as_ref().map_or("-".into(), version);
    let new = change.new.as_ref().map_or("-".into(), version);
    format!("{} {old}>{new}", change.key())
}

#[tokio::test]
async fn changes_survive_breaks_and_expiry() {
    let script = Script(Mutex::new(VecDeque::from([
        Step::Refuse,
        Step::List(vec![("a", 1), ("b", 2)], 5),
        Step::Watch { from: 5, events: vec![Event::Set("a", 6), Event::Gone("b", 7)] },
        Step::Refuse,
        Step::Watch { from: 7, events: vec![Event::Set("c", 8), Event::Expire] },
        Step::List(vec![("a", 6), ("d", 9)], 10),
    ])));
    let informer = Informer::new("Test");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    informer.on_change(move |change| log.lock().expect("not poisoned").push(describe(change)));
    let cancel = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&informer).run(script, cancel.clone()));
    informer.wait_until_synced().await;
    let caught_up = async {
        while informer.version() < 10 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), caught_up).await.expect("must catch up");
    cancel.cancel();
    running.await.expect("does not panic");
    let expected = ["a ->1", "b ->2", "a 1>6", "b 2>-", "c ->8", "c 8>-", "d ->9"];
    assert_eq!(*seen.lock().expect("not poisoned"), expected);
    assert_eq!(informer.all().len(), 2);
}

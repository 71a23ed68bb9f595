//! Runs cases: independent ones beside each other, the others one by one; each with a deadline and a clean-up.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::{FutureExt, StreamExt};

use super::case::{Case, Skip};
use super::context::{Suite, T};
use super::list::List;
use super::progress::Progress;
use super::report::{Done, Outcome};

/// What the cases of one suite share, and how a run of one gets what it works with.
pub(crate) trait World: Send + Sync + 'static {
    /// What a case works with.
    type Context: Clone + Send;

    /// A context for one run.
    fn context(self: &Arc<Self>) -> Result<Self::Context>;

    /// How long one case, and its clean-up, may take.
    fn deadline(&self) -> Duration;

    /// Removes what the run made.
    fn clean_up(context: Self::Context) -> impl Future<Output = Result<()>> + Send;
}

impl World for Suite {
    type Context = T;

    fn context(self: &Arc<Self>) -> Result<T> {
        T::new(self)
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn clean_up(context: T) -> Result<()> {
        context.clean_up().await
    }
}

/// How cases are run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manner {
    /// Cases beside each other.
    pub(crate) parallel: usize,
    /// How often a case may be tried: more than once only where a race of the reference is not ours to mend.
    pub(crate) attempts: u32,
    /// Draw a bar where standard output is a terminal, and tell only what did not pass.
    pub(crate) bar: bool,
}

/// Runs all and gives their results in the order of the list.
pub(crate) async fn run<W: World>(
    suite: &Arc<W>,
    cases: Vec<Case<W::Context>>,
    manner: Manner,
    known: &List,
    skipped: &List,
) -> Vec<Done> {
    let progress = &Progress::new(cases.len(), manner.bar);
    let (serial, beside): (Vec<_>, Vec<_>) = cases.into_iter().enumerate().partition(|(_, case)| case.serial);
    let mut done: Vec<(usize, Done)> = futures::stream::iter(beside)
        .map(
            |(index, case)| async move { (index, one(suite, &case, manner, known, skipped, progress).await) },
        )
        .buffer_unordered(manner.parallel.max(1))
        .collect()
        .await;
    for (index, case) in serial {
        done.push((index, one(suite, &case, manner, known, skipped, progress).await));
    }
    progress.end();
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, done)| done).collect()
}

async fn one<W: World>(
    suite: &Arc<W>,
    case: &Case<W::Context>,
    manner: Manner,
    known: &List,
    skipped: &List,
    progress: &Progress,
) -> Done {
    let begun = Instant::now();
    let id = case.id();
    let outcome = match skipped.get(&id) {
        Some(reason) => Outcome::Skipped(format!("by the skip list: {reason}")),
        None => excuse(attempts(suite, case, manner.attempts, known.contains_key(&id)).await, known.get(&id)),
    };
    let done =
        Done { group: case.group.to_owned(), name: case.name.to_owned(), time: begun.elapsed(), outcome };
    progress.done(&done);
    done
}

/// Begins the reason of a known failure that is a race: passing is nothing to report.
const SOMETIMES: &str = "sometimes";

fn excuse(outcome: Outcome, reason: Option<&String>) -> Outcome {
    match (outcome, reason) {
        (Outcome::Failed(_), Some(reason)) => Outcome::Known(reason.clone()),
        (Outcome::Passed, Some(reason)) if reason.starts_with(SOMETIMES) => Outcome::Passed,
        (Outcome::Passed, Some(reason)) => Outcome::KnownButPassed(reason.clone()),
        (outcome, _) => outcome,
    }
}

/// Tries a case until it passes; one that is known to fail is tried once.
async fn attempts<W: World>(
    suite: &Arc<W>,
    case: &Case<W::Context>,
    attempts: u32,
    is_known: bool,
) -> Outcome {
    let mut left = if is_known { 1 } else { attempts.max(1) };
    loop {
        let outcome = attempt(suite, case).await;
        left -= 1;
        match &outcome {
            Outcome::Failed(why) if left > 0 => println!("    again         {}: {why}", case.id()),
            _ => return outcome,
        }
    }
}

async fn attempt<W: World>(suite: &Arc<W>, case: &Case<W::Context>) -> Outcome {
    let t = match suite.context() {
        Ok(t) => t,
        Err(error) => return Outcome::Failed(format!("{error:#}")),
    };
    let run = AssertUnwindSafe((case.run)(t.clone())).catch_unwind();
    let result = match tokio::time::timeout(suite.deadline(), run).await {
        Err(_) => Err(anyhow::anyhow!("not finished after {} s", suite.deadline().as_secs())),
        Ok(Err(_)) => Err(anyhow::anyhow!("the case itself panicked")),
        Ok(Ok(result)) => result,
    };
    let cleaned = match tokio::time::timeout(suite.deadline(), W::clean_up(t)).await {
        Err(_) => Err(anyhow::anyhow!("cleaning up is not finished after {} s", suite.deadline().as_secs())),
        Ok(result) => result,
    };
    match (result, cleaned) {
        (Ok(()), Ok(())) => Outcome::Passed,
        (Err(error), cleaned) => {
            if let Some(skip) = error.downcast_ref::<Skip>() {
                return cleaned.map_or_else(
                    |error| Outcome::Failed(format!("{error:#}")),
                    |()| Outcome::Skipped(skip.0.clone()),
                );
            }
            let left = cleaned.err().map(|error| format!("; then {error:#}")).unwrap_or_default();
            Outcome::Failed(format!("{}{left}", chain(&error)))
        }
        (Ok(()), Err(error)) => Outcome::Failed(format!("{error:#}")),
    }
}

/// The error in one line; of a gRPC status only the code and the text.
fn chain(error: &anyhow::Error) -> String {
    let parts: Vec<String> = error
        .chain()
        .map(|cause| match cause.downcast_ref::<tonic::Status>() {
            Some(status) => format!("{:?}: {}", status.code(), status.message()),
            None => cause.to_string(),
        })
        .collect();
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_excuses_failures_only() {
        let reason = "because".to_owned();
        assert_eq!(excuse(Outcome::Failed("x".to_owned()), Some(&reason)), Outcome::Known(reason.clone()));
        assert_eq!(excuse(Outcome::Passed, Some(&reason)), Outcome::KnownButPassed(reason.clone()));
        assert_eq!(excuse(Outcome::Passed, Some(&"sometimes: a race".to_owned())), Outcome::Passed);
        assert_eq!(excuse(Outcome::Failed("x".to_owned()), None), Outcome::Failed("x".to_owned()));
        let skipped = Outcome::Skipped("y".to_owned());
        assert_eq!(excuse(skipped.clone(), Some(&reason)), skipped);
    }
}

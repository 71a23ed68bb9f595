//! Runs jobs beside each other on a few lanes.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What is still to be done, and which groups are at it.
struct Queue<J> {
    waiting: VecDeque<J>,
    busy: BTreeSet<String>,
}

/// Works the jobs off in their order, `lanes` at a time, and gives what came of them in the order in which they ended. Of
/// a group that `group` names, one job runs at a time.
pub(crate) fn run<J: Send, R: Send>(
    jobs: Vec<J>,
    lanes: usize,
    group: impl Fn(&J) -> Option<String> + Sync,
    work: impl Fn(&J) -> R + Sync,
) -> Vec<(J, R)> {
    let lanes = lanes.clamp(1, jobs.len().max(1));
    let queue = Mutex::new(Queue { waiting: jobs.into(), busy: BTreeSet::new() });
    let (freed, done) = (Condvar::new(), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                while let Some(job) = take(&queue, &freed, &group) {
                    let result = work(&job);
                    if let Some(name) = group(&job) {
                        locked(&queue).busy.remove(&name);
                    }
                    freed.notify_all();
                    locked(&done).push((job, result));
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// The first job whose group is free; waits while there are only others, and gives nothing when there is none.
fn take<J>(queue: &Mutex<Queue<J>>, freed: &Condvar, group: &impl Fn(&J) -> Option<String>) -> Option<J> {
    let mut state = locked(queue);
    loop {
        if state.waiting.is_empty() {
            return None;
        }
        let free = |job: &J| group(job).is_none_or(|name| !state.busy.contains(&name));
        if let Some(index) = state.waiting.iter().position(free) {
            let job = state.waiting.remove(index)?;
            state.busy.extend(group(&job));
            return Some(job);
        }
        state = freed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn each_job_is_done_once_and_a_group_one_at_a_time() {
        let (now, most, same) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let group = |job: &usize| job.is_multiple_of(3).then(|| "thirds".to_owned());
        let results = run((0..60).collect(), 4, group, |job| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            if group(job).is_some() {
                assert_eq!(same.fetch_add(1, Ordering::SeqCst), 0, "two of one group at once");
                std::thread::yield_now();
                same.fetch_sub(1, Ordering::SeqCst);
            }
            now.fetch_sub(1, Ordering::SeqCst);
            job * 2
        });
        let done: BTreeSet<(usize, usize)> = results.into_iter().collect();
        assert_eq!(done, (0..60).map(|job| (job, job * 2)).collect());
        assert!(most.into_inner() <= 4);
    }

    #[test]
    fn no_jobs_are_no_work() {
        assert!(run(Vec::<u8>::new(), 0, |_| None, |_| ()).is_empty());
    }
}

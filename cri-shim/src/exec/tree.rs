//! Ends a process together with everything it started, also what its death orphaned.
//!
//! runc makes each exec process the leader of a session of its own, so its descendants are found by their session or by
//! their parents in `/proc`. A process that opened a session of its own and then lost its parent escapes; it ends
//! with the container.

use std::collections::{BTreeMap, BTreeSet};

use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;

/// Rounds against processes that fork faster than they are killed.
const ROUNDS: usize = 10;

/// Parent and session of a process.
type Relations = BTreeMap<u32, (u32, u32)>;

/// Kills the session that `leader` leads, and its descendants. Reads `/proc`, so not for async code.
pub fn kill(leader: u32) {
    for _ in 0..ROUNDS {
        let members = members(&read_proc(), leader);
        if members.is_empty() {
            return;
        }
        for pid in members {
            let Ok(number) = i32::try_from(pid) else { continue };
            // One that has ended in between is what we want.
            if let Err(errno) = send(Pid::from_raw(number), Signal::SIGKILL) {
                tracing::trace!(pid, %errno, "not killed");
            }
        }
    }
}

/// The leader, its session and all their descendants, without zombies (which are not listed).
fn members(relations: &Relations, leader: u32) -> BTreeSet<u32> {
    let in_session = relations.iter().filter(|(pid, (_, session))| **pid == leader || *session == leader);
    let mut members: BTreeSet<u32> = in_session.map(|(pid, _)| *pid).collect();
    loop {
        let children =
            relations.iter().filter(|(pid, (parent, _))| members.contains(parent) && !members.contains(pid));
        let more: Vec<u32> = children.map(|(pid, _)| *pid).collect();
        if more.is_empty() {
            return members;
        }
        members.extend(more);
    }
}

fn read_proc() -> Relations {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Relations::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some((pid, parse_stat(&stat)?))
    })
    .collect()
}

/// Parent and session from a stat line, proc(5); `None` for a zombie.
fn parse_stat(stat: &str) -> Option<(u32, u32)> {
    // The name may hold anything, so the fields count from its last parenthesis.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some((parent, session))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stat_lines_with_odd_names() {
        assert_eq!(parse_stat("12 (a) b (c) S 7 12 9 0 -1"), Some((7, 9)));
        assert_eq!(parse_stat("12 (sh) Z 7 12 9 0 -1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn finds_session_and_descendants_but_nobody_else() {
        let relations = Relations::from([
            (10, (1, 10)),
            (11, (10, 10)),
            (12, (1, 10)),  // orphaned, same session
            (13, (12, 13)), // own session, parent known
            (20, (1, 20)),
        ]);
        assert_eq!(members(&relations, 10), BTreeSet::from([10, 11, 12, 13]));
        assert!(members(&relations, 99).is_empty());
    }
}

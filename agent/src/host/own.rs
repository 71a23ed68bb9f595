//! The agent's own process: how the kernel's OOM killer sees it, and how many files it may have open.
//!
//! What the machine does not permit is told once and left as it is: the agent works without.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::{debug, warn};

const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Sets the score: the lower, the later it is ended when memory runs out.
pub(super) fn set_oom_score(score: i32) {
    match std::fs::write(OOM_SCORE, score.to_string()) {
        Ok(()) => debug!(score, "the agent's OOM score"),
        Err(error) => {
            let stays = std::fs::read_to_string(OOM_SCORE).unwrap_or_default();
            warn!(%error, "oomScoreAdj {score} cannot be set (CAP_SYS_RESOURCE is missing): {} stays", stays.trim());
        }
    }
}

/// Allows so many files; less where only less may be had.
pub(super) fn allow_open_files(wanted: u64) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let most = wanted.max(hard);
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, most).is_ok() {
        debug!(files = wanted, "files that the agent may have open");
        return;
    }
    let reached = wanted.min(hard);
    match setrlimit(Resource::RLIMIT_NOFILE, reached, hard) {
        Ok(()) => warn!("maxOpenFiles {wanted} cannot be had here: {reached} may be open"),
        Err(error) => warn!(%error, "maxOpenFiles {wanted} cannot be had here: {soft} may be open"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_had_is_had() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        allow_open_files(soft);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (soft, hard));
        allow_open_files(u64::MAX);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard), "the kernel has no more");
        let before = std::fs::read_to_string(OOM_SCORE).unwrap();
        // Nobody needs a privilege for what is already so.
        set_oom_score(before.trim().parse().unwrap());
        assert_eq!(std::fs::read_to_string(OOM_SCORE).unwrap(), before);
    }
}

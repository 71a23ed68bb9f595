//! Stateful firewalls and clients outside: what the packet programs rewrote before connection tracking saw it is marked,
//! and kept out of connection tracking by a rule of nftables; where `iptables` is in use, it is forwarded whatever the
//! policy of `FORWARD` is.

use cni_plugins_host::nft::{NftError, untracked};
use ebpf_common::UNTRACKED_MARK;

/// What was said already.
#[derive(Debug, Default)]
pub(super) struct Firewall {
    passes: bool,
    complaint: Option<String>,
}

impl Firewall {
    /// Makes marked packets pass, or ends that; may be repeated, and puts back what somebody took away.
    pub(super) fn pass(&mut self, wanted: bool) {
        let outcome = match (wanted, self.passes) {
            (true, _) => untracked::pass(UNTRACKED_MARK),
            (false, true) => untracked::unpass(UNTRACKED_MARK).map(drop),
            (false, false) => return,
        };
        self.passes = wanted;
        let complaint = outcome.err().map(|error| describe(&error));
        if let Some(why) = complaint.as_ref().filter(|why| self.complaint.as_ref() != Some(*why)) {
            tracing::warn!(
                why,
                "a firewall of this node that drops what connection tracking calls invalid may stop clients outside"
            );
        }
        self.complaint = complaint;
    }
}

/// Takes the rules away, whoever made them.
pub(super) fn cleanup() {
    if let Err(error) = untracked::unpass(UNTRACKED_MARK) {
        tracing::debug!(why = describe(&error), "no rules of nftables to take away");
    }
}

fn describe(error: &NftError) -> String {
    format!("{error}: {}", error.source)
}

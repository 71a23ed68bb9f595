//! Effects on the host: the fork, what the child does before its program, system calls that no safe crate offers.
//!
//! `init`, `join`, `finish`, `hook`, `attach`, `in_root` and `tty` run in the child. The caller may have threads, so nothing there
//! allocates, locks or panics: they work on plans whose memory was made before the fork. The rest runs in the caller.

pub(crate) mod attach;
pub(crate) mod bpf;
pub(crate) mod finish;
pub(crate) mod fork;
pub(crate) mod hook;
pub(crate) mod idmap;
pub(crate) mod in_root;
pub(crate) mod init;
pub(crate) mod join;
pub(crate) mod libseccomp;
pub(crate) mod link;
pub(crate) mod namespaces;
pub(crate) mod sys;
pub(crate) mod tty;

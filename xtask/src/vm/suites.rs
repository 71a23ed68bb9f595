//! Which root tests are run in which guest: the table to which a package is added.
//!
//! A package's tests find in the guest: the kernel modules and programs that are named here, its own executables and test
//! programs at the very paths at which cargo built them (tests name those), and nothing else of this machine.

use std::path::Path;

use anyhow::{Context, Result};

/// The guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// Kernel and initramfs, no systemd, no containerd.
    Light,
    /// Debian 12 with systemd and containerd.
    Debian,
}

/// The root tests of one package.
pub(super) struct Suite {
    /// Its folder.
    pub(super) folder: &'static str,
    /// The guests they are run in.
    pub(super) lanes: &'static [Lane],
    /// The tests, by the name of their file; none stands for every `root_*`.
    pub(super) tests: &'static [&'static str],
    /// Kernel modules that nothing loads by itself; what these depend on is found. Debian's kernel for clouds has no
    /// others than those of its package: a test that needs one which is not there must say so itself.
    pub(super) modules: &'static [&'static str],
    /// Programs of this machine that the tests call, for the light guest; the other one has what its image has.
    pub(super) programs: &'static [&'static str],
    /// Files and directories of this machine that the tests read, for the light guest.
    pub(super) files: &'static [&'static str],
    /// Arguments for every test program, such as `--skip`.
    pub(super) arguments: &'static [&'static str],
    /// Environment of the tests.
    pub(super) env: &'static [(&'static str, &'static str)],
}

/// A suite without needs, to be completed.
const PLAIN: Suite = Suite {
    folder: "",
    lanes: &[Lane::Light],
    tests: &[],
    modules: &[],
    programs: &[],
    files: &[],
    arguments: &[],
    env: &[],
};

/// All of them, in the order in which they run.
pub(super) const SUITES: &[Suite] = &[
    Suite {
        folder: "cni-plugins",
        modules: &[
            "bridge",
            "veth",
            "dummy",
            "br_netfilter",
            "8021q",
            "sctp",
            "wireguard",
            "nf_tables",
            "nft_chain_nat",
            "nft_ct",
            "nft_nat",
            "nft_masq",
            "nft_fib_inet",
            "nf_conntrack_netlink",
            "sch_tbf",
        ],
        programs: &["ip", "nft"],
        ..PLAIN
    },
    Suite {
        folder: "cri-shim/runtime",
        lanes: &[Lane::Light, Lane::Debian],
        modules: &["overlay"],
        programs: &["runc", "umount"],
        ..PLAIN
    },
    Suite { folder: "cri-shim/shim", lanes: &[Lane::Debian], ..PLAIN },
    Suite { folder: "cri-shim", lanes: &[Lane::Debian], ..PLAIN },
];

impl Suite {
    /// Those of a guest.
    pub(super) fn of(lane: Lane) -> impl Iterator<Item = &'static Self> {
        SUITES.iter().filter(move |suite| suite.lanes.contains(&lane))
    }

    /// The names of its tests.
    pub(super) fn names(&self, repo: &Path) -> Result<Vec<String>> {
        if !self.tests.is_empty() {
            return Ok(self.tests.iter().map(|name| (*name).to_owned()).collect());
        }
        let dir = repo.join(self.folder).join("tests");
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry?.path();
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("root_") && path.extension().is_some_and(|extension| extension == "rs") {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_has_tests_in_this_checkout() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for suite in SUITES {
            let names = suite.names(repo).unwrap();
            assert!(!names.is_empty(), "{} has no root tests", suite.folder);
            for name in names {
                let file = repo.join(suite.folder).join("tests").join(format!("{name}.rs"));
                assert!(file.is_file(), "{} is missing", file.display());
            }
        }
    }
}

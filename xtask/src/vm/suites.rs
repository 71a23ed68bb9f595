//! Which root tests are run in which guest: the table to which a package is added.
//!
//! A package's tests find in the guest: the kernel modules and programs that are named here, its own executables and test
//! programs at the very paths at which cargo built them (tests name those), and nothing else of this machine. They know
//! that they are in a guest by `KEELSON_VM` (`light` or `debian`), where a test that finds no kernel module must fail.

use std::path::{Path, PathBuf};

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
    /// Runs of our own suites, in the light guest: `xtask` with these words, called by the first two.
    pub(super) runs: &'static [Run],
    /// Kernel modules that nothing loads by itself; what these depend on is found. Debian's kernel for clouds has no
    /// others than those of its package: a test that needs one which is not there must say so itself.
    pub(super) modules: &'static [&'static [&'static str]],
    /// Programs of this machine that the tests call, for the light guest; the other one has what its image has. Busybox's
    /// own stand for the rest; those of them that start another program (`nsenter`) prefer busybox's.
    pub(super) programs: &'static [&'static str],
    /// Files and directories of this machine that the tests read, for the light guest; those that are missing here are
    /// missed by the test, which says so.
    pub(super) files: &'static [&'static str],
    /// Arguments for every test program, such as `--skip`.
    pub(super) arguments: &'static [&'static str],
    /// Environment of the tests.
    pub(super) env: &'static [(&'static str, &'static str)],
}

/// One run of `xtask` inside the guest, in what it takes for this checkout.
pub(super) struct Run {
    /// Its words; `--junit` is added.
    pub(super) words: &'static [&'static str],
    /// Executables of the package that it needs, as `target/release` has them.
    pub(super) executables: &'static [&'static str],
    /// Files of the checkout that it reads.
    pub(super) files: &'static [&'static str],
}

/// A suite without needs, to be completed.
const PLAIN: Suite = Suite {
    folder: "",
    lanes: &[Lane::Light],
    tests: &[],
    runs: &[],
    modules: &[],
    programs: &[],
    files: &[],
    arguments: &[],
    env: &[],
};

/// What packets between namespaces need.
const LINKS: &[&str] = &["bridge", "veth", "dummy", "ifb", "8021q", "vxlan", "wireguard", "sctp"];
/// Packet filters, and what forgets or lists connections.
const FILTERS: &[&str] = &[
    "br_netfilter",
    "nf_tables",
    "nft_chain_nat",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_fib_inet",
    "nf_conntrack_netlink",
];
/// Queues that limit and slow, hooks for programs, and the kernel's lists of sockets.
const QUEUES: &[&str] =
    &["sch_tbf", "sch_netem", "sch_ingress", "cls_bpf", "tcp_diag", "udp_diag", "sctp_diag", "inet_diag"];

/// All of them, in the order in which they run.
pub(super) const SUITES: &[Suite] = &[
    Suite {
        folder: "cni-plugins",
        runs: &[Run {
            // What the kernel has a part in; how input is read is the same on any machine.
            words: &[
                "conformance",
                "cni",
                "--no-build",
                "--set",
                "keelson",
                "--parallel",
                "2",
                "--filter",
                "ADD:|CHECK:|limits:|ports:|settings:|bridge DEL:|portmap DEL:|bandwidth DEL:",
            ],
            executables: &["keelson-cni"],
            files: &["xtask/src/conformance/cni/keelson.txt"],
        }],
        modules: &[LINKS, FILTERS, QUEUES],
        programs: &["ip", "nft", "tc", "bridge", "nsenter"],
        // Chains with plugins of others, where this machine has them.
        files: &[
            "/usr/lib/cni/bandwidth",
            "/usr/lib/cni/bridge",
            "/usr/lib/cni/host-local",
            "/usr/lib/cni/static",
            "/usr/lib/cni/tuning",
        ],
        // A call takes an emulated processor twenty times as long.
        env: &[("KEELSON_CNI_ROUNDS", "30")],
        ..PLAIN
    },
    Suite { folder: "ebpf/tests", modules: &[LINKS, FILTERS, QUEUES], programs: &["ip", "tc"], ..PLAIN },
    Suite {
        folder: "agent",
        tests: &["root_network", "root_proxy", "root_service_matrix", "root_host"],
        modules: &[LINKS, FILTERS, QUEUES],
        programs: &["ip", "nft", "tc", "bridge", "nsenter"],
        ..PLAIN
    },
    // With a server that is the machine's own.
    Suite {
        folder: "agent",
        lanes: &[Lane::Debian],
        tests: &["root_nfs"],
        modules: &[&["nfs", "nfsv4", "nfsd"]],
        ..PLAIN
    },
    Suite {
        folder: "cri-shim/runtime",
        lanes: &[Lane::Light, Lane::Debian],
        modules: &[&["overlay"]],
        programs: &["runc", "umount"],
        ..PLAIN
    },
    Suite { folder: "cri-shim/shim", lanes: &[Lane::Debian], ..PLAIN },
    Suite {
        folder: "cri-shim",
        lanes: &[Lane::Debian],
        // Those in which the kernel, its cgroups or systemd have a part; the others are the same everywhere.
        tests: &[
            "root_cri",
            "root_containers",
            "root_equal",
            "root_exec",
            "root_layers",
            "root_recovery",
            "root_sandbox",
            "root_stats",
            "root_streams",
        ],
        // Starts the server anew at every step of every call, a quarter of an hour here, and no kernel has a part in where
        // it is ended.
        arguments: &["--skip", "it_may_die_at_every_step_of_every_call"],
        ..PLAIN
    },
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
            if name.starts_with("root_") && self.source(repo, &name).is_some() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// The file that a test begins with: of its name, or in a directory of its name.
    fn source(&self, repo: &Path, name: &str) -> Option<PathBuf> {
        let tests = repo.join(self.folder).join("tests");
        [tests.join(format!("{name}.rs")), tests.join(name).join("main.rs")]
            .into_iter()
            .find(|file| file.is_file())
    }

    /// Its modules, in the order in which they are loaded.
    pub(super) fn modules(&self) -> Vec<&'static str> {
        self.modules.iter().flat_map(|some| some.iter().copied()).collect()
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
            for file in suite.runs.iter().flat_map(|run| run.files) {
                assert!(repo.join(file).is_file(), "{file} is missing");
            }
            assert!(!names.is_empty(), "{} has no root tests", suite.folder);
            for name in names {
                assert!(suite.source(repo, &name).is_some(), "{}: {name} is missing", suite.folder);
            }
        }
    }
}

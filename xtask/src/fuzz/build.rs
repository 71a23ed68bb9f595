//! Building fuzz targets: libFuzzer's instruments in everything that they use, one cargo run for each crate.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::cmd::Cmd;

/// What libFuzzer is guided by: counters on every edge, and the values of comparisons.
const INSTRUMENTS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    // Branches must stay branches to be seen.
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];

/// How and where it is built. Optimisation and checks are in the profiles of the crates.
#[derive(Debug)]
pub(super) struct Build {
    place: PathBuf,
    triple: String,
    sanitize: bool,
}

impl Build {
    /// Below `place`; with the address sanitizer in a directory of its own.
    pub(super) fn new(place: &Path, sanitize: bool) -> Result<Self> {
        let place = if sanitize { place.join("sanitized") } else { place.to_owned() };
        let version = Cmd::new("rustc").args(["-vV"]).output()?;
        let Some(triple) = version.lines().find_map(|line| line.strip_prefix("host: ")) else {
            bail!("`rustc -vV` names no host");
        };
        Ok(Self { place, triple: triple.to_owned(), sanitize })
    }

    /// Builds some targets of the crate in `directory`.
    pub(super) fn run(&self, directory: &Path, targets: &[&str]) -> Result<()> {
        let mut flags = INSTRUMENTS.to_vec();
        let mut cmd = Cmd::new("cargo");
        if self.sanitize {
            flags.push("-Zsanitizer=address");
            cmd = cmd.args(["+nightly"]);
        }
        // With a target named, the flags are not for build scripts and macros.
        cmd = cmd.args(["build", "--release", "--quiet", "--target", &self.triple]);
        for target in targets {
            cmd = cmd.args(["--bin", target]);
        }
        cmd.dir(directory)
            .env("CARGO_TARGET_DIR", &self.place)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .run()
    }

    /// The program of a target.
    pub(super) fn program(&self, target: &str) -> PathBuf {
        self.place.join(&self.triple).join("release").join(target)
    }
}

//! Test programs and executables as cargo built them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cargo_metadata::Message;

use crate::cmd::Cmd;

/// A built program.
pub(super) struct Program {
    /// Name of its target.
    pub(super) name: String,
    /// Where cargo put it.
    pub(super) file: PathBuf,
    /// Whether it is a test.
    pub(super) is_test: bool,
}

/// The `root_*` tests and the executables of a package.
pub(super) fn of_package(repo: &Path, package: &str) -> Result<Vec<Program>> {
    let text = Cmd::new("cargo")
        .args(["test", "--release", "--no-run", "--message-format=json", "--package", package])
        .args(["--bins", "--test", "root_*"])
        .dir(repo)
        .output()?;
    let mut found = Vec::new();
    for message in Message::parse_stream(text.as_bytes()) {
        let Message::CompilerArtifact(artifact) = message? else { continue };
        let Some(executable) = artifact.executable else { continue };
        // A package's executables are also built as tests of themselves, which are no root tests.
        let is_test = artifact.target.is_test();
        if is_test || !artifact.profile.test {
            found.push(Program { name: artifact.target.name, file: executable.into_std_path_buf(), is_test });
        }
    }
    Ok(found)
}

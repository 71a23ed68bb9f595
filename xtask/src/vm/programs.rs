//! Root tests and the executables they name, as cargo built them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cargo_metadata::Message;

use crate::cmd::Cmd;

/// A built program.
pub(super) struct Program {
    /// Folder of its package, relative to the checkout.
    pub(super) folder: String,
    /// Name of its target.
    pub(super) name: String,
    /// Where cargo put it.
    pub(super) file: PathBuf,
    /// Whether it is a test.
    pub(super) is_test: bool,
}

/// The `root_*` tests and the executables of the packages in these folders. No package is named to cargo, as in the
/// root tier: it would choose other features and build everything once more.
pub(super) fn root_tests(repo: &Path, folders: &[&str]) -> Result<Vec<Program>> {
    let text = Cmd::new("cargo")
        .args(["test", "--release", "--no-run", "--message-format=json", "--test", "root_*"])
        .dir(repo)
        .output()?;
    let mut found = Vec::new();
    for message in Message::parse_stream(text.as_bytes()) {
        let Message::CompilerArtifact(artifact) = message? else { continue };
        let Some(executable) = artifact.executable else { continue };
        let folder = artifact.manifest_path.parent().map(|dir| dir.as_std_path()).unwrap_or(repo);
        let folder = folder.strip_prefix(repo).unwrap_or(folder).to_string_lossy().into_owned();
        if !folders.contains(&folder.as_str()) {
            continue;
        }
        // A package's executables may also be built as tests of themselves, which are no root tests.
        let is_test = artifact.target.is_test();
        if is_test || !artifact.profile.test {
            let file = executable.into_std_path_buf();
            found.push(Program { folder, name: artifact.target.name, file, is_test });
        }
    }
    Ok(found)
}

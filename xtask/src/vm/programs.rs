//! Root tests and the executables they name, as cargo built them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cargo_metadata::Message;
use cargo_metadata::camino::Utf8Path;

use crate::cmd::Cmd;

/// A built program.
pub(crate) struct Program {
    /// Folder of its package, relative to the checkout.
    pub(crate) folder: String,
    /// Name of its target.
    pub(crate) name: String,
    /// Where cargo put it.
    pub(crate) file: PathBuf,
    /// Whether it is a test.
    pub(crate) is_test: bool,
}

/// Builds tests, each a folder and a name, and with them the executables of their packages. No package is named to
/// cargo, as in the root tier: it would choose other features and build everything once more.
pub(crate) fn root_tests(repo: &Path, wanted: &BTreeSet<(String, String)>) -> Result<Vec<Program>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut cmd = Cmd::new("cargo").args([
        "test",
        "--release",
        "--no-run",
        "--quiet",
        "--message-format=json-render-diagnostics",
    ]);
    for name in wanted.iter().map(|(_, name)| name).collect::<BTreeSet<_>>() {
        cmd = cmd.args(["--test", name]);
    }
    let text = cmd.dir(repo).output()?;
    let mut found = Vec::new();
    for message in Message::parse_stream(text.as_bytes()) {
        let Message::CompilerArtifact(artifact) = message? else { continue };
        let Some(executable) = artifact.executable else { continue };
        let folder = artifact.manifest_path.parent().map_or(repo, Utf8Path::as_std_path);
        let folder = folder.strip_prefix(repo).unwrap_or(folder).to_string_lossy().into_owned();
        let is_test = artifact.target.is_test();
        let key = (folder, artifact.target.name);
        // A package's executables may also be built as tests of themselves, which are no root tests.
        let needed = if is_test {
            wanted.contains(&key)
        } else {
            !artifact.profile.test && wanted.iter().any(|(folder, _)| *folder == key.0)
        };
        if needed {
            found.push(Program { folder: key.0, name: key.1, file: executable.into_std_path_buf(), is_test });
        }
    }
    Ok(found)
}

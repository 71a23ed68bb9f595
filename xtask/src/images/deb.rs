//! Debian packages as files: downloaded by apt (nothing is installed) and unpacked by dpkg-deb.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::Cmd;

/// What Debian's suites are signed with; the package debian-archive-keyring brings it.
const DEBIAN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Unpacked packages, each in a folder of its own name.
pub(crate) struct Packages {
    dir: PathBuf,
}

impl Packages {
    /// Downloads and unpacks `names` below `dir`, from the machine's own suites; what is there is kept.
    pub(crate) fn fetch(dir: &Path, names: &[&str]) -> Result<Self> {
        Self::fetch_with(dir, names, &[])
    }

    /// The same from another Debian suite, such as `trixie`: with package lists of its own below `dir`, checked against
    /// Debian's keys, so that nothing of it can come into the machine's own installation.
    pub(crate) fn fetch_from(suite: &str, dir: &Path, names: &[&str]) -> Result<Self> {
        let apt = dir.join("apt");
        for part in ["lists/partial", "cache/archives/partial"] {
            let path = apt.join(part);
            fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        }
        let sources = apt.join("sources.list");
        let line = format!("deb [signed-by={DEBIAN_KEYS}] http://deb.debian.org/debian {suite} main\n");
        fs::write(&sources, line).with_context(|| format!("writing {}", sources.display()))?;
        let options = [
            "-o".to_owned(),
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "-o".to_owned(),
            "Dir::Etc::sourceparts=-".to_owned(),
            "-o".to_owned(),
            format!("Dir::State::lists={}", apt.join("lists").display()),
            "-o".to_owned(),
            format!("Dir::Cache={}", apt.join("cache").display()),
        ];
        Self::fetch_with(dir, names, &options)
    }

    fn fetch_with(dir: &Path, names: &[&str], options: &[String]) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let missing: Vec<&str> =
            names.iter().copied().filter(|name| !dir.join(name).join(".complete").is_file()).collect();
        if !missing.is_empty() && download(dir, &missing, options).is_err() {
            // No package lists, or old ones that name files which the mirror no longer has.
            Cmd::new("apt-get").args(options).args(["update", "-qq"]).output()?;
            download(dir, &missing, options)?;
        }
        for name in missing {
            unpack(dir, name)?;
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// The unpacked tree of one package.
    pub(crate) fn tree(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

fn download(dir: &Path, names: &[&str], options: &[String]) -> Result<()> {
    // apt drops to the user _apt for downloads where it can; a folder of root's makes it warn, not fail.
    Cmd::new("apt-get").args(options).args(["download", "-qq"]).args(names).dir(dir).output().map(drop)
}

fn unpack(dir: &Path, name: &str) -> Result<()> {
    let prefix = format!("{name}_");
    let archive = fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path())).find(|path| {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        file.starts_with(&prefix) && file.ends_with(".deb")
    });
    let Some(archive) = archive else {
        bail!("apt-get download brought no {name} package into {}", dir.display())
    };
    let tree = dir.join(name);
    Cmd::new("dpkg-deb").args(["-x".as_ref(), archive.as_os_str(), tree.as_os_str()]).output()?;
    fs::write(tree.join(".complete"), "").context("marking the package complete")
}

/// This machine's architecture by its OCI (Go) name.
pub(crate) fn architecture() -> Result<String> {
    Ok(Cmd::new("dpkg").args(["--print-architecture"]).output()?.trim().to_owned())
}

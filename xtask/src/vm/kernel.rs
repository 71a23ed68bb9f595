//! Debian's kernel for clouds: fetched as a package, unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cmd::Cmd;
use crate::images::deb::Packages;

/// The package that always depends on the newest kernel.
const META: &str = "linux-image-cloud-amd64";

/// A kernel and its modules.
pub(super) struct Kernel {
    /// The compressed kernel.
    pub(super) image: PathBuf,
    /// The directory that holds `lib/modules/<version>`.
    pub(super) tree: PathBuf,
    /// Its version, as `uname -r` tells it.
    pub(super) version: String,
}

impl Kernel {
    /// The newest one that apt knows; one that was unpacked before is taken where apt knows none.
    pub(super) fn fetch(cache: &Path) -> Result<Self> {
        let dir = cache.join("kernel");
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let package = match newest() {
            Ok(package) => package,
            Err(error) => kept(&dir).ok_or(error)?,
        };
        let packages = Packages::fetch(&dir, &[&package])?;
        Self::of(&packages.tree(&package))
    }

    fn of(tree: &Path) -> Result<Self> {
        let modules = tree.join("lib/modules");
        let version = fs::read_dir(&modules)
            .with_context(|| format!("reading {}", modules.display()))?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .next()
            .context("the kernel package has no modules")?;
        let image = tree.join("boot").join(format!("vmlinuz-{version}"));
        anyhow::ensure!(image.is_file(), "{} is missing", image.display());
        Ok(Self { image, tree: tree.to_owned(), version })
    }
}

fn newest() -> Result<String> {
    if let Ok(package) = dependency() {
        return Ok(package);
    }
    // A new machine has no package lists.
    Cmd::new("apt-get").args(["update", "-qq"]).output()?;
    dependency()
}

fn dependency() -> Result<String> {
    let text = Cmd::new("apt-cache").args(["depends", "--no-recommends", "--no-suggests", META]).output()?;
    first_dependency(&text).with_context(|| format!("apt knows no dependency of {META}"))
}

fn first_dependency(text: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "))?;
    Some(line.trim().to_owned())
}

fn kept(dir: &Path) -> Option<String> {
    let names = fs::read_dir(dir).ok()?.flatten().filter(|entry| entry.path().join(".complete").is_file());
    names.map(|entry| entry.file_name().to_string_lossy().into_owned()).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_what_the_meta_package_depends_on() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(first_dependency(text).unwrap(), "linux-image-6.1.0-56-cloud-amd64");
        assert_eq!(first_dependency("linux-image-cloud-amd64\n"), None);
    }
}

//! A container's bundle: the directory containerd makes with `config.json`, and what the shim adds to it.
//!
//! `keelson.json` is what a later `delete` needs when the shim has died: written as soon as the container exists, removed
//! when everything of it is gone. `address` is where containerd finds the shim again after its own restart.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use cri_shim_runtime::Container;
use nix::fcntl::OFlag;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

/// Annotation that containers of one pod share: they share a shim.
const GROUP_ANNOTATION: &str = "io.kubernetes.cri.sandbox-id";

/// A bundle's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// The directory.
    pub path: PathBuf,
}

/// What is kept on disk of a container.
#[derive(Debug, Serialize, Deserialize)]
pub struct Kept {
    /// The container.
    pub container: Container,
}

fn told(what: &str, path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    let words = format!("{what} {}", path.display());
    move |error| io::Error::new(error.kind(), format!("{words}: {error}"))
}

impl Bundle {
    /// The bundle at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where the root file system is.
    pub fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    /// The specification.
    pub fn spec(&self) -> io::Result<Spec> {
        self.parse()
    }

    /// The annotations alone.
    pub fn annotations(&self) -> io::Result<BTreeMap<String, String>> {
        #[derive(Deserialize)]
        struct Annotated {
            #[serde(default)]
            annotations: Option<BTreeMap<String, String>>,
        }
        Ok(self.parse::<Annotated>()?.annotations.unwrap_or_default())
    }

    /// The first process of the specification, from the file: it is too large to be kept for every exec.
    pub fn process(&self) -> io::Result<oci_spec::runtime::Process> {
        #[derive(Deserialize)]
        struct WithProcess {
            process: oci_spec::runtime::Process,
        }
        Ok(self.parse::<WithProcess>()?.process)
    }

    fn parse<T: for<'a> Deserialize<'a>>(&self) -> io::Result<T> {
        let path = self.path.join("config.json");
        let text = std::fs::read(&path).map_err(told("read", &path))?;
        serde_json::from_slice(&text).map_err(|error| told("parse", &path)(error.into()))
    }

    /// Writes down that the container exists.
    pub fn keep(&self, container: &Container) -> io::Result<()> {
        let kept = Kept { container: container.clone() };
        self.write("keelson.json", &serde_json::to_vec(&kept)?)?;
        // Tools that look at runc's bundles look for this one.
        self.write("init.pid", container.pid.to_string().as_bytes())
    }

    /// What is kept, when there is something.
    pub fn kept(&self) -> Option<Kept> {
        let text = std::fs::read(self.path.join("keelson.json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Forgets what was kept.
    pub fn forget(&self) {
        // One that stays is only looked at again in vain.
        std::fs::remove_file(self.path.join("keelson.json")).ok();
    }

    /// Writes the shim's address, which containerd reads when it comes back.
    pub fn write_address(&self, address: &str) -> io::Result<()> {
        self.write("address", address.as_bytes())
    }

    /// The address that was written.
    pub fn address(&self) -> Option<String> {
        std::fs::read_to_string(self.path.join("address")).ok()
    }

    /// Tells containerd's log something, through the pipe it reads in the bundle; when it does not, nobody hears.
    pub fn say(&self, words: &str) {
        let flags = OFlag::O_NONBLOCK.bits();
        let Ok(mut log) = OpenOptions::new().write(true).custom_flags(flags).open(self.path.join("log"))
        else {
            return;
        };
        let id = self.path.file_name().unwrap_or_default().to_string_lossy();
        let line = format!(
            "time=\"{}\" level=warning msg={words:?} id={id} runtime=keelson\n",
            jiff::Timestamp::now()
        );
        // A full pipe is nobody's loss but the line's.
        log.write_all(line.as_bytes()).ok();
    }

    /// Replaces a file at once.
    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (new, path) = (self.path.join(format!(".{name}")), self.path.join(name));
        std::fs::write(&new, bytes).map_err(told("write", &new))?;
        std::fs::rename(&new, &path).map_err(told("write", &path))
    }
}

/// The name that containers of one shim share.
pub fn group<'a>(annotations: &'a BTreeMap<String, String>, id: &'a str) -> &'a str {
    annotations.get(GROUP_ANNOTATION).map_or(id, String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_shares_and_a_single_container_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::at(dir.path());
        let config = r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.sandbox-id":"pod"},"x":[1]}"#;
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        assert_eq!(group(&bundle.annotations().unwrap(), "c"), "pod");
        std::fs::write(dir.path().join("config.json"), r#"{"annotations":null}"#).unwrap();
        assert_eq!(group(&bundle.annotations().unwrap(), "c"), "c");
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(bundle.annotations().unwrap_err().to_string().contains("config.json"));
    }
}

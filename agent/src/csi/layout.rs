//! Where volumes are on the node's disk, and what is written down about them: as upstream's kubelet has both, so that either
//! goes on where the other ended.
//!
//! | path below `<rootDir>` | what |
//! |---|---|
//! | `pods/<uid>/volumes/kubernetes.io~csi/<name>/mount` | a pod's view of a volume |
//! | `…/<name>/vol_data.json` | whose volume that is: written before a driver is asked, removed last |
//! | `plugins/kubernetes.io/csi/<driver>/<hash>/globalmount` | a staged volume, with `vol_data.json` beside it |
//! | `pods/<uid>/volumeDevices/kubernetes.io~csi/<name>` | link to a pod's device |
//! | `plugins/kubernetes.io/csi/volumeDevices/{publish/<name>/<uid>,staging/<name>,<name>/data/vol_data.json}` | devices |
//!
//! Blocks, as file systems do.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::files::gone;

/// The file that says whose volume a directory is.
const DATA: &str = "vol_data.json";
const PLUGIN: &str = "kubernetes.io~csi";

/// What is written down about a volume. Fields that this version does not know are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VolumeData {
    /// Name of the attachment.
    #[serde(rename = "attachmentID", default, skip_serializing_if = "String::is_empty")]
    pub(super) attachment_id: String,
    /// The driver.
    #[serde(default)]
    pub(super) driver_name: String,
    /// The node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) node_name: String,
    /// Name of the PersistentVolume, or of the pod's volume.
    #[serde(rename = "specVolID", default, skip_serializing_if = "String::is_empty")]
    pub(super) spec_name: String,
    /// How the driver calls the volume.
    #[serde(default)]
    pub(super) volume_handle: String,
    /// `Persistent` or `Ephemeral`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) volume_lifecycle_mode: String,
    #[serde(flatten)]
    pub(super) others: BTreeMap<String, serde_json::Value>,
}

impl VolumeData {
    /// Whether the volume outlives its pods.
    pub(super) fn is_persistent(&self) -> bool {
        self.volume_lifecycle_mode != super::spec::EPHEMERAL
    }
}

/// The paths of one kubelet root directory.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    root_dir: PathBuf,
}

/// A volume that a pod has on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PodVolume {
    /// Name of the PersistentVolume, or of the pod's volume.
    pub(super) spec_name: String,
    /// A device.
    pub(super) block: bool,
    /// `None` where the file is missing or cannot be read.
    pub(super) data: Option<VolumeData>,
}

impl Layout {
    pub(super) fn new(root_dir: &Path) -> Self {
        Self { root_dir: root_dir.to_owned() }
    }

    fn plugin_dir(&self) -> PathBuf {
        self.root_dir.join("plugins/kubernetes.io/csi")
    }

    fn pod_volumes(&self, uid: &str) -> PathBuf {
        self.root_dir.join("pods").join(uid).join("volumes").join(PLUGIN)
    }

    fn pod_devices(&self, uid: &str) -> PathBuf {
        self.root_dir.join("pods").join(uid).join("volumeDevices").join(PLUGIN)
    }

    /// Where a pod sees a file system.
    pub(super) fn target(&self, uid: &str, spec_name: &str) -> PathBuf {
        self.pod_volumes(uid).join(spec_name).join("mount")
    }

    /// Where a file system is staged.
    pub(super) fn staging(&self, driver: &str, handle: &str) -> PathBuf {
        self.plugin_dir().join(driver).join(hash(&[handle])).join("globalmount")
    }

    /// Where a pod's device is published.
    pub(super) fn device(&self, uid: &str, spec_name: &str) -> PathBuf {
        self.plugin_dir().join("volumeDevices/publish").join(spec_name).join(uid)
    }

    /// Where a device is staged.
    pub(super) fn device_staging(&self, spec_name: &str) -> PathBuf {
        self.plugin_dir().join("volumeDevices/staging").join(spec_name)
    }

    fn device_data(&self, spec_name: &str) -> PathBuf {
        self.plugin_dir().join("volumeDevices").join(spec_name).join("data").join(DATA)
    }

    /// The link in a pod's directory that leads to its device.
    pub(super) fn device_link(&self, uid: &str, spec_name: &str) -> PathBuf {
        self.pod_devices(uid).join(spec_name)
    }

    /// Writes down whose volume the pod's is, and makes the directories around it.
    pub(super) fn write_pod(&self, uid: &str, block: bool, data: &VolumeData) -> io::Result<()> {
        if block {
            make_dir(&self.pod_devices(uid))?;
            write(&self.device_data(&data.spec_name), data)?;
            let (device, link) = (self.device(uid, &data.spec_name), self.device_link(uid, &data.spec_name));
            if let Some(parent) = device.parent() {
                make_dir(parent)?;
            }
            // The link is the pod's mark: also one that leads nowhere yet.
            return match std::os::unix::fs::symlink(device, link) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => Ok(()),
            };
        }
        write(&self.pod_volumes(uid).join(&data.spec_name).join(DATA), data)
    }

    /// Writes down whose staged volume `staging` is, and makes it.
    pub(super) fn write_staged(staging: &Path, data: &VolumeData) -> io::Result<()> {
        make_dir(staging)?;
        match staging.parent() {
            Some(parent) => write(&parent.join(DATA), data),
            None => Ok(()),
        }
    }

    /// Every volume of a pod.
    pub(super) fn of_pod(&self, uid: &str) -> io::Result<Vec<PodVolume>> {
        let mut volumes = Vec::new();
        for spec_name in names(&self.pod_volumes(uid))? {
            let data = read(&self.pod_volumes(uid).join(&spec_name).join(DATA));
            volumes.push(PodVolume { spec_name, block: false, data });
        }
        for spec_name in names(&self.pod_devices(uid))? {
            let data = read(&self.device_data(&spec_name));
            volumes.push(PodVolume { spec_name, block: true, data });
        }
        Ok(volumes)
    }

    /// Every volume of every pod.
    pub(super) fn of_all_pods(&self) -> io::Result<Vec<(String, PodVolume)>> {
        let mut volumes = Vec::new();
        for uid in names(&self.root_dir.join("pods"))? {
            let found = self.of_pod(&uid)?;
            volumes.extend(found.into_iter().map(|volume| (uid.clone(), volume)));
        }
        Ok(volumes)
    }

    /// Whether another pod than `uid` has the volume.
    pub(super) fn is_shared(&self, uid: &str, driver: &str, handle: &str) -> io::Result<bool> {
        Ok(self.of_all_pods()?.iter().any(|(other, volume)| {
            other != uid
                && volume.data.as_ref().is_some_and(|data| {
                    data.is_persistent() && data.driver_name == driver && data.volume_handle == handle
                })
        }))
    }

    /// What of a driver is staged: the directory, and whose it is.
    pub(super) fn staged(&self, driver: &str) -> io::Result<Vec<(PathBuf, VolumeData)>> {
        let mut staged = Vec::new();
        for name in names(&self.plugin_dir().join(driver))? {
            let directory = self.plugin_dir().join(driver).join(name);
            if let Some(data) = read(&directory.join(DATA)).filter(|data| data.driver_name == driver) {
                staged.push((directory.join("globalmount"), data));
            }
        }
        Ok(staged)
    }

    /// Removes what is left of a pod's volume, which is not mounted any more; its data last.
    pub(super) fn forget_pod(&self, uid: &str, volume: &PodVolume) -> io::Result<()> {
        if volume.block {
            return gone(std::fs::remove_file(self.device_link(uid, &volume.spec_name)));
        }
        let directory = self.pod_volumes(uid).join(&volume.spec_name);
        gone(std::fs::remove_dir(directory.join("mount")))?;
        gone(std::fs::remove_file(directory.join(DATA)))?;
        gone(std::fs::remove_dir(directory))
    }

    /// Removes what is left of a staged file system, which is not mounted any more; its data last.
    pub(super) fn forget_staged(staging: &Path) -> io::Result<()> {
        gone(std::fs::remove_dir(staging))?;
        let Some(directory) = staging.parent() else { return Ok(()) };
        gone(std::fs::remove_file(directory.join(DATA)))?;
        gone(std::fs::remove_dir(directory))
    }

    /// Removes what is left of a staged device; its data last.
    pub(super) fn forget_device(&self, spec_name: &str) -> io::Result<()> {
        gone(std::fs::remove_dir_all(self.device_staging(spec_name)))?;
        gone(std::fs::remove_dir(self.plugin_dir().join("volumeDevices/publish").join(spec_name)))?;
        gone(std::fs::remove_dir_all(self.plugin_dir().join("volumeDevices").join(spec_name)))
    }
}

/// Name of the attachment of a volume to a node.
pub(super) fn attachment_name(handle: &str, driver: &str, node: &str) -> String {
    format!("csi-{}", hash(&[handle, driver, node]))
}

/// What a driver calls a volume that only exists with its pod.
pub(super) fn ephemeral_handle(uid: &str, volume: &str) -> String {
    format!("csi-{}", hash(&[uid, volume]))
}

fn hash(parts: &[&str]) -> String {
    use std::fmt::Write as _;
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part.as_bytes());
    }
    let mut text = String::new();
    for byte in digest.finalize() {
        // Writing to a string cannot fail.
        write!(text, "{byte:02x}").ok();
    }
    text
}

fn make_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn read(path: &Path) -> Option<VolumeData> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Writes in one step, unless this is what is there.
fn write(path: &Path, data: &VolumeData) -> io::Result<()> {
    if read(path).as_ref() == Some(data) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    let text = serde_json::to_string(data)?;
    crate::files::write_private(path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(spec_name: &str, handle: &str, mode: &str) -> VolumeData {
        VolumeData {
            attachment_id: attachment_name(handle, "d.example", "n"),
            driver_name: "d.example".to_owned(),
            node_name: "n".to_owned(),
            spec_name: spec_name.to_owned(),
            volume_handle: handle.to_owned(),
            volume_lifecycle_mode: mode.to_owned(),
            ..VolumeData::default()
        }
    }

    #[test]
    fn names_are_upstreams() {
        // printf abc | sha256sum
        assert_eq!(
            attachment_name("a", "b", "c"),
            "csi-ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let layout = Layout::new(Path::new("/k"));
        assert_eq!(layout.target("u", "pv1"), Path::new("/k/pods/u/volumes/kubernetes.io~csi/pv1/mount"));
        assert_eq!(
            layout.staging("d.example", "abc"),
            Path::new(
                "/k/plugins/kubernetes.io/csi/d.example/ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad/globalmount"
            )
        );
    }

    #[test]
    fn what_is_written_is_found_again_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        layout.write_pod("u1", false, &data("pv", "h", "Persistent")).unwrap();
        layout.write_pod("u2", false, &data("pv", "h", "Persistent")).unwrap();
        layout.write_pod("u2", true, &data("dev", "b", "Persistent")).unwrap();
        let text =
            std::fs::read_to_string(dir.path().join("pods/u1/volumes/kubernetes.io~csi/pv/vol_data.json"))
                .unwrap();
        assert!(
            text.starts_with("{\"attachmentID\":\"csi-") && text.contains("\"specVolID\":\"pv\""),
            "{text}"
        );
        assert!(layout.is_shared("u1", "d.example", "h").unwrap());
        assert!(!layout.is_shared("u2", "d.example", "b").unwrap());
        let found = layout.of_pod("u2").unwrap();
        assert_eq!(
            found.iter().map(|volume| (volume.spec_name.as_str(), volume.block)).collect::<Vec<_>>(),
            [("pv", false), ("dev", true)]
        );
        let staging = layout.staging("d.example", "h");
        Layout::write_staged(&staging, &data("", "h", "")).unwrap();
        assert_eq!(layout.staged("d.example").unwrap()[0].0, staging);
        for volume in &found {
            layout.forget_pod("u2", volume).unwrap();
        }
        assert_eq!(layout.of_pod("u2").unwrap(), []);
        assert!(!layout.is_shared("u1", "d.example", "h").unwrap());
        Layout::forget_staged(&staging).unwrap();
        layout.forget_device("dev").unwrap();
        assert!(layout.staged("d.example").unwrap().is_empty());
    }

    #[test]
    fn fields_of_others_are_kept() {
        let text = r#"{"driverName":"d","volumeHandle":"h","seLinuxMountContext":"x"}"#;
        let data: VolumeData = serde_json::from_str(text).unwrap();
        assert!(data.is_persistent());
        assert_eq!(serde_json::to_string(&data).unwrap(), text);
    }
}

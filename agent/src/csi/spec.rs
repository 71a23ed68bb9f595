//! What a pod's volume asks of a driver: from the PersistentVolume or the pod's own volume, and the driver's CSIDriver. Pure.

use std::collections::BTreeMap;

use agent_core::resources::whole;
use k8s_openapi::api::core::v1::{CSIVolumeSource, PersistentVolume, Pod, SecretReference};
use k8s_openapi::api::storage::v1::{CSIDriver, CSIDriverSpec};

use super::drivers::Capabilities;
use super::layout::ephemeral_handle;
use super::wire::{AccessMode, Empty, Mode, MountVolume, VolumeCapability};

/// `volumeLifecycleModes`: a volume that outlives its pods.
pub(super) const PERSISTENT: &str = "Persistent";
/// One that does not.
pub(super) const EPHEMERAL: &str = "Ephemeral";

/// A secret, by namespace and name.
pub(super) type SecretName = (String, String);

/// One volume of a driver, as a pod uses it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CsiVolume {
    /// Name of the PersistentVolume, or of the pod's volume.
    pub(super) spec_name: String,
    pub(super) driver: String,
    pub(super) handle: String,
    pub(super) persistent: bool,
    pub(super) block: bool,
    pub(super) read_only: bool,
    pub(super) fs_type: String,
    pub(super) mount_options: Vec<String>,
    /// As the PersistentVolume lists them.
    pub(super) access_modes: Vec<String>,
    pub(super) attributes: BTreeMap<String, String>,
    pub(super) stage_secret: Option<SecretName>,
    pub(super) publish_secret: Option<SecretName>,
    pub(super) expand_secret: Option<SecretName>,
    /// Size of the PersistentVolume in bytes.
    pub(super) capacity: Option<i64>,
}

impl CsiVolume {
    /// Of a PersistentVolume; `None` where it is not a driver's. `read_only` is the pod's wish.
    pub fn of_persistent(volume: &PersistentVolume, read_only: bool) -> Option<Self> {
        let spec = volume.spec.as_ref()?;
        let source = spec.csi.as_ref()?;
        Some(Self {
            spec_name: volume.metadata.name.clone().unwrap_or_default(),
            driver: source.driver.clone(),
            handle: source.volume_handle.clone(),
            persistent: true,
            block: spec.volume_mode.as_deref() == Some("Block"),
            read_only,
            fs_type: source.fs_type.clone().unwrap_or_default(),
            mount_options: spec.mount_options.clone().unwrap_or_default(),
            access_modes: spec.access_modes.clone().unwrap_or_default(),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            stage_secret: source.node_stage_secret_ref.as_ref().map(secret),
            publish_secret: source.node_publish_secret_ref.as_ref().map(secret),
            expand_secret: source.node_expand_secret_ref.as_ref().map(secret),
            capacity: spec.capacity.as_ref().and_then(|capacity| whole(capacity.get("storage")?)),
        })
    }

    /// Of a `csi` volume in the pod itself.
    pub fn inline(pod: &Pod, name: &str, source: &CSIVolumeSource) -> Self {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let secret = source.node_publish_secret_ref.as_ref();
        Self {
            spec_name: name.to_owned(),
            driver: source.driver.clone(),
            handle: ephemeral_handle(pod.metadata.uid.as_deref().unwrap_or_default(), name),
            read_only: source.read_only.unwrap_or(false),
            fs_type: source.fs_type.clone().unwrap_or_default(),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            publish_secret: secret.map(|secret| (namespace, secret.name.clone())),
            ..Self::default()
        }
    }

    /// Whether the pod may not write to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// `Persistent` or `Ephemeral`.
    pub(super) fn lifecycle(&self) -> &'static str {
        if self.persistent { PERSISTENT } else { EPHEMERAL }
    }

    /// Name of the volume in the node's status.
    pub(super) fn unique_name(&self) -> String {
        unique_name(&self.driver, &self.handle)
    }

    /// Whether it can be written by one node only.
    fn is_read_write_once(&self) -> bool {
        self.access_modes.iter().any(|mode| mode == "ReadWriteOnce" || mode == "ReadWriteOncePod")
    }

    /// What the driver is told of the use.
    pub(super) fn capability(&self, capabilities: Capabilities, group: Option<u32>) -> VolumeCapability {
        let first = self.access_modes.first().map_or("ReadWriteOnce", String::as_str);
        let mode = match (first, capabilities.single_node_multi_writer) {
            ("ReadOnlyMany", _) => Mode::MultiNodeReaderOnly,
            ("ReadWriteMany", _) => Mode::MultiNodeMultiWriter,
            ("ReadWriteOncePod", true) => Mode::SingleNodeSingleWriter,
            ("ReadWriteOnce", true) => Mode::SingleNodeMultiWriter,
            ("ReadWriteOnce" | "ReadWriteOncePod", false) => Mode::SingleNodeWriter,
            _ => Mode::Unknown,
        };
        let group = group.filter(|_| capabilities.volume_mount_group);
        let mount = MountVolume {
            fs_type: self.fs_type.clone(),
            mount_flags: self.mount_options.clone(),
            volume_mount_group: group.map(|group| group.to_string()).unwrap_or_default(),
        };
        VolumeCapability {
            block: self.block.then_some(Empty {}),
            mount: (!self.block).then_some(mount),
            access_mode: Some(AccessMode { mode: mode as i32 }),
        }
    }
}

/// Name of a volume in the node's status.
pub(super) fn unique_name(driver: &str, handle: &str) -> String {
    format!("kubernetes.io/csi/{driver}^{handle}")
}

fn secret(reference: &SecretReference) -> SecretName {
    (reference.namespace.clone().unwrap_or_default(), reference.name.clone().unwrap_or_default())
}

/// What a CSIDriver says of its driver, or what counts where there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a field of its own in the object")]
pub(super) struct DriverRules {
    pub(super) attach_required: bool,
    pub(super) pod_info: bool,
    pub(super) republish: bool,
    /// Audience and lifetime of each token.
    pub(super) tokens: Vec<(String, Option<i64>)>,
    pub(super) tokens_in_secrets: bool,
    /// `None`: there is no CSIDriver.
    modes: Option<Vec<String>>,
    fs_group: FsGroup,
}

/// `fsGroupPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FsGroup {
    Always,
    Never,
    ReadWriteOnceWithType,
}

impl DriverRules {
    /// Of a driver.
    pub(super) fn of(driver: Option<&CSIDriver>) -> Self {
        let default = CSIDriverSpec::default();
        let spec = driver.map_or(&default, |driver| &driver.spec);
        let tokens = spec.token_requests.iter().flatten();
        let modes = spec.volume_lifecycle_modes.clone().filter(|modes| !modes.is_empty());
        Self {
            // Who has no CSIDriver may need it: upstream waits.
            attach_required: spec.attach_required.unwrap_or(true),
            pod_info: spec.pod_info_on_mount.unwrap_or(false),
            republish: spec.requires_republish.unwrap_or(false),
            tokens: tokens.map(|token| (token.audience.clone(), token.expiration_seconds)).collect(),
            tokens_in_secrets: spec.service_account_token_in_secrets.unwrap_or(false),
            modes: driver.map(|_| modes.unwrap_or_else(|| vec![PERSISTENT.to_owned()])),
            fs_group: match spec.fs_group_policy.as_deref() {
                Some("File") => FsGroup::Always,
                Some("None") => FsGroup::Never,
                _ => FsGroup::ReadWriteOnceWithType,
            },
        }
    }

    /// Whether the driver has volumes of this kind.
    pub(super) fn check_mode(&self, volume: &CsiVolume) -> Result<(), String> {
        let (mode, driver) = (volume.lifecycle(), &volume.driver);
        match &self.modes {
            None if volume.persistent => Ok(()),
            None => {
                Err(format!("volume mode \"{mode}\" not supported by driver {driver} (no CSIDriver object)"))
            }
            Some(modes) if modes.iter().any(|known| known == mode) => Ok(()),
            Some(modes) => Err(format!(
                "volume mode \"{mode}\" not supported by driver {driver} (only supports [{}])",
                modes.iter().map(|mode| format!("\"{mode}\"")).collect::<Vec<_>>().join(" ")
            )),
        }
    }

    /// Whether the agent gives the volume's files to the pod's group.
    pub(super) fn changes_owner(&self, volume: &CsiVolume) -> bool {
        if volume.read_only || volume.block {
            return false;
        }
        match self.fs_group {
            FsGroup::Always => true,
            FsGroup::Never => false,
            FsGroup::ReadWriteOnceWithType => {
                !volume.fs_type.is_empty() && (!volume.persistent || volume.is_read_write_once())
            }
        }
    }
}

/// What a driver with `podInfoOnMount` is told.
pub(super) fn pod_info(pod: &Pod, volume: &CsiVolume) -> BTreeMap<String, String> {
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
    let of = |text: &Option<String>| text.clone().unwrap_or_default();
    [
        ("pod.name", of(&pod.metadata.name)),
        ("pod.namespace", of(&pod.metadata.namespace)),
        ("pod.uid", of(&pod.metadata.uid)),
        ("serviceAccount.name", account.unwrap_or_default()),
        ("ephemeral", (!volume.persistent).to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn volume(spec: Value) -> CsiVolume {
        let mut spec = spec;
        spec["csi"] = json!({"driver": "d", "volumeHandle": "h", "fsType": "ext4",
            "nodeStageSecretRef": {"name": "s", "namespace": "ns"}});
        let volume = serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).unwrap();
        CsiVolume::of_persistent(&volume, false).unwrap()
    }

    fn rules(spec: &Value) -> DriverRules {
        DriverRules::of(Some(
            &serde_json::from_value(json!({"metadata": {"name": "d"}, "spec": spec})).unwrap(),
        ))
    }

    #[test]
    fn modes_depend_on_what_the_driver_knows() {
        let plain = Capabilities::default();
        let rich = Capabilities { single_node_multi_writer: true, volume_mount_group: true, ..plain };
        let mode = |volume: &CsiVolume, capabilities| {
            volume.capability(capabilities, Some(7)).access_mode.unwrap().mode()
        };
        for (name, with_plain, with_rich) in [
            ("ReadWriteOnce", Mode::SingleNodeWriter, Mode::SingleNodeMultiWriter),
            ("ReadWriteOncePod", Mode::SingleNodeWriter, Mode::SingleNodeSingleWriter),
            ("ReadOnlyMany", Mode::MultiNodeReaderOnly, Mode::MultiNodeReaderOnly),
            ("ReadWriteMany", Mode::MultiNodeMultiWriter, Mode::MultiNodeMultiWriter),
        ] {
            let volume = volume(json!({"accessModes": [name]}));
            assert_eq!((mode(&volume, plain), mode(&volume, rich)), (with_plain, with_rich), "{name}");
        }
        let volume = volume(json!({"capacity": {"storage": "1Gi"}, "mountOptions": ["noatime"]}));
        assert_eq!((volume.capacity, mode(&volume, plain)), (Some(1 << 30), Mode::SingleNodeWriter));
        let group = |capabilities| volume.capability(capabilities, Some(7)).mount.unwrap().volume_mount_group;
        assert_eq!((group(plain), group(rich)), (String::new(), "7".to_owned()));
        assert_eq!(volume.stage_secret, Some(("ns".to_owned(), "s".to_owned())));
    }

    #[test]
    fn inline_volumes_need_a_driver_that_says_so() {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"}}))
                .unwrap();
        let source =
            serde_json::from_value(json!({"driver": "d", "nodePublishSecretRef": {"name": "s"}})).unwrap();
        let inline = CsiVolume::inline(&pod, "v", &source);
        assert_eq!(inline.publish_secret, Some(("ns".to_owned(), "s".to_owned())));
        let refused = DriverRules::of(None).check_mode(&inline).unwrap_err();
        assert_eq!(refused, "volume mode \"Ephemeral\" not supported by driver d (no CSIDriver object)");
        let refused = rules(&json!({})).check_mode(&inline).unwrap_err();
        assert_eq!(
            refused,
            "volume mode \"Ephemeral\" not supported by driver d (only supports [\"Persistent\"])"
        );
        assert!(rules(&json!({"volumeLifecycleModes": ["Ephemeral"]})).check_mode(&inline).is_ok());
        assert!(DriverRules::of(None).check_mode(&volume(json!({}))).is_ok());
        assert_eq!(pod_info(&pod, &inline)["csi.storage.k8s.io/ephemeral"], "true");
    }

    #[test]
    fn files_change_owner_as_the_policy_says() {
        let once = volume(json!({"accessModes": ["ReadWriteOnce"]}));
        let many = volume(json!({"accessModes": ["ReadWriteMany"]}));
        let untyped = CsiVolume { fs_type: String::new(), ..once.clone() };
        for (policy, of_once, of_many, of_untyped) in [
            ("File", true, true, true),
            ("None", false, false, false),
            ("ReadWriteOnceWithFSType", true, false, false),
        ] {
            let rules = rules(&json!({"fsGroupPolicy": policy}));
            let all = [&once, &many, &untyped].map(|volume| rules.changes_owner(volume));
            assert_eq!(all, [of_once, of_many, of_untyped], "{policy}");
            assert!(!rules.changes_owner(&CsiVolume { read_only: true, ..once.clone() }));
        }
    }
}

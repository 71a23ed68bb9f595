//! Brings a volume to a pod: stages it on the node, publishes it for the pod, gives its files to the pod's group.
//!
//! What is on disk before each call says what there is to undo: the pod's `vol_data.json` before the first, that of the staged
//! volume before it is staged. Where a driver has ended with an error, nothing is left to undo and the files go again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::storage::v1::CSIDriver;
use kube::Api;
use serde_json::{Map, Value, json};

use super::drivers::{Capabilities, Driver};
use super::layout::{Layout, PodVolume, VolumeData, attachment_name};
use super::spec::{DriverRules, SecretName, pod_info};
use super::wire::{self, CallError, Empty, PublishRequest, StageRequest};
use super::{Csi, MountOrder, Mounted, Published, ask};
use crate::contracts::{Dependency, VolumeError, VolumeEvent, VolumeStep};
use crate::host::mount_table;
use crate::host::volumes::ownership::Ownership;
use crate::host::volumes::tokens::TokenKey;

/// How often a driver that wants that publishes again.
const REPUBLISH: SignedDuration = SignedDuration::from_secs(60);
/// Lifetime of a token when the CSIDriver names none.
const TOKEN_SECONDS: i64 = 3600;

/// What every call about the order needs.
struct Prepared {
    driver: Driver,
    capabilities: Capabilities,
    rules: DriverRules,
    /// What attaching the volume gave.
    attached: BTreeMap<String, String>,
}

impl Csi {
    /// Where the pod sees the volume.
    pub fn path(&self, uid: &str, spec_name: &str, block: bool) -> PathBuf {
        if block { self.0.layout.device(uid, spec_name) } else { self.0.layout.target(uid, spec_name) }
    }

    /// Whether the pod sees it: this agent published it, or it is mounted since an earlier one did.
    pub async fn is_published(&self, uid: &str, spec_name: &str, block: bool) -> bool {
        let path = self.path(uid, spec_name, block);
        if self.state().published.contains_key(&path) {
            return true;
        }
        let is_mounted = move |_: &Layout| mount_table::is_mount_point(&path);
        self.blocking(is_mounted).await.unwrap_or(false)
    }

    /// Brings the volume to the pod, or keeps it as it should be where it is there.
    pub async fn mount(&self, order: &MountOrder<'_>) -> Result<Mounted, VolumeError> {
        let volume = &order.volume;
        let names = [volume.spec_name.as_str(), volume.driver.as_str(), order.uid()];
        if !names.iter().all(|name| crate::host::volumes::is_file_name(name)) || volume.handle.is_empty() {
            return Err(order.error(VolumeStep::SetUp, format!("{names:?} cannot name a volume")));
        }
        self.depend(order);
        let path = self.path(order.uid(), &volume.spec_name, volume.block);
        let known = self.state().published.get(&path).cloned();
        if let Some(known) = known {
            return Ok(self.keep(order, path, &known).await);
        }
        let prepared = match self.prepare(order).await {
            // An earlier agent published it: neither the driver nor the API server need be there.
            Err(error) if self.is_published(order.uid(), &volume.spec_name, volume.block).await => {
                tracing::debug!(%error, "a volume of an earlier agent is looked after later");
                return Ok(Mounted {
                    path,
                    refresh_at: Some(Timestamp::now() + REPUBLISH),
                    ..Mounted::default()
                });
            }
            prepared => prepared?,
        };
        let refresh_at = self.bring(order, &prepared).await?;
        let mut mounted = Mounted { path, refresh_at, events: Vec::new() };
        self.expand(order, &mut mounted).await;
        Ok(mounted)
    }

    /// Everything from the first file on disk to the last file's owner. What an earlier agent published is published once more:
    /// it may have been killed before the driver had ended.
    async fn bring(
        &self,
        order: &MountOrder<'_>,
        prepared: &Prepared,
    ) -> Result<Option<Timestamp>, VolumeError> {
        let volume = &order.volume;
        let _alone = self.lock(&volume.driver, &volume.handle).await;
        let data = VolumeData {
            attachment_id: attachment_name(&volume.handle, &volume.driver, &self.0.settings.node_name),
            driver_name: volume.driver.clone(),
            node_name: self.0.settings.node_name.clone(),
            spec_name: volume.spec_name.clone(),
            volume_handle: volume.handle.clone(),
            volume_lifecycle_mode: volume.lifecycle().to_owned(),
            ..VolumeData::default()
        };
        let (uid, block) = (order.uid().to_owned(), volume.block);
        let written = self.blocking(move |layout| layout.write_pod(&uid, block, &data)).await;
        written.map_err(|problem| {
            order.error(order.publish_step(), format!("failed to save volume info data: {problem}"))
        })?;
        let staging = if volume.persistent && prepared.capabilities.stage {
            Some(self.stage(order, prepared).await?)
        } else {
            None
        };
        self.publish(order, prepared, staging.as_deref()).await?;
        self.change_owner(order, prepared).await?;
        Ok(self.note_published(order, staging, &prepared.rules))
    }

    /// The pod is woken when one of these changes.
    fn depend(&self, order: &MountOrder<'_>) {
        let driver = order.volume.driver.clone();
        let on = [Dependency::Plugin(driver.clone()), Dependency::Driver(driver)];
        self.0.objects.depend(order.uid(), &on);
    }

    /// The pod sees the volume now; when to publish it again.
    fn note_published(
        &self,
        order: &MountOrder<'_>,
        staging: Option<PathBuf>,
        rules: &DriverRules,
    ) -> Option<Timestamp> {
        let claim = order.claim.map(|claim| {
            let of = |text: &Option<String>| text.clone().unwrap_or_default();
            (of(&claim.metadata.namespace), of(&claim.metadata.name))
        });
        let again_at = rules.republish.then(|| Timestamp::now() + REPUBLISH);
        let published = Published {
            uid: order.uid().to_owned(),
            name: order.name.to_owned(),
            claim,
            driver: order.volume.driver.clone(),
            handle: order.volume.handle.clone(),
            staging,
            again_at,
        };
        let path = self.path(order.uid(), &order.volume.spec_name, order.volume.block);
        self.state().published.insert(path, published);
        again_at
    }

    /// A pod that sees the volume: publishes again where the driver wants that, and lets it grow. What fails is told, tried
    /// again, and not in the pod's way.
    async fn keep(&self, order: &MountOrder<'_>, path: PathBuf, known: &Published) -> Mounted {
        let mut mounted = Mounted { path, refresh_at: known.again_at, events: Vec::new() };
        if known.again_at.is_some_and(|at| at <= Timestamp::now()) {
            mounted.refresh_at = Some(Timestamp::now() + REPUBLISH);
            match self.publish_again(order).await {
                Err(error) if !error.waits => {
                    mounted.events.push(VolumeEvent::warning(error.step.reason(), error.to_string()));
                }
                _ => {}
            }
        }
        self.expand(order, &mut mounted).await;
        mounted
    }

    async fn publish_again(&self, order: &MountOrder<'_>) -> Result<(), VolumeError> {
        let volume = &order.volume;
        let prepared = self.prepare(order).await?;
        let stages = volume.persistent && prepared.capabilities.stage;
        let staging = stages.then(|| self.staging(order));
        let _alone = self.lock(&volume.driver, &volume.handle).await;
        self.publish(order, &prepared, staging.as_deref()).await?;
        self.note_published(order, staging, &prepared.rules);
        Ok(())
    }

    /// Everything that must be known, and be so, before the driver is asked.
    async fn prepare(&self, order: &MountOrder<'_>) -> Result<Prepared, VolumeError> {
        let volume = &order.volume;
        let objects: Api<CSIDriver> = Api::all(self.0.client.clone());
        let object = ask(objects.get_opt(&volume.driver)).await.map_err(|problem| {
            order.error(order.stage_step(), format!("failed to get CSIDriver {}: {problem}", volume.driver))
        })?;
        let rules = DriverRules::of(object.as_ref());
        rules.check_mode(volume).map_err(|problem| {
            let text = format!(
                "kubernetes.io/csi: mounter.SetupAt failed to check volume lifecycle mode: {problem}"
            );
            order.error(order.publish_step(), text)
        })?;
        let needs_attachment = volume.persistent && rules.attach_required;
        if needs_attachment {
            self.report_use(order).await?;
        }
        let attached = if needs_attachment { self.attached(order).await? } else { BTreeMap::new() };
        let driver = self.0.drivers.get(&volume.driver).map_err(|problem| {
            let text = match order.stage_step() {
                VolumeStep::MountDevice => "attacher.MountDevice failed to create newCsiDriverClient",
                VolumeStep::SetUpDevice => "blockMapper.SetUpDevice failed to get CSI client",
                _ => "mounter.SetUpAt failed to get CSI client",
            };
            order.error(order.stage_step(), format!("kubernetes.io/csi: {text}: {problem}"))
        })?;
        let capabilities = driver
            .capabilities(self.0.settings.call_deadline)
            .await
            .map_err(|error| order.error(order.stage_step(), error))?;
        Ok(Prepared { driver, capabilities, rules, attached })
    }

    pub(super) fn staging(&self, order: &MountOrder<'_>) -> PathBuf {
        let volume = &order.volume;
        if volume.block {
            self.0.layout.device_staging(&volume.spec_name)
        } else {
            self.0.layout.staging(&volume.driver, &volume.handle)
        }
    }

    /// Stages the volume on the node, where it is not.
    async fn stage(&self, order: &MountOrder<'_>, prepared: &Prepared) -> Result<PathBuf, VolumeError> {
        let volume = &order.volume;
        let staging = self.staging(order);
        if self.state().staged.contains(&staging) {
            return Ok(staging);
        }
        let secrets = self.secrets(volume.stage_secret.as_ref(), "NodeStageSecretRef").await;
        let secrets = secrets.map_err(|problem| order.error(order.stage_step(), problem))?;
        let data = VolumeData {
            driver_name: volume.driver.clone(),
            volume_handle: volume.handle.clone(),
            ..VolumeData::default()
        };
        let (block, directory) = (volume.block, staging.clone());
        let written = self.blocking(move |_| {
            if block { std::fs::create_dir_all(&directory) } else { Layout::write_staged(&directory, &data) }
        });
        written.await.map_err(|problem| {
            order.error(order.stage_step(), format!("failed to create dir {}: {problem}", staging.display()))
        })?;
        let request = StageRequest {
            volume_id: volume.handle.clone(),
            publish_context: prepared.attached.clone(),
            staging_target_path: text(&staging),
            volume_capability: Some(volume.capability(prepared.capabilities, order.group)),
            secrets,
            volume_context: volume.attributes.clone(),
        };
        let deadline = self.0.settings.call_deadline;
        let staged: Result<Empty, CallError> =
            wire::call(&prepared.driver.channel, wire::STAGE, request, deadline).await;
        if let Err(error) = staged {
            if error.is_final() {
                self.unstaged(order, staging).await;
            }
            return Err(order.error(order.stage_step(), error));
        }
        self.state().staged.insert(staging.clone());
        Ok(staging)
    }

    /// The driver has ended without staging: nothing is to be undone, unless another pod has the volume.
    async fn unstaged(&self, order: &MountOrder<'_>, staging: PathBuf) {
        let pod = pod_volume(order);
        let (uid, volume) = (order.uid().to_owned(), order.volume.clone());
        let seen = self.path(&uid, &volume.spec_name, volume.block);
        let cleaned = self.blocking(move |layout| {
            let shared = layout.is_shared(&uid, &volume.driver, &volume.handle)?;
            if !shared && !mount_table::is_mount_point(&staging)? {
                if volume.block {
                    layout.forget_device(&volume.spec_name)?;
                } else {
                    Layout::forget_staged(&staging)?;
                }
            }
            if mount_table::is_mount_point(&seen)? { Ok(()) } else { layout.forget_pod(&uid, &pod) }
        });
        if let Err(problem) = cleaned.await {
            tracing::debug!(%problem, "what a driver refused to stage stays until the pod goes");
        }
    }

    /// Publishes the volume for the pod.
    async fn publish(
        &self,
        order: &MountOrder<'_>,
        prepared: &Prepared,
        staging: Option<&Path>,
    ) -> Result<(), VolumeError> {
        let (volume, step) = (&order.volume, order.publish_step());
        let mut secrets = self
            .secrets(volume.publish_secret.as_ref(), "NodePublishSecretRef")
            .await
            .map_err(|problem| order.error(step, problem))?;
        let mut attributes = volume.attributes.clone();
        if prepared.rules.pod_info {
            attributes.extend(pod_info(order.pod, volume));
        }
        let tokens = self.tokens(order, &prepared.rules).await.map_err(|problem| {
            let text = "kubernetes.io/csi: mounter.SetUpAt failed to get service accoount token attributes";
            order.error(step, format!("{text}: {problem}"))
        })?;
        let place = if prepared.rules.tokens_in_secrets { &mut secrets } else { &mut attributes };
        place.extend(tokens.map(|tokens| ("csi.storage.k8s.io/serviceAccount.tokens".to_owned(), tokens)));
        let request = PublishRequest {
            volume_id: volume.handle.clone(),
            publish_context: prepared.attached.clone(),
            staging_target_path: staging.map(text).unwrap_or_default(),
            target_path: text(&self.path(order.uid(), &volume.spec_name, volume.block)),
            volume_capability: Some(volume.capability(prepared.capabilities, order.group)),
            readonly: volume.read_only,
            secrets,
            volume_context: attributes,
        };
        let deadline = self.0.settings.call_deadline;
        let published: Result<Empty, CallError> =
            wire::call(&prepared.driver.channel, wire::PUBLISH, request, deadline).await;
        let Err(error) = published else { return Ok(()) };
        let path = self.path(order.uid(), &volume.spec_name, volume.block);
        let is_seen = self.state().published.contains_key(&path);
        // What is staged is still to be undone; the data says so.
        if error.is_final() && staging.is_none() && !is_seen {
            let (uid, pod) = (order.uid().to_owned(), pod_volume(order));
            let cleaned = self.blocking(move |layout| {
                if mount_table::is_mount_point(&path)? { Ok(()) } else { layout.forget_pod(&uid, &pod) }
            });
            if let Err(problem) = cleaned.await {
                tracing::debug!(%problem, "what a driver refused to publish stays until the pod goes");
            }
        }
        Err(order.error(step, error))
    }

    /// The service account's tokens that the driver wants, as it wants them.
    async fn tokens(&self, order: &MountOrder<'_>, rules: &DriverRules) -> Result<Option<String>, String> {
        if rules.tokens.is_empty() {
            return Ok(None);
        }
        let of = |text: &Option<String>| text.clone().unwrap_or_default();
        let account = order.pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        let mut tokens = Map::new();
        for (audience, seconds) in &rules.tokens {
            let key = TokenKey {
                pod_uid: order.uid().to_owned(),
                pod_name: of(&order.pod.metadata.name),
                namespace: of(&order.pod.metadata.namespace),
                service_account: account.clone().unwrap_or_else(|| "default".to_owned()),
                audience: Some(audience.clone()).filter(|audience| !audience.is_empty()),
                expiration_seconds: seconds.unwrap_or(TOKEN_SECONDS),
            };
            let token = self.0.tokens.get(&key).await?;
            let expires = token.expires_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            tokens.insert(audience.clone(), json!({"token": token.text, "expirationTimestamp": expires}));
        }
        Ok(Some(Value::Object(tokens).to_string()))
    }

    /// A secret's content, nothing where none is named.
    pub(super) async fn secrets(
        &self,
        name: Option<&SecretName>,
        field: &str,
    ) -> Result<BTreeMap<String, String>, String> {
        let Some((namespace, name)) = name else { return Ok(BTreeMap::new()) };
        let failed = |cause: String| format!("fetching {field} {namespace}/{name} failed: {cause}");
        let found = self.0.objects.secret(namespace, name).await.map_err(|error| failed(error.message))?;
        let secret = found.ok_or_else(|| {
            failed(format!("kubernetes.io/csi: failed to find the secret {name} in the namespace {namespace} with error: secrets \"{name}\" not found"))
        })?;
        let data = secret.data.iter().flatten().map(|(key, value)| match std::str::from_utf8(&value.0) {
            Ok(value) => Ok((key.clone(), value.to_owned())),
            // The call takes texts; half a key is worse than none.
            Err(_) => Err(failed(format!("the value of {key} is not UTF-8, which drivers are given"))),
        });
        data.collect()
    }

    /// Gives the files to the pod's group, where that is the agent's business.
    async fn change_owner(&self, order: &MountOrder<'_>, prepared: &Prepared) -> Result<(), VolumeError> {
        let volume = &order.volume;
        let Some(group) = order.group else { return Ok(()) };
        if prepared.capabilities.volume_mount_group || !prepared.rules.changes_owner(volume) {
            return Ok(());
        }
        let (path, always) = (self.path(order.uid(), &volume.spec_name, false), order.group_always);
        let ownership = Ownership { group: Some(group) };
        let changed =
            self.blocking(move |_| if always { ownership.claim_all(&path) } else { ownership.claim(&path) });
        changed.await.map_err(|problem| {
            order
                .error(VolumeStep::SetUp, format!("applyFSGroup failed for vol {}: {problem}", volume.handle))
        })
    }
}

fn pod_volume(order: &MountOrder<'_>) -> PodVolume {
    PodVolume { spec_name: order.volume.spec_name.clone(), block: order.volume.block, data: None }
}

pub(super) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

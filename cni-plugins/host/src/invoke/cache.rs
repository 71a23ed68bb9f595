//! Attachments on disk, in libcni's format, so that DEL has the result and configuration of ADD even
//! when the configuration directory changed or the runtime restarted.
//!
//! One file per attachment, `<cache dir>/results/<network>-<container id>-<ifname>`, replaced
//! atomically.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use cni_plugins_types::{CniResult, NetworkConfigList, Version};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{InvokeError, RuntimeArgs};

/// The value libcni writes into `kind`.
const KIND: &str = "cniCacheV1";

/// A cached attachment.
#[derive(Debug, Clone)]
pub struct CachedAttachment {
    /// The chain's result; absent when the file had none that we understand.
    pub result: Option<CniResult>,
    info: CachedInfo,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CachedInfo {
    kind: String,
    container_id: String,
    /// Base64, as Go writes byte strings.
    config: String,
    if_name: String,
    network_name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    netns: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cni_args: Option<Vec<(String, String)>>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    capability_args: BTreeMap<String, Value>,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    result: Value,
}

impl CachedAttachment {
    /// The configuration the attachment was made with.
    pub fn list(&self, network: &str) -> Result<NetworkConfigList, InvokeError> {
        // Undecodable text parses as an empty configuration, whose error then names the network.
        let bytes = STANDARD.decode(&self.info.config).unwrap_or_default();
        NetworkConfigList::parse(&String::from_utf8_lossy(&bytes))
            .map_err(|source| InvokeError::CachedConfig { network: network.to_owned(), source })
    }

    /// `rt` completed by what ADD was called with.
    pub(super) fn runtime_args(&self, rt: &RuntimeArgs) -> RuntimeArgs {
        let mut full = rt.clone();
        if full.args.is_empty() {
            full.args = self.info.cni_args.clone().unwrap_or_default();
        }
        if full.capability_args.is_empty() {
            full.capability_args.clone_from(&self.info.capability_args);
        }
        full
    }
}

pub(super) fn read(
    cache_dir: &Path,
    network: &str,
    rt: &RuntimeArgs,
) -> Result<Option<CachedAttachment>, InvokeError> {
    let path = file(cache_dir, network, rt);
    match fs::read(&path) {
        // A file that does not parse was not written by us or libcni; DEL then works without it.
        Ok(bytes) => Ok(parse(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(InvokeError::Cache { step: "read", path, source }),
    }
}

pub(super) fn write(
    cache_dir: &Path,
    list: &NetworkConfigList,
    rt: &RuntimeArgs,
    result: &CniResult,
) -> Result<(), InvokeError> {
    let info = CachedInfo {
        kind: KIND.to_owned(),
        container_id: rt.container_id.clone(),
        config: STANDARD.encode(&list.source),
        if_name: rt.ifname.clone(),
        network_name: list.name.clone(),
        netns: rt.netns.to_string_lossy().into_owned(),
        cni_args: (!rt.args.is_empty()).then(|| rt.args.clone()),
        capability_args: rt.capability_args.clone(),
        result: result.to_value(list.cni_version),
    };
    let path = file(cache_dir, &list.name, rt);
    let write = || {
        fs::create_dir_all(cache_dir.join("results"))?;
        // A leading dot keeps half-written files out of `list`.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}"));
        fs::write(&temporary, serde_json::to_vec(&info)?)?;
        fs::rename(&temporary, &path)
    };
    write().map_err(|source| InvokeError::Cache { step: "write", path: path.clone(), source })
}

pub(super) fn remove(cache_dir: &Path, network: &str, rt: &RuntimeArgs) -> Result<(), InvokeError> {
    let path = file(cache_dir, network, rt);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(InvokeError::Cache { step: "remove", path, source })
        }
        _ => Ok(()),
    }
}

/// Every attachment cached for `network`.
pub(super) fn list(cache_dir: &Path, network: &str) -> Result<Vec<RuntimeArgs>, InvokeError> {
    let dir = cache_dir.join("results");
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => {
            entries.map_err(|source| InvokeError::Cache { step: "list", path: dir.clone(), source })?
        }
    };
    let mut attachments = Vec::new();
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let cached = fs::read(entry.path()).ok().and_then(|bytes| parse(&bytes));
        if let Some(CachedAttachment { info, .. }) =
            cached.filter(|cached| cached.info.network_name == network)
        {
            attachments.push(RuntimeArgs {
                container_id: info.container_id,
                netns: info.netns.into(),
                ifname: info.if_name,
                args: info.cni_args.unwrap_or_default(),
                capability_args: info.capability_args,
            });
        }
    }
    Ok(attachments)
}

fn parse(bytes: &[u8]) -> Option<CachedAttachment> {
    let info: CachedInfo = serde_json::from_slice(bytes).ok()?;
    if info.kind != KIND {
        return None;
    }
    let result = CniResult::from_value(info.result.clone(), Version::default()).ok();
    Some(CachedAttachment { result, info })
}

fn file(cache_dir: &Path, network: &str, rt: &RuntimeArgs) -> PathBuf {
    cache_dir.join("results").join(format!("{network}-{}-{}", rt.container_id, rt.ifname))
}

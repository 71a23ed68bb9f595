//! What is written down of pulls, as upstream writes it: `ImagePullIntent` and `ImagePulledRecord` of `kubelet.config.k8s.io`.
//!
//! Written is v1beta1 (upstream since 1.35), read v1alpha1 as well. A field that is not known is refused: a record that is
//! understood by half could let somebody in.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{PullCredentials, PulledRecord};

const VERSION: &str = "kubelet.config.k8s.io/v1beta1";
const OLD_VERSION: &str = "kubelet.config.k8s.io/v1alpha1";
const INTENT: &str = "ImagePullIntent";
const RECORD: &str = "ImagePulledRecord";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Intent {
    kind: String,
    api_version: String,
    image: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Record {
    kind: String,
    api_version: String,
    #[serde(default)]
    last_updated_time: Option<Timestamp>,
    image_ref: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    credential_mapping: BTreeMap<String, PullCredentials>,
}

/// That an image is about to be pulled.
pub fn intent(image: &str) -> String {
    let intent = Intent { kind: INTENT.to_owned(), api_version: VERSION.to_owned(), image: image.to_owned() };
    serde_json::to_string(&intent).expect("text has no form that JSON lacks")
}

/// The image of an intent.
pub fn read_intent(text: &str) -> Result<String, String> {
    let intent: Intent = serde_json::from_str(text).map_err(|error| error.to_string())?;
    check((&intent.kind, INTENT), &intent.api_version)?;
    Ok(intent.image)
}

/// How an image was pulled.
pub fn record(record: &PulledRecord) -> String {
    let written = Record {
        kind: RECORD.to_owned(),
        api_version: VERSION.to_owned(),
        last_updated_time: Some(record.last_updated),
        image_ref: record.image_ref.clone(),
        credential_mapping: record.credentials.clone(),
    };
    serde_json::to_string(&written).expect("keys are text")
}

/// What a record says.
pub fn read_record(text: &str) -> Result<PulledRecord, String> {
    let written: Record = serde_json::from_str(text).map_err(|error| error.to_string())?;
    check((&written.kind, RECORD), &written.api_version)?;
    Ok(PulledRecord {
        last_updated: written.last_updated_time.unwrap_or(Timestamp::UNIX_EPOCH),
        image_ref: written.image_ref,
        credentials: written.credential_mapping,
    })
}

fn check((kind, expected): (&str, &str), version: &str) -> Result<(), String> {
    if kind != expected {
        return Err(format!("kind {kind:?} instead of {expected}"));
    }
    if version != VERSION && version != OLD_VERSION {
        return Err(format!("apiVersion {version:?} is not known, expected {VERSION}"));
    }
    Ok(())
}

//! OpenAPI documents, built on demand from the kinds table and the checked-in definitions.
//!
//! Output: `/openapi/v2` as JSON and as gnostic protobuf, the `/openapi/v3` index and its per-group documents, ready
//! to send. The definitions lie compressed in the binary and every call builds its document anew, so that nothing
//! stays in memory: callers cache what they serve (and [`fingerprint`] says when it changed).

mod definitions;
mod gnostic;
mod paths;
mod protobuf;
mod v3;

use definitions::Definitions;
use serde_json::{Map, Value, json};

use crate::kinds::{RESOURCES, ResourceInfo, group_versions};

/// Media type that answers with [`v2_protobuf`] carry.
pub const V2_PROTOBUF_MEDIA_TYPE: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// The name clients ask for it by; Go's MIME parser does not take the `@`, so answers must not carry it.
pub const V2_PROTOBUF_REQUESTED_TYPE: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";

/// Goes up when the documents change for another reason than the table or the definitions.
const REVISION: &str = "1";

const VERSION: &str = "v1.36.0";

/// `/openapi/v2` as JSON.
pub fn v2_json() -> Vec<u8> {
    encode(&v2_document())
}

/// `/openapi/v2` as gnostic's `openapi.v2.Document`.
pub fn v2_protobuf() -> Vec<u8> {
    protobuf::encode(&v2_document())
}

/// `/openapi/v3`: where the document of each group and version is.
pub fn v3_index() -> Value {
    let hash = fingerprint();
    let entries: Map<String, Value> = group_versions()
        .into_iter()
        .map(|(group, version)| {
            let path = group_path(group, version);
            let url = format!("/openapi/v3/{path}?hash={hash}");
            (path, json!({ "serverRelativeURL": url }))
        })
        .collect();
    json!({ "paths": entries })
}

/// `/openapi/v3/<path>`, path without leading slash: `api/v1`, `apis/apps/v1`.
pub fn v3_group(path: &str) -> Option<Vec<u8>> {
    let (group, version) = group_versions().into_iter().find(|(g, v)| group_path(g, v) == path)?;
    Some(encode(&v3::document(&rows(group, version), &Definitions::load())))
}

/// A hash of everything the documents are made from, for ETags and the index's URLs.
pub fn fingerprint() -> String {
    let table = format!("{REVISION}{VERSION}{RESOURCES:?}");
    let hash = fnv1a(fnv1a(FNV_OFFSET, definitions::COMPRESSED), table.as_bytes());
    format!("{hash:016X}")
}

fn v2_document() -> Value {
    let mut all_paths = Map::new();
    for (group, version) in group_versions() {
        all_paths.extend(paths::of_group(&rows(group, version)));
    }
    let definitions = Definitions::load();
    json!({
        "swagger": "2.0",
        "info": { "title": "Kubernetes", "version": VERSION },
        "paths": all_paths,
        "definitions": definitions.into_all(),
    })
}

fn rows(group: &str, version: &str) -> Vec<&'static ResourceInfo> {
    RESOURCES.iter().filter(|r| r.group == group && r.version == version).collect()
}

/// `api/v1` or `apis/<group>/<version>`.
fn group_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

fn encode(document: &Value) -> Vec<u8> {
    serde_json::to_vec(document).expect("a JSON value always encodes")
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv1a(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests;

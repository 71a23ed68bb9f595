//! Which keys of an object become which files. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, KeyToPath, Secret};

/// A file of a projected volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    /// Content.
    pub(super) data: Vec<u8>,
    /// Permission bits.
    pub(super) mode: u32,
    /// Owner; absent means root.
    pub(super) owner: Option<u32>,
}

/// Files by path relative to the volume.
pub(super) type Files = BTreeMap<String, File>;

/// How an object is referred to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Selection<'a> {
    /// Keys and their paths; empty means every key under its own name.
    pub(super) items: &'a [KeyToPath],
    /// Mode of files without their own.
    pub(super) default_mode: u32,
    /// Missing keys are left out instead of an error.
    pub(super) optional: bool,
}

/// The files of a ConfigMap.
pub(super) fn config_map(object: &ConfigMap, selection: Selection<'_>) -> Result<Files, String> {
    let text = object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
    let binary = object.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    select(&text.chain(binary).collect(), selection, "configmap references non-existent config key")
}

/// The files of a Secret.
pub(super) fn secret(object: &Secret, selection: Selection<'_>) -> Result<Files, String> {
    let data = object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    select(&data.collect(), selection, "references non-existent secret key")
}

/// A mode from the API, which has checked it.
pub(super) fn mode(mode: Option<i32>, default: u32) -> u32 {
    mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(default) & 0o777
}

fn select(data: &BTreeMap<&str, &[u8]>, selection: Selection<'_>, missing: &str) -> Result<Files, String> {
    let file = |data: &[u8], mode| File { data: data.to_vec(), mode, owner: None };
    if selection.items.is_empty() {
        return Ok(data
            .iter()
            .map(|(key, value)| ((*key).to_owned(), file(value, selection.default_mode)))
            .collect());
    }
    let mut files = Files::new();
    for item in selection.items {
        match data.get(item.key.as_str()) {
            Some(value) => {
                files.insert(item.path.clone(), file(value, mode(item.mode, selection.default_mode)));
            }
            None if selection.optional => {}
            None => return Err(format!("{missing}: {}", item.key)),
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn items(value: serde_json::Value) -> Vec<KeyToPath> {
        serde_json::from_value(value).unwrap()
    }

    fn names(files: &Files) -> Vec<String> {
        files.iter().map(|(path, file)| format!("{path}:{:o}:{}", file.mode, file.data.len())).collect()
    }

    #[test]
    fn all_keys_or_the_chosen_ones() {
        let object: ConfigMap =
            serde_json::from_value(json!({"data": {"a": "1", "b": "22"}, "binaryData": {"c": "AAAA"}}))
                .unwrap();
        let all = Selection { items: &[], default_mode: 0o644, optional: false };
        assert_eq!(names(&config_map(&object, all).unwrap()), ["a:644:1", "b:644:2", "c:644:3"]);
        let chosen = items(json!([{"key": "b", "path": "dir/x", "mode": 256}, {"key": "a", "path": "y"}]));
        let some = Selection { items: &chosen, ..all };
        assert_eq!(names(&config_map(&object, some).unwrap()), ["dir/x:400:2", "y:644:1"]);
    }

    #[test]
    fn a_missing_key_is_an_error_unless_optional() {
        let chosen = items(json!([{"key": "nope", "path": "x"}]));
        let selection = Selection { items: &chosen, default_mode: 0o644, optional: false };
        let error = config_map(&ConfigMap::default(), selection).unwrap_err();
        assert_eq!(error, "configmap references non-existent config key: nope");
        let error = secret(&Secret::default(), selection).unwrap_err();
        assert_eq!(error, "references non-existent secret key: nope");
        let optional = Selection { optional: true, ..selection };
        assert!(secret(&Secret::default(), optional).unwrap().is_empty());
    }
}

//! Discovery documents: which groups, versions and resources there are.
//!
//! Input: the [`crate::kinds`] table. Output: the JSON of `/api`, `/apis`, `/api/v1`, `/apis/G`, `/apis/G/V`, in the
//! plain and the aggregated form.

use serde_json::{Value, json};

use crate::kinds::{RESOURCES, ResourceInfo, Subresource, api_version, group_versions};

/// `APIVersions`, at `/api`.
pub fn api_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{ "clientCIDR": "0.0.0.0/0", "serverAddress": server_address }],
    })
}

/// `APIGroupList`, at `/apis`.
pub fn groups() -> Value {
    let groups: Vec<Value> = named_groups().map(group_document).collect();
    json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
}

/// `APIGroup`, at `/apis/<name>`.
pub fn group(name: &str) -> Option<Value> {
    let found = named_groups().find(|(group, _)| *group == name)?;
    let mut document = group_document(found);
    document["kind"] = json!("APIGroup");
    document["apiVersion"] = json!("v1");
    Some(document)
}

/// `APIResourceList`, at `/api/v1` and `/apis/<group>/<version>`.
pub fn resources(group: &str, version: &str) -> Option<Value> {
    let mut entries = Vec::new();
    for info in rows(group, version) {
        entries.push(resource_entry(info));
        entries.extend(info.subresources.iter().map(|s| subresource_entry(info, s)));
    }
    if entries.is_empty() {
        return None;
    }
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": api_version(group, version),
        "resources": entries,
    }))
}

/// `APIGroupDiscoveryList` (`apidiscovery.k8s.io/<version>`), at `/api` for the core group, else at `/apis`.
pub fn aggregated(core: bool, discovery_version: &str) -> Value {
    let groups: Vec<Value> = group_versions()
        .into_iter()
        .filter(|(group, _)| group.is_empty() == core)
        .map(|(group, version)| {
            let resources: Vec<Value> = rows(group, version).map(aggregated_entry).collect();
            let metadata = if group.is_empty() { json!({}) } else { json!({ "name": group }) };
            json!({
                "metadata": metadata,
                "versions": [{ "version": version, "resources": resources, "freshness": "Current" }],
            })
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": format!("apidiscovery.k8s.io/{discovery_version}"),
        "metadata": {},
        "items": groups,
    })
}

fn named_groups() -> impl Iterator<Item = (&'static str, &'static str)> {
    group_versions().into_iter().filter(|(group, _)| !group.is_empty())
}

fn group_document((group, version): (&str, &str)) -> Value {
    let entry = json!({ "groupVersion": format!("{group}/{version}"), "version": version });
    json!({ "name": group, "versions": [entry], "preferredVersion": entry })
}

fn rows<'a>(group: &'a str, version: &'a str) -> impl Iterator<Item = &'static ResourceInfo> + 'a {
    RESOURCES.iter().filter(move |r| r.group == group && r.version == version)
}

fn resource_entry(info: &ResourceInfo) -> Value {
    let mut entry = json!({
        "name": info.plural,
        "singularName": info.singular,
        "namespaced": info.namespaced,
        "kind": info.kind,
        "verbs": info.verbs,
    });
    if !info.short_names.is_empty() {
        entry["shortNames"] = json!(info.short_names);
    }
    if !info.categories.is_empty() {
        entry["categories"] = json!(info.categories);
    }
    entry
}

fn subresource_entry(info: &ResourceInfo, sub: &Subresource) -> Value {
    let mut entry = json!({
        "name": format!("{}/{}", info.plural, sub.name),
        "singularName": "",
        "namespaced": info.namespaced,
        "kind": sub.kind,
        "verbs": sub.verbs,
    });
    if let Some((group, version)) = sub.group_version {
        entry["group"] = json!(group);
        entry["version"] = json!(version);
    }
    entry
}

fn aggregated_entry(info: &ResourceInfo) -> Value {
    let scope = if info.namespaced { "Namespaced" } else { "Cluster" };
    let mut entry = json!({
        "resource": info.plural,
        "responseKind": { "group": info.group, "version": info.version, "kind": info.kind },
        "scope": scope,
        "singularResource": info.singular,
        "verbs": info.verbs,
    });
    if !info.short_names.is_empty() {
        entry["shortNames"] = json!(info.short_names);
    }
    if !info.categories.is_empty() {
        entry["categories"] = json!(info.categories);
    }
    if !info.subresources.is_empty() {
        entry["subresources"] = info.subresources.iter().map(|s| aggregated_subresource(info, s)).collect();
    }
    entry
}

fn aggregated_subresource(info: &ResourceInfo, sub: &Subresource) -> Value {
    let (group, version) = sub.group_version.unwrap_or((info.group, info.version));
    json!({
        "subresource": sub.name,
        "responseKind": { "group": group, "version": version, "kind": sub.kind },
        "verbs": sub.verbs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_list_the_same_resources() {
        let plain = resources("apps", "v1").unwrap();
        let names: Vec<&str> =
            plain["resources"].as_array().unwrap().iter().filter_map(|r| r["name"].as_str()).collect();
        assert_eq!(
            names,
            [
                "deployments",
                "deployments/scale",
                "deployments/status",
                "replicasets",
                "replicasets/scale",
                "replicasets/status"
            ]
        );
        let aggregated = aggregated(false, "v2");
        let apps = aggregated["items"].as_array().unwrap().iter().find(|g| g["metadata"]["name"] == "apps");
        assert_eq!(apps.unwrap()["versions"][0]["resources"][0]["subresources"][0]["subresource"], "scale");
        assert!(resources("apps", "v2").is_none());
        assert_eq!(group("apps").unwrap()["preferredVersion"]["groupVersion"], "apps/v1");
    }
}

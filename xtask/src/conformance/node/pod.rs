//! A pod in the making: JSON with what every case needs filled in, and the rest merged into it.

use serde_json::{Value, json};

/// A pod's manifest.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    /// As it will be sent.
    pub(crate) object: Value,
    image: String,
}

impl Pod {
    /// With one container `main` that runs a script once. It is bound to the node: the scheduler is no part of what is asked.
    pub(crate) fn new(name: &str, labels: Value, node: &str, image: &str, script: &str) -> Self {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "nodeName": node,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                "tolerations": [{"operator": "Exists"}],
                "containers": [container("main", image, script)],
            },
        });
        Self { object, image: image.to_owned() }
    }

    /// Its name.
    pub(crate) fn name(&self) -> String {
        self.object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
    }

    /// With another name.
    pub(crate) fn named(self, name: &str) -> Self {
        self.metadata(json!({"name": name}))
    }

    /// Merges into the metadata.
    pub(crate) fn metadata(mut self, more: Value) -> Self {
        merge(&mut self.object["metadata"], more);
        self
    }

    /// Merges into the spec; a list replaces a list, `null` removes.
    pub(crate) fn spec(mut self, more: Value) -> Self {
        merge(&mut self.object["spec"], more);
        self
    }

    /// Merges into the container `main`.
    pub(crate) fn main(mut self, more: Value) -> Self {
        merge(&mut self.object["spec"]["containers"][0], more);
        self
    }

    /// Another container beside `main`.
    pub(crate) fn beside(self, name: &str, script: &str, more: Value) -> Self {
        self.add("containers", name, script, more)
    }

    /// An init container, after those that are there.
    pub(crate) fn init(self, name: &str, script: &str, more: Value) -> Self {
        self.add("initContainers", name, script, more)
    }

    fn add(mut self, list: &str, name: &str, script: &str, more: Value) -> Self {
        let mut new = container(name, &self.image, script);
        merge(&mut new, more);
        push(&mut self.object["spec"][list], new);
        self
    }

    /// A volume that `main` mounts at `/v/<name>`.
    pub(crate) fn volume(self, name: &str, source: Value) -> Self {
        let path = format!("/v/{name}");
        self.volume_at(name, source, json!({"mountPath": path}))
    }

    /// A volume that `main` mounts as `mount` says.
    pub(crate) fn volume_at(mut self, name: &str, source: Value, mut mount: Value) -> Self {
        let mut volume = source;
        volume["name"] = name.into();
        mount["name"] = name.into();
        push(&mut self.object["spec"]["volumes"], volume);
        push(&mut self.object["spec"]["containers"][0]["volumeMounts"], mount);
        self
    }

    /// Environment variables of `main`.
    pub(crate) fn env(self, env: Value) -> Self {
        self.main(json!({"env": env}))
    }

    /// Restarts containers whatever they end with.
    pub(crate) fn always(self) -> Self {
        self.spec(json!({"restartPolicy": "Always"}))
    }
}

/// A container that runs a script.
fn container(name: &str, image: &str, script: &str) -> Value {
    json!({"name": name, "image": image, "imagePullPolicy": "IfNotPresent", "command": ["/bin/sh", "-c", script]})
}

fn push(list: &mut Value, item: Value) {
    match list {
        Value::Array(items) => items.push(item),
        other => *other = json!([item]),
    }
}

/// A merge patch.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            if let Some(object) = target.as_object_mut() {
                object.remove(&key);
            }
        } else {
            merge(&mut target[&key], value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_merged_and_lists_grow() {
        let pod = Pod::new("p", json!({}), "n", "busybox", "true")
            .spec(json!({"securityContext": {"runAsUser": 1}, "restartPolicy": null}))
            .spec(json!({"securityContext": {"runAsGroup": 2}}))
            .volume("a", json!({"emptyDir": {}}))
            .volume("b", json!({"emptyDir": {}}))
            .init("first", "true", json!({"restartPolicy": "Always"}));
        let spec = &pod.object["spec"];
        assert_eq!(spec["securityContext"], json!({"runAsUser": 1, "runAsGroup": 2}));
        assert!(spec.get("restartPolicy").is_none());
        assert_eq!(spec["containers"][0]["volumeMounts"][1], json!({"name": "b", "mountPath": "/v/b"}));
        assert_eq!(spec["initContainers"][0]["image"], "busybox");
        assert_eq!(spec["initContainers"][0]["restartPolicy"], "Always");
    }
}

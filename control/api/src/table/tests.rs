//! Lines as kubectl prints them.

#![allow(clippy::needless_pass_by_value, reason = "test tables pass literals")]

use serde_json::{Value, json};

use super::*;
use crate::kinds;

const NOW: &str = "2026-01-02T03:04:05Z";

/// All cells of one object, joined with blanks; wide columns follow a bar.
fn line(api_version: &str, kind: &str, mut object: Value) -> String {
    let info = kinds::by_kind(api_version, kind).unwrap();
    object["metadata"]["creationTimestamp"] = json!("2026-01-02T03:03:00Z");
    let table = render(info, &[&object], NOW.parse().unwrap(), Include::Metadata);
    let columns = table["columnDefinitions"].as_array().unwrap();
    let cells = table["rows"][0]["cells"].as_array().unwrap();
    assert_eq!(columns.len(), cells.len(), "{kind}");
    let shown = |priority: i64| {
        let picked = columns.iter().zip(cells).filter(|(column, _)| column["priority"] == priority);
        let texts = picked.map(|(_, cell)| cell.as_str().map_or_else(|| cell.to_string(), str::to_owned));
        texts.collect::<Vec<_>>().join(" ")
    };
    match shown(1) {
        wide if wide.is_empty() => shown(0),
        wide => format!("{} | {wide}", shown(0)),
    }
}

#[track_caller]
fn check_pod(status: Value, expected: &str) {
    let pod = json!({
        "metadata": {"name": "p"},
        "spec": {"nodeName": "n", "containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]},
        "status": status,
    });
    assert_eq!(line("v1", "Pod", pod), format!("p {expected} 65s | <none> n <none> <none>"));
}

#[test]
fn pod_states() {
    check_pod(json!({"phase": "Pending"}), "0/2 Pending 0");
    check_pod(
        json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]}),
        "0/2 Init:0/1 0",
    );
    check_pod(
        json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
        "0/2 Init:CrashLoopBackOff 2",
    );
    let done = json!([{"name": "i", "state": {"terminated": {"exitCode": 0}}}]);
    check_pod(
        json!({"phase": "Running", "initContainerStatuses": done, "containerStatuses": [
            {"name": "a", "ready": true, "state": {"running": {}}},
            {"name": "b", "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"finishedAt": "2026-01-02T03:03:55Z"}}}]}),
        "1/2 CrashLoopBackOff 3 (10s ago)",
    );
    check_pod(
        json!({"phase": "Succeeded", "containerStatuses": [{"name": "a", "state": {"terminated": {"reason": "Completed"}}}]}),
        "0/2 Completed 0",
    );
    check_pod(
        json!({"phase": "Failed", "containerStatuses": [{"name": "a", "state": {"terminated": {"exitCode": 3}}}]}),
        "0/2 ExitCode:3 0",
    );
}

#[test]
fn terminating_pods_and_sidecars() {
    let pod = json!({
        "metadata": {"name": "p", "deletionTimestamp": NOW},
        "spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "s", "restartPolicy": "Always"}]},
        "status": {"phase": "Running", "podIP": "10.244.0.5",
            "initContainerStatuses": [{"name": "s", "started": true, "ready": true, "state": {"running": {}}}],
            "containerStatuses": [{"name": "a", "ready": true, "state": {"running": {}}}]},
    });
    assert_eq!(line("v1", "Pod", pod), "p 2/2 Terminating 0 65s | 10.244.0.5 <none> <none> <none>");
}

#[test]
fn nodes_and_workloads() {
    let node = json!({
        "metadata": {"name": "n", "labels": {"node-role.kubernetes.io/control-plane": ""}},
        "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}], "nodeInfo": {"kubeletVersion": "v1.36.0"}},
    });
    assert_eq!(
        line("v1", "Node", node),
        "n Ready,SchedulingDisabled control-plane 65s v1.36.0 | 10.0.0.1 <none> <unknown> <unknown> <unknown>"
    );
    let deployment = json!({
        "metadata": {"name": "web"},
        "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {"spec": {"containers": [{"name": "nginx", "image": "nginx:1.17.9"}]}}},
        "status": {"readyReplicas": 2, "updatedReplicas": 3, "availableReplicas": 2, "replicas": 3},
    });
    assert_eq!(
        line("apps/v1", "Deployment", deployment.clone()),
        "web 2/3 3 2 65s | nginx nginx:1.17.9 app=web"
    );
    assert_eq!(line("apps/v1", "ReplicaSet", deployment), "web 3 3 2 65s | nginx nginx:1.17.9 app=web");
}

#[test]
fn services_and_endpoints() {
    let service = json!({
        "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.9", "selector": {"app": "web"},
            "ports": [{"port": 80, "nodePort": 30000, "protocol": "TCP"}, {"port": 443, "protocol": "TCP"}]},
    });
    assert_eq!(
        line("v1", "Service", service),
        "web NodePort 10.96.0.9 <none> 80:30000/TCP,443/TCP 65s | app=web"
    );
    let slice = json!({
        "metadata": {"name": "web-x"}, "addressType": "IPv4", "ports": [{"port": 80}],
        "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3"]}, {"addresses": ["10.0.0.4"]}],
    });
    assert_eq!(
        line("discovery.k8s.io/v1", "EndpointSlice", slice),
        "web-x IPv4 80 10.0.0.1,10.0.0.2,10.0.0.3 + 1 more... 65s"
    );
    let endpoints = json!({"metadata": {"name": "e"}, "subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]}]});
    assert_eq!(line("v1", "Endpoints", endpoints), "e 10.0.0.1:80 65s");
}

#[test]
fn events_and_the_rest() {
    let event = json!({
        "metadata": {"name": "p.1"}, "involvedObject": {"kind": "Pod", "name": "p"}, "type": "Normal",
        "reason": "Started", "message": "Started container a\n", "count": 2, "source": {"component": "kubelet", "host": "n"},
        "firstTimestamp": "2026-01-02T03:03:05Z", "lastTimestamp": "2026-01-02T03:04:00Z",
    });
    assert_eq!(
        line("v1", "Event", event),
        "5s Normal Started pod/p Started container a |  kubelet, n 60s 2 p.1"
    );
    assert_eq!(
        line("v1", "Secret", json!({"metadata": {"name": "s"}, "type": "Opaque", "data": {"a": ""}})),
        "s Opaque 1 65s"
    );
    let lease = json!({"metadata": {"name": "n"}, "spec": {"holderIdentity": "n"}});
    assert_eq!(line("coordination.k8s.io/v1", "Lease", lease), "n n 65s");
}

#[test]
fn volumes_and_what_belongs_to_them() {
    let volume = json!({
        "metadata": {"name": "pv"}, "status": {"phase": "Bound"},
        "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain", "claimRef": {"namespace": "d", "name": "data"},
            "storageClassName": "slow", "volumeMode": "Filesystem"},
    });
    assert_eq!(
        line("v1", "PersistentVolume", volume),
        "pv 1Gi RWO,RWX Retain Bound d/data slow <unset>  65s | Filesystem"
    );
    let claim = json!({
        "metadata": {"name": "data"}, "spec": {"volumeMode": "Filesystem", "storageClassName": "slow"},
        "status": {"phase": "Pending", "capacity": {"storage": "1Gi"}},
    });
    assert_eq!(
        line("v1", "PersistentVolumeClaim", claim.clone()),
        "data Pending    slow <unset> 65s | Filesystem"
    );
    let mut bound = claim;
    bound["spec"]["volumeName"] = json!("pv");
    bound["status"] =
        json!({"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"]});
    assert_eq!(
        line("v1", "PersistentVolumeClaim", bound),
        "data Bound pv 1Gi RWO slow <unset> 65s | Filesystem"
    );
    let class = json!({
        "metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "a.b/c",
    });
    assert_eq!(
        line("storage.k8s.io/v1", "StorageClass", class),
        "fast (default) a.b/c Delete Immediate false 65s"
    );
    let driver =
        json!({"metadata": {"name": "d"}, "spec": {"volumeLifecycleModes": ["Persistent", "Ephemeral"]}});
    assert_eq!(
        line("storage.k8s.io/v1", "CSIDriver", driver),
        "d true false false <unset> false Persistent,Ephemeral 65s"
    );
    let attachment = json!({"metadata": {"name": "a"}, "status": {"attached": true},
        "spec": {"attacher": "d", "nodeName": "n", "source": {"persistentVolumeName": "pv"}}});
    assert_eq!(line("storage.k8s.io/v1", "VolumeAttachment", attachment), "a d pv n true 65s");
}

#[test]
fn certificate_requests_and_classes() {
    let mut request = json!({
        "metadata": {"name": "csr-1"},
        "spec": {"signerName": "kubernetes.io/kubelet-serving", "username": "system:node:n", "expirationSeconds": 3600},
    });
    let shown = |object: &Value| line("certificates.k8s.io/v1", "CertificateSigningRequest", object.clone());
    assert_eq!(shown(&request), "csr-1 65s kubernetes.io/kubelet-serving system:node:n 60m Pending");
    request["status"] = json!({"conditions": [{"type": "Approved"}], "certificate": "eA=="});
    assert!(shown(&request).ends_with(" Approved,Issued"), "{}", shown(&request));
    let class = json!({"metadata": {"name": "high"}, "value": 1000, "preemptionPolicy": "Never"});
    assert_eq!(line("scheduling.k8s.io/v1", "PriorityClass", class), "high 1000 false 65s Never");
    let claim =
        json!({"metadata": {"name": "gpu"}, "status": {"allocation": {}, "reservedFor": [{"name": "p"}]}});
    assert_eq!(line("resource.k8s.io/v1", "ResourceClaim", claim), "gpu allocated,reserved 65s");
    let slice =
        json!({"metadata": {"name": "s"}, "spec": {"nodeName": "n", "driver": "d", "pool": {"name": "p"}}});
    assert_eq!(line("resource.k8s.io/v1", "ResourceSlice", slice), "s n d p 65s");
}

//! Mistakes of a user: each is named, and everything else goes on.

use std::net::TcpListener;

use crate::b_walk::{deployed, removed};
use crate::support::{Namespace, apply_text, cluster, kubectl, kubectl_fails, said};

fn pod(name: &str, container: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: main\n    {}\n",
        container.replace('\n', "\n    ")
    )
}

#[track_caller]
fn refused(manifest: &str, causes: &[&str]) {
    cluster();
    let output = apply_text(manifest, &[]);
    let text = said(&output);
    assert!(!output.status.success(), "should be refused: {text}");
    for cause in causes {
        assert!(text.contains(cause), "`{cause}` is not named: {text}");
    }
}

#[test]
fn an_unknown_field_is_named() {
    refused(
        &pod("typo", "image: busybox\ncomand: [\"sh\"]"),
        &["unknown field \"spec.containers[0].comand\""],
    );
}

#[test]
fn a_wrong_type_is_named() {
    let manifest = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: wrong}\nspec:\n  replicas: three\n  selector: {matchLabels: {a: b}}\n  template:\n    metadata: {labels: {a: b}}\n    spec: {containers: [{name: c, image: busybox}]}\n";
    refused(manifest, &["replicas"]);
}

#[test]
fn a_limit_below_the_request_is_refused() {
    let container = "image: busybox\nresources:\n  requests: {cpu: 200m}\n  limits: {cpu: 100m}";
    refused(
        &pod("limits", container),
        &["spec.containers[0].resources.requests", "must be less than or equal to cpu limit"],
    );
}

#[test]
fn the_same_node_port_twice_is_refused() {
    deployed();
    let manifest = "apiVersion: v1\nkind: Service\nmetadata: {name: second}\nspec:\n  type: NodePort\n  selector: {app: nginx}\n  ports: [{port: 80, nodePort: 30000}]\n";
    refused(manifest, &["spec.ports[0].nodePort: Invalid value: 30000: provided port is already allocated"]);
    removed();
}

#[test]
fn an_image_that_exists_nowhere() {
    let ns = Namespace::new("no-image");
    ns.apply(&pod("nope", "image: nginx:9.9.9"));
    ns.wait("back-off", &["get", "pod", "nope"], |table| {
        table.contains("ImagePullBackOff") || table.contains("ErrImagePull")
    });
    ns.wait(
        "ImagePullBackOff",
        &["get", "pod", "nope", "-o", "jsonpath={.status.containerStatuses[0].state.waiting.reason}"],
        |reason| reason == "ImagePullBackOff",
    );
    let story = ns.kubectl(&["describe", "pod", "nope"]);
    assert!(story.contains("Failed to pull image \"nginx:9.9.9\"") && story.contains("not found"), "{story}");
    ns.apply(&pod("fine", "image: busybox\ncommand: [\"sleep\", \"60\"]"));
    ns.kubectl(&["wait", "--for=condition=Ready", "pod/fine", "--timeout=60s"]);
}

#[test]
fn a_command_that_does_not_exist() {
    let ns = Namespace::new("no-command");
    ns.apply(&pod("nope", "image: busybox\ncommand: [\"/no/such/tool\"]"));
    ns.wait(
        "the cause",
        &["get", "pod", "nope", "-o", "jsonpath={.status.containerStatuses[0]}"],
        |status| {
            status.contains("/no/such/tool")
                && (status.contains("StartError")
                    || status.contains("RunContainerError")
                    || status.contains("CrashLoopBackOff"))
        },
    );
}

#[test]
fn a_node_port_that_a_process_holds() {
    cluster();
    let _holder = TcpListener::bind("0.0.0.0:30123").unwrap();
    let ns = Namespace::new("held-port");
    ns.apply("apiVersion: v1\nkind: Service\nmetadata: {name: held}\nspec:\n  type: NodePort\n  selector: {app: none}\n  ports: [{port: 80, nodePort: 30123}]\n");
    ns.wait("an event", &["get", "events"], |table| table.contains("30123"));
}

#[test]
fn what_is_not_there_is_named() {
    cluster();
    assert!(kubectl_fails(&["get", "pod", "ghost"]).contains("pods \"ghost\" not found"));
    assert!(
        kubectl_fails(&["get", "unicorns"]).contains("the server doesn't have a resource type \"unicorns\"")
    );
    kubectl(&["get", "nodes"]);
}

#[test]
fn what_the_cluster_needs_stays_and_others_are_refused() {
    cluster();
    let refusal = kubectl_fails(&["delete", "namespace", "default"]);
    assert!(refusal.contains("this namespace may not be deleted"), "{refusal}");
    let refusal = kubectl_fails(&["get", "pods", "--as=nobody"]);
    assert!(refusal.contains("User \"nobody\" cannot list resource \"pods\""), "{refusal}");
}

//! What the node does by itself: static pods, debugging of running pods, logs that grow, pods over their limits.

use std::time::Duration;

use crate::support::{Namespace, cluster, kubectl, kubectl_command, repo, said, wait_for, wait_kubectl};

#[test]
fn static_pods_come_and_go_with_their_files() {
    cluster();
    let node = kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"]);
    let name = format!("fixed-{node}");
    let directory = repo().join("target/up/manifests");
    let (file, broken) = (directory.join("fixed.yaml"), directory.join("broken.yaml"));
    let manifest = |text: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: fixed}}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  \
             - {{name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, \"echo {text}; sleep 3600\"]}}\n"
        )
    };
    std::fs::write(&broken, "kind: [Pod").expect("a file");
    std::fs::write(&file, manifest("first")).expect("a file");
    let ready = |text: &str| text.trim() == "True";
    let condition = "jsonpath={.status.conditions[?(@.type=='Ready')].status}";
    wait_kubectl("the static pod", &["get", "pod", &name, "-o", condition], ready);
    wait_kubectl("its log", &["logs", &name], |log| log == "first\n");
    // Deleting what the API shows does not touch the container.
    let id = |name: &str| {
        kubectl(&["get", "pod", name, "-o", "jsonpath={.status.containerStatuses[0].containerID}"])
    };
    let before = id(&name);
    kubectl(&["delete", "pod", &name, "--wait=false"]);
    wait_kubectl("the mirror again", &["get", "pod", &name, "-o", condition], ready);
    assert_eq!(id(&name), before);
    std::fs::write(&file, manifest("second")).expect("a file");
    wait_kubectl("the changed pod", &["logs", &name], |log| log == "second\n");
    std::fs::remove_file(&file).expect("it is there");
    std::fs::remove_file(&broken).expect("it is there");
    wait_for("the pod's end", Duration::from_secs(90), || {
        let shown = said(&kubectl_command(&["get", "pod", &name]).output().expect("kubectl starts"));
        if shown.contains("NotFound") { Ok(()) } else { Err(shown) }
    });
}

#[test]
fn kubectl_debug_looks_into_a_running_pod() {
    let ns = Namespace::new("debug");
    ns.kubectl(&["run", "web", "--image=nginx:1.17.9"]);
    ns.kubectl(&["wait", "--for=condition=Ready", "pod/web", "--timeout=60s"]);
    let script = "ps | grep -c '[n]ginx: master'; echo seen";
    ns.kubectl(&["debug", "web", "--image=busybox", "--target=web", "-c", "look", "--", "sh", "-c", script]);
    let log = ns.wait("what it saw", &["logs", "web", "-c", "look"], |log| log.contains("seen"));
    assert!(!log.starts_with('0'), "the target's processes are in sight: {log}");
    let state = "jsonpath={.status.ephemeralContainerStatuses[0].state.terminated.reason}";
    ns.wait("its end", &["get", "pod", "web", "-o", state], |reason| reason.trim() == "Completed");
    let restarts =
        ns.kubectl(&["get", "pod", "web", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"]);
    assert_eq!(restarts, "0");
}

#[test]
fn a_pod_over_its_own_disk_limit_is_evicted() {
    let ns = Namespace::new("limits");
    ns.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: greedy}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: busybox
    command: ["sh", "-c", "dd if=/dev/zero of=/scratch/file bs=1M count=4; sleep 3600"]
    volumeMounts: [{name: scratch, mountPath: /scratch}]
  volumes:
  - {name: scratch, emptyDir: {sizeLimit: 1Mi}}
"#,
    );
    let status = "jsonpath={.status.phase} {.status.reason} {.status.message}";
    let told =
        ns.wait("the eviction", &["get", "pod", "greedy", "-o", status], |text| text.contains("Evicted"));
    assert_eq!(told.trim(), "Failed Evicted Usage of EmptyDir volume \"scratch\" exceeds the limit \"1Mi\".");
    ns.wait("the event", &["get", "events"], |text| text.contains("Evicted"));
}

#[test]
fn a_running_pod_is_resized() {
    let ns = Namespace::new("resize");
    ns.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: box}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: busybox
    command: ["sleep", "3600"]
    resources: {requests: {cpu: 50m, memory: 16Mi}, limits: {cpu: 100m, memory: 32Mi}}
"#,
    );
    ns.kubectl(&["wait", "--for=condition=Ready", "pod/box", "--timeout=60s"]);
    let patch = r#"{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"100m"},"limits":{"cpu":"200m","memory":"64Mi"}}}]}}"#;
    ns.kubectl(&["patch", "pod", "box", "--subresource", "resize", "--patch", patch]);
    let limits = "jsonpath={.status.containerStatuses[0].resources.limits}";
    ns.wait("the new limits", &["get", "pod", "box", "-o", limits], |text| {
        text.contains("200m") && text.contains("64Mi")
    });
    let limit = ns.kubectl(&[
        "exec",
        "box",
        "--",
        "sh",
        "-c",
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max",
    ]);
    assert_eq!(limit.trim(), "67108864");
    let restarts =
        ns.kubectl(&["get", "pod", "box", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"]);
    assert_eq!(restarts, "0");
}

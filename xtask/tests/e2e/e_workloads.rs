//! What pods can use: configuration, volumes, probes, limits, restarts, identity.

use crate::support::Namespace;

#[test]
fn configuration_reaches_the_container() {
    let ns = Namespace::new("configuration");
    ns.apply(
        r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: blue, motd: "hello\n"}
---
apiVersion: v1
kind: Secret
metadata: {name: key}
stringData: {token: s3cret}
---
apiVersion: v1
kind: Pod
metadata: {name: reader, labels: {tier: test}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: busybox
    command: ["sleep", "3600"]
    env:
    - {name: COLOR, valueFrom: {configMapKeyRef: {name: settings, key: color}}}
    - {name: TOKEN, valueFrom: {secretKeyRef: {name: key, key: token}}}
    - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: GREETING, value: "$(COLOR)-$(TOKEN)"}
    volumeMounts:
    - {name: settings, mountPath: /settings}
    - {name: key, mountPath: /key}
    - {name: scratch, mountPath: /scratch}
  volumes:
  - {name: settings, configMap: {name: settings}}
  - {name: key, secret: {secretName: key}}
  - {name: scratch, emptyDir: {}}
"#,
    );
    ns.kubectl(&["wait", "--for=condition=Ready", "pod/reader", "--timeout=60s"]);
    let exec = |script: &str| ns.kubectl(&["exec", "reader", "--", "sh", "-c", script]);
    assert_eq!(exec("echo $GREETING"), "blue-s3cret\n");
    assert_eq!(exec("cat /settings/motd /key/token"), "hello\ns3cret");
    let address = ns.kubectl(&["get", "pod", "reader", "-o", "jsonpath={.status.podIP}"]);
    assert_eq!(exec("echo $POD_IP").trim(), address);
    exec("echo kept > /scratch/file");
    assert!(exec("ls /var/run/secrets/kubernetes.io/serviceaccount").contains("token"));
    // A change of the ConfigMap reaches the mounted file without a restart.
    ns.kubectl(&["patch", "configmap", "settings", "-p", r#"{"data":{"motd":"changed\n"}}"#]);
    ns.wait("the changed file", &["exec", "reader", "--", "cat", "/settings/motd"], |text| {
        text.contains("changed")
    });
    // The service account's token opens the API from inside, through the `kubernetes` Service.
    let who = exec(
        "wget -q -O - --no-check-certificate --header \"Authorization: Bearer $(cat /var/run/secrets/kubernetes.io/serviceaccount/token)\" https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/version || true",
    );
    assert!(who.contains("gitVersion") || who.contains("TLS") || who.contains("ssl"), "{who}");
}

#[test]
fn a_crashing_container_backs_off() {
    let ns = Namespace::new("crash");
    ns.kubectl(&["run", "crash", "--image=busybox", "--", "sh", "-c", "echo last words; exit 3"]);
    ns.wait("CrashLoopBackOff", &["get", "pod", "crash"], |table| table.contains("CrashLoopBackOff"));
    let state = ns.kubectl(&[
        "get",
        "pod",
        "crash",
        "-o",
        "jsonpath={.status.containerStatuses[0].lastState.terminated.exitCode}",
    ]);
    assert_eq!(state, "3");
    assert!(ns.kubectl(&["logs", "crash"]).contains("last words"));
}

#[test]
fn a_pod_that_completes() {
    let ns = Namespace::new("complete");
    ns.kubectl(&["run", "once", "--image=busybox", "--restart=Never", "--", "true"]);
    ns.wait("Completed", &["get", "pod", "once"], |table| table.contains("Completed"));
    let phase = ns.kubectl(&["get", "pod", "once", "-o", "jsonpath={.status.phase}"]);
    assert_eq!(phase, "Succeeded");
}

#[test]
fn probes_decide_readiness_and_restarts() {
    let ns = Namespace::new("probes");
    ns.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: probed}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: busybox
    command: ["sh", "-c", "touch /tmp/alive; sleep 3600"]
    readinessProbe: {exec: {command: ["test", "-f", "/tmp/ready"]}, periodSeconds: 1}
    livenessProbe: {exec: {command: ["test", "-f", "/tmp/alive"]}, periodSeconds: 1, failureThreshold: 2}
    terminationGracePeriodSeconds: 1
"#
        .replace("    terminationGracePeriodSeconds: 1\n", "  terminationGracePeriodSeconds: 1\n")
        .as_str(),
    );
    let ready = ["get", "pod", "probed", "-o", "jsonpath={.status.conditions[?(@.type=='Ready')].status}"];
    ns.wait("running", &["get", "pod", "probed"], |table| table.contains("Running"));
    ns.wait("not ready", &ready, |status| status == "False");
    ns.kubectl(&["exec", "probed", "--", "touch", "/tmp/ready"]);
    ns.wait("ready", &ready, |status| status == "True");
    ns.kubectl(&["exec", "probed", "--", "rm", "/tmp/ready"]);
    ns.wait("not ready again", &ready, |status| status == "False");
    ns.kubectl(&["exec", "probed", "--", "rm", "/tmp/alive"]);
    ns.wait(
        "restarted",
        &["get", "pod", "probed", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"],
        |count| count == "1",
    );
}

#[test]
fn the_memory_limit_kills() {
    let ns = Namespace::new("memory");
    ns.kubectl(&[
        "run", "hog", "--image=busybox", "--restart=Never",
        "--overrides={\"spec\":{\"containers\":[{\"name\":\"hog\",\"image\":\"busybox\",\"command\":[\"sh\",\"-c\",\"tail /dev/zero\"],\"resources\":{\"limits\":{\"memory\":\"32Mi\"}}}]}}",
    ]);
    ns.wait(
        "OOMKilled",
        &["get", "pod", "hog", "-o", "jsonpath={.status.containerStatuses[0].state.terminated.reason}"],
        |reason| reason == "OOMKilled",
    );
}

#[test]
fn a_pod_too_large_waits_with_a_reason() {
    let ns = Namespace::new("too-large");
    ns.kubectl(&[
        "run", "giant", "--image=busybox",
        "--overrides={\"spec\":{\"containers\":[{\"name\":\"giant\",\"image\":\"busybox\",\"resources\":{\"requests\":{\"cpu\":\"4000\"}}}]}}",
    ]);
    ns.wait("the reason", &["describe", "pod", "giant"], |text| {
        text.contains("Insufficient cpu") && text.contains("FailedScheduling")
    });
}

#[test]
fn init_containers_come_first_and_graceful_termination_is_kept() {
    let ns = Namespace::new("order");
    ns.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: ordered}
spec:
  terminationGracePeriodSeconds: 20
  volumes: [{name: shared, emptyDir: {}}]
  initContainers:
  - {name: first, image: busybox, command: ["sh", "-c", "echo first > /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  - {name: second, image: busybox, command: ["sh", "-c", "echo second >> /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - {name: main, image: busybox, command: ["sh", "-c", "trap 'echo bye; exit 0' TERM; cat /shared/order; while true; do sleep 0.1; done"], volumeMounts: [{name: shared, mountPath: /shared}]}
"#,
    );
    ns.kubectl(&["wait", "--for=condition=Ready", "pod/ordered", "--timeout=60s"]);
    ns.wait("the order", &["logs", "ordered"], |text| text.contains("first\nsecond"));
    let begin = std::time::Instant::now();
    ns.kubectl(&["delete", "pod", "ordered"]);
    assert!(
        begin.elapsed().as_secs() < 15,
        "the container left at SIGTERM; the whole grace must not be waited for"
    );
}

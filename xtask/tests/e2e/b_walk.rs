//! The README's walk with the tutorial manifest.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{
    answers_from_all, cluster, get, kubeconfig, kubectl, kubectl_command, node_address, pods, repo, said,
    served_by, wait_for, wait_kubectl, xtask,
};

const APP: &str = "app=nginx";
const PLUGINS: &str = "table inet keelson_cni";
const UNTRACKED: &str = "table inet keelson_untracked";

fn manifest() -> String {
    repo().join("examples/nginx.yaml").display().to_string()
}

/// Applies the example and waits for three ready pods.
pub(crate) fn deployed() -> Vec<String> {
    cluster();
    kubectl(&["apply", "-f", &manifest()]);
    kubectl(&["rollout", "status", "deployment/nginx", "--timeout=120s"]);
    let names = pods("default", APP);
    assert_eq!(names.len(), 3, "{names:?}");
    names
}

/// Deletes the example and waits until its pods are gone.
pub(crate) fn removed() {
    kubectl(&["delete", "-f", &manifest(), "--ignore-not-found"]);
    wait_kubectl("pods gone", &["get", "pods", "-l", APP, "-o", "name"], |list| list.trim().is_empty());
}

pub(crate) fn cluster_ip() -> String {
    kubectl(&["get", "service", "nginx", "-o", "jsonpath={.spec.clusterIP}"])
}

/// The tables of nftables, and of each what it holds.
fn packet_filter() -> BTreeMap<String, String> {
    let output = Command::new("nft").args(["list", "ruleset"]).output().expect("nft starts");
    let text = said(&output);
    let tables = text.split("\n}").filter_map(|table| table.trim().split_once(" {\n"));
    tables.map(|(name, content)| (name.to_owned(), content.to_owned())).collect()
}

/// The table of the CNI plugins, where pods' masquerade and host ports are; empty where there is none.
pub(crate) fn table_of_plugins() -> String {
    packet_filter().remove(PLUGINS).unwrap_or_default()
}

#[test]
fn a_second_up_changes_nothing() {
    cluster();
    let before = said(&xtask(&["status", "--json"]));
    let output = xtask(&["up", "--detach", "--no-build"]);
    assert!(output.status.success());
    assert!(said(&output).contains("already up"), "{}", said(&output));
    let pids = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.contains("\"pid\"")).map(str::to_owned).collect()
    };
    assert_eq!(pids(&before), pids(&said(&xtask(&["status", "--json"]))));
}

#[test]
fn b_apply_get_and_curl() {
    let before = {
        cluster();
        packet_filter()
    };
    let names = deployed();
    let table = kubectl(&["get", "nodes,deployments,rs,pods,svc,endpointslices", "-o", "wide"]);
    for column in [
        "INTERNAL-IP",
        "CONTAINER-RUNTIME",
        "UP-TO-DATE",
        "DESIRED",
        "READY",
        "NODE",
        "CLUSTER-IP",
        "PORTS",
        "ENDPOINTS",
    ] {
        assert!(table.contains(column), "no column {column} in\n{table}");
    }
    assert!(table.contains("80:30000/TCP"), "{table}");
    assert!(table.contains("3/3"), "{table}");
    answers_from_all(&format!("{}:80", cluster_ip()), &names);
    answers_from_all(&format!("{}:30000", node_address()), &names);
    answers_from_all("127.0.0.1:30000", &names);
    // For pods there is masquerade, in the plugins' table, and one rule lets clients outside past stateful firewalls; for
    // Services there is nothing in any.
    let (mut before, mut after) = (before, packet_filter());
    for ours in [PLUGINS, UNTRACKED] {
        before.remove(ours);
        let text = after.remove(ours).unwrap_or_default();
        for trace in [cluster_ip().as_str(), "30000", "10.96."] {
            assert!(!text.contains(trace), "{trace} of a Service is in the packet filter: {text}");
        }
    }
    assert_eq!(before, after, "no table but ours may change");
}

#[test]
fn c_from_a_pod() {
    deployed();
    kubectl(&["run", "client", "--image=busybox", "--restart=Never", "--", "sleep", "3600"]);
    kubectl(&["wait", "--for=condition=Ready", "pod/client", "--timeout=60s"]);
    for target in [cluster_ip(), format!("{}:30000", node_address())] {
        let page = kubectl(&["exec", "client", "--", "wget", "-q", "-O", "-", &format!("http://{target}/")]);
        assert!(page.contains("Welcome to nginx!"), "{target}: {page}");
    }
    kubectl(&["delete", "pod", "client", "--grace-period=1"]);
}

#[test]
fn d_scale_roll_and_undo() {
    deployed();
    kubectl(&["scale", "deployment/nginx", "--replicas=5"]);
    kubectl(&["rollout", "status", "deployment/nginx", "--timeout=60s"]);
    assert_eq!(pods("default", APP).len(), 5);
    let mut watcher = kubectl_command(&[
        "get",
        "deployment",
        "nginx",
        "--watch",
        "-o",
        "jsonpath={.status.availableReplicas}{'\\n'}",
    ])
    .stdout(Stdio::piped())
    .spawn()
    .expect("kubectl starts");
    let lines = BufReader::new(watcher.stdout.take().expect("piped")).lines();
    let seen = std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<String>>());
    kubectl(&["set", "image", "deployment/nginx", "nginx=nginx:1.17.10"]);
    let progress = kubectl(&["rollout", "status", "deployment/nginx", "--timeout=120s"]);
    assert!(progress.contains("successfully rolled out"), "{progress}");
    watcher.kill().ok();
    watcher.wait().ok();
    // 25 % of 5, rounded down, may be unavailable: one.
    let available: Vec<i64> =
        seen.join().expect("reader").iter().filter_map(|line| line.trim().parse().ok()).collect();
    assert!(
        !available.is_empty() && available.iter().all(|count| *count >= 4),
        "fell below 4 available: {available:?}"
    );
    let address = format!("{}:80", cluster_ip());
    wait_for("the new version", Duration::from_secs(10), || {
        let page = get(&address)?;
        if page.contains("nginx:1.17.10") { Ok(()) } else { Err(page) }
    });
    kubectl(&["rollout", "undo", "deployment/nginx"]);
    kubectl(&["rollout", "status", "deployment/nginx", "--timeout=120s"]);
    wait_for("the old version", Duration::from_secs(10), || {
        let page = get(&address)?;
        if page.contains("nginx:1.17.9") { Ok(()) } else { Err(page) }
    });
}

#[test]
fn e_a_deleted_pod_is_replaced() {
    removed();
    let names = deployed();
    kubectl(&["delete", "pod", &names[0]]);
    let after = wait_for("three ready pods again", Duration::from_secs(60), || {
        let now = pods("default", APP);
        let ready = kubectl(&["get", "deployment", "nginx", "-o", "jsonpath={.status.readyReplicas}"]);
        if now.len() == 3 && ready == "3" && !now.contains(&names[0]) {
            Ok(now)
        } else {
            Err(format!("{now:?}, ready {ready}"))
        }
    });
    answers_from_all(&format!("{}:80", cluster_ip()), &after);
}

#[test]
fn f_logs_follow() {
    let names = deployed();
    let mut follower =
        kubectl_command(&["logs", "-f", &names[0]]).stdout(Stdio::piped()).spawn().expect("kubectl starts");
    let mut lines = BufReader::new(follower.stdout.take().expect("piped")).lines();
    let address = format!("{}:80", cluster_ip());
    wait_for("a request to the followed pod", Duration::from_secs(30), || {
        let response = get(&address)?;
        if served_by(&response) == Some(names[0].as_str()) { Ok(()) } else { Err("another pod".to_owned()) }
    });
    let access = lines.by_ref().map_while(Result::ok).find(|line| line.contains("GET / HTTP/1.1"));
    follower.kill().ok();
    follower.wait().ok();
    assert!(access.is_some(), "the follower ended without the request's line");
    let whole = kubectl(&["logs", &names[0], "--timestamps", "--tail=1"]);
    assert!(whole.trim_start().starts_with("20"), "a time stamp first: {whole}");
}

#[test]
fn g_exec_by_websocket_and_spdy() {
    let names = deployed();
    for websockets in ["true", "false"] {
        let output =
            kubectl_command(&["exec", &names[0], "--", "sh", "-c", "echo out; echo err >&2; exit 7"])
                .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets)
                .output()
                .expect("kubectl starts");
        assert_eq!(output.status.code(), Some(7), "websockets={websockets}: {}", said(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
        assert!(String::from_utf8_lossy(&output.stderr).contains("err\n"));
        // `script` gives kubectl a terminal.
        let shell = format!(
            "kubectl --kubeconfig {} exec -it {} -- sh -c 'tty; read word; echo got:$word'",
            kubeconfig().display(),
            names[0]
        );
        let mut child = Command::new("script")
            .args(["-qec", &shell, "/dev/null"])
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("script starts");
        std::io::Write::write_all(child.stdin.as_mut().expect("piped"), b"hello\n").expect("written");
        let output = child.wait_with_output().expect("script ends");
        let text = said(&output);
        assert!(text.contains("/dev/pts/") && text.contains("got:hello"), "websockets={websockets}: {text}");
    }
    let missing =
        said(&kubectl_command(&["exec", &names[0], "--", "no-such-tool"]).output().expect("kubectl starts"));
    assert!(missing.contains("no-such-tool") && missing.contains("executable file not found"), "{missing}");
}

#[test]
fn h_describe_tells_the_story() {
    let names = deployed();
    let text = kubectl(&["describe", "pod", &names[0]]);
    for part in [
        "Controlled By:  ReplicaSet/nginx-",
        "Successfully assigned default/",
        "Created container",
        "Started container",
        "Status:           Running",
    ] {
        assert!(text.contains(part), "`{part}` is missing in\n{text}");
    }
}

#[test]
fn i_port_forward() {
    let names = deployed();
    for websockets in ["true", "false"] {
        let mut child = kubectl_command(&["port-forward", &format!("pod/{}", names[0]), ":80"])
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets)
            .stdout(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("kubectl prints");
        let address = line.split_whitespace().nth(2).unwrap_or_default().to_owned();
        let page = get(&address);
        child.kill().ok();
        child.wait().ok();
        let page = page.unwrap_or_else(|error| panic!("websockets={websockets}: {line}: {error}"));
        assert_eq!(served_by(&page), Some(names[0].as_str()));
    }
}

#[test]
fn z_delete() {
    deployed();
    removed();
    let left = kubectl(&["get", "deployments,rs,pods,endpointslices", "-l", APP, "-o", "name"]);
    assert!(left.trim().is_empty(), "left behind: {left}");
    let refused = get("127.0.0.1:30000");
    assert!(refused.as_ref().is_err_and(|error| error.contains("refused")), "{refused:?}");
}

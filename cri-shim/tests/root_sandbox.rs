//! Sandboxes: what a pod's namespaces, files and parameters are, handlers, joined calls and refusals. Needs root.

mod support;

use std::path::Path;
use std::time::Duration;

use cri_shim_api::v1;
use cri_shim_api::v1::{NamespaceMode, NamespaceOption, PodSandboxState};
use futures::future::join_all;
use keelson_cri::handlers::SHIM;
use serde_json::json;
use support::cri::{Cri, PATIENCE, shell};
use tonic::Code;

fn with_namespaces(pod: &mut v1::PodSandboxConfig, options: NamespaceOption) {
    let linux = pod.linux.as_mut().expect("set");
    linux.security_context.get_or_insert_default().namespace_options = Some(options);
}

fn container_in(options: &NamespaceOption, name: &str) -> v1::ContainerConfig {
    let mut config = shell(name, "exec sleep 3600");
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut()).expect("set");
    security.namespace_options = Some(options.clone());
    config
}

async fn says(cri: &Cri, id: &str, script: &str) -> String {
    let answer = cri.exec(id, &["sh", "-c", script]).await;
    assert_eq!(answer.exit_code, 0, "{script}: {}", String::from_utf8_lossy(&answer.stderr));
    String::from_utf8_lossy(&answer.stdout).trim().to_owned()
}

async fn started(
    cri: &Cri,
    sandbox: &str,
    pod: &v1::PodSandboxConfig,
    config: v1::ContainerConfig,
) -> String {
    let id = Box::pin(cri.create(sandbox, pod, config)).await.expect("created");
    cri.launch(&id).await.expect("started");
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_has_its_own_name_parameters_and_shared_memory() {
    let cri = Cri::start().await;
    let mut pod = cri.pod("own");
    let sysctls = &mut pod.linux.as_mut().unwrap().sysctls;
    sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    sysctls.insert("net.ipv4.tcp_syncookies".into(), "0".into());
    let sandbox = cri.run(&pod).await.unwrap();
    let options = NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() };
    let one = started(&cri, &sandbox, &pod, container_in(&options, "one")).await;
    let two = started(&cri, &sandbox, &pod, container_in(&options, "two")).await;

    let seen = says(
        &cri,
        &one,
        "cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start kernel/shm_rmid_forced net/ipv4/tcp_syncookies \
         kernel/hostname; cat /etc/hostname; echo here > /dev/shm/note; cat /proc/mounts | tr ' ' '\n' > /tmp/m || true",
    )
    .await;
    assert_eq!(seen, "0\n1\n0\nown\nown");
    assert_eq!(says(&cri, &two, "cat /dev/shm/note").await, "here", "shared between containers");
    let mounts = says(&cri, &two, "cat /proc/mounts").await;
    let shm = mounts.lines().find(|line| line.contains(" /dev/shm ")).unwrap();
    assert!(shm.contains("size=65536k") && shm.contains("nosuid") && shm.contains("noexec"), "{shm}");
    let group_range = says(&cri, &two, "cat /proc/sys/net/ipv4/ping_group_range").await;
    assert_eq!(group_range.split_whitespace().collect::<Vec<_>>(), ["0", "2147483647"]);
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_counted_where_the_pod_says() {
    let cri = Cri::start().await;
    let shared = NamespaceOption { pid: NamespaceMode::Pod.into(), ..NamespaceOption::default() };
    let mut pod = cri.pod("shared");
    with_namespaces(&mut pod, shared.clone());
    let sandbox = cri.run(&pod).await.unwrap();
    let one = started(&cri, &sandbox, &pod, container_in(&shared, "one")).await;
    assert_eq!(says(&cri, &one, "cat /proc/1/comm").await, "pause");
    let target = NamespaceOption {
        pid: NamespaceMode::Target.into(),
        target_id: one.clone(),
        ..NamespaceOption::default()
    };
    let beside = started(&cri, &sandbox, &pod, container_in(&target, "beside")).await;
    assert_eq!(says(&cri, &beside, "cat /proc/1/comm").await, "pause");
    cri.remove(&sandbox).await;

    let all = NamespaceOption {
        network: NamespaceMode::Node.into(),
        pid: NamespaceMode::Node.into(),
        ipc: NamespaceMode::Node.into(),
        ..NamespaceOption::default()
    };
    let mut pod = cri.pod("node");
    with_namespaces(&mut pod, all.clone());
    let sandbox = cri.run(&pod).await.unwrap();
    let id = started(&cri, &sandbox, &pod, container_in(&all, "main")).await;
    let own = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string();
    for kind in ["net", "pid", "ipc", "uts"] {
        let link = says(&cri, &id, &format!("ls -l /proc/self/ns/{kind}")).await;
        assert!(link.ends_with(&own(kind)), "{kind}: {link}");
    }
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_may_have_users_of_its_own() {
    let mut cri = Cri::start().await;
    let maps = || vec![v1::IdMapping { host_id: 3_000_000, container_id: 0, length: 65_536 }];
    let users = v1::UserNamespace { mode: NamespaceMode::Pod.into(), uids: maps(), gids: maps() };
    let options = NamespaceOption { userns_options: Some(users), ..NamespaceOption::default() };
    let mut pod = cri.pod("users");
    with_namespaces(&mut pod, options.clone());
    let sandbox = cri.run(&pod).await.unwrap();
    let pause = cri.pause_pid(&sandbox).await;
    let map = std::fs::read_to_string(format!("/proc/{pause}/uid_map")).unwrap();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "3000000", "65536"]);
    let link = |kind: &str| std::fs::read_link(format!("/proc/{pause}/ns/{kind}")).unwrap();
    assert_ne!(link("user"), std::fs::read_link("/proc/self/ns/user").unwrap());
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: true };
    let info = cri.runtime().pod_sandbox_status(request).await.unwrap().into_inner().info["info"].clone();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let pinned =
        cni_plugins_host::netns::identity(std::path::Path::new(info["netns"].as_str().unwrap())).unwrap();
    assert_eq!(link("net").display().to_string(), format!("net:[{pinned}]"), "the pinned one is the pod's");
    // Only the owner of a network may set this, so it tells whose it is.
    let allowed = std::process::Command::new("nsenter")
        .args(["-t", &pause.to_string(), "-U", "-n", "-S", "0", "-G", "0"])
        .args([
            "sh",
            "-c",
            "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ip link set lo down && ip link set lo up",
        ])
        .output()
        .unwrap();
    assert!(allowed.status.success(), "{}", String::from_utf8_lossy(&allowed.stderr));
    cri.restart().await;
    assert_eq!(cri.state_of(&sandbox).await, PodSandboxState::SandboxReady);
    cri.remove(&sandbox).await;

    let wrong = v1::UserNamespace { mode: NamespaceMode::Pod.into(), ..v1::UserNamespace::default() };
    with_namespaces(&mut pod, NamespaceOption { userns_options: Some(wrong), ..NamespaceOption::default() });
    let refused = cri.run(&pod).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("userns"), "{refused}");
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::too_many_lines, reason = "one server, one walk through its handlers")]
async fn handlers_are_offered_where_they_work() {
    let mut cri = Cri::start().await;
    let status = |cri: &Cri| {
        let mut client = cri.runtime();
        async move { client.status(v1::StatusRequest { verbose: true }).await.unwrap().into_inner() }
    };
    let told = status(&cri).await;
    let names: Vec<&str> = told.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert!(names.contains(&"") && names.contains(&"runc"), "{names:?}");

    let run_with = |cri: &Cri, handler: &str, name: &str| {
        let request =
            v1::RunPodSandboxRequest { config: Some(cri.pod(name)), runtime_handler: handler.to_owned() };
        let mut client = cri.runtime();
        async move { client.run_pod_sandbox(request).await.map(|answer| answer.into_inner().pod_sandbox_id) }
    };
    let refused = run_with(&cri, "kata", "unknown").await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("\"kata\" is not configured; there are"), "{refused}");
    assert!(refused.message().contains("runc"), "{refused}");
    let sandbox = run_with(&cri, "runc", "named").await.unwrap();
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: false };
    let shown = cri.runtime().pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap();
    assert_eq!(shown.runtime_handler, "runc");
    cri.remove(&sandbox).await;

    let handlers = json!([
        { "name": "ordinary", "kind": "runc", "binary": "runc" },
        { "name": "broken", "kind": "runc", "binary": "/bin/false" },
        { "name": "gone", "kind": "keelson", "binary": "/no/such/shim" },
        { "name": "late", "kind": "keelson", "binary": cri.dir().join("late").join(SHIM) },
    ]);
    cri.reconfigure(&json!({ "handlers": handlers, "defaultHandler": "ordinary" })).await;
    let told = status(&cri).await;
    let names: Vec<&str> = told.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(names, ["", "ordinary"]);
    assert!(told.info["handlers"].contains("/no/such/shim"), "{}", told.info["handlers"]);
    for (handler, part) in [
        ("broken", "/bin/false"),
        ("gone", "/no/such/shim"),
        ("late", "late/containerd-shim"),
        ("runc", "not configured"),
    ] {
        let refused = run_with(&cri, handler, "refused").await.unwrap_err();
        assert!(
            refused.message().contains(part) && refused.message().contains("there are ordinary"),
            "{refused}"
        );
    }
    let pod = cri.pod("plain");
    let sandbox = cri.run(&pod).await.unwrap();
    let id = cri.script(&sandbox, &pod, "main", "exec sleep 3600").await;
    cri.answers(&id).await;
    cri.remove(&sandbox).await;

    // One that did not work at the start is tried again when a pod names it, some seconds later.
    let shim = Path::new(env!("CARGO_BIN_EXE_keelson-cri")).with_file_name(SHIM);
    std::fs::create_dir(cri.dir().join("late")).unwrap();
    std::os::unix::fs::symlink(shim, cri.dir().join("late").join(SHIM)).unwrap();
    let begun = tokio::time::Instant::now();
    let sandbox = loop {
        match run_with(&cri, "late", "late").await {
            Ok(sandbox) => break sandbox,
            Err(refused) => assert!(begun.elapsed() < PATIENCE, "{refused}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let late = cri.pod("late");
    let id = cri.script(&sandbox, &late, "main", "exec sleep 3600").await;
    cri.answers(&id).await;
    cri.remove(&sandbox).await;
    let told = status(&cri).await;
    let names: Vec<&str> = told.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(names, ["", "ordinary", "late"]);

    // Nothing chosen, and our own does not work: the next one does, and it is told once why.
    let handlers = json!([
        { "name": "ordinary", "kind": "runc", "binary": "runc" },
        { "name": "keelson", "kind": "keelson", "binary": "/no/such/shim" },
    ]);
    cri.reconfigure(&json!({ "handlers": handlers, "defaultHandler": null })).await;
    let told = status(&cri).await;
    assert!(told.info["handlers"].contains(r#""default":"ordinary""#), "{}", told.info["handlers"]);
    let sandbox = cri.run(&pod).await.unwrap();
    let id = cri.script(&sandbox, &pod, "main", "exec sleep 3600").await;
    cri.answers(&id).await;
    let log = std::fs::read_to_string(cri.dir().join("cri.log")).unwrap();
    let warned = log.lines().filter(|line| line.contains("the default handler does not work on this node"));
    assert_eq!(warned.filter(|line| line.contains("/no/such/shim")).count(), 1, "{log}");
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_join_the_one_under_way() {
    let cri = Cri::start().await;
    let pod = cri.pod("joined");
    let made = join_all((0..8).map(|_| cri.run(&pod))).await;
    let sandbox = made[0].clone().unwrap();
    assert!(made.iter().all(|id| id.as_ref().ok() == Some(&sandbox)), "{made:?}");
    let config = shell("main", "exec sleep 3600");
    let made = join_all((0..8).map(|_| cri.create(&sandbox, &pod, config.clone()))).await;
    let id = made[0].clone().unwrap();
    assert!(made.iter().all(|found| found.as_ref().ok() == Some(&id)), "{made:?}");
    cri.launch(&id).await.unwrap();

    // A caller that goes away stops nothing, and whoever comes later hears how it ended.
    let stop = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    let mut client = cri.runtime();
    let gone =
        tokio::time::timeout(std::time::Duration::from_millis(1), client.stop_pod_sandbox(stop.clone()));
    drop(gone.await);
    let stops = join_all((0..8).map(|_| {
        let (mut client, stop) = (cri.runtime(), stop.clone());
        async move { client.stop_pod_sandbox(stop).await.map(drop) }
    }));
    assert!(stops.await.iter().all(Result::is_ok));
    assert_eq!(cri.state_of(&sandbox).await, PodSandboxState::SandboxNotready);
    let removals = join_all((0..8).map(|_| {
        let mut client = cri.runtime();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        async move { client.remove_pod_sandbox(request).await.map(drop) }
    }));
    assert!(removals.await.iter().all(Result::is_ok));
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_sandboxes_are_refused_by_name_and_leave_nothing() {
    let cri = Cri::start().await;
    let changed = |change: &dyn Fn(&mut v1::PodSandboxConfig)| {
        let mut pod = cri.pod("bad");
        change(&mut pod);
        pod
    };
    let sysctl = |name: &str| {
        let name = name.to_owned();
        move |pod: &mut v1::PodSandboxConfig| {
            pod.linux.as_mut().unwrap().sysctls.insert(name.clone(), "1".into());
        }
    };
    let cases = [
        (changed(&|pod| pod.metadata = None), "metadata"),
        (changed(&|pod| pod.metadata.as_mut().unwrap().name.clear()), "metadata.name"),
        (changed(&|pod| pod.hostname = "x".repeat(65)), "hostname"),
        (changed(&sysctl("vm.swappiness")), "vm.swappiness"),
        (changed(&sysctl("net/../kernel/panic")), "net/../kernel/panic"),
        (
            changed(&|pod| {
                pod.annotations.insert("kubernetes.io/egress-bandwidth".into(), "fast".into());
            }),
            "egress-bandwidth",
        ),
        (changed(&|pod| pod.linux.as_mut().unwrap().cgroup_parent = "/../../etc".into()), "leads upwards"),
        (
            changed(&|pod| {
                let port = v1::PortMapping { container_port: 80, host_port: 70_000, ..Default::default() };
                pod.port_mappings.push(port);
            }),
            "70000",
        ),
    ];
    for (pod, part) in cases {
        let refused = cri.run(&pod).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(part), "{part} is not in {refused}");
    }
    let nothing = v1::RunPodSandboxRequest::default();
    assert_eq!(cri.runtime().run_pod_sandbox(nothing).await.unwrap_err().code(), Code::InvalidArgument);
    // What only the kernel refuses leaves nothing either.
    for parent in ["/cgroup.procs", "/a\0b"] {
        let impossible = changed(&|pod| pod.linux.as_mut().unwrap().cgroup_parent = parent.into());
        let refused = cri.run(&impossible).await.unwrap_err();
        assert!(refused.message().contains("make the cgroup"), "{refused}");
    }
    let listed = cri.runtime().list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap();
    assert!(listed.into_inner().items.is_empty(), "half-made ones stay");
    // A parameter of a namespace that the kernel does not have is found only by trying.
    let refused = cri.run(&changed(&sysctl("net.no.such.parameter"))).await.unwrap_err();
    assert!(
        refused.message().contains("no/such/parameter") || refused.message().contains("no.such.parameter"),
        "{refused}"
    );
    cri.assert_nothing_left().await;
}

/// Writes down what it was called with.
const WITNESS: &str = r#"#!/bin/sh
{ env | grep ^CNI_; cat; } > "DIR/seen-$CNI_COMMAND"
echo '{"cniVersion":"1.1.0","ips":[{"address":"10.88.0.7/24"}]}'
"#;

#[tokio::test(flavor = "multi_thread")]
async fn plugins_are_told_what_they_can_use() {
    let cri = Cri::start().await;
    let plugin = cri.dir().join("bin/witness");
    std::fs::write(&plugin, WITNESS.replace("DIR", &cri.dir().display().to_string())).unwrap();
    std::fs::set_permissions(&plugin, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let offered = ["portMappings", "bandwidth", "dns", "cgroupPath", "io.kubernetes.cri.pod-annotations"];
    let offered: serde_json::Map<_, _> =
        offered.into_iter().map(|name| (name.to_owned(), true.into())).collect();
    let list = json!({ "cniVersion": "1.1.0", "name": "told", "plugins": [
        { "type": "witness", "capabilities": offered },
    ]});
    std::fs::write(cri.dir().join("net.d/new"), list.to_string()).unwrap();
    std::fs::rename(cri.dir().join("net.d/new"), cri.dir().join("net.d/05-told.conflist")).unwrap();
    let begun = tokio::time::Instant::now();
    loop {
        let answer = cri.runtime().status(v1::StatusRequest { verbose: true }).await.unwrap().into_inner();
        if answer.info.values().any(|text| text.contains("witness")) {
            break;
        }
        assert!(begun.elapsed() < support::cri::PATIENCE, "the new network is not seen: {:?}", answer.info);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }

    let mut pod = cri.pod("told");
    let mapping = |protocol: v1::Protocol, host_port, host_ip: &str| v1::PortMapping {
        protocol: protocol.into(),
        container_port: 80,
        host_port,
        host_ip: host_ip.to_owned(),
    };
    pod.port_mappings = vec![
        mapping(v1::Protocol::Tcp, 8080, ""),
        mapping(v1::Protocol::Udp, 8081, "192.0.2.1"),
        mapping(v1::Protocol::Sctp, 8082, "2001:db8::1"),
        mapping(v1::Protocol::Tcp, 0, ""),
    ];
    let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    pod.dns_config = Some(v1::DnsConfig {
        servers: list(&["10.96.0.10", "fd00::a"]),
        searches: list(&["one.example"]),
        options: list(&["ndots:5"]),
    });
    pod.annotations.insert("kubernetes.io/egress-bandwidth".into(), "5M".into());
    let sandbox = cri.run(&pod).await.unwrap();
    cri.remove(&sandbox).await;
    for verb in ["ADD", "DEL"] {
        let text = std::fs::read_to_string(cri.dir().join(format!("seen-{verb}"))).unwrap();
        let (environment, config) = text.split_at(text.find('{').unwrap());
        let wanted = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=told;K8S_POD_INFRA_CONTAINER_ID={sandbox};\
             K8S_POD_UID=uid-told"
        );
        for line in
            [format!("CNI_ARGS={wanted}"), format!("CNI_CONTAINERID={sandbox}"), "CNI_IFNAME=eth0".into()]
        {
            assert!(environment.contains(&line), "{verb}: {line} is not in {environment}");
        }
        assert!(environment.contains("CNI_NETNS=/"), "{verb}: {environment}");
        let config: serde_json::Value = serde_json::from_str(config).unwrap();
        let told = &config["runtimeConfig"];
        let port = |number, protocol, address| json!({ "hostPort": number, "containerPort": 80, "protocol": protocol, "hostIP": address });
        let ports =
            json!([port(8080, "tcp", ""), port(8081, "udp", "192.0.2.1"), port(8082, "sctp", "2001:db8::1")]);
        assert_eq!(told["portMappings"], ports, "{verb}");
        let dns = json!({ "servers": ["10.96.0.10", "fd00::a"], "searches": ["one.example"], "options": ["ndots:5"] });
        assert_eq!(told["dns"], dns, "{verb}");
        assert_eq!(told["cgroupPath"], json!(pod.linux.as_ref().unwrap().cgroup_parent), "{verb}");
        assert_eq!(told["bandwidth"]["egressRate"], json!(5_000_000), "{verb}");
        assert!(told["bandwidth"]["ingressRate"].is_null(), "{verb}: {told}");
        assert_eq!(told["io.kubernetes.cri.pod-annotations"]["note"], json!("kept"), "{verb}");
    }
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_unknown_ids_get_precise_answers() {
    let cri = Cri::start().await;
    let mut client = cri.runtime();
    for number in 0..10_000_u32 {
        let id = match number % 4 {
            0 => format!("{number:064x}"),
            1 => format!("../../../{number}"),
            2 => String::new(),
            _ => format!("{number}\u{0}\n{}", "x".repeat(500)),
        };
        let (sandbox, container) = (id.clone(), id.clone());
        let missing = match number % 5 {
            0 => client
                .pod_sandbox_status(v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox, verbose: true })
                .await
                .map(drop),
            1 => client
                .container_status(v1::ContainerStatusRequest { container_id: container, verbose: true })
                .await
                .map(drop),
            2 => {
                client.start_container(v1::StartContainerRequest { container_id: container }).await.map(drop)
            }
            3 => client
                .exec_sync(v1::ExecSyncRequest {
                    container_id: container,
                    cmd: vec!["true".into()],
                    timeout: 1,
                })
                .await
                .map(drop),
            _ => {
                let config = Some(shell("main", "true"));
                let request =
                    v1::CreateContainerRequest { pod_sandbox_id: sandbox, config, sandbox_config: None };
                client.create_container(request).await.map(drop)
            }
        };
        let refused = missing.unwrap_err();
        assert!(matches!(refused.code(), Code::NotFound | Code::InvalidArgument), "{id:?}: {refused}");
        let fine = match number % 4 {
            0 => client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id }).await.map(drop),
            1 => {
                client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id }).await.map(drop)
            }
            2 => client
                .stop_container(v1::StopContainerRequest { container_id: id, timeout: 9 })
                .await
                .map(drop),
            _ => client.remove_container(v1::RemoveContainerRequest { container_id: id }).await.map(drop),
        };
        fine.expect("stopping and removing what is not there is fine");
    }
    cri.assert_nothing_left().await;
}

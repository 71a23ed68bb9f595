//! Networking, sysctls and what pods share: addresses, names, ports, several containers in a pod.

use anyhow::{Context, Result};
use cri_shim_api::v1::{self, NamespaceMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::case::{Case, case, holds, refused, same};
use super::super::context::{T, pod_security, security};

pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let group = "networking";
    all.extend([
        case(group, "a pod has an address, and it is the one inside", address),
        case(group, "two pods have two addresses and reach each other", two_pods),
        case(group, "loopback is up in the pod", loopback),
        case(group, "the hostname is the configured one, in /etc/hostname too", hostname),
        case(group, "resolv.conf has the configured servers, searches and options", dns),
        case(group, "resolv.conf is the host's when nothing is configured", host_dns),
        case(
            group,
            "/etc/hosts, /etc/hostname and /etc/resolv.conf can be written unless the root is read-only",
            etc_files,
        ),
        case(group, "/etc/hosts is the host's when nothing is mounted there", host_hosts),
        case(group, "a container port is reached at the pod's address", container_port),
        case(group, "a host port is reached on the host, and is closed after Stop", host_port),
        case(group, "a host port with an address is reached at that address only", host_port_address),
        case(
            group,
            "a pod with the host's network has no address of its own and the host's devices",
            host_net,
        ),
        case(group, "the address of a removed pod can be given again", addresses_return).serial(),
        case(group, "the status keeps no address after Stop that another pod may get", no_ip_after_stop),
    ]);
    let group = "sysctl";
    all.extend([
        case(group, "a safe one is set in the pod", safe_sysctl),
        case(group, "an unsafe one is set in the pod", unsafe_sysctl),
        case(group, "unprivileged ports and ping are allowed by default", default_sysctls),
        case(group, "one that does not exist is refused and named, and nothing stays", bad_sysctl),
    ]);
    let group = "multiple containers";
    all.extend([
        case(group, "share the network", shared_network),
        case(group, "share IPC and /dev/shm", shared_ipc),
        case(group, "have logs of their own", own_logs),
        case(group, "run commands each in its own", own_exec),
        case(group, "have file systems of their own", own_files),
        case(group, "one is removed while the other runs on", remove_one),
        case(group, "eight start at once", eight_at_once),
    ]);
    all
}

/// A pod's configuration in the host's network, as the kubelet sends it: without a hostname.
pub(super) fn host_network(config: &mut v1::PodSandboxConfig) {
    config.hostname = String::new();
    pod_security(config).namespace_options.get_or_insert_default().network = NamespaceMode::Node.into();
}

async fn ip(t: &T, pod: &str) -> Result<String> {
    let ip = t.pod_status(pod).await?.network.unwrap_or_default().ip;
    anyhow::ensure!(ip.parse::<std::net::IpAddr>().is_ok(), "the pod's address is {ip:?}");
    Ok(ip)
}

async fn address(t: T) -> Result<()> {
    let (pod, id) = t.idle().await?;
    let ip = ip(&t, &pod.id).await?;
    holds("eth0", &t.sh(&id, "ip addr show eth0").await?, &ip)
}

async fn two_pods(t: T) -> Result<()> {
    let ((one, id), (other, _)) = (t.idle().await?, t.idle().await?);
    let (first, second) = (ip(&t, &one.id).await?, ip(&t, &other.id).await?);
    anyhow::ensure!(first != second, "both have {first}");
    let script = format!("ping -c 1 -W 30 {second}");
    t.sh(&id, &script).await.map(drop)
}

async fn loopback(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    holds("lo", &t.sh(&id, "ip link show lo").await?, "UP")?;
    t.sh(&id, "ping -c 1 -W 30 127.0.0.1").await.map(drop)
}

async fn hostname(t: T) -> Result<()> {
    let mut config = t.pod();
    config.hostname = "a-name-of-its-own".to_owned();
    let pod = t.run(&config).await?;
    let text = t.output_in(&pod, "hostname; cat /etc/hostname", |_| ()).await?;
    same("the names", text.as_str(), "a-name-of-its-own\na-name-of-its-own\n")
}

async fn dns(t: T) -> Result<()> {
    let mut config = t.pod();
    let list = super::super::context::strings;
    config.dns_config = Some(v1::DnsConfig {
        servers: list(&["10.10.10.10", "fd00::10"]),
        searches: list(&["one.example", "two.example"]),
        options: list(&["ndots:5", "edns0"]),
    });
    let pod = t.run(&config).await?;
    let text = t.output_in(&pod, "cat /etc/resolv.conf", |_| ()).await?;
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let wanted = [
        "nameserver 10.10.10.10",
        "nameserver fd00::10",
        "options ndots:5 edns0",
        "search one.example two.example",
    ];
    same("resolv.conf", lines, wanted.to_vec())
}

async fn host_dns(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let text = t.output_in(&pod, "cat /etc/resolv.conf", |_| ()).await?;
    same("resolv.conf", text.trim_end(), std::fs::read_to_string("/etc/resolv.conf")?.trim_end())
}

async fn host_hosts(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let text = t.output_in(&pod, "cat /etc/hosts", |_| ()).await?;
    same("hosts", text.trim_end(), std::fs::read_to_string("/etc/hosts")?.trim_end())
}

async fn etc_files(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let script =
        "for f in hosts hostname resolv.conf; do echo x >>/etc/$f && echo written $f; done 2>/dev/null; true";
    let text = t.output_in(&pod, script, |_| ()).await?;
    same("a writable root", text.as_str(), "written hosts\nwritten hostname\nwritten resolv.conf\n")?;
    let text = t.output_in(&pod, script, |config| security(config).readonly_rootfs = true).await?;
    same("a read-only root", text.as_str(), "")
}

/// Asks an HTTP server.
async fn get(address: &str) -> Result<String> {
    let mut stream = tokio::net::TcpStream::connect(address).await.with_context(|| address.to_owned())?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

async fn container_port(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell(super::streaming::HTTPD)).await?;
    super::streaming::listening(&t, &id, 8080).await?;
    let address = format!("{}:8080", ip(&t, &pod.id).await?);
    holds("the answer", &get(&address).await?, "served")
}

async fn host_port(t: T) -> Result<()> {
    let mut config = t.pod();
    let (container_port, host_port) = (8080, 12000);
    config.port_mappings = vec![v1::PortMapping { container_port, host_port, ..Default::default() }];
    let pod = t.run(&config).await?;
    let id = t.launch(&pod, &t.shell(super::streaming::HTTPD)).await?;
    super::streaming::listening(&t, &id, 8080).await?;
    holds("the answer", &get("127.0.0.1:12000").await?, "served")?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    anyhow::ensure!(get("127.0.0.1:12000").await.is_err(), "the port answers after Stop");
    Ok(())
}

async fn host_port_address(t: T) -> Result<()> {
    let mut config = t.pod();
    let (container_port, host_port, host_ip) = (8080, 12001, "127.0.0.2".to_owned());
    config.port_mappings = vec![v1::PortMapping { container_port, host_port, host_ip, ..Default::default() }];
    let pod = t.run(&config).await?;
    let id = t.launch(&pod, &t.shell(super::streaming::HTTPD)).await?;
    super::streaming::listening(&t, &id, 8080).await?;
    holds("the answer", &get("127.0.0.2:12001").await?, "served")?;
    anyhow::ensure!(get("127.0.0.3:12001").await.is_err(), "another address answers, too");
    Ok(())
}

async fn host_net(t: T) -> Result<()> {
    let mut config = t.pod();
    host_network(&mut config);
    let pod = t.run(&config).await?;
    same("ip", t.pod_status(&pod.id).await?.network.unwrap_or_default().ip.as_str(), "")?;
    let text = t
        .output_in(&pod, "readlink /proc/self/ns/net; hostname", |config| {
            security(config).namespace_options.get_or_insert_default().network = NamespaceMode::Node.into();
        })
        .await?;
    let own = std::fs::read_link("/proc/self/ns/net")?.display().to_string();
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    same("namespace and name", text, format!("{own}\n{}\n", name.trim()))
}

async fn addresses_return(t: T) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..5 {
        let pod = t.sandbox().await?;
        seen.insert(ip(&t, &pod.id).await?);
        t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
        t.try_remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    }
    anyhow::ensure!(!seen.is_empty(), "no address");
    Ok(())
}

async fn no_ip_after_stop(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    ip(&t, &pod.id).await?;
    t.try_stop_pod(&pod.id).await.context("StopPodSandbox")?;
    let status = t.pod_status(&pod.id).await?;
    same("state", status.state(), v1::PodSandboxState::SandboxNotready)?;
    same("ip", status.network.unwrap_or_default().ip.as_str(), "")
}

async fn sysctl(t: &T, name: &str, value: &str) -> Result<String> {
    let mut config = t.pod();
    config.linux.get_or_insert_default().sysctls.insert(name.to_owned(), value.to_owned());
    let pod = t.run(&config).await?;
    let path = name.replace('.', "/");
    Ok(t.output_in(&pod, &format!("cat /proc/sys/{path}"), |_| ()).await?.trim().to_owned())
}

async fn safe_sysctl(t: T) -> Result<()> {
    same("kernel.shm_rmid_forced", sysctl(&t, "kernel.shm_rmid_forced", "1").await?.as_str(), "1")
}

async fn unsafe_sysctl(t: T) -> Result<()> {
    same("fs.mqueue.msg_max", sysctl(&t, "fs.mqueue.msg_max", "100").await?.as_str(), "100")?;
    same(
        "net.ipv4.ip_local_port_range",
        sysctl(&t, "net.ipv4.ip_local_port_range", "2000 3000").await?.as_str(),
        "2000\t3000",
    )
}

async fn default_sysctls(t: T) -> Result<()> {
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range";
    same("the defaults", t.output(script, |_| ()).await?.as_str(), "0\n0\t2147483647\n")
}

async fn bad_sysctl(t: T) -> Result<()> {
    let mut config = t.pod();
    config.linux.get_or_insert_default().sysctls.insert("kernel.nobody_has_this".to_owned(), "1".to_owned());
    let uid = config.metadata.clone().unwrap_or_default().uid;
    let status = refused("an unknown sysctl", t.try_run(&config).await)?;
    holds("the error", status.message(), "nobody_has_this")?;
    let answer =
        t.rt().list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.context("ListPodSandbox")?;
    let left = answer.into_inner().items;
    let left =
        left.iter().filter(|item| item.metadata.as_ref().is_some_and(|known| known.uid == uid)).count();
    same("sandboxes left", left, 0)
}

async fn shared_network(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let server = t.launch(&pod, &t.shell(super::streaming::HTTPD)).await?;
    super::streaming::listening(&t, &server, 8080).await?;
    same(
        "the answer",
        t.output_in(&pod, "wget -qO- http://127.0.0.1:8080/", |_| ()).await?.as_str(),
        "served\n",
    )
}

async fn shared_ipc(t: T) -> Result<()> {
    let (pod, first) = t.idle().await?;
    t.sh(&first, "echo shared >/dev/shm/file").await?;
    let text = t.output_in(&pod, "cat /dev/shm/file; readlink /proc/self/ns/ipc", |_| ()).await?;
    same("both", text, format!("shared\n{}\n", t.sh(&first, "readlink /proc/self/ns/ipc").await?))
}

async fn own_logs(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    for text in ["one", "two"] {
        same("the log", t.output_in(&pod, &format!("echo {text}"), |_| ()).await?, format!("{text}\n"))?;
    }
    Ok(())
}

async fn own_exec(t: T) -> Result<()> {
    let (pod, first) = t.idle_with(|config| config.envs = env("first")).await?;
    let mut config = t.shell(super::super::context::IDLE);
    config.envs = env("second");
    let second = t.launch(&pod, &config).await?;
    same("first", t.sh(&first, "echo $WHO").await?.as_str(), "first")?;
    same("second", t.sh(&second, "echo $WHO").await?.as_str(), "second")
}

fn env(value: &str) -> Vec<v1::KeyValue> {
    vec![v1::KeyValue { key: "WHO".to_owned(), value: value.to_owned() }]
}

async fn own_files(t: T) -> Result<()> {
    let (pod, first) = t.idle().await?;
    t.sh(&first, "echo mine >/file").await?;
    same("the other", t.output_in(&pod, "ls /file 2>&1 | grep -c 'No such'", |_| ()).await?.trim(), "1")
}

async fn remove_one(t: T) -> Result<()> {
    let (pod, first) = t.idle().await?;
    let second = t.launch(&pod, &t.shell(super::super::context::IDLE)).await?;
    t.try_remove(&first).await.context("RemoveContainer")?;
    same("the other", t.sh(&second, "echo alive").await?.as_str(), "alive")?;
    same("the pod", t.pod_status(&pod.id).await?.state(), v1::PodSandboxState::SandboxReady)
}

async fn eight_at_once(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let configs: Vec<_> = (0..8).map(|_| t.shell(super::super::context::IDLE)).collect();
    let ids = futures::future::try_join_all(configs.iter().map(|config| t.launch(&pod, config))).await?;
    for id in &ids {
        same("a container", t.sh(id, "echo alive").await?.as_str(), "alive")?;
    }
    Ok(())
}

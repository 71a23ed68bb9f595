//! Names, addresses and namespaces of the network.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same, skip};
use super::super::context::{IDLE, T};
use super::super::live::{Live, container};
use super::super::pod::Pod;
use super::prints;

pub(super) fn cases() -> Vec<Case<T>> {
    let (hosts, names, net) = ("KubeletManagedEtcHosts", "Hostname of Pod", "Networking");
    let dns = "DNS configuration of Pod";
    vec![
        case(hosts, "/etc/hosts is the kubelet's, with the pod's address and name", hosts_file),
        case(hosts, "hostAliases are added", host_aliases),
        case(hosts, "with hostNetwork it is the node's file", hosts_of_node),
        case(hosts, "a container's own mount of /etc/hosts stays", own_hosts),
        prints(
            hosts,
            "it has mode 0644 and belongs to root",
            "stat -c '%a %u' /etc/hosts",
            |pod| pod,
            "644 0",
        ),
        case(names, "the hostname is the pod's name", hostname),
        prints(
            names,
            "spec.hostname is the hostname",
            "hostname",
            |pod| pod.spec(json!({"hostname": "web"})),
            "web",
        ),
        case(names, "hostname and subdomain make a full name", subdomain),
        case(names, "setHostnameAsFQDN makes the full name the hostname", fqdn),
        case(names, "a name of more than 63 characters is cut", long_name),
        case(names, "hostnameOverride is the hostname", hostname_override),
        case(dns, "dnsPolicy None takes only what dnsConfig says", dns_none),
        case(dns, "dnsPolicy Default is the node's configuration", dns_default),
        case(
            dns,
            "dnsPolicy ClusterFirst asks the cluster's servers, or tells that there is none",
            dns_cluster_first,
        ),
        case(dns, "dnsConfig is added to the policy's", dns_added),
        case(dns, "dnsPolicy None without a server is refused", dns_none_refused),
        case(net, "pods reach each other by TCP", between_pods),
        case(net, "a pod exchanges datagrams with the node", datagrams),
        case(net, "containers of a pod reach each other on the loopback", loopback),
        case(net, "a pod reaches itself at its own address", itself),
        case(net, "hostNetwork gives the node's addresses and interfaces", host_network),
        case(net, "a pod in the node's network reaches pods, and they reach it", node_and_pod),
        case(net, "hostPort leads to the container", host_port),
        case(net, "hostPort of one address leads only from there", host_port_address),
        case(net, "two pods with one hostPort are not both admitted", host_port_twice),
        case(net, "a pod reaches a service's address", service),
        case(net, "a pod reaches the API server at its service", api_server),
        case(net, "a pod has one address and one interface beside the loopback", interfaces),
    ]
}

async fn hosts_file(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let text = live.exec("cat /etc/hosts").await?;
    let address = live.address().await?;
    let lines: Vec<&str> = text.lines().collect();
    same("the first line", lines.first().copied(), Some("# Kubernetes-managed hosts file."))?;
    let own = format!("{address}\t{}", live.name);
    for line in ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", own.as_str()] {
        ensure!(lines.contains(&line), "{line:?} is missing: {text}");
    }
    Ok(())
}

async fn host_aliases(t: T) -> Result<()> {
    let aliases = json!([{"ip": "192.0.2.7", "hostnames": ["one", "two.example.com"]}, {"ip": "192.0.2.8", "hostnames": ["three"]}]);
    let text = t.output(t.pod("cat /etc/hosts").spec(json!({"hostAliases": aliases}))).await?;
    holds(
        "the file",
        &text,
        "# Entries added by HostAliases.\n192.0.2.7\tone\ttwo.example.com\n192.0.2.8\tthree\n",
    )
}

async fn hosts_of_node(t: T) -> Result<()> {
    let pod = t
        .pod("head -1 /etc/hosts; sed 1d /etc/hosts | cmp - /v/etc/hosts && echo equal")
        .spec(json!({"hostNetwork": true}));
    let output = t.output(pod.volume("etc", json!({"hostPath": {"path": "/etc"}}))).await?;
    same("the output", output.as_str(), "# Kubernetes-managed hosts file (host network).\nequal\n")
}

async fn own_hosts(t: T) -> Result<()> {
    t.config_map("hosts", json!({"hosts": "127.0.0.1 mine\n"})).await?;
    let mount = json!({"mountPath": "/etc/hosts", "subPath": "hosts"});
    let output = t
        .output(t.pod("cat /etc/hosts").volume_at("hosts", json!({"configMap": {"name": "hosts"}}), mount))
        .await?;
    same("the file", output.as_str(), "127.0.0.1 mine\n")
}

async fn hostname(t: T) -> Result<()> {
    let pod = t.pod("hostname; cat /etc/hostname");
    let name = pod.name();
    same("the names", t.output(pod).await?, format!("{name}\n{name}\n"))
}

/// The names that a pod of a domain finds for itself.
async fn full_name(t: &T, more: Value) -> Result<(String, String)> {
    let pod = t
        .pod("hostname; grep -w web /etc/hosts | tr '\\t' ' ' | cut -d' ' -f2-")
        .spec(json!({"hostname": "web", "subdomain": "shop"}));
    let output = t.output(pod.spec(more)).await?;
    let (name, hosts) = output.split_once('\n').unwrap_or_default();
    Ok((name.to_owned(), hosts.trim().to_owned()))
}

async fn subdomain(t: T) -> Result<()> {
    let (name, hosts) = full_name(&t, json!({})).await?;
    same("the hostname", name.as_str(), "web")?;
    let start = format!("web.shop.{}.svc.", t.namespace().await?);
    ensure!(hosts.starts_with(&start) && hosts.ends_with(" web"), "/etc/hosts has {hosts:?}, not {start:?}…");
    Ok(())
}

async fn fqdn(t: T) -> Result<()> {
    let (name, _) = full_name(&t, json!({"setHostnameAsFQDN": true})).await?;
    let start = format!("web.shop.{}.svc.", t.namespace().await?);
    ensure!(name.starts_with(&start), "the hostname is {name:?}, not {start:?}…");
    Ok(())
}

async fn long_name(t: T) -> Result<()> {
    let name = format!("{}-{}", "a".repeat(62), "b".repeat(20));
    let output = t.output(t.pod("hostname").named(&name)).await?;
    same("the hostname", output.trim(), "a".repeat(62).as_str())
}

async fn hostname_override(t: T) -> Result<()> {
    let live = t.run(t.idle().spec(json!({"hostnameOverride": "over.example.com"}))).await?;
    let pod = live.ready().await?;
    if pod["spec"]["hostnameOverride"].is_null() {
        return skip("the cluster does not know spec.hostnameOverride");
    }
    same("the hostname", live.exec("hostname").await?.as_str(), "over.example.com")
}

async fn dns_none(t: T) -> Result<()> {
    let config = json!({"nameservers": ["192.0.2.1", "192.0.2.2"], "searches": ["one.example", "two.example"],
        "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]});
    let output = t
        .output(t.pod("cat /etc/resolv.conf").spec(json!({"dnsPolicy": "None", "dnsConfig": config})))
        .await?;
    let mut lines: Vec<&str> = output.lines().collect();
    lines.sort_unstable();
    let wanted = [
        "nameserver 192.0.2.1",
        "nameserver 192.0.2.2",
        "options ndots:2 edns0",
        "search one.example two.example",
    ];
    same("the lines", lines, wanted.to_vec())
}

/// Servers of a resolv.conf, in their order.
fn servers(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("nameserver ")).map(str::trim).collect()
}

async fn dns_default(t: T) -> Result<()> {
    let config = super::kubelet::config(&t).await?;
    let file = config["resolvConf"].as_str().filter(|file| !file.is_empty()).unwrap_or("/etc/resolv.conf");
    let (directory, name) = file.rsplit_once('/').unwrap_or(("/etc", "resolv.conf"));
    let script = format!("cat /etc/resolv.conf; echo ---; cat /v/etc/{name}");
    let pod = t
        .pod(&script)
        .spec(json!({"dnsPolicy": "Default"}))
        .volume("etc", json!({"hostPath": {"path": directory}}));
    let output = t.output(pod).await?;
    let (own, node) = output.split_once("---").unwrap_or_default();
    let wanted: Vec<&str> = servers(node).into_iter().take(3).collect();
    same("the servers", servers(own), wanted)
}

async fn dns_cluster_first(t: T) -> Result<()> {
    let config = super::kubelet::config(&t).await?;
    let wanted: Vec<&str> =
        config["clusterDNS"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let live = t.ready(t.idle().spec(json!({"dnsPolicy": "ClusterFirst"}))).await?;
    if wanted.is_empty() {
        return live
            .event("MissingClusterDNS", "kubelet does not have ClusterDNS IP configured")
            .await
            .map(drop);
    }
    let text = live.exec("cat /etc/resolv.conf").await?;
    same("the servers", servers(&text), wanted)?;
    let domain = config["clusterDomain"].as_str().unwrap_or("cluster.local");
    let search = format!("search {}.svc.{domain} svc.{domain} {domain}", live.namespace);
    holds("the file", &text, &search)?;
    holds("the file", &text, "ndots:5")
}

async fn dns_added(t: T) -> Result<()> {
    let config = json!({"nameservers": ["192.0.2.9"], "searches": ["added.example"], "options": [{"name": "timeout", "value": "7"}]});
    let output = t
        .output(t.pod("cat /etc/resolv.conf").spec(json!({"dnsPolicy": "Default", "dnsConfig": config})))
        .await?;
    let line =
        |start: &str| output.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_owned();
    ensure!(line("search").split_whitespace().any(|word| word == "added.example"), "{output}");
    ensure!(line("options").split_whitespace().any(|word| word == "timeout:7"), "{output}");
    let all = servers(&output);
    ensure!(all.contains(&"192.0.2.9") || all.len() == 3, "{output}");
    Ok(())
}

async fn dns_none_refused(t: T) -> Result<()> {
    let refused = t.refused(t.idle().spec(json!({"dnsPolicy": "None"}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "spec.dnsConfig")
}

/// Serves its name over HTTP on a port.
fn named_server(t: &T, port: u16) -> Pod {
    let script = format!("mkdir /tmp/www; hostname > /tmp/www/name; httpd -p {port} -h /tmp/www; {IDLE}");
    let probe = json!({"tcpSocket": {"port": port}, "periodSeconds": 1});
    t.pod(&script).main(json!({"readinessProbe": probe}))
}

/// An address in a URL.
fn bracketed(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// Asks from a pod; the answer must be the server's name.
async fn asks(from: &Live, address: &str, port: u16, server: &Live) -> Result<()> {
    let url = format!("http://{}:{port}/name", bracketed(address));
    from.exec_until(&format!("[ \"$(timeout 5 wget -q -O - {url})\" = {} ]", server.name)).await
}

async fn between_pods(t: T) -> Result<()> {
    let (server, client) = tokio::try_join!(t.ready(named_server(&t, 8080)), t.ready(t.idle()))?;
    asks(&client, &server.address().await?, 8080, &server).await
}

async fn datagrams(t: T) -> Result<()> {
    let address = t.need_local()?;
    let socket = tokio::net::UdpSocket::bind((address, 0)).await?;
    let port = socket.local_addr()?.port();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        // Every request for a file is answered by its first and last block.
        while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
            socket.send_to(b"\x00\x03\x00\x01from the node", from).await.ok();
        }
    });
    let script = format!("tftp -g -r any -l /tmp/got {address} {port} && cat /tmp/got");
    same("what came", t.output(t.pod(&script)).await?.as_str(), "from the node")
}

async fn loopback(t: T) -> Result<()> {
    let pod = t.idle().beside(
        "other",
        &format!("mkdir /tmp/www; echo beside > /tmp/www/name; httpd -p 8080 -h /tmp/www; {IDLE}"),
        json!({}),
    );
    let live = t.ready(pod).await?;
    live.exec_until("[ \"$(wget -q -O - http://127.0.0.1:8080/name)\" = beside ]").await
}

async fn itself(t: T) -> Result<()> {
    let live = t.ready(named_server(&t, 8080)).await?;
    asks(&live, &live.address().await?, 8080, &live).await
}

async fn host_network(t: T) -> Result<()> {
    let spec = json!({"hostNetwork": true});
    let (one, two) = tokio::try_join!(t.ready(t.idle().spec(spec.clone())), t.ready(t.idle().spec(spec)))?;
    let pod = one.until("its address", |pod| pod["status"]["podIP"].is_string()).await?;
    same("the pod's address", &pod["status"]["podIP"], &pod["status"]["hostIP"])?;
    let namespace = "readlink /proc/self/ns/net";
    same("the namespace", one.exec(namespace).await?, two.exec(namespace).await?)
}

async fn node_and_pod(t: T) -> Result<()> {
    // A port that the node does not use for connections of its own, nor anybody else for services.
    let port = 18231;
    let server = named_server(&t, port).spec(json!({"hostNetwork": true}));
    let (host, pod) = tokio::try_join!(t.ready(server), t.ready(named_server(&t, 8080)))?;
    asks(&host, &pod.address().await?, 8080, &pod).await?;
    let name = host.exec("cat /tmp/www/name").await?;
    let url = format!("http://{}:{port}/name", bracketed(&t.node_address()?.to_string()));
    pod.exec_until(&format!("[ \"$(timeout 5 wget -q -O - {url})\" = {name} ]")).await
}

fn with_port(pod: Pod, port: Value) -> Pod {
    pod.main(json!({"ports": [port]}))
}

async fn host_port(t: T) -> Result<()> {
    let server = with_port(named_server(&t, 8080), json!({"containerPort": 8080, "hostPort": 18232}));
    let client = t.idle().spec(json!({"hostNetwork": true}));
    let (server, client, pod) = tokio::try_join!(t.ready(server), t.ready(client), t.ready(t.idle()))?;
    let node = t.node_address()?.to_string();
    asks(&client, &node, 18232, &server).await?;
    asks(&pod, &node, 18232, &server).await
}

async fn host_port_address(t: T) -> Result<()> {
    let port = json!({"containerPort": 8080, "hostPort": 18233, "hostIP": "127.0.0.1"});
    let (server, client) = tokio::try_join!(
        t.ready(with_port(named_server(&t, 8080), port)),
        t.ready(t.idle().spec(json!({"hostNetwork": true})))
    )?;
    asks(&client, "127.0.0.1", 18233, &server).await?;
    let node = bracketed(&t.node_address()?.to_string());
    client.exec(&format!("! timeout 5 wget -q -O - http://{node}:18233/name")).await.map(drop)
}

async fn host_port_twice(t: T) -> Result<()> {
    let port = json!({"containerPort": 8080, "hostPort": 18234});
    t.ready(with_port(t.idle(), port.clone())).await?;
    let second = t.run(with_port(t.idle(), port)).await?;
    let pod = second.failed("NodePorts").await?;
    holds(
        "the message",
        pod["status"]["message"].as_str().unwrap_or_default(),
        "Predicate NodePorts failed",
    )?;
    second.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn service(t: T) -> Result<()> {
    let labelled = named_server(&t, 8080).metadata(json!({"labels": {"app": "named"}}));
    let (server, client) = tokio::try_join!(t.ready(labelled), t.ready(t.idle()))?;
    let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "named"},
        "spec": {"selector": {"app": "named"}, "ports": [{"port": 80, "targetPort": 8080}]}});
    let made = t.api().post(&t.path("services").await?, &object).await?;
    asks(&client, made["spec"]["clusterIP"].as_str().unwrap_or_default(), 80, &server).await
}

async fn api_server(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    // Without credentials: any answer of the server is one.
    live.exec_until("timeout 10 nc -w 5 $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT </dev/null").await
}

async fn interfaces(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let address = live.address().await?;
    let names = live.exec("ls /sys/class/net | sort | tr '\\n' ' '").await?;
    ensure!(names.split_whitespace().any(|name| name == "lo"), "no loopback: {names}");
    ensure!(names.split_whitespace().any(|name| name == "eth0"), "no eth0: {names}");
    let shown = live.exec("ip -o address show dev eth0; cat /sys/class/net/lo/flags").await?;
    holds("the interface's addresses", &shown, &format!(" {address}/"))?;
    holds("the loopback's flags", &shown, "0x9")
}

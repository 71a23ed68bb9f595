//! `keelson-agent service …`: what is programmed on this node, read from the pinned maps, whether or not an agent runs.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Subcommand, ValueEnum};
use ebpf_common::{FrontendKey, FrontendValue, Protocol};
use ebpf_loader::{SeenFlow, SeenService, ServiceKey, Source, Trace, View, describe};
use serde_json::{Value, json};

use super::{host_ports, routes};

/// How answers look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Columns for people.
    #[default]
    Table,
    /// One JSON document.
    Json,
}

/// A question.
#[derive(Debug, Subcommand)]
pub enum Question {
    /// Every programmed service port, and what it listens on.
    List,
    /// Everything about one Service.
    Show {
        /// `namespace/name`, or `namespace/name:port`; without a namespace, the Services of that name in all of them.
        name: String,
    },
    /// Network devices that clients outside are served through.
    Devices,
    /// Connections from outside.
    Flows {
        /// At most so many.
        #[arg(long, default_value_t = 1000)]
        limit: usize,
    },
    /// Where a connection goes, as in `trace pod 10.96.0.10:53 --protocol UDP`.
    Trace {
        /// Who dials: `host`, `pod` or an address. One that is neither the node's nor on the way of a pods' device is a
        /// client outside.
        #[arg(value_name = "SRC")]
        source: String,
        /// What is dialled: address:port, `[address]:port` with IPv6.
        #[arg(value_name = "DST:PORT")]
        destination: String,
        /// TCP, UDP or SCTP.
        #[arg(long, default_value = "TCP")]
        protocol: String,
    },
    /// Every endpoint with the connections it was given.
    Backends,
    /// Counters of every service port.
    Stats {
        /// Draws rates anew every second until interrupted.
        #[arg(long)]
        watch: bool,
    },
}

/// Answers a question; `stats --watch` calls `draw` again and again, the others once.
pub fn answer(
    pin_dir: &Path,
    question: &Question,
    output: Output,
    mut draw: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    if let Question::Stats { watch: true } = question {
        return watch(pin_dir, draw);
    }
    let view = open(pin_dir)?;
    let document = match question {
        Question::List => list(&view),
        Question::Show { name } => show(&view, name)?,
        Question::Trace { source, destination, protocol } => trace(&view, source, destination, protocol)?,
        Question::Devices => devices(&view)?,
        Question::Flows { limit } => flows(&view, *limit)?,
        Question::Backends => backends(&view),
        Question::Stats { .. } => stats(&view),
    };
    match output {
        Output::Json => draw(&format!("{:#}\n", document.json)),
        Output::Table => draw(&document.text),
    }
}

/// An answer in both forms.
struct Document {
    json: Value,
    text: String,
}

fn open(pin_dir: &Path) -> Result<View> {
    View::open(pin_dir).with_context(|| {
        format!(
            "no service data plane of this version is pinned at {} (is the proxy enabled?)",
            pin_dir.display()
        )
    })
}

fn list(view: &View) -> Document {
    let services = view.services();
    let rows = services.iter().map(|service| {
        let listens: Vec<String> = service.frontends.iter().map(|(key, _)| describe(key)).collect();
        vec![shown(&service.name), listens.join(","), service.backends.len().to_string(), affinity(service)]
    });
    let text = table(&["SERVICE", "LISTENS", "ENDPOINTS", "AFFINITY"], rows);
    Document { json: services.iter().map(service_json).collect(), text }
}

fn affinity(service: &SeenService) -> String {
    if service.affinity_secs == 0 { "-".to_owned() } else { format!("{}s", service.affinity_secs) }
}

fn show(view: &View, name: &str) -> Result<Document> {
    let all = view.services();
    let asked = |service: &&SeenService| is_asked(&service.name, name);
    let found: Vec<&SeenService> = all.iter().filter(asked).collect();
    if found.is_empty() {
        let known: Vec<&str> = all.iter().map(|service| service.name.as_str()).take(10).collect();
        bail!(
            "no service {name:?} is programmed here; there are {} ports, such as {}",
            all.len(),
            known.join(", ")
        );
    }
    let mut text = String::new();
    for service in &found {
        // Writing to a string cannot fail.
        writeln!(text, "{} (id {}, affinity {})", service.name, service.id, affinity(service)).ok();
        let frontends =
            service.frontends.iter().map(|(key, value)| vec![describe(key), kind(key), policy(value.flags)]);
        text += &indent(&table(&["LISTENS", "ON", "POLICY"], frontends));
        let endpoints = service.backends.iter().map(|backend| {
            let here = if backend.local { "this node" } else { "" };
            let clients = if backend.cluster { "all" } else { "those of policy Local (draining)" };
            vec![backend.address.to_string(), clients.into(), backend.connections.to_string(), here.into()]
        });
        if service.backends.is_empty() {
            text += "  no endpoints: connections are refused\n";
        } else {
            text += &indent(&table(&["ENDPOINT", "CLIENTS", "CONNECTIONS", "RUNS ON"], endpoints));
        }
    }
    Ok(Document { json: found.into_iter().map(service_json).collect(), text })
}

/// Whether a programmed port, `namespace/name:port` or a host port's key, is one of what was asked for.
fn is_asked(full: &str, asked: &str) -> bool {
    let begins = |text: &str| {
        text.strip_prefix(asked).is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '/']))
    };
    let bare = full.split_once('/').map(|(_, name)| name).filter(|_| !asked.contains('/'));
    begins(full) || bare.is_some_and(begins)
}

/// A name as columns show it: host ports are called by their sandboxes, of which the first characters tell which.
fn shown(name: &str) -> String {
    let short = |part: &str| {
        let id: String = part.chars().take_while(char::is_ascii_hexdigit).collect();
        match (id.len(), part.get(..13), part.get(64..)) {
            (64, Some(short), Some(rest)) => format!("{short}{rest}"),
            _ => part.to_owned(),
        }
    };
    name.split_inclusive(['/', ',']).map(short).collect()
}

fn kind(key: &FrontendKey) -> String {
    if key.scope == FrontendKey::SCOPE_NODE { "every address of the node" } else { "its address" }.to_owned()
}

fn policy(flags: u32) -> String {
    let said = [
        (FrontendValue::FLAG_LOCAL, "inside: Local"),
        (FrontendValue::FLAG_EXTERNAL_LOCAL, "outside: Local"),
        (FrontendValue::FLAG_SOURCE_RANGES, "source ranges"),
        (FrontendValue::FLAG_DIRECT, "outside: endpoints answer directly"),
        (FrontendValue::FLAG_GUARDED, "inside only where the address is this node's"),
    ];
    let said: Vec<&str> = said.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, text)| *text).collect();
    if said.is_empty() { "Cluster".to_owned() } else { said.join(", ") }
}

fn trace(view: &View, source: &str, destination: &str, protocol: &str) -> Result<Document> {
    let from = match source {
        "host" => Source::Host,
        "pod" => Source::Pod,
        text => {
            let address: IpAddr =
                text.parse().with_context(|| format!("SRC {text:?} is none of host, pod and an address"))?;
            let outside = Source::Outside(SocketAddr::new(address, ANY_PORT));
            match (view.is_own(address), leads_outside(view, address)) {
                (true, _) => Source::Host,
                (false, true) => outside,
                (false, false) => Source::Pod,
            }
        }
    };
    let to: SocketAddr = destination
        .parse()
        .with_context(|| format!("DST {destination:?} is not an address and port like 10.96.0.1:443"))?;
    let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let protocol = known.into_iter().find(|known| known.name().eq_ignore_ascii_case(protocol));
    let protocol = protocol.context("--protocol is none of TCP, UDP and SCTP")?;
    let who = match from {
        Source::Host => "a process of this node",
        Source::Pod => "a pod",
        Source::Outside(_) => "a client outside",
    };
    let (outcome, text, answers) = match view.trace(from, to, protocol) {
        Trace::NotAService => {
            ("passed", format!("{to} is no service for {who}: packets go there untouched\n"), Vec::new())
        }
        Trace::Refused(name) => {
            let text = format!("{to} is {name}, which has no endpoint for {who}: refused at once\n");
            ("refused", text, Vec::new())
        }
        Trace::Dropped(name, why) => {
            ("dropped", format!("{to} is {name}, and its packets are dropped: {why}\n"), Vec::new())
        }
        Trace::Shown(name, answers) => {
            let each: Vec<String> = answers.iter().map(|address| format!("  {address}\n")).collect();
            let text = format!(
                "{to} is {name}; {who} is connected, with its own address, to one of\n{}",
                each.concat()
            );
            ("shown", text, answers.iter().map(ToString::to_string).collect())
        }
        Trace::Forwarded(name, answers) => {
            let each: Vec<String> = answers.iter().map(|address| format!("  {address}\n")).collect();
            let text = format!("{to} is {name}; {who} is connected to one of\n{}", each.concat());
            ("forwarded", text, answers.iter().map(ToString::to_string).collect())
        }
    };
    Ok(Document {
        json: json!({"destination": to.to_string(), "outcome": outcome, "endpoints": answers}),
        text,
    })
}

/// A source port, where only the address counts.
const ANY_PORT: u16 = 40_000;

/// Whether packets to an address leave by a device whose clients are outside, by the kernel's routes.
fn leads_outside(view: &View, address: IpAddr) -> bool {
    let Some(device) = routes::device_to(address) else {
        return false;
    };
    view.devices().unwrap_or_default().iter().any(|seen| seen.name == device && seen.outer)
}

fn devices(view: &View) -> Result<Document> {
    let seen = view.devices().context("read the map of devices")?;
    let rows = seen.iter().map(|device| {
        let sources: Vec<String> = device.sources.iter().map(ToString::to_string).collect();
        let side = if device.outer { "outside" } else { "pods" };
        let name = if device.name.is_empty() { format!("({})", device.index) } else { device.name.clone() };
        vec![name, side.to_owned(), device.how.join(","), sources.join(",")]
    });
    let text = table(&["DEVICE", "LEADS TO", "BY", "HIDES CLIENTS BEHIND"], rows);
    let json = seen
        .iter()
        .map(|device| {
            json!({
                "device": device.name, "index": device.index, "outside": device.outer, "by": device.how,
                "sources": device.sources.iter().map(ToString::to_string).collect::<Vec<_>>(),
            })
        })
        .collect();
    Ok(Document { json, text })
}

fn flows(view: &View, limit: usize) -> Result<Document> {
    let seen = view.flows(limit).context("read the maps of connections from outside")?;
    let state = |flow: &SeenFlow| match (flow.closing, flow.established) {
        (true, _) => "closing",
        (false, true) => "established",
        (false, false) => "new",
    };
    let rows = seen.iter().map(|flow| {
        let source = if flow.source == flow.client { "-".to_owned() } else { flow.source.to_string() };
        vec![
            flow.protocol.to_owned(),
            flow.client.to_string(),
            flow.frontend.to_string(),
            flow.endpoint.to_string(),
            source,
            state(flow).to_owned(),
            shown(&flow.service),
        ]
    });
    let head = ["PROTOCOL", "CLIENT", "DIALLED", "ENDPOINT", "HIDDEN BEHIND", "STATE", "SERVICE"];
    let text = table(&head, rows);
    let json = seen
        .iter()
        .map(|flow| {
            json!({
                "protocol": flow.protocol, "client": flow.client.to_string(), "dialled": flow.frontend.to_string(),
                "endpoint": flow.endpoint.to_string(), "source": flow.source.to_string(), "state": state(flow),
                "service": flow.service,
            })
        })
        .collect();
    Ok(Document { json, text })
}

fn backends(view: &View) -> Document {
    let services = view.services();
    let rows = services.iter().flat_map(|service| {
        service.backends.iter().map(|backend| {
            let place = if backend.local { "yes" } else { "no" };
            vec![
                backend.address.to_string(),
                shown(&service.name),
                place.to_owned(),
                backend.connections.to_string(),
            ]
        })
    });
    let text = table(&["ENDPOINT", "SERVICE", "LOCAL", "CONNECTIONS"], rows);
    Document { json: services.iter().map(service_json).collect(), text }
}

const STATS_HEAD: [&str; 6] = ["SERVICE", "CONNECTIONS", "REFUSED", "AFFINITY HITS", "HEALED", "EXTERNAL"];

fn stats(view: &View) -> Document {
    let services = view.services();
    let rows = services.iter().map(|service| {
        let s = &service.stats;
        let figures = [s.forwarded, s.refused, s.affinity_hits, s.healed, s.external];
        let figures = figures.iter().map(ToString::to_string);
        std::iter::once(shown(&service.name)).chain(figures).collect()
    });
    Document { text: table(&STATS_HEAD, rows), json: services.iter().map(service_json).collect() }
}

/// Rates of every service that was used during the last second, until interrupted.
fn watch(pin_dir: &Path, mut draw: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let mut before: BTreeMap<String, [u64; 5]> = BTreeMap::new();
    loop {
        let view = open(pin_dir)?;
        let now: BTreeMap<String, [u64; 5]> = view
            .services()
            .into_iter()
            .map(|service| {
                let s = service.stats;
                (service.name, [s.forwarded, s.refused, s.affinity_hits, s.healed, s.external])
            })
            .collect();
        let rows = now.iter().filter_map(|(name, figures)| {
            let old = before.get(name)?;
            let rates: Vec<u64> =
                figures.iter().zip(old).map(|(new, old)| new.saturating_sub(*old)).collect();
            let busy = rates.iter().any(|rate| *rate > 0);
            busy.then(|| {
                std::iter::once(shown(name)).chain(rates.iter().map(|rate| format!("{rate}/s"))).collect()
            })
        });
        // Home and clear: the picture stays in place.
        draw(&format!("\x1b[H\x1b[2J{}", table(&STATS_HEAD, rows)))?;
        before = now;
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn service_json(service: &SeenService) -> Value {
    let s = &service.stats;
    json!({
        "name": service.name,
        "id": service.id,
        "affinitySeconds": service.affinity_secs,
        "frontends": service.frontends.iter().map(|(key, value)| json!({
            "listens": describe(key),
            "nodePort": key.scope == FrontendKey::SCOPE_NODE,
            "internalTrafficPolicy": policy_name(value.flags, FrontendValue::FLAG_LOCAL),
            "externalTrafficPolicy": policy_name(value.flags, FrontendValue::FLAG_EXTERNAL_LOCAL),
            "sourceRanges": value.flags & FrontendValue::FLAG_SOURCE_RANGES != 0,
            "guarded": value.flags & FrontendValue::FLAG_GUARDED != 0,
        })).collect::<Vec<_>>(),
        "endpoints": service.backends.iter().map(|backend| json!({
            "address": backend.address.to_string(),
            "local": backend.local,
            "draining": !backend.cluster,
            "connections": backend.connections,
        })).collect::<Vec<_>>(),
        "stats": {
            "connections": s.forwarded, "refused": s.refused, "affinityHits": s.affinity_hits,
            "healedDatagrams": s.healed, "externalConnections": s.external, "deniedPackets": s.denied,
            "receivedPackets": s.packets_in, "receivedBytes": s.bytes_in,
            "sentPackets": s.packets_out, "sentBytes": s.bytes_out,
        },
    })
}

fn policy_name(flags: u32, local: u32) -> &'static str {
    if flags & local != 0 { "Local" } else { "Cluster" }
}

/// Columns as wide as their widest cell.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn indent(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| format!("  {line}\n")).collect();
    lines.concat()
}

/// Compares the maps with what the API server says, and tells every difference.
pub async fn verify(
    pin_dir: &Path,
    client: kube::Client,
    config: &super::ProxyConfig,
    zone: Option<String>,
) -> Result<Vec<String>> {
    let list = kube::api::ListParams::default();
    let services: Vec<_> = kube::Api::<k8s_openapi::api::core::v1::Service>::all(client.clone())
        .list(&list)
        .await
        .context("list Services")?
        .items;
    let slices: Vec<_> = kube::Api::<k8s_openapi::api::discovery::v1::EndpointSlice>::all(client)
        .list(&list)
        .await
        .context("list EndpointSlices")?
        .items;
    let wanted = super::wanted(config, zone, &services, &slices);
    ensure!(pin_dir.exists(), "nothing is pinned at {}", pin_dir.display());
    let mut differences = open(pin_dir)?.differences(&wanted);
    // Ports that pods have on this node are nobody's Service.
    differences.retain(|text| !host_ports::is_host_port(&ServiceKey(text.clone())));
    Ok(differences)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".to_owned(), "b".to_owned()], vec!["longer".to_owned(), "c".to_owned()]];
        assert_eq!(table(&["X", "Y"], rows.into_iter()), "X       Y\na       b\nlonger  c\n");
    }

    #[test]
    fn services_are_found_with_and_without_their_namespace() {
        for (asked, found) in [
            ("a/web", true),
            ("a/web:http", true),
            ("web", true),
            ("web:http", true),
            ("a", true),
            ("we", false),
            ("b/web", false),
        ] {
            assert_eq!(is_asked("a/web:http", asked), found, "{asked}");
        }
        assert!(is_asked("a/web", "web") && !is_asked("a/web", "web:http"));
    }

    #[test]
    fn ids_of_sandboxes_are_cut() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(
            shown(&format!("hostport/net,{id},eth0.json/TCP/80/IPv4")),
            "hostport/net,0123456789abc,eth0.json/TCP/80/IPv4"
        );
        assert_eq!(shown("default/web:http"), "default/web:http");
    }

    #[test]
    fn policies_are_told_in_the_words_of_the_api() {
        assert_eq!(policy(0), "Cluster");
        assert_eq!(
            policy(FrontendValue::FLAG_LOCAL | FrontendValue::FLAG_EXTERNAL_LOCAL),
            "inside: Local, outside: Local"
        );
    }

    #[test]
    fn a_directory_without_maps_is_named() {
        let error = open(Path::new("/nonexistent")).err().unwrap();
        assert!(format!("{error:#}").contains("pinned at /nonexistent"), "{error:#}");
    }
}

//! `cargo xtask status`: what runs, with pid, memory and health; a table or JSON.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::cmd::Cmd;
use crate::fabric;
use crate::paths::Layout;
use crate::process::{Record, memory};
use crate::supervise::registry_address;

/// Limit of one health check.
const DEADLINE: Duration = Duration::from_secs(2);

/// One line of the table.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    /// Component name.
    pub(crate) name: String,
    /// Its pid, when it runs.
    pub(crate) pid: Option<i32>,
    /// Restarts by the supervisor.
    pub(crate) restarts: u32,
    /// Resident memory, MiB.
    pub(crate) rss_mib: f64,
    /// Proportional memory, MiB.
    pub(crate) pss_mib: f64,
    /// `ok` or what is wrong.
    pub(crate) health: String,
}

/// Prints the table or JSON; an error when nothing runs.
pub(crate) fn run(layout: &Layout, json: bool) -> Result<bool> {
    let lines = collect(layout);
    let text = if json { serde_json::to_string_pretty(&lines)? + "\n" } else { table(layout, &lines)? };
    // A reader that has seen enough (`| head`) is no failure.
    std::io::stdout().write_all(text.as_bytes()).ok();
    Ok(!lines.is_empty() && lines.iter().all(|line| line.health == "ok"))
}

fn table(layout: &Layout, lines: &[Line]) -> Result<String> {
    use std::fmt::Write as _;
    if lines.is_empty() {
        return Ok("nothing runs (start with `cargo xtask up`)\n".to_owned());
    }
    let mut text = String::new();
    writeln!(
        text,
        "{:<17} {:>8} {:>9} {:>9} {:>9}  HEALTH",
        "COMPONENT", "PID", "RESTARTS", "RSS MiB", "PSS MiB"
    )?;
    for line in lines {
        let pid = line.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        writeln!(
            text,
            "{:<17} {pid:>8} {:>9} {:>9.1} {:>9.1}  {}",
            line.name, line.restarts, line.rss_mib, line.pss_mib, line.health
        )?;
    }
    if let Ok(nodes) = kubectl(layout, &["get", "nodes", "--no-headers"]) {
        writeln!(text, "\nnodes: {}", nodes.trim().replace('\n', "\n       "))?;
    }
    Ok(text)
}

/// The state of every recorded component.
pub(crate) fn collect(layout: &Layout) -> Vec<Line> {
    Record::load_all(&layout.procs()).into_iter().map(|record| line(layout, record)).collect()
}

fn line(layout: &Layout, record: Record) -> Line {
    let alive = record.process.is_alive();
    let (rss, pss) = alive.then(|| memory(record.process.pid)).flatten().unwrap_or_default();
    let health = if alive {
        health(layout, &record.name).map_or_else(|error| format!("{error:#}"), |()| "ok".to_owned())
    } else {
        "not running".to_owned()
    };
    let mib = |kib: u64| f64::from(u32::try_from(kib).unwrap_or(u32::MAX)) / 1024.0;
    Line {
        name: record.name,
        pid: alive.then_some(record.process.pid),
        restarts: record.restarts,
        rss_mib: mib(rss),
        pss_mib: mib(pss),
        health,
    }
}

fn health(layout: &Layout, name: &str) -> Result<()> {
    let (component, place) = match name.split_once('@') {
        Some((component, node)) => (component, layout.node(node)),
        None => (name, layout.clone()),
    };
    match component {
        "control" => kubectl(layout, &["get", "--raw", "/readyz"]).map(drop),
        "containerd" => connect(&place.containerd_socket()),
        "cri" => connect(&place.cri_socket()),
        "agent" => {
            let address = fabric::number(&place.name()).map_or(Ipv4Addr::LOCALHOST, fabric::address);
            http_get(address, 10248, "/healthz")
        }
        "supervisor" => registry(layout),
        _ => Ok(()),
    }
}

fn registry(layout: &Layout) -> Result<()> {
    let port = std::fs::read_to_string(layout.run.join("registry.port"))?.trim().parse()?;
    http_get(registry_address(layout), port, "/v2/")
}

fn connect(socket: &Path) -> Result<()> {
    UnixStream::connect(socket).map(drop).map_err(|error| anyhow::anyhow!("{}: {error}", socket.display()))
}

/// A GET that must be answered with 200.
fn http_get(address: Ipv4Addr, port: u16, path: &str) -> Result<()> {
    let address = SocketAddr::from((address, port));
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let status = String::from_utf8_lossy(&head[9..]);
    anyhow::ensure!(status == "200", "GET http://{address}{path}: status {status}");
    Ok(())
}

/// Runs kubectl with this cluster's kubeconfig.
pub(crate) fn kubectl(layout: &Layout, args: &[&str]) -> Result<String> {
    Cmd::new("kubectl")
        .args(["--kubeconfig".as_ref(), layout.kubeconfig().as_os_str()])
        .args(["--request-timeout=5s"])
        .args(args)
        .output()
}

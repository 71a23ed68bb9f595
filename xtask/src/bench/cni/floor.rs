//! What an ADD cannot be quicker than: a process, and what the kernel takes for a pair.
//!
//! Measured beside ADD, in the same rounds: starting a program that does nothing, either side's plugin when it is only asked
//! for its version, and the kernel's part of an ADD (pair, port, address), asked for by this
//! process.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cni_plugins_host::netlink::{Link, LinkChange, LinkRef, Netlink, Step, VethPair};

use super::side::{BRIDGE, Pod, Side};
use crate::bench::cri::report::{Goal, Row};
use crate::bench::stats::{Round, median};

/// Times of one round.
#[derive(Default)]
pub(super) struct Floor {
    nothing: Vec<f64>,
    kernel: Vec<f64>,
    versions: Vec<Round>,
}

impl Floor {
    /// Another round; the bridge must be there.
    pub(super) fn round(&mut self, ours: &Side, peer: &Side, used: &mut Vec<Pod>) -> Result<()> {
        self.nothing.push(super::rows::millis(nothing()?));
        self.kernel.push(super::rows::millis(kernel(ours, used)?));
        let version = |side: &Side| -> Result<f64> { Ok(super::rows::millis(side.version()?)) };
        self.versions.push((vec![version(ours)?], vec![version(peer)?]));
        Ok(())
    }

    /// The rows of the report.
    pub(super) fn rows(&self) -> Vec<Row> {
        let group = "what is in an ADD";
        let alone = |name, values: &[f64]| Row::plain(group, name, "ms", median(values), 0.0, Goal::None);
        vec![
            alone("a process that does nothing (true)", &self.nothing),
            alone("pair, port and address in the kernel", &self.kernel),
            Row::of_rounds(group, "VERSION of the plugin", "ms", &self.versions, median, Goal::None),
        ]
    }
}

fn nothing() -> Result<Duration> {
    let begun = Instant::now();
    let mut child = Command::new("/bin/true")
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting true")?;
    child.wait()?;
    Ok(begun.elapsed())
}

/// The calls of an ADD that change the kernel, on open sockets.
fn kernel(side: &Side, used: &mut Vec<Pod>) -> Result<Duration> {
    let pod = side.pod()?;
    let took = side.on_host(|| {
        let (host, inside) = (Netlink::open()?, Netlink::open_in(pod.netns())?);
        let bridge = host.link(BRIDGE)?.context("the bridge is there")?;
        let namespace = std::fs::File::open(pod.netns())?;
        let (this, name) = (LinkRef::Name("eth0"), "kbench-floor");
        let pair = VethPair {
            host_name: name,
            bridge_index: Some(bridge.index),
            host_mac: None,
            peer_name: "eth0",
            peer_mac: None,
            peer_netns: Some(std::os::fd::AsRawFd::as_raw_fd(&namespace)),
            mtu: 1500,
        };
        let begun = Instant::now();
        host.run(vec![Step::create_veth(&pair)])?;
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        let answers = inside.run(vec![Step::set_link(this, &up), Step::get_link(this)])?;
        let link = answers.iter().flatten().find_map(|body| Link::read(body)).context("eth0 is there")?;
        inside.run(vec![Step::add_address(link.index, "10.96.255.254/16".parse()?, false)])?;
        let took = begun.elapsed();
        host.delete_link(name)?;
        Ok(took)
    });
    used.push(pod);
    took
}

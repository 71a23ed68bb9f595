//! The short way between pods of one node, as the agent finds and follows them.

use anyhow::{Context, Result, ensure};
use ebpf_tests::{arena::ip, places::Place, tables::at};
use keelson_agent::proxy;
use serde_json::json;

use super::{Agent, PATIENCE, World, service, slices};

/// Frames that a port of the pods' bridge lets out while another pod asks the one behind it, some times.
fn carried(world: &World, asking: &Place) -> Result<u64> {
    let sent = || -> Result<u64> {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("pod1:")).context("pod1")?;
        Ok(line.split_ascii_whitespace().nth(9).context("frames sent")?.parse()?)
    };
    let before = sent()?;
    for address in ["10.244.1.2:8080", "[fd00:244:1::2]:8081"] {
        for _ in 0..10 {
            asking.ask_tcp(at(address), PATIENCE)??;
        }
    }
    world.near.run(|| ())?;
    Ok(sent()? - before)
}

#[test]
fn pods_of_one_node_take_the_short_way_unless_somebody_wants_to_see_them() -> Result<()> {
    let world = World::make()?;
    let second = Place::empty()?;
    second.join("pod2", "eth0", &[], &["10.244.1.3/24", "fd00:244:1::3/64"])?;
    ip(&["link", "set", "pod2", "master", "pods0"])?;
    let agent = Agent::start(&world, vec![service("near", 30001, &json!({}))], slices("near", true, false))?;
    let short = || Ok(carried(&world, &second)? < 12);
    agent.until("the short way", short)?;
    let whole = || Ok(carried(&world, &second)? > 60);
    let tc = |arguments: &[&str]| -> Result<()> {
        let done = std::process::Command::new("tc").args(arguments).status().context("run tc")?;
        ensure!(done.success(), "tc {}", arguments.join(" "));
        Ok(())
    };
    let steps: [(&str, &[&str], &[&str]); 3] = [
        ("tc", &["qdisc", "add", "dev", "pod1", "root", "pfifo"], &["qdisc", "del", "dev", "pod1", "root"]),
        ("tc", &["qdisc", "add", "dev", "pod2", "clsact"], &["qdisc", "del", "dev", "pod2", "clsact"]),
        (
            "ip",
            &["link", "set", "pod1", "type", "bridge_slave", "isolated", "on"],
            &["link", "set", "pod1", "type", "bridge_slave", "isolated", "off"],
        ),
    ];
    for (program, begin, end) in steps {
        let run = |arguments: &[&str]| if program == "tc" { tc(arguments) } else { ip(arguments) };
        run(begin)?;
        agent.until(&format!("the bridge's way with {}", begin.join(" ")), whole)?;
        run(end)?;
        agent.until(&format!("the short way after {}", end.join(" ")), short)?;
    }
    // Whoever asks the service is sent to the pod, and takes the short way there.
    agent.stop()?;
    ensure!(short()?, "what is pinned goes on for a while without the agent");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(proxy::cleanup(&world.arena.pin_dir, "10.96.0.0/12,fd00:96::/108"))?;
    ensure!(whole()?, "something of the data plane stays on the pods' links");
    Ok(())
}

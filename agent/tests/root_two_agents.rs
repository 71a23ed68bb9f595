//! Two agents in one network namespace and one cgroup, as a second installation beside the first makes them: each is told
//! what it cannot have, both serve, and the end of one takes nothing from the other.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ebpf_tests::{
    agent::Agent,
    api::{self, Api},
    arena::Arena,
    servers::{Server, ask_tcp, wait_until},
    tables::{at, ips},
};

/// An API server with one Service, answered by one endpoint.
fn cluster(vip: &str, endpoint: &str) -> Result<Api> {
    let api = Api::start()?;
    api.put("services", api::service("default", "web", at(vip), "TCP"));
    api.put("endpointslices", api::slice("default", "web", 0, &[at(endpoint)], "TCP"));
    Ok(api)
}

/// The pins of the second agent; removed with the test.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        drop(ebpf_loader::unload(&self.0));
    }
}

#[test]
fn a_second_agent_serves_beside_the_first_and_says_which_ports_it_lacks() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2"]))?;
    let _servers = [Server::tcp(at("10.244.0.1:8080"))?, Server::tcp(at("10.244.0.2:8080"))?];
    let (one, two) = ("10.96.0.10:80", "10.96.0.20:80");
    let apis = [cluster(one, "10.244.0.1:8080")?, cluster(two, "10.244.0.2:8080")?];
    let binary = Path::new(env!("CARGO_BIN_EXE_keelson-agent"));
    let mut first = Agent::new(binary, &arena, &apis[0].kubeconfig())?;
    first.start()?;
    first.wait_for_syncs(1)?;
    let name =
        arena.pin_dir.file_name().context("a pin directory has a name")?.to_string_lossy().into_owned();
    let pins = Pins(arena.pin_dir.with_file_name(format!("{name}-second")));
    let mut second = Agent::with_pins(binary, &arena, &apis[1].kubeconfig(), &pins.0)?;
    second.start()?;
    wait_until("the second agent serves", || {
        second.still_runs()?;
        Ok(ask_tcp(at(two)).is_ok())
    })?;
    let (answered, peer) = ask_tcp(at(one))?;
    assert_eq!((answered.as_str(), peer), ("10.244.0.1:8080", at(one)), "the first one's Service as before");
    for field in ["keelson.proxy.healthzPort", "keelson.proxy.metricsPort"] {
        apis[1].wait_for_event("ServiceProxyPortTaken", "bench", field)?;
    }
    let figures = first.metrics()?;
    ensure!(
        figures.contains("keelson_service_map_entries{map=\"services\"} 1\n"),
        "its own figures: {figures}"
    );
    second.kill()?;
    first.kill()?;
    assert_eq!(ask_tcp(at(two))?.1, at(two), "the programs outlive both");
    first.start()?;
    first.wait_for_syncs(1)?;
    assert_eq!(ask_tcp(at(one))?.1, at(one));
    Ok(())
}

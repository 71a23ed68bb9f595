//! Links that delay, lose and reorder packets, by netem: in `cargo xtask test vm-light`, whose kernel has it.

use crate::lab::{self, Lab, Node, eventually, talk};
use crate::{all_reach_all, entries};

/// Makes a node's link bad in the direction to the node.
fn netem(lab: &Lab, node: &Node, how: &str) -> Result<String, String> {
    let words = format!("qdisc replace dev {} root netem {how}", node.port);
    lab::run(&lab.fabric, "tc", &words.split(' ').collect::<Vec<_>>())
}

/// What the queue of a node's link has seen.
fn queue(lab: &Lab, node: &Node) -> String {
    lab::run(&lab.fabric, "tc", &["-s", "qdisc", "show", "dev", &node.port]).unwrap()
}

#[test]
fn slow_lossy_and_cut_links_leave_the_network_as_it_is() {
    let lab = Lab::new(2, "mode: vxlan", false);
    let nodes: Vec<&Node> = lab.nodes.iter().collect();
    if let Err(error) = netem(&lab, nodes[1], "delay 1ms") {
        assert!(std::env::var_os("KEELSON_VM").is_none(), "the guest has no netem: {error}");
        eprintln!("skipped: this kernel has no netem ({}); `cargo xtask test vm-light` has", error.trim());
        return;
    }
    all_reach_all(&lab, &nodes);
    let before = [entries(nodes[0]), entries(nodes[1])];

    netem(&lab, nodes[1], "delay 40ms 20ms loss 10% reorder 25%").unwrap();
    // Until enough was sent for some of it to have been lost.
    eventually("a lossy link loses", || {
        all_reach_all(&lab, &nodes);
        let seen = queue(&lab, nodes[1]);
        if seen.contains("(dropped 0,") { Err(seen) } else { Ok(()) }
    });

    netem(&lab, nodes[1], "loss 100%").unwrap();
    talk(&nodes[0].pod, &nodes[1].pod, nodes[1].pod_addresses[0]).expect_err("a cut link carries nothing");
    assert_eq!([entries(nodes[0]), entries(nodes[1])], before, "a peer out of reach stays a peer");

    lab::run(&lab.fabric, "tc", &["qdisc", "del", "dev", &nodes[1].port, "root"]).unwrap();
    all_reach_all(&lab, &nodes);
    assert_eq!([entries(nodes[0]), entries(nodes[1])], before);
}

//! The node suite on the shared cluster.

use crate::support::{cluster, said, xtask};

#[test]
fn the_node_keeps_what_a_kubelet_promises() {
    cluster();
    let output = xtask(&[
        "conformance",
        "node",
        "--parallel",
        "12",
        // So many cases beside each other find the machine busy now and then; what failed once is printed.
        "--attempts",
        "2",
        "--junit",
        "target/conformance/node.xml",
        "--html",
        "target/conformance/node.html",
    ]);
    let text = said(&output);
    println!("{text}");
    assert!(output.status.success(), "cases failed; target/conformance/node.html tells which");
    // Here nothing that static pods and local services need is missing.
    assert!(!text.contains("is not this machine's") && !text.contains("static pods is not known"), "skipped");
}

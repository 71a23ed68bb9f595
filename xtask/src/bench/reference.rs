//! What upstream says of itself: figures of other machines, told beside ours so that a reader has them at hand.
//!
//! They are no measurement of this run, and every line that shows one says so. A measurement beside a stock kubelet on
//! this machine is what `--peer-kubelet` is for.

use serde::Serialize;

/// One figure of upstream.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Reference {
    /// What it is of.
    pub(super) what: &'static str,
    /// The figure, with its unit.
    pub(super) figure: &'static str,
    /// Where it is from.
    pub(super) source: &'static str,
}

/// A stock kubelet 1.36 with containerd 2, measured once on a machine with two processors.
const STOCK: &str = "kubelet 1.36 with containerd 2, another machine's run";

/// Figures that `bench start` is read beside.
pub(super) const STARTS: [Reference; 5] = [
    Reference { what: "1 pod made → Ready", figure: "0.55-0.8 s", source: STOCK },
    Reference { what: "10 pods at once → the last Ready", figure: "1.5 s", source: STOCK },
    Reference { what: "50 pods at once → the last Ready", figure: "7.5 s", source: STOCK },
    Reference { what: "110 pods at once → the last Ready", figure: "17.9 s", source: STOCK },
    Reference { what: "container's end → status at the API, median", figure: "950 ms", source: STOCK },
];

/// Figures that `bench node` is read beside.
pub(super) const NODE: [Reference; 5] = [
    Reference { what: "RSS of kubelet, idle → 110 pods", figure: "81 → 124 MB", source: STOCK },
    Reference { what: "RSS of containerd, idle → 110 pods", figure: "50 → 119 MB", source: STOCK },
    Reference {
        what: "RSS allowed to kubelet; to the runtime",
        figure: "100 MiB; 500 MiB",
        source: "limits of test/e2e_node/density_test.go",
    },
    Reference {
        what: "processor allowed with 10 pods at rest, p95: kubelet; runtime",
        figure: "0.35; 0.40 core",
        source: "limits of test/e2e_node/resource_usage_test.go",
    },
    Reference {
        what: "k3s agent (kubelet, containerd and proxy)",
        figure: "275 MB, 3 % of a core",
        source: "docs.k3s.io, resource profiling, v1.26.5",
    },
];

/// Shows them, labelled as what they are.
pub(super) fn show(figures: &[Reference]) {
    println!("\nreference, another machine's run (not measured here):");
    for Reference { what, figure, source } in figures {
        println!("  {what}: {figure} ({source})");
    }
}

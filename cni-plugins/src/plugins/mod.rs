//! The plugins, one module each, and the choice between them.

mod bandwidth;
pub(crate) mod bridge;
pub(crate) mod ipam;
mod loopback;
pub(crate) mod masquerade;
mod portmap;
mod tuning;
mod vxlan;

use cni_plugins_types::CniResult;

use crate::{call::Call, failure::Failure};

/// A plugin of this executable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plugin {
    /// `keelson-bridge`
    Bridge,
    /// `keelson-ipam`
    Ipam,
    /// `keelson-loopback`
    Loopback,
    /// `keelson-tuning`
    Tuning,
    /// `keelson-bandwidth`
    Bandwidth,
    /// `keelson-portmap`
    Portmap,
    /// `keelson-masquerade`
    Masquerade,
    /// `keelson-vxlan`
    Vxlan,
}

impl Plugin {
    /// All of them.
    pub(crate) const ALL: [Plugin; 8] = [
        Plugin::Bridge,
        Plugin::Ipam,
        Plugin::Loopback,
        Plugin::Tuning,
        Plugin::Bandwidth,
        Plugin::Portmap,
        Plugin::Masquerade,
        Plugin::Vxlan,
    ];

    /// Name of its executable, the `type` of a configuration.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Plugin::Bridge => "keelson-bridge",
            Plugin::Ipam => "keelson-ipam",
            Plugin::Loopback => "keelson-loopback",
            Plugin::Tuning => "keelson-tuning",
            Plugin::Bandwidth => "keelson-bandwidth",
            Plugin::Portmap => "keelson-portmap",
            Plugin::Masquerade => "keelson-masquerade",
            Plugin::Vxlan => "keelson-vxlan",
        }
    }

    /// The plugin whose executable has this name. `loopback` is the name under which containerd calls that one.
    pub(crate) fn named(name: &str) -> Option<Self> {
        if name == "loopback" {
            return Some(Plugin::Loopback);
        }
        Plugin::ALL.into_iter().find(|plugin| plugin.name() == name)
    }

    /// Carries out the call; ADD returns a result, the other commands nothing.
    pub(crate) fn run(self, call: &Call) -> Result<Option<CniResult>, Failure> {
        // Addresses may be given to whomever; all others would change the host's own network for a pod's.
        if self != Plugin::Ipam {
            call.refuse_own_namespace()?;
        }
        match self {
            Plugin::Bridge => bridge::run(call),
            Plugin::Ipam => ipam::run(call),
            Plugin::Loopback => loopback::run(call),
            Plugin::Tuning => tuning::run(call),
            Plugin::Bandwidth => bandwidth::run(call),
            Plugin::Portmap => portmap::run(call),
            Plugin::Masquerade => masquerade::run(call),
            Plugin::Vxlan => vxlan::run(call),
        }
    }
}

/// Removes what the plugins made in this network namespace; one outcome for each kind of thing.
pub(crate) fn cleanup() -> Vec<Result<Vec<String>, Failure>> {
    vec![bridge::cleanup(), portmap::cleanup()]
}

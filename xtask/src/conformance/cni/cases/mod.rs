//! The promises, by area of the specification; which of them a plugin must keep follows from its kind.

mod add;
mod bandwidth;
mod chained;
mod check;
mod del;
mod delegate;
mod gc;
mod input;
mod ipam;
mod loopback;
mod portmap;
mod protocol;
mod status;
mod tuning;
mod vxlan;

use anyhow::{Context, Result};

use super::super::case::{Case, case, skip};
use super::context::T;
use super::subject::Kind;

/// Cases of a kind, in reading order.
pub(super) fn of(kind: Kind) -> Vec<Case<T>> {
    let mut all = protocol::cases(kind);
    all.extend(input::cases(kind));
    match kind {
        Kind::Bridge => {
            all.extend(add::cases(kind));
            all.extend(delegate::cases(kind));
        }
        Kind::Ipam => all.extend(ipam::cases(kind)),
        Kind::Loopback => all.extend(loopback::cases(kind)),
        Kind::Vxlan => all.extend(vxlan::cases(kind)),
        Kind::Portmap | Kind::Bandwidth | Kind::Tuning | Kind::Masquerade => all.extend(chained::cases(kind)),
    }
    all.extend(del::cases(kind));
    all.extend(check::cases(kind));
    all.extend(gc::cases(kind));
    all.extend(status::cases(kind));
    match kind {
        Kind::Portmap => all.extend(portmap::cases(kind)),
        Kind::Bandwidth => all.extend(bandwidth::cases(kind)),
        Kind::Tuning => all.extend(tuning::cases(kind)),
        Kind::Bridge | Kind::Ipam | Kind::Loopback | Kind::Masquerade | Kind::Vxlan => {}
    }
    all
}

/// The ids of all cases of all kinds.
pub(super) fn ids() -> Vec<String> {
    Kind::ALL.into_iter().flat_map(of).map(|case| case.id()).collect()
}

/// A case that calls programs and waits for them.
fn check(group: &'static str, name: &'static str, run: fn(&T) -> Result<()>) -> Case<T> {
    case(group, name, move |t: T| async move {
        tokio::task::spawn_blocking(move || run(&t)).await.context("the case's thread")?
    })
}

/// A group's name. It lives as long as the program, as every list of cases does.
fn group(kind: Kind, area: &str) -> &'static str {
    format!("{} {area}", kind.word()).leak()
}

/// Skips unless the plugin says to support a version; that it must is a case of its own.
fn need(t: &T, version: &str) -> Result<()> {
    if t.supports(version) { Ok(()) } else { skip(format!("the plugin does not say to support {version}")) }
}

/// A pod that this kind can be called for, a configuration that works, and for a chained plugin a previous result.
fn ready(t: &T) -> Result<(super::context::Pod, serde_json::Value)> {
    ready_for(t, t.newest())
}

/// The same of a version.
fn ready_for(t: &T, version: &str) -> Result<(super::context::Pod, serde_json::Value)> {
    let config = t.config_of(version);
    if t.subject().kind.is_chained() {
        let (pod, result) = t.wired(version)?;
        return Ok((pod, super::context::with(&config, "prevResult", result)));
    }
    Ok((t.pod()?, config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_fit_the_lists_format() {
        let mut ids = ids();
        assert!(ids.iter().all(|id| !id.contains(" = ") && !id.starts_with('#')));
        let count = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), count);
    }

    #[test]
    fn the_lists_name_cases_that_exist() {
        for name in ["debian.txt", "keelson.txt"] {
            let file =
                std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/conformance/cni").join(name);
            super::super::super::list::load(&file, &ids()).expect("a list of existing cases");
        }
    }
}

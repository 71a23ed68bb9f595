//! Which capabilities a process gets: the usual 14, plus and minus what CRI says.

use std::collections::{BTreeSet, HashSet};
use std::str::FromStr;

use cri_shim_api::v1::Capability as CriCapability;
use oci_spec::runtime::{Capability, LinuxCapabilities, LinuxCapabilitiesBuilder};

use super::{NodeFacts, SpecError};

/// What an unprivileged container starts with, as with every common runtime.
pub(super) const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// The names, without `CAP_`, in order; `ALL` first, so that single names refine it.
pub fn effective(
    wanted: Option<&CriCapability>,
    privileged: bool,
    node: &NodeFacts,
) -> Result<BTreeSet<String>, SpecError> {
    let every = || node.capabilities.iter().cloned().collect::<BTreeSet<_>>();
    if privileged {
        return Ok(every());
    }
    let mut set: BTreeSet<String> = DEFAULT.iter().map(|name| (*name).to_owned()).collect();
    let Some(wanted) = wanted else { return Ok(set) };
    let add = wanted.add_capabilities.iter().chain(&wanted.add_ambient_capabilities);
    let add: Vec<String> = add.map(|name| short(name)).collect::<Result<_, _>>()?;
    let drop: Vec<String> =
        wanted.drop_capabilities.iter().map(|name| short(name)).collect::<Result<_, _>>()?;
    if add.iter().any(|name| name == "ALL") {
        set = every();
    }
    if drop.iter().any(|name| name == "ALL") {
        set.clear();
    }
    for name in add.into_iter().filter(|name| name != "ALL") {
        if !node.capabilities.is_empty() && !node.capabilities.contains(&name) {
            let problem = format!("{name}: this node has it not to give");
            return Err(SpecError::Unsupported { field: "capabilities", problem });
        }
        set.insert(name);
    }
    for name in drop {
        set.remove(&name);
    }
    Ok(set)
}

/// The specification's capability sets; ambient ones only where CRI asks for them.
pub fn sets(
    names: &BTreeSet<String>,
    wanted: Option<&CriCapability>,
) -> Result<LinuxCapabilities, SpecError> {
    let set = parse(names.iter().map(String::as_str))?;
    let ambient: Vec<String> = wanted
        .map(|wanted| {
            wanted.add_ambient_capabilities.iter().map(|name| short(name)).collect::<Result<_, _>>()
        })
        .transpose()?
        .unwrap_or_default();
    let ambient = parse(ambient.iter().map(String::as_str).filter(|name| names.contains(*name)))?;
    Ok(LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set.clone())
        // Inheritable ones are not set for plain containers (CVE-2022-24769), only together with ambient ones.
        .inheritable(ambient.clone())
        .ambient(ambient)
        .build()?)
}

fn parse<'a>(names: impl Iterator<Item = &'a str>) -> Result<HashSet<Capability>, SpecError> {
    names
        .map(|name| {
            Capability::from_str(name).map_err(|_unknown| SpecError::UnknownCapability(name.to_owned()))
        })
        .collect()
}

/// `CAP_NET_RAW` or `net_raw` to `NET_RAW`.
fn short(name: &str) -> Result<String, SpecError> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if short == "ALL" || Capability::from_str(short).is_ok() {
        return Ok(short.to_owned());
    }
    Err(SpecError::UnknownCapability(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeFacts {
        let capabilities = ["CHOWN", "NET_ADMIN", "SYS_ADMIN"].map(str::to_owned).to_vec();
        NodeFacts { capabilities, ..NodeFacts::default() }
    }

    fn names(add: &[&str], drop: &[&str]) -> Vec<String> {
        let wanted = CriCapability {
            add_capabilities: add.iter().map(|name| (*name).to_owned()).collect(),
            drop_capabilities: drop.iter().map(|name| (*name).to_owned()).collect(),
            ..CriCapability::default()
        };
        effective(Some(&wanted), false, &node()).unwrap().into_iter().collect()
    }

    #[test]
    fn all_comes_first_and_single_names_refine_it() {
        assert_eq!(names(&["NET_ADMIN"], &["ALL"]), ["NET_ADMIN"]);
        let can = ["CHOWN", "NET_ADMIN"];
        assert_eq!(names(&["ALL"], &["CAP_SYS_ADMIN"]), can, "only what the node can give");
        assert_eq!(names(&[], &[]).len(), 14);
        assert!(!names(&[], &["net_raw"]).contains(&"NET_RAW".to_owned()));
    }

    #[test]
    fn an_unknown_name_is_told() {
        let wanted = CriCapability { add_capabilities: vec!["FLY".into()], ..CriCapability::default() };
        let error = effective(Some(&wanted), false, &node()).unwrap_err();
        assert_eq!(error.to_string(), "unknown capability \"FLY\"");
    }

    #[test]
    fn what_the_node_cannot_give_is_refused_not_tried() {
        let wanted = CriCapability { add_capabilities: vec!["SYS_BOOT".into()], ..CriCapability::default() };
        let error = effective(Some(&wanted), false, &node()).unwrap_err().to_string();
        assert_eq!(error, "capabilities: SYS_BOOT: this node has it not to give");
    }

    #[test]
    fn a_plain_container_inherits_nothing() {
        let sets = sets(&BTreeSet::from(["CHOWN".to_owned()]), None).unwrap();
        assert_eq!(sets.bounding().as_ref().map(HashSet::len), Some(1));
        assert_eq!(sets.inheritable().as_ref().map(HashSet::len), Some(0));
    }
}

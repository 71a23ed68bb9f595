//! Cgroups that systemd makes: a transient scope for each container.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;

use super::dbus::{Body, Bus, Failed, Value};
use super::properties::{self, Property};
use super::{Paths, devices, hierarchies};
use crate::error::Error;
use crate::host::fork::Forked;
use crate::host::idmap;

/// How long a scope may take to begin.
const LIMIT: Duration = Duration::from_secs(30);

/// Keeps a scope in being until the container's process is in it: systemd ends an empty one.
#[derive(Debug)]
pub(crate) struct Placeholder(Forked);

impl Drop for Placeholder {
    fn drop(&mut self) {
        self.0.discard();
    }
}

/// A scope's name and the slice it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unit {
    slice: String,
    name: String,
}

/// Reads `slice:prefix:name`.
fn unit(id: &str, path: Option<&Path>) -> Result<Unit, Error> {
    let field = "linux.cgroupsPath";
    let text = path.and_then(Path::to_str).unwrap_or_default();
    if text.is_empty() {
        return Ok(Unit { slice: "system.slice".to_owned(), name: format!("keelson-{id}.scope") });
    }
    let parts: Vec<&str> = text.split(':').collect();
    let [slice, prefix, name] = parts.as_slice() else {
        return Err(Error::spec(
            field,
            format!("{text:?} is not slice:prefix:name, as the systemd driver needs it"),
        ));
    };
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").unwrap_or_default();
    let good = slice == "-.slice" || (!stem.is_empty() && !stem.split('-').any(str::is_empty));
    if !good || slice.contains('/') {
        return Err(Error::spec(field, format!("{slice:?} is not the name of a slice")));
    }
    if name.is_empty() || name.contains('/') || prefix.contains('/') {
        return Err(Error::spec(field, format!("{text:?} names no unit")));
    }
    let name = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
    Ok(Unit { slice: slice.to_owned(), name })
}

impl Unit {
    /// Where the scope is in each hierarchy: slices lie in one another by their names.
    fn directory(&self) -> PathBuf {
        let mut path = PathBuf::from("/");
        if let Some(stem) = self.slice.strip_suffix(".slice").filter(|stem| *stem != "-") {
            let mut name = String::new();
            for part in stem.split('-') {
                if !name.is_empty() {
                    name.push('-');
                }
                name.push_str(part);
                path.push(format!("{name}.slice"));
            }
        }
        path.push(&self.name);
        path
    }
}

/// Makes the scope that `slice:prefix:name` names.
pub(crate) fn make(
    id: &str,
    path: Option<&Path>,
    resources: Option<&LinuxResources>,
) -> Result<(Paths, Placeholder), Error> {
    let unit = unit(id, path)?;
    let mut bus = connect()?;
    let placeholder = Placeholder(idmap::placeholder()?);
    let pid = placeholder.0.pid;
    start(&mut bus, &unit, pid, &limits(resources)?)?;
    wait_until_inside(pid, &unit)?;
    let mut paths = Paths { unit: Some(unit.name.clone()), ..Paths::default() };
    paths.make_directories(&unit.directory())?;
    Ok((paths, placeholder))
}

fn connect() -> Result<Bus, Error> {
    Bus::systemd().map_err(|error| Error::Unavailable {
        feature: "the systemd cgroup driver",
        reason: format!("systemd cannot be asked: {error}"),
    })
}

/// What systemd is to keep in force.
fn limits(resources: Option<&LinuxResources>) -> Result<Vec<Property>, Error> {
    let hierarchies = hierarchies()?;
    let version2 = hierarchies.iter().all(|hierarchy| hierarchy.unified);
    let mut list = resources.map(|resources| properties::of(resources, version2)).unwrap_or_default();
    // In version 2 our program stays beside systemd's own; the list of version 1 is rewritten when systemd reloads.
    if hierarchies.iter().any(|hierarchy| hierarchy.keys().any(|name| name == "devices")) {
        let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        list.extend(devices::properties(rules)?);
    }
    Ok(list)
}

fn start(bus: &mut Bus, unit: &Unit, pid: i32, limits: &[Property]) -> Result<(), Error> {
    let yes = |name: &'static str| (name, Value::Bool(true));
    let mut properties = vec![
        ("Description", Value::Text(format!("container {}", unit.name))),
        ("Slice", Value::Text(unit.slice.clone())),
        ("PIDs", Value::Ids(vec![pid.unsigned_abs()])),
        ("DefaultDependencies", Value::Bool(false)),
        // One that failed is not kept for anybody to look at: who runs containers tells their ends.
        ("CollectMode", Value::Text("inactive-or-failed".to_owned())),
        yes("Delegate"),
        yes("CPUAccounting"),
        yes("MemoryAccounting"),
        yes("TasksAccounting"),
        yes("IOAccounting"),
    ];
    properties.extend(limits.iter().cloned());
    let mut body = Body::default();
    body.text(&unit.name);
    body.text("replace");
    body.properties(&properties);
    body.nothing();
    let step = || Error::step(format!("start the unit {}", unit.name));
    match bus.manager("StartTransientUnit", "ssa(sv)a(sa(sv))", &body) {
        // One that failed earlier is remembered under the name.
        Err(Failed::Refused(name, _)) if name == "org.freedesktop.systemd1.UnitExists" => {
            let mut failed = Body::default();
            failed.text(&unit.name);
            bus.manager("ResetFailedUnit", "s", &failed).map_err(step())?;
            bus.manager("StartTransientUnit", "ssa(sv)a(sa(sv))", &body).map_err(step())
        }
        other => other.map_err(step()),
    }
}

/// The call is answered before the scope has begun.
fn wait_until_inside(pid: i32, unit: &Unit) -> Result<(), Error> {
    let begun = Instant::now();
    let inside = format!("/{}", unit.name);
    loop {
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if cgroup.lines().any(|line| line.ends_with(&inside)) {
            return Ok(());
        }
        if begun.elapsed() > LIMIT {
            return Err(Error::Unavailable {
                feature: "the systemd cgroup driver",
                reason: format!("the unit {} has not begun after {LIMIT:?}", unit.name),
            });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Tells systemd of changed limits, and returns when it has written those that it knows; the caller writes all of them
/// afterwards.
pub(crate) fn update(unit: &str, resources: &LinuxResources, version2: bool) -> Result<(), Error> {
    let limits = properties::of(resources, version2);
    if limits.is_empty() {
        return Ok(());
    }
    let mut bus = connect()?;
    let mut body = Body::default();
    body.text(unit);
    // Only for as long as the unit lives.
    body.truth(true);
    body.properties(&limits);
    let step = || Error::step(format!("change the unit {unit}"));
    bus.manager("SetUnitProperties", "sba(sv)", &body).map_err(step())?;
    // The answer comes before the files are written; the next call is looked at after that.
    let mut body = Body::default();
    body.text(unit);
    bus.manager("GetUnit", "s", &body).map_err(step())
}

/// Lets systemd forget a scope whose cgroup is gone; it may have done so by itself.
pub(crate) fn forget(unit: &str) {
    let Ok(mut bus) = Bus::systemd() else { return };
    let mut body = Body::default();
    body.text(unit);
    body.text("replace");
    let _gone = bus.manager("StopUnit", "ss", &body);
    let mut body = Body::default();
    body.text(unit);
    let _gone = bus.manager("ResetFailedUnit", "s", &body);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_s_scope_is_in_its_nested_slices() {
        let path = Path::new("kubepods-burstable-podx.slice:cri-containerd:abc");
        let unit = unit("id", Some(path)).unwrap();
        assert_eq!(unit.name, "cri-containerd-abc.scope");
        assert_eq!(
            unit.directory(),
            Path::new(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice/cri-containerd-abc.scope"
            )
        );
        let top = super::unit("id", Some(Path::new(":p:n"))).unwrap();
        assert_eq!(top.directory(), Path::new("/system.slice/p-n.scope"));
    }

    #[test]
    fn other_forms_are_refused() {
        for path in ["/kubepods/x", "a.slice:b", "a--b.slice:p:n", "a:p:n", "x/y.slice:p:n", "a.slice:p:"] {
            assert!(unit("id", Some(Path::new(path))).is_err(), "{path}");
        }
    }
}

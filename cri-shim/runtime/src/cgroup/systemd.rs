//! Cgroups that systemd makes: a transient scope for each container.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::{LinuxMemory, LinuxPids, LinuxResources};

use super::dbus::{Body, Bus, Failed, Value};
use super::{Paths, convert};
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
    start(&mut bus, &unit, pid, resources)?;
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

fn start(bus: &mut Bus, unit: &Unit, pid: i32, resources: Option<&LinuxResources>) -> Result<(), Error> {
    let yes = |name: &'static str| (name, Value::Bool(true));
    let mut properties = vec![
        ("Description", Value::Text(format!("container {}", unit.name))),
        ("Slice", Value::Text(unit.slice.clone())),
        ("PIDs", Value::Ids(vec![pid.unsigned_abs()])),
        ("DefaultDependencies", Value::Bool(false)),
        yes("Delegate"),
        yes("CPUAccounting"),
        yes("MemoryAccounting"),
        yes("TasksAccounting"),
        yes("IOAccounting"),
    ];
    properties.extend(limits(resources));
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

/// The limits that systemd would otherwise put back to its own when it reloads.
fn limits(resources: Option<&LinuxResources>) -> Vec<(&'static str, Value)> {
    let mut list = Vec::new();
    let Some(resources) = resources else { return list };
    let unsigned = |value: i64| u64::try_from(value).unwrap_or(u64::MAX);
    if let Some(limit) = resources.memory().as_ref().and_then(LinuxMemory::limit).filter(|limit| *limit != 0)
    {
        list.push(("MemoryMax", Value::U64(unsigned(limit))));
    }
    if let Some(limit) = resources.pids().as_ref().map(LinuxPids::limit).filter(|limit| *limit != 0) {
        list.push(("TasksMax", Value::U64(unsigned(limit))));
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            list.push(("CPUWeight", Value::U64(convert::shares_to_weight(shares))));
        }
        let period = cpu.period().filter(|period| *period != 0).unwrap_or(100_000);
        if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
            // Rounded up to what systemd can write down: whole hundredths of a second's percent.
            let per_second = unsigned(quota).checked_mul(1_000_000).map(|value| value / period);
            let per_second = per_second.filter(|_| quota > 0);
            let rounded = per_second.map_or(u64::MAX, |value| value.next_multiple_of(10_000));
            list.push(("CPUQuotaPerSecUSec", Value::U64(rounded)));
        }
    }
    list
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

/// Tells systemd of changed limits; the files themselves are written by the caller.
pub(crate) fn update(unit: &str, resources: &LinuxResources) -> Result<(), Error> {
    let limits = limits(Some(resources));
    if limits.is_empty() {
        return Ok(());
    }
    let mut body = Body::default();
    body.text(unit);
    // Only for as long as the unit lives.
    body.truth(true);
    body.properties(&limits);
    let step = Error::step(format!("change the unit {unit}"));
    connect()?.manager("SetUnitProperties", "sba(sv)", &body).map_err(step)
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

    #[test]
    fn limits_as_systemd_takes_them() {
        let resources: LinuxResources = serde_json::from_str(
            r#"{"memory":{"limit":-1},"pids":{"limit":5},"cpu":{"shares":1024,"quota":12345,"period":100000}}"#,
        )
        .unwrap();
        let got = limits(Some(&resources));
        assert_eq!(got[0], ("MemoryMax", Value::U64(u64::MAX)));
        assert_eq!(got[1], ("TasksMax", Value::U64(5)));
        assert_eq!(got[2], ("CPUWeight", Value::U64(39)));
        assert_eq!(got[3], ("CPUQuotaPerSecUSec", Value::U64(130_000)));
    }
}
